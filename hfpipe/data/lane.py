"""A lane of the stream: draws documents from its share of every source, a window at a time, with an exact state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, IterableDataset

from hfpipe.data.packing import Packed, pack
from hfpipe.data.source_errors import readable
from hfpipe.errors import DataError
from hfpipe.recipe import Source

MAX_CHARACTERS = 10_000_000  # of a document; what is longer is cut
LISTED = 20  # ids of dirty rows that the report names


class Reader:
    """One lane's share of one source: endless, epoch after epoch.

    Args:
        rows: The source, with a column `text`.
        lane: Which share.
        lanes: How many shares.
        source: What the rows were opened from, for messages.
    """

    def __init__(self, rows: Dataset | IterableDataset, lane: int, lanes: int, source: Source) -> None:
        self.source = source
        self.epoch = 0
        self.read = 0  # rows of this epoch that were read
        self.dirty: dict[str, int] = {}
        self.dirty_ids: list[str] = []
        self._usable = 0  # documents of this epoch that were not dirty
        self._share = _shares(rows, lane, lanes)
        self._stream: IterableDataset | None = None
        self._stream_state: dict[str, Any] | None = None  # what a stream that has not moved yet cannot tell itself
        self._rows: Iterator[dict[str, Any]] | None = None

    def next(self) -> str:
        """The next document that is not dirty.

        Raises:
            DataError: A whole epoch has none.
        """
        while True:
            if self._rows is None:
                self._begin(None)
            assert self._rows is not None
            row = next(self._rows, None)
            if row is None:
                if not self._usable:
                    raise DataError(
                        f"source {self.source.path!r} has no document with text in it ({self.read} rows read)."
                    )
                self.epoch, self.read, self._usable, self._rows = self.epoch + 1, 0, 0, None
                continue
            self.read += 1
            self._stream_state = None
            text = row["text"]
            if isinstance(text, str) and text and not text.isspace():
                self._usable += 1
                return _clean(text)
            self._count_dirty(row, "missing" if text is None else "empty" if isinstance(text, str) else "not a text")

    def _count_dirty(self, row: dict[str, Any], why: str) -> None:
        self.dirty[why] = self.dirty.get(why, 0) + 1
        if len(self.dirty_ids) < LISTED:
            self.dirty_ids.append(str(row.get("id", f"row {self.read}")))

    def _begin(self, state: dict[str, Any] | None) -> None:
        """Begins an epoch, or continues it."""
        share = self._share()
        if isinstance(share, Dataset):
            self._rows = _rows_from(share, self.read)
            return
        if state is not None:
            share.load_state_dict(state)
        self._stream, self._stream_state, self._rows = share, state, readable(share, self.source)

    def state(self) -> dict[str, Any]:
        inner = self._stream_state
        if inner is None and self._stream is not None and self.read:
            inner = self._stream.state_dict()
        dirty = {"dirty": dict(self.dirty), "dirty_ids": list(self.dirty_ids)}
        return {"epoch": self.epoch, "read": self.read, "usable": self._usable, "stream": inner, **dirty}

    def facts(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "dirty": dict(self.dirty), "dirty_ids": list(self.dirty_ids)}

    def load(self, state: dict[str, Any]) -> None:
        self.epoch, self.read, self._usable = state["epoch"], state["read"], state["usable"]
        self.dirty, self.dirty_ids = dict(state["dirty"]), list(state["dirty_ids"])
        if self.read:
            self._begin(state["stream"])


def _rows_from(share: Dataset, begin: int) -> Iterator[dict[str, Any]]:
    """The rows of a table from `begin` on, fetched in blocks."""
    for start in range(begin, len(share), 100):
        block = share[start : min(start + 100, len(share))]
        columns = list(block)
        for values in zip(*block.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def _shares(rows: Dataset | IterableDataset, lane: int, lanes: int) -> Callable[[], Any]:
    """A function that opens this lane's share anew.

    A stream with fewer shards than lanes, even after `reshard`, is read whole by every lane, which keeps each its own
    rows: more reading, and the same rows.
    """
    if isinstance(rows, Dataset):
        mine = range(lane, len(rows), lanes)
        return lambda: rows.select(mine if len(mine) else range(len(rows)))
    if rows.num_shards < lanes:
        rows = rows.reshard()
    if rows.num_shards >= lanes:
        return lambda: rows.shard(num_shards=lanes, index=lane)
    return lambda: rows.filter(lambda _, index: index % lanes == lane, with_indices=True)


def _clean(text: str) -> str:
    """A document that the tokenizer can take: bounded, without NUL and without lone surrogates."""
    text = text[:MAX_CHARACTERS].replace("\x00", "")
    return text.encode("utf-8", "replace").decode("utf-8")


class Window(NamedTuple):
    """The rows that come of one window, and the lane's state before it was built."""

    start: dict[str, Any]
    rows: Packed


