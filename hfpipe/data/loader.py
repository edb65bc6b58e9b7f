"""Batches of tensors for Trainer, and the time it waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from hfpipe.data.encode import IGNORED


class RowSource(Protocol):
    """What serves the rows of one rank and knows its place: `TokenStream` and `ShuffledRows`."""

    def batches(self, rows: int) -> Iterator[list[dict[str, Any]]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    @staticmethod
    def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]: ...
    def report(self) -> dict[str, Any]: ...


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

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        batches = self.source.batches(self.batch_size)
        while True:
            begin = time.perf_counter()
            rows = next(batches, None)
            if rows is None:
                return
            batch = self.collated(rows, self.pad_token_id, self.multiple)
            self.waited_seconds += time.perf_counter() - begin
            yield batch
