"""Finite rows in a shuffled, resumable order, batches of tensors for Trainer, and the time it waits for them."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from hfpipe.core.errors import RecipeError
from hfpipe.data.row_order import Epoch, GroupedRows, RowOrder
from hfpipe.data.text_tokens import IGNORED

SIDES = ("input_ids", "rejected_ids")  # of a row: its tokens, and the other side of a pair


class RowSource(Protocol):
    """Gives the rows of one rank and knows its place: `TokenStream` and `ResumableSampler`."""

    def batches(self, rows: int) -> Iterator[list[dict[str, Any]]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    @staticmethod
    def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]: ...
    def facts(self) -> dict[str, Any]: ...
    @property
    def goes_on(self) -> bool: ...


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int, multiple: int = 1) -> dict[str, torch.Tensor]:
    """Stacks rows into tensors (B, L).

    Rows are padded on the right. Packed rows (with `position_ids`) get NO attention mask: with one, transformers no
    longer sees from the positions where a document begins, and documents leak into each other. Their padding counts
    its positions from 0, as a document of its own.

    Args:
        rows: `{"input_ids": [L], "labels": [L]}`, and `position_ids` when packed.
        pad_token_id: Fills `input_ids`; labels are filled with -100.
        multiple: L is rounded up to a multiple of this.
    """
    packed = "position_ids" in rows[0]
    length = max(len(row["input_ids"]) for row in rows)
    length += -length % multiple
    batch = {
        "input_ids": torch.full((len(rows), length), pad_token_id),
        "labels": torch.full((len(rows), length), IGNORED),
        ("position_ids" if packed else "attention_mask"): torch.zeros((len(rows), length), dtype=torch.long),
    }
    for index, row in enumerate(rows):
        size = len(row["input_ids"])
        batch["input_ids"][index, :size] = torch.as_tensor(row["input_ids"])
        batch["labels"][index, :size] = torch.as_tensor(row["labels"])
        if packed:
            batch["position_ids"][index, :size] = torch.as_tensor(row["position_ids"])
            batch["position_ids"][index, size:] = torch.arange(length - size)
        else:
            batch["attention_mask"][index, :size] = 1
    return batch


class BatchLoader:
    """The loader that Trainer iterates: this rank's batches in run order, which accelerate must not shard again.

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


