"""One lane's share of one source, document by document, with an exact state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset

from hfpipe.data.source_errors import readable
from hfpipe.errors import DataError
from hfpipe.recipe import Source

MAX_CHARACTERS = 10_000_000  # of a document; what is longer is cut
LISTED = 20  # ids of dirty rows that the report names
BLOCK = 100  # rows of a table fetched at a time


class Reader:
    """Reads a share of a source: endlessly, epoch after epoch, or once.

    A share without a usable document would stall its lane, and so the run; an endless reader then reads the whole
    source.

    Args:
        rows: The source, with a column `text`.
        lane: Which share.
        lanes: How many shares.
        source: What the rows were opened from, for messages.
        repeat: Whether to begin anew at the end.
    """

    def __init__(
        self, rows: Dataset | IterableDataset, lane: int, lanes: int, source: Source, repeat: bool = True
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
        self._stream: IterableDataset | None = None
        self._stream_state: dict[str, Any] | None = None  # what a stream that has not moved yet cannot tell itself
        self._rows: Iterator[dict[str, Any]] | None = None

    def next(self) -> str | None:
        """The next document that is not dirty; None at the end of what is read once.

        Raises:
            DataError: The whole source has none.
        """
        while not self.ended:
            if self._rows is None:
                self._begin(None)
            assert self._rows is not None
            row = next(self._rows, None)
            if row is None:
                self._end_epoch()
                continue
            self._read += 1
            self.rows += 1
            self._stream_state = None
            text = row["text"]
            if not isinstance(text, str):
                self._count_dirty(row, "missing" if text is None else "not a text")
            elif not (cleaned := _clean(text)) or cleaned.isspace():
                self._count_dirty(row, "empty")
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
        self._read, self._usable, self._rows, self._stream = 0, 0, None, None

    def _count_dirty(self, row: dict[str, Any], why: str) -> None:
        self.dirty[why] = self.dirty.get(why, 0) + 1
        name = str(row.get("id", f"row {self._read}"))
        if len(self.dirty_ids) < LISTED and name not in self.dirty_ids:  # every epoch meets it again
            self.dirty_ids.append(name)

    def _begin(self, state: dict[str, Any] | None) -> None:
        """Begins an epoch, or continues it."""
        share = share_of(self._all, 0, 1) if self._whole else share_of(self._all, self._lane, self._lanes)
        if isinstance(share, Dataset):
            self._rows = _rows_from(share, self._read)
            return
        if state is not None:
            share.load_state_dict(state)
        self._stream, self._stream_state, self._rows = share, state, readable(share, self.source)

    def state(self) -> dict[str, Any]:
        """Where the reader stands, small and JSON-able."""
        inner = self._stream_state
        if inner is None and self._stream is not None and self._read:
            inner = self._stream.state_dict()
        return {
            "epoch": self.epoch,
            "ended": self.ended,
            "whole": self._whole,
            "read": self._read,
            "usable": self._usable,
            "stream": inner,
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
        if self._read:
            self._begin(state["stream"])


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


def _rows_from(share: Dataset, begin: int) -> Iterator[dict[str, Any]]:
    """The rows of a table from `begin` on, fetched in blocks."""
    for start in range(begin, len(share), BLOCK):
        block = share[start : min(start + BLOCK, len(share))]
        for values in zip(*block.values(), strict=True):
            yield dict(zip(block, values, strict=True))


def _clean(text: str) -> str:
    """A document that the tokenizer can take: bounded, without NUL and without lone surrogates."""
    text = text[:MAX_CHARACTERS].replace("\x00", "")
    return text.encode("utf-8", "replace").decode("utf-8")
