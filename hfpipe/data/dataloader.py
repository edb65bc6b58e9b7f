"""Finite rows in a shuffled, resumable order, batches of tensors for Trainer, and the time it waits for them.

Row n of the run is row n % N of the permutation of epoch n // N. Step s takes the rows from s*G to (s+1)*G, G being the
global batch, so the same global batches come out on any number of ranks, and a resume costs one permutation.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from hfpipe.core.errors import RecipeError
from hfpipe.data.tokenize import IGNORED


class RowSource(Protocol):
    """What serves the rows of one rank and knows its place: `TokenStream` and `ShuffledRows`."""

    def batches(self, rows: int) -> Iterator[list[dict[str, Any]]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    @staticmethod
    def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]: ...
    def report(self) -> dict[str, Any]: ...
    @property
    def goes_on(self) -> bool: ...


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int, multiple: int = 1) -> dict[str, torch.Tensor]:
    """Stacks rows into tensors (B, L).

    Packed rows (with `position_ids`) are of one length and get NO attention mask: with one, transformers no longer sees
    from the positions where a document begins, and documents leak into each other. Other rows are padded on the right.

    Args:
        rows: `{"input_ids": [L], "labels": [L]}`, and `position_ids` when packed.
        pad_token_id: Fills `input_ids`; labels are filled with -100.
        multiple: L is rounded up to a multiple of this.
    """
    if "position_ids" in rows[0]:
        keys = ("input_ids", "position_ids", "labels")
        return {key: torch.from_numpy(np.stack([row[key] for row in rows]).astype(np.int64)) for key in keys}
    length = max(len(row["input_ids"]) for row in rows)
    length += -length % multiple
    batch = {
        "input_ids": torch.full((len(rows), length), pad_token_id),
        "attention_mask": torch.zeros((len(rows), length), dtype=torch.long),
        "labels": torch.full((len(rows), length), IGNORED),
    }
    for index, row in enumerate(rows):
        size = len(row["input_ids"])
        batch["input_ids"][index, :size] = torch.as_tensor(row["input_ids"])
        batch["attention_mask"][index, :size] = 1
        batch["labels"][index, :size] = torch.as_tensor(row["labels"])
    return batch


class BatchLoader:
    """What Trainer iterates: this rank's batches in run order, which accelerate must not shard again.

    Args:
        source: Serves the rows and holds the position.
        batch_size: Rows of a micro-batch on this rank.
        pad_token_id: See `collate`.
        multiple: See `collate`.
        collated: Stacks the rows.
    """

    def __init__(
        self,
        source: RowSource,
        batch_size: int,
        pad_token_id: int,
        multiple: int = 1,
        collated: Callable[[Sequence[dict[str, Any]], int, int], dict[str, torch.Tensor]] = collate,
    ) -> None:
        self.collated = collated
        self.source, self.batch_size, self.pad_token_id, self.multiple = source, batch_size, pad_token_id, multiple
        self.waited_seconds = 0.0
        self.recent: deque[list[dict[str, Any]]] = deque()  # the rows of the last `keep` batches
        self.keep = 0
        self.is_done = False  # nothing is left to train: Trainer would take one more step

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if self.is_done:
            return
        batches = self.source.batches(self.batch_size)
        while True:
            begin = time.perf_counter()
            rows = next(batches, None)
            if rows is None:
                return
            self.recent.append(rows)
            while len(self.recent) > self.keep:
                self.recent.popleft()
            batch = self.collated(rows, self.pad_token_id, self.multiple)
            self.waited_seconds += time.perf_counter() - begin
            yield batch


class ShuffledRows:
    """Serves the rows of one rank.

    Within a global batch the rows are dealt by length: micro-batches hold rows of like length, which saves padding and
    changes nothing else, since the loss is a sum over the tokens of the global batch.

    Args:
        rows: Indexable rows with `input_ids` and `labels`.
        lengths: (N,) tokens of each row.
        total: Rows to serve in all; the last global batch is filled with rows that carry no label.
        per_device: Rows of a micro-batch on one rank.
        accumulation: Micro-batches of a step.
        seed: Seed of the permutations.
        rank: This rank.
        ranks: Number of ranks.
    """

    def __init__(
        self,
        rows: Any,
        lengths: Sequence[int],
        *,
        total: int,
        per_device: int,
        accumulation: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.rows, self.lengths, self.total = rows, np.asarray(lengths), total
        self.per_device, self.accumulation = per_device, accumulation
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.global_batch = per_device * accumulation * ranks
        self.served = 0  # rows of all ranks, in whole micro-batches
        self._permutations: dict[int, np.ndarray] = {}

    def batches(self, rows: int) -> Iterator[list[dict[str, Any]]]:
        """Yields this rank's micro-batches until `total` rows are served on all ranks together."""
        if rows != self.per_device:
            raise ValueError(f"made for micro-batches of {self.per_device} rows, asked for {rows}")
        while self.served < self.total:
            start = self.served - self.served % self.global_batch
            indices = [self._row(n) for n in range(start, min(start + self.global_batch, self.total))]
            indices.sort(key=lambda index: -self.lengths[index])
            for micro in range((self.served - start) // (rows * self.ranks), self.accumulation):
                dealt = indices[micro * rows * self.ranks : (micro + 1) * rows * self.ranks][self.rank :: self.ranks]
                self.served += rows * self.ranks
                batch = [self.rows[int(index)] for index in dealt]
                yield batch + [self._blank(indices[-1])] * (rows - len(batch))

    def _row(self, n: int) -> int:
        epoch, place = divmod(n, len(self.lengths))
        if epoch not in self._permutations:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))
            self._permutations = {key: value for key, value in self._permutations.items() if key == epoch - 1}
            self._permutations[epoch] = order
        return int(self._permutations[epoch][place])

    def _blank(self, index: int) -> dict[str, Any]:
        """A row that carries no label: it fills the last batch and adds nothing to the loss."""
        ids = list(self.rows[int(index)]["input_ids"])
        return {"input_ids": ids, "labels": [IGNORED] * len(ids), "blank": True}

    def state_dict(self) -> dict[str, int]:
        """The position after the last micro-batch, the same on every rank."""
        return {"served": self.served}

    @staticmethod
    def merge_states(states: list[dict[str, int]]) -> dict[str, int]:
        return states[0]

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues at a position that this or another number of ranks has reached.

        Raises:
            RecipeError: The position is not the beginning of a global batch of this size.
        """
        if state["served"] % self.global_batch:
            raise RecipeError(
                f"the checkpoint stands at row {state['served']}, which is not a whole number of global batches of "
                f"{self.global_batch} rows; set global_batch_size as it was when the run began."
            )
        self.served = state["served"]

    @property
    def goes_on(self) -> bool:
        """Whether a longer run stands at this position too: none fills a batch where this one ends."""
        return self.served <= self.total

    def report(self) -> dict[str, Any]:
        """Facts about what was served."""
        return {"rows": min(self.served, self.total), "epochs": min(self.served, self.total) / len(self.lengths)}
