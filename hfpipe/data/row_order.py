"""The order in which a stage takes its rows, and which of them share one: nothing is padded that need not be.

Rows of like length stand together (`GroupedRows`), or several examples share a row (`PackedRows`), or neither
(`ShuffledRows`). All follow from the seed and the epoch alone, so a resume and other ranks come to the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

WINDOW_ROWS = 4096  # that are sorted by length together, at least: of 8 rows a step those of 512 steps
WINDOW_STEPS = 50  # at least, as `group_by_length` of transformers


class Epoch(NamedTuple):
    """The rows of an epoch in their order, in eight bytes an example.

    Args:
        examples: (N,) int32 examples, those of one row after those of another.
        starts: (R + 1,) int32 where each row begins; None where each is one example.
    """

    examples: np.ndarray
    starts: np.ndarray | None = None

    @property
    def rows(self) -> int:
        return len(self.examples) if self.starts is None else len(self.starts) - 1

    def row(self, number: int) -> np.ndarray:
        """Returns the examples of a row."""
        begin, end = (number, number + 1) if self.starts is None else self.starts[number : number + 2]
        return self.examples[begin:end]


class RowOrder(Protocol):
    """The rows of each epoch in their order; each is made of one example or of several."""

    def epoch(self, number: int) -> Epoch: ...


class ShuffledRows:
    """Examples in a shuffled order, each a row.

    For classification: where length goes with the class, steps of like length would be steps of few classes.

    Args:
        examples: Number of examples.
        seed: Seed of the shuffles.
    """

    def __init__(self, examples: int, seed: int) -> None:
        self._examples, self._seed = examples, seed

    def epoch(self, number: int) -> Epoch:
        """Returns the rows of an epoch."""
        return Epoch(np.random.default_rng([self._seed, number]).permutation(self._examples).astype(np.int32))


class GroupedRows:
    """Examples in a shuffled order in which those of one step are of like length.

    An epoch is shuffled and cut into windows of many steps. A window is sorted by length and cut into steps, whose
    order is shuffled again. Where an epoch begins within a step, so do its first rows, which are short.

    Args:
        lengths: (N,) tokens of each example.
        step: Rows of a step over all ranks.
        seed: Seed of the shuffles.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, step: int, seed: int) -> None:
        self._lengths, self._step, self._seed = np.asarray(lengths), step, seed

    def epoch(self, number: int) -> Epoch:
        """Returns the rows of an epoch."""
        size, step = len(self._lengths), self._step
        chance = np.random.default_rng([self._seed, number])
        order = chance.permutation(size)
        head = min(-number * size % step, size)  # what the last step of the epoch before has room for
        window = step * max(WINDOW_STEPS, WINDOW_ROWS // step)
        count = max(1, round((size - head) / window))
        ends = [size * (part + 1) // count for part in range(count)]
        rows, begin = [], 0
        for place, end in enumerate(ends):
            part = order[begin:end] if place < count - 1 else order[begin:]
            part = part[np.argsort(self._lengths[part], kind="stable")]
            first, part = part[: head * (not place)], part[head * (not place) :]
            rest = len(part) % step
            if place < count - 1 and rest:  # whole steps alone; the others go into the next window
                order[end - rest : end], part = part[:rest].copy(), part[rest:]
                begin, rest = end - rest, 0
            else:
                begin = end
            steps = part[rest:].reshape(-1, step)
            rows += [first, *steps[chance.permutation(len(steps))], part[:rest]]
        return Epoch(np.concatenate(rows).astype(np.int32))


class PackedRows:
    """Whole examples in rows of one length, by best-fit decreasing: each into the row with the least room for it.

    Source: Johnson 1974, doi:10.1016/0022-0000(74)90002-3.

    Args:
        lengths: (N,) tokens of each example, none more than `room`.
        room: Tokens of a row.
        seed: Seed of the shuffles.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, room: int, seed: int) -> None:
        self._lengths, self._room, self._seed = np.asarray(lengths), room, seed

    def epoch(self, number: int) -> Epoch:
        """Returns the rows of an epoch."""
        chance = np.random.default_rng([self._seed, number])
        order = chance.permutation(len(self._lengths))
        order = order[np.argsort(-self._lengths[order], kind="stable")]
        in_row = np.empty(len(order), dtype=np.int32)
        open_rows: list[list[int]] = [[] for _ in range(self._room + 1)]  # by the room that is left
        free = rows = 0  # bit r of `free`: a row with room r is open
        for place, size in enumerate(self._lengths[order].tolist()):
            if fitting := free >> size:
                room = size + (fitting & -fitting).bit_length() - 1
                row = open_rows[room].pop()
                if not open_rows[room]:
                    free &= ~(1 << room)
            else:
                room, row, rows = self._room, rows, rows + 1
            in_row[place] = row
            if room > size:
                open_rows[room - size].append(row)
                free |= 1 << (room - size)
        in_row = chance.permutation(rows).astype(np.int32)[in_row]
        starts = np.concatenate([[0], np.cumsum(np.bincount(in_row, minlength=rows))])
        return Epoch(order[np.argsort(in_row, kind="stable")].astype(np.int32), starts.astype(np.int32))


def count_rows(order: RowOrder, epochs: float) -> int:
    """Counts the rows of so many epochs, the last of which may be a part of one."""
    whole = int(epochs)
    rows = sum(order.epoch(number).rows for number in range(whole))
    return rows + (round((epochs - whole) * order.epoch(whole).rows) if epochs > whole else 0)