class ResumableSampler:
    """Gives the rows of one rank, and knows the place.

    Step s takes the rows from s*G to (s+1)*G, G being the global batch, so the same global batches come out on any
    number of ranks. Within one the rows are dealt by length: micro-batches hold rows of like length, which saves
    padding and changes nothing else, since the loss is a sum over the tokens of the global batch.

    Args:
        rows: Indexable examples with `input_ids` and `labels`.
        lengths: (N,) tokens of each example.
        total: Rows to give in all; the last global batch is filled with rows that carry no label.
        per_device: Rows of a micro-batch on one rank.
        accumulation: Micro-batches of a step.
        seed: Seed of the order.
        order: The rows of each epoch; when absent, grouped by length.
        packed: Whether rows of several examples are to be made, with `position_ids`.
        rank: This rank.
        ranks: Number of ranks.
    """

    def __init__(
        self,
        rows: Any,
        lengths: Sequence[int] | np.ndarray,
        *,
        total: int,
        per_device: int,
        accumulation: int,
        seed: int,
        order: RowOrder | None = None,
        packed: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.rows, self.lengths, self.total = rows, np.asarray(lengths), total
        self.per_device, self.accumulation = per_device, accumulation
        self.rank, self.ranks, self.packed = rank, ranks, packed
        self.global_batch = per_device * accumulation * ranks
        self.order = order or GroupedRows(self.lengths, self.global_batch, seed)
        self.progress = 0  # rows of all ranks, in whole micro-batches
        self.tokens = self.places = 0  # given by this rank in this process: of examples, and with padding
        self._epochs: dict[int, Epoch] = {}
        self._begins = [0]  # of each epoch, the number of its first row

    def batches(self, rows: int) -> Iterator[list[dict[str, Any]]]:
        """Yields this rank's micro-batches until `total` rows are given on all ranks together."""
        if rows != self.per_device:
            raise ValueError(f"made for micro-batches of {self.per_device} rows, asked for {rows}")
        while self.progress < self.total:
            start = self.progress - self.progress % self.global_batch
            wanted = [self._examples(n) for n in range(start, min(start + self.global_batch, self.total))]
            wanted.sort(key=lambda examples: -int(self.lengths[examples].sum()))
            for micro in range((self.progress - start) // (rows * self.ranks), self.accumulation):
                dealt = wanted[micro * rows * self.ranks : (micro + 1) * rows * self.ranks][self.rank :: self.ranks]
                self.progress += rows * self.ranks
                batch = [self._row(examples) for examples in dealt]
                self.tokens += sum(len(row[name]) for row in batch for name in SIDES if name in row)
                batch += [self._padding(wanted[-1])] * (rows - len(batch))
                sizes = [len(row[name]) for row in batch for name in SIDES if name in row]
                self.places += len(sizes) * max(sizes)
                yield batch

    def examples(self) -> np.ndarray:
        """Returns the examples that are given at all, each once, in the order of the data."""
        if self.total >= len(self.lengths):
            return np.arange(len(self.lengths))
        return np.unique(np.concatenate([self._examples(n) for n in range(self.total)]))

    def longest(self, lengths: np.ndarray | None = None) -> int:
        """Returns the tokens of the longest row that is given at all, on any rank.

        Later epochs have rows of the same lengths as the first one, in another order.

        Args:
            lengths: (N,) tokens of each example, where others are meant than those of the order.
        """
        epoch = self._epoch(0)
        sizes = (self.lengths if lengths is None else lengths)[epoch.examples]
        if epoch.starts is not None:
            sizes = np.add.reduceat(sizes, epoch.starts[:-1])
        return int(sizes[: self.total].max())

    def _examples(self, n: int) -> np.ndarray:
        """Returns the examples of row n of the run."""
        while n >= self._begins[-1]:
            number = len(self._begins) - 1
            self._begins.append(self._begins[-1] + self._epoch(number).rows)
        number = bisect_right(self._begins, n) - 1
        return self._epoch(number).row(n - self._begins[number])

    def _epoch(self, number: int) -> Epoch:
        if number not in self._epochs:
            self._epochs = {other: rows for other, rows in self._epochs.items() if other == number - 1}
            self._epochs[number] = self.order.epoch(number)
        return self._epochs[number]

    def _row(self, examples: np.ndarray) -> dict[str, Any]:
        if not self.packed:
            return self.rows[int(examples[0])]
        parts = [self.rows[int(example)] for example in examples]
        row = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        return {**row, "position_ids": np.concatenate([np.arange(len(part["input_ids"])) for part in parts])}

    def _padding(self, examples: np.ndarray) -> dict[str, Any]:
        """Returns a row that carries no label: it fills the last batch and adds nothing to the loss."""
        row = self._row(examples[:1])
        return {**row, "labels": [IGNORED] * len(row["input_ids"]), "is_padding": True}

    def state_dict(self) -> dict[str, int]:
        """Returns the position after the last micro-batch, the same on every rank."""
        return {"progress": self.progress}

    @staticmethod
    def merge_states(states: list[dict[str, int]]) -> dict[str, int]:
        return states[0]

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues at a position that this or another number of ranks has reached.

        Raises:
            RecipeError: The position is not the beginning of a global batch of this size.
        """
        progress = state.get("progress")
        if progress is None or progress % self.global_batch:
            found = "is of an earlier version" if progress is None else f"stands at row {progress}"
            raise RecipeError(
                f"the checkpoint {found}, which is not a whole number of global batches of {self.global_batch} rows; "
                "set global_batch_size as it was when the run began, or remove the stage's checkpoints to begin anew."
            )
        self.progress = progress

    @property
    def goes_on(self) -> bool:
        """True if a longer run stands at this position too: none fills a batch where this one ends."""
        return self.progress <= self.total

    def facts(self) -> dict[str, Any]:
        """Returns facts about the rows that were given; the share of padding of this rank since it started."""
        given = min(self.progress, self.total)
        padding = {"padding_share": round(1 - self.tokens / self.places, 4)} if self.places else {}
        if given:
            self._examples(given - 1)
        number = max(bisect_right(self._begins, max(given - 1, 0)) - 1, 0)
        size = self._epoch(number).rows
        return {"rows": given, "epochs": number + (given - self._begins[number]) / size, **padding}
