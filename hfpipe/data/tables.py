"""How a table is dealt out to the lanes of a stream."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

ONE_BY_ONE = 100_000  # rows, at each start
OF_A_ROW = 4  # bytes that the EOS token of a document counts for


@dataclass(frozen=True)
class Dealt:
    """A table, and which of its rows each share has.

    Args:
        rows: Rows with a column `text`.
        places: The places of each share's rows, in their order.
    """

    rows: Dataset
    places: Sequence[Sequence[int] | np.ndarray]

    def share(self, number: int) -> Dataset:
        """The rows of a share."""
        return self.rows.select(self.places[number])


def deal(rows: Dataset, lanes: int, *, by_length: bool) -> Dealt:
    """Deals a table out by turns, or so that the shares hold about as much text.

    Args:
        rows: Rows with a column `text`.
        lanes: Number of shares.
        by_length: Whether lanes have to end together, because what one of them lacks is padded. The longest text that
            is left goes to the share that has the least (Graham 1969, doi:10.1137/0117039); after `ONE_BY_ONE` of them,
            which takes Python, the rest goes by turns, and differs by no more than the longest of it.
    """
    if not by_length:
        return Dealt(rows, [range(lane, len(rows), lanes) for lane in range(lanes)])
    sizes = _bytes_of(rows) + OF_A_ROW
    order = np.argsort(-sizes, kind="stable")
    least = [(0, lane) for lane in range(lanes)]
    shares = np.empty(len(sizes), dtype=np.int32)
    for place in order[:ONE_BY_ONE]:
        given, lane = least[0]
        shares[place] = lane
        heapq.heapreplace(least, (given + int(sizes[place]), lane))
    shares[order[ONE_BY_ONE:]] = np.arange(max(len(order) - ONE_BY_ONE, 0)) % lanes
    return Dealt(rows, [np.flatnonzero(shares == lane) for lane in range(lanes)])


def _bytes_of(rows: Dataset) -> np.ndarray:
    """(N,) the length of each row's text."""
    parts: list[Any] = [np.zeros(0, dtype=np.int64)]
    for table in rows.select_columns("text").with_format("arrow").iter(batch_size=1000):
        column = table["text"]
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            parts.append(pc.fill_null(pc.binary_length(column), 0).to_numpy())
        else:
            parts.append(np.array([len(text) if isinstance(text, str) else 0 for text in column.to_pylist()]))
    return np.concatenate(parts).astype(np.int64)
