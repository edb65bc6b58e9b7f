"""One lane's share of one source, document by document, with an exact state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import Dataset, IterableDataset

from hfpipe.data.outage import Outage
from hfpipe.data.source_errors import readable
from hfpipe.errors import DataError, Unreachable
from hfpipe.recipe import Source

Row: TypeAlias = tuple[Any, Any]  # text and id

MAX_CHARACTERS = 10_000_000  # of a document; what is longer is cut
LISTED = 20  # ids of dirty rows that the report names
BLOCK = 100  # rows fetched at a time


class Reader:
    """Reads a share of a source: endlessly, epoch after epoch, or once.

    A share without a usable document would stall its lane, and so the run; an endless reader then reads the whole
    source.

    Rows are fetched in blocks: one by one, `datasets` takes as long as the tokenizer for short documents. Only between
    blocks does a stream know its place, so the state is the place before the block at hand and the rows read since.

    Args:
        rows: The source, with a column `text`.
        lane: Which share.
        lanes: How many shares.
        source: What the rows were opened from, for messages.
        repeat: Whether to begin anew at the end.
        block: Rows of a stream fetched at a time.
    """

    def __init__(
        self,
        rows: Dataset | IterableDataset,
        lane: int,
        lanes: int,
        source: Source,
        repeat: bool = True,
        block: int = BLOCK,
    ) -> None:
        self._all, self._lane, self._lanes, self.source, self._repeat = rows, lane, lanes, source, repeat
        self.epoch = 0  # epochs that are finished
        self.ended = False
        self.rows = 0  # read in all
        self.dirty: dict[str, int] = {}
        self.dirty_ids: list[str] = []
        self._read = 0  # rows of this epoch that were read
        self._usable = 0  # of them, documents that were not dirty
        self._whole = False  # whether the whole source is read, and not a share
        self._block = block
        self._block_state: dict[str, Any] | None = None  # the stream's before the block at hand; None at its beginning
        self._block_read = 0  # rows read since
        self._rows: Iterator[Row] | None = None

    def next(self) -> str | None:
        """The next document that is not dirty; None at the end of what is read once.

        Raises:
            DataError: The whole source has none.
        """
        while not self.ended:
            if self._rows is None:
                self._begin()
            assert self._rows is not None
            row = next(self._rows, None)
            if row is None:
                self._end_epoch()
                continue
            self._read += 1
            self._block_read += 1
            self.rows += 1
            text, name = row
            if not isinstance(text, str):
                self._count_dirty(name, "missing" if text is None else "not a text")
            elif not (cleaned := _clean(text)) or cleaned.isspace():
                self._count_dirty(name, "empty")
            else:
                self._usable += 1
                return cleaned
        return None

    def _end_epoch(self) -> None:
        if not self._repeat:
            self.ended = True
        elif not self._usable and self._whole:
            raise DataError(f"source {self.source.path!r} has no document with text in it ({self._read} rows read).")
        if self._usable or self.ended:
            self.epoch += 1
        else:
            self._whole = True
        self._read, self._usable, self._rows = 0, 0, None
        self._block_state, self._block_read = None, 0

    def _count_dirty(self, name: Any, why: str) -> None:
        self.dirty[why] = self.dirty.get(why, 0) + 1
        name = f"row {self._read}" if name is None else str(name)
        if len(self.dirty_ids) < LISTED and name not in self.dirty_ids:  # every epoch meets it again
            self.dirty_ids.append(name)

    def _begin(self) -> None:
        """Begins an epoch, or continues it."""
        share = self._share()
        self._rows = _table_rows(share, self._read) if isinstance(share, Dataset) else self._connected_rows()

    def _share(self) -> Dataset | IterableDataset:
        return share_of(self._all, 0, 1) if self._whole else share_of(self._all, self._lane, self._lanes)

    def _connected_rows(self) -> Iterator[Row]:
        """The rows of a stream from this place on; where the connection is lost, opened again at its place."""
        outage = Outage(self.source, self._lane)
        while True:
            try:
                yield from self._stream_rows(outage)
                return
            except Unreachable as error:
                outage.wait(error, self._read)

    def _stream_rows(self, outage: Outage) -> Iterator[Row]:
        """The rows of a stream from this place on, opened anew."""
        share = self._share()
        passed = self._block_read
        if share._ex_iterable.iter_arrow is not None:  # else rows are Python's already, and may be of mixed types
            share = share.with_format("arrow")
        if self._block_state is not None:
            share.load_state_dict(self._block_state)
        for block in readable(share.iter(batch_size=self._block), self.source):
            outage.over()
            rows = _rows_of(block)
            self._block_read = min(passed, len(rows))  # of a block that had been read in part
            passed -= self._block_read
            yield from rows[self._block_read :]
            self._block_state, self._block_read = share.state_dict(), 0

    def state(self) -> dict[str, Any]:
        """Where the reader stands, small and JSON-able."""
        return {
            "epoch": self.epoch,
            "ended": self.ended,
            "whole": self._whole,
            "read": self._read,
            "usable": self._usable,
            "block": self._block,
            "block_state": self._block_state,
            "block_read": self._block_read,
            "rows": self.rows,
            "dirty": dict(self.dirty),
            "dirty_ids": list(self.dirty_ids),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken."""
        self.epoch, self.ended, self._whole = state["epoch"], state["ended"], state["whole"]
        self._read, self._usable = state["read"], state["usable"]
        self.rows = state["rows"]
        self.dirty, self.dirty_ids = dict(state["dirty"]), list(state["dirty_ids"])
        self._block, self._block_state, self._block_read = state["block"], state["block_state"], state["block_read"]


def share_of(rows: Dataset | IterableDataset, lane: int, lanes: int) -> Dataset | IterableDataset:
    """A lane's share of a source.

    A stream with fewer shards than lanes is read whole by every lane, which keeps each its own rows: more reading, and
    the same rows. Streams made of one another share one place in the file, so each lane's is built anew by `shard`.
    """
    if isinstance(rows, Dataset):
        return rows.select(range(lane, len(rows), lanes))
    if rows.num_shards >= lanes:
        return rows.shard(num_shards=lanes, index=lane)
    return rows.shard(num_shards=1, index=0).filter(lambda _, index: index % lanes == lane, with_indices=True)


def _table_rows(share: Dataset, begin: int) -> Iterator[Row]:
    """The rows of a table from `begin` on."""
    for start in range(begin, len(share), BLOCK):
        yield from _rows_of(share[start : min(start + BLOCK, len(share))])


def _rows_of(block: dict[str, list[Any]] | pa.Table) -> list[Row]:
    columns = block.to_pydict() if isinstance(block, pa.Table) else block
    texts = columns["text"]
    return list(zip(texts, columns.get("id", [None] * len(texts)), strict=True))


def _clean(text: str) -> str:
    """A document that the tokenizer can take: bounded, without NUL and without lone surrogates."""
    text = text[:MAX_CHARACTERS].replace("\x00", "")
    return text.encode("utf-8", "replace").decode("utf-8")