class Lane:
    """Builds windows one after the other.

    Args:
        readers: One for each source.
        weights: Share of the tokens that each source gives.
        tokenize: Texts to token arrays, each with its EOS.
        length: Tokens of a row.
        window_documents: Documents of a window.
        seed: With the lane's number and the window's, the seed of the window's shuffle.
    """

    def __init__(
        self,
        readers: list[Reader],
        weights: list[float],
        tokenize: Callable[[list[str]], list[np.ndarray]],
        length: int,
        window_documents: int,
        seed: list[int],
    ) -> None:
        self.readers, self.weights, self.tokenize = readers, weights, tokenize
        self.length, self.window_documents, self.seed = length, window_documents, seed
        self.window = 0
        self.tokens = [0.0] * len(readers)  # given by each source so far
        self.characters = [0] * len(readers)
        self.rest = np.zeros(0, dtype=np.int32)
        self.rest_starts = np.zeros(0, dtype=bool)

    def state(self) -> dict[str, Any]:
        return {
            "window": self.window,
            "sources": [reader.state() for reader in self.readers],
            "tokens": list(self.tokens),
            "characters": list(self.characters),
            "rest": self.rest.tolist(),
            "rest_starts": np.flatnonzero(self.rest_starts).tolist(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.window = state["window"]
        self.tokens, self.characters = list(state["tokens"]), list(state["characters"])
        self.rest = np.array(state["rest"], dtype=np.int32)
        self.rest_starts = np.zeros(len(self.rest), dtype=bool)
        self.rest_starts[state["rest_starts"]] = True
        for reader, saved in zip(self.readers, state["sources"], strict=True):
            reader.load(saved)

    def build(self) -> Window:
        """Draws, shuffles, tokenizes and packs the next window; at least one row comes of it."""
        start = self.state()
        tokens, starts = [self.rest], [self.rest_starts]
        size = len(self.rest)
        documents = 0
        while size < self.length or not documents:
            texts, origin = self._draw()
            order = np.random.default_rng([*self.seed, self.window, documents]).permutation(len(texts))
            for place, ids in zip(order, self.tokenize([texts[place] for place in order]), strict=True):
                begin = np.zeros(len(ids), dtype=bool)
                begin[0] = True
                tokens.append(ids)
                starts.append(begin)
                size += len(ids)
                self.tokens[origin[place]] += len(ids)
            documents += len(texts)
        self.window += 1
        packed = pack(np.concatenate(tokens), np.concatenate(starts), self.length)
        self.rest, self.rest_starts = packed.rest, packed.rest_starts
        return Window(start, packed)

    def _draw(self) -> tuple[list[str], list[int]]:
        """The next documents, each from the source whose tokens lag most behind its weight.

        Before a document is tokenized its tokens are estimated from its characters; the window's true counts replace
        the estimates, so the shares are held over a run whatever the length of the documents.
        """
        estimates = list(self.tokens)
        texts, origin = [], []
        for _ in range(self.window_documents):
            lag = [given / weight for given, weight in zip(estimates, self.weights, strict=True)]
            source = lag.index(min(lag))
            text = self.readers[source].next()
            ratio = self.tokens[source] / self.characters[source] if self.characters[source] else 0.25
            estimates[source] += len(text) * ratio + 1
            self.characters[source] += len(text)
            texts.append(text)
            origin.append(source)
        return texts, origin
