"""One lane's share of one source, row by row, with an exact state; a table is dealt out by rows.

What comes of a row is its text, or the whole of it where an example is made of it.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from hfpipe.core.errors import DataError, Unreachable
from hfpipe.data.cleaning.minhash import REASONS
from hfpipe.data.cleaning.text_rules import LOOK, Tally, tidy, tidy_row
from hfpipe.data.sources.decoding import can_be_arrow, python_of, table_blocks
from hfpipe.data.sources.errors import friendly, readable
from hfpipe.data.sources.retry import Retry
from hfpipe.recipe import Source
from hfpipe.recipe.row_formats import text_of

Row: TypeAlias = tuple[Any, Any]  # text or whole row, and id

BLOCK = 100  # rows fetched at a time
# A share of a stream of no more rows and characters is kept: to open its files for each epoch takes far longer.
KEPT_ROWS, KEPT_CHARACTERS = 1_000, 1_000_000


class ShardReader:
    """Reads one share of a source after the other: endlessly, or for so many epochs.

    In epoch e lane l reads share (l + e) % lanes, so that in each epoch the lanes together read every share once, and
    over the epochs all lanes read as much: shares are of unequal length, and one may hold no document at all.

    Rows are fetched in blocks: one by one, `datasets` takes as long as the tokenizer for short documents. Only between
    blocks does a stream know its place, so the state is the place before the block at hand and the rows read since.

    Args:
        rows: The source, with a column `text` unless `whole`; a table with the rows of each share.
        lane: Which share comes first.
        lanes: How many shares.
        source: What the rows were opened from, for messages.
        epochs: How many shares to read; None for no end.
        block: Rows of a stream fetched at a time.
        removed: Why each row of each share is removed, 0 where it stays; see `dedup.py`. A share ends where nobody
            looked further.
        whole: Whether whole rows are wanted, and not their column `text`.
        kept: Of small shares of a stream, what they hold; the readers of a source have one together.
    """

    def __init__(
        self,
        rows: Dealt | IterableDataset,
        lane: int,
        lanes: int,
        source: Source,
        epochs: int | None = None,
        block: int = BLOCK,
        removed: Sequence[np.ndarray] | None = None,
        whole: bool = False,
        kept: dict[int, list[Row]] | None = None,
    ) -> None:
        self._all, self._lane, self.lanes, self.source, self._epochs = rows, lane, lanes, source, epochs
        self._removed, self._whole, self._kept = removed, whole, {} if kept is None else kept
        self.epoch = 0  # epochs that are finished
        self.documents: int | None = None  # of the first of them
        self.ended = False
        # Counted in the first epoch alone, in which the lanes together read every row once.
        self.rows = 0
        self.dirty, self.mended = Tally(), Tally()  # rows that were left out, and rows that were cut or mended
        self.removed = Tally()
        self._read = 0  # rows of this epoch that were read
        self._usable = 0  # of them, documents that were not dirty
        self._fruitless = 0  # shares in a row that gave no document
        self._block = block
        self._block_state: dict[str, Any] | None = None  # the stream's before the block at hand; None at its beginning
        self._block_read = 0  # rows read since
        self._rows: Iterator[Row] | None = None

    def take(self, count: int, characters: int = sys.maxsize) -> list[Any]:
        """The next documents that are not dirty: `count` of them, or fewer at the end of an epoch.

        Args:
            count: Documents.
            characters: Those of all documents, after which no more are taken.

        Raises:
            DataError: No share has one.
            MachineError: The network was away for too long.
        """
        texts: list[Any] = []
        left = characters
        while len(texts) < count and left > 0 and not self.ended:
            if self._rows is None:
                self._begin()
            assert self._rows is not None
            judged = None if self._removed is None else self._removed[self._number]
            row = None if judged is not None and self._read == len(judged) else next(self._rows, None)
            if row is None:
                self._end_epoch()
                if texts:
                    break
                continue
            self._read += 1
            self._block_read += 1
            if judged is not None and judged[self._read - 1]:
                self._count(self.removed, (REASONS[int(judged[self._read - 1])],), row)
                continue
            self.rows += not self.epoch
            text, found = tidy_row(row[0]) if self._whole else tidy(row[0])
            if found:
                self._count(self.dirty if text is None else self.mended, found, row)
            if text is not None:
                self._usable += 1
                left -= len(text if isinstance(text, str) else text_of(text))
                texts.append(text)
        return texts

    def _count(self, tally: Tally, reasons: Sequence[str], row: Row) -> None:
        """Counts the row read last, the first time that it is read."""
        if not self.epoch:
            tally.add(reasons, self._name(row[1]))

    def _name(self, name: Any) -> str:
        """The id of the row read last, or its place in the source."""
        if name is not None:
            return str(name)
        row = self._read - 1
        if isinstance(self._all, Dealt):
            return f"row {self._all.places[self._number][row]}"
        if self._all.num_shards < self.lanes:
            return f"row {row * self.lanes + self._number}"
        return f"row {row} of share {self._number}"

    def _end_epoch(self) -> None:
        self.epoch += 1
        self.documents = self._usable if self.documents is None else self.documents
        self.ended = self.epoch == self._epochs
        self._fruitless = 0 if self._usable else self._fruitless + 1
        if self._fruitless == self.lanes and not self.ended:
            found = f"{self.rows} rows read, {self.dirty}" if self.rows else "no rows"
            found += f", removed: {self.removed}" if self.removed else ""
            raise DataError(
                f"source {self.source.path!r} has no document with text in it ({found}). {LOOK}"
                f"{self.dirty.encoding_advice}"
            )
        self._read, self._usable, self._rows = 0, 0, None
        self._block_state, self._block_read = None, 0

    def _begin(self) -> None:
        """Begins an epoch, or continues it."""
        if isinstance(self._all, Dealt):
            blocks = table_blocks(self._all.share(self._number), BLOCK, begin=self._read)
            self._rows = (row for block in blocks for row in _rows_of(block, self._whole))
        elif self._number in self._kept:
            self._rows = iter(self._kept[self._number][self._read :])
        else:
            self._rows = self._connected_rows() if self._read else self._keeping(self._connected_rows())

    def _keeping(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yields the rows of a share, and keeps them where they are few."""
        number, left = self._number, KEPT_CHARACTERS
        seen: list[Row] | None = []
        for row in rows:
            if seen is not None:
                left -= len(str(row[0]))
                seen.append(row)
                if left < 0 or len(seen) > KEPT_ROWS:
                    seen = None
            yield row
        if seen is not None:
            self._kept[number] = seen

    @property
    def _number(self) -> int:
        """Returns the number of this epoch's share."""
        return (self._lane + self.epoch) % self.lanes

    @property
    def _place(self) -> str:
        return f"row {self._read:,} of lane {self._lane}"

    def _connected_rows(self) -> Iterator[Row]:
        """The rows of a stream from this place on; where the connection is lost, opened again at its place."""
        retry = Retry(self.source)
        while True:
            try:
                yield from self._stream_rows(retry)
                return
            except Unreachable as error:
                retry.wait(error, self._place)

    def _stream_rows(self, retry: Retry) -> Iterator[Row]:
        """The rows of a stream from this place on, opened anew."""
        assert isinstance(self._all, IterableDataset)
        with friendly(self.source):  # looks at files
            share = share_of(self._all, self._number, self.lanes)
        passed = self._block_read
        if can_be_arrow(share):
            share = share.with_format("arrow")
        if self._block_state is not None:
            share.load_state_dict(self._block_state)
        for block in readable(share.iter(batch_size=self._block), self.source):
            retry.over(self._place)
            rows = _rows_of(block, self._whole)
            self._block_read = min(passed, len(rows))  # of a block that had been read in part
            passed -= self._block_read
            yield from rows[self._block_read :]
            self._block_state, self._block_read = share.state_dict(), 0

    def state(self) -> dict[str, Any]:
        """The position of the reader, small and JSON-able."""
        return {
            "epoch": self.epoch,
            "ended": self.ended,
            "documents": self.documents,
            "fruitless": self._fruitless,
            "read": self._read,
            "usable": self._usable,
            "block": self._block,
            "block_state": self._block_state,
            "block_read": self._block_read,
            "rows": self.rows,
            **self.tallies(),
        }

    def tallies(self) -> dict[str, Any]:
        """Counts the rows that were dirty, mended or removed: reasons, and ids of the first rows."""
        return {
            "dirty": dict(self.dirty.counts),
            "dirty_ids": list(self.dirty.ids),
            "mended": dict(self.mended.counts),
            "mended_ids": list(self.mended.ids),
            "removed": dict(self.removed.counts),
            "removed_ids": list(self.removed.ids),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken."""
        self.epoch, self.ended, self._fruitless = state["epoch"], state["ended"], state["fruitless"]
        self._read, self._usable = state["read"], state["usable"]
        self.documents = state["documents"]
        self.rows = state["rows"]
        self.dirty = Tally(state["dirty"], state["dirty_ids"])
        self.mended = Tally(state["mended"], state["mended_ids"])
        self.removed = Tally(state["removed"], state["removed_ids"])
        self._block, self._block_state, self._block_read = state["block"], state["block_state"], state["block_read"]


def share_of(rows: IterableDataset, lane: int, lanes: int) -> IterableDataset:
    """A lane's share of a stream.

    One with fewer shards than lanes is read whole by every lane, which keeps each its own rows: more reading, and
    the same rows. Streams made of one another share one place in the file, so each lane's is built anew by `shard`.
    """
    if rows.num_shards >= lanes:
        return rows.shard(num_shards=lanes, index=lane)
    whole = rows.shard(num_shards=1, index=0)
    if can_be_arrow(whole):  # Python would decode every row in every lane
        return whole.with_format("arrow").filter(
            lambda _, places: [place % lanes == lane for place in places], batched=True, with_indices=True
        )
    return whole.filter(lambda _, place: place % lanes == lane, with_indices=True)


def in_shards(rows: IterableDataset, lanes: int, source: Source) -> IterableDataset:
    """A stream cut into as many shards as it has, if its files are fewer than the lanes; waits for the network."""
    retry, place = Retry(source), "the count of its files"
    while True:
        try:
            with friendly(source):
                cut = rows.reshard() if rows.num_shards < lanes else rows
            retry.over(place)
            return cut
        except Unreachable as error:
            retry.wait(error, place)


def _rows_of(block: dict[str, list[Any]] | pa.Table, whole: bool) -> list[Row]:
    columns = python_of(block) if isinstance(block, pa.Table) else block
    rows = (
        [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)] if whole else None
    )
    contents: list[Any] = columns["text"] if rows is None else rows
    return list(zip(contents, columns.get("id", [None] * len(contents)), strict=True))


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
