"""A lane of the stream: the rows of its share of every source, interleaved by the weights, a window at a time.

A row is of one source alone, and sources take turns row by row: so their shares of the tokens hold to within a row,
however long documents are, and at every place of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from hfpipe.data.stream.packing import Rows, pack
from hfpipe.data.stream.shard_reader import ShardReader
from hfpipe.data.tokenize import IGNORED

WINDOW_CHARACTERS = 2_000_000  # of a window, which 500 books would make too large


class Window(NamedTuple):
    """The rows that come of one window.

    Args:
        start: The lane's state before the window was built.
        rows: The rows; none only where the lane has ended.
        origins: (N,) the source of each row.
        last: Whether every source has ended, so that nothing comes after this window.
        sources: Of each source so far, as drawn: `tokens`, `epochs`, `documents` of an epoch, `rows`, and
            `ShardReader.tallies`.
    """

    start: dict[str, Any]
    rows: Rows
    origins: np.ndarray
    last: bool
    sources: list[dict[str, Any]]


class RowBuilder(Protocol):
    """Builds the rows of one source in one lane: `DocumentBuilder` of documents, `ExampleBuilder` of examples."""

    rows: Rows
    given: int

    @property
    def left(self) -> int: ...
    @property
    def ended(self) -> bool: ...
    def turn(self) -> float: ...
    def build(self) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...
    def facts(self) -> dict[str, Any]: ...


class Lane:
    """Builds windows one after the other.

    Args:
        builders: One for each source.
        weights: Share of the tokens that each source gives.
        seed: With the number of a source, the seed of the phases.
        lane: Which of the lanes it is.
        lanes: How many there are.
        replayed: Of each source, whether it is another stage's. Those keep their part of the weights to the end, and
            the lane ends without them; the part of an own source that has ended falls to the other own ones.
    """

    def __init__(
        self,
        builders: Sequence[RowBuilder],
        weights: Sequence[float],
        seed: int,
        lane: int,
        lanes: int,
        replayed: Sequence[bool] | None = None,
    ) -> None:
        self._builders = builders
        self._weights = [weight / sum(weights) for weight in weights]
        self._replayed = [number for number, other in enumerate(replayed or []) if other]
        self._own = [number for number in range(len(builders)) if number not in self._replayed]
        # Start each lane at a different phase, so that the lanes don't all draw from one source at once.
        places = [np.random.default_rng([seed, number]).permutation(lanes)[lane] for number in range(len(builders))]
        self._waited = [(place + 0.5) / lanes for place in places]
        self._given: list[float] = [0] * len(builders)  # rows, by the tokens in them
        self._saved: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """The position of the lane between two windows, small and JSON-able."""
        return {"given": list(self._given), "builders": [builder.state() for builder in self._builders]}

    def load(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken; with the next window, for windows that were begun are built again."""
        self._saved = state

    def build(self) -> Window:
        """The next rows: until one source needs documents again."""
        if self._saved is not None:
            self._given = list(self._saved["given"])
            for builder, saved in zip(self._builders, self._saved["builders"], strict=True):
                builder.load(saved)
            self._saved = None
        start = self.state()
        begins = [builder.given for builder in self._builders]
        order: list[int] = []
        while (source := self._next()) is not None:
            builder = self._builders[source]
            if not builder.left:
                if order:
                    break
                builder.build()
                begins[source] = 0
                continue
            self._given[source] += builder.turn()
            builder.given += 1
            order.append(source)
        parts = [builder.rows.part(begin, builder.given) for begin, builder in zip(begins, self._builders, strict=True)]
        origins = np.array(order, dtype=np.int64)
        facts = [builder.facts() for builder in self._builders]
        return Window(start, _interleaved(parts, origins), origins, self._next() is None, facts)

    def _next(self) -> int | None:
        """The source of the next row; None where every own one has ended.

        It is the one that lags most behind its weight; before that, whether it is an own or a replayed one.
        """
        own = [source for source in self._own if not self._builders[source].ended]
        if not own:
            return None
        if self._replayed and self._lag(self._replayed) < self._lag(self._own):
            return min(self._replayed, key=lambda source: self._lag([source]))
        return min(own, key=lambda source: self._lag([source]))

    def _lag(self, sources: list[int]) -> float:
        """The rows that sources have given, and a part of one, for their weight."""
        rows = sum(self._given[source] for source in sources) + 1 - self._waited[sources[0]]
        return rows / sum(self._weights[source] for source in sources)


def _interleaved(parts: list[Rows], origins: np.ndarray) -> Rows:
    """The rows of all sources in one.

    Args:
        parts: The rows of each.
        origins: (N,) the source of each row.
    """
    if len(parts) == 1:
        return parts[0]
    places = np.argsort(origins, kind="stable")  # of the first source's rows, then of the second's...
    fields = []
    for of_sources in zip(*parts, strict=True):
        together = np.concatenate(of_sources)
        fields.append(np.empty_like(together))
        fields[-1][places] = together
    return Rows(*fields)


class DocumentBuilder:
    """Builds the rows of one source, and knows how many of them were given out.

    Args:
        reader: The lane's share of the source.
        tokenize: Texts to their tokens one after the other, each with its EOS, and of each how many.
        length: L, tokens of a row.
        documents: Documents of a window.
        characters: Of a window, after which it takes no more documents.
        pad: The token that fills the last row.
        seed: With the window's number, the seed of its shuffle.
    """

    def __init__(
        self,
        reader: ShardReader,
        tokenize: Callable[[list[str]], tuple[np.ndarray, np.ndarray]],
        length: int,
        documents: int,
        characters: int,
        pad: int,
        seed: Sequence[int],
    ) -> None:
        self.reader, self._tokenize, self._length = reader, tokenize, length
        self._documents, self._characters, self._pad, self._seed = documents, characters, pad, seed
        self.tokens = 0  # of all documents drawn
        self._window = 0
        self._rest = np.zeros(0, dtype=np.int32)  # what did not fill a row
        self._rest_starts = np.zeros(0, dtype=bool)
        self.rows = self._packed(0)  # of the window
        self.given = 0  # of these rows
        self._start = self._now()  # before the window

    @property
    def left(self) -> int:
        """Rows that are built and not given out."""
        return len(self.rows.tokens) - self.given

    @property
    def ended(self) -> bool:
        """True if nothing is left."""
        return not self.left and self.reader.ended and not len(self._rest)

    def turn(self) -> float:
        """Returns the part of a row that the next row counts for, as sources take turns."""
        return 1

    def _now(self) -> dict[str, Any]:
        return {
            "reader": self.reader.state(),
            "tokens": self.tokens,
            "window": self._window,
            "rest": self._rest.tolist(),
            "rest_starts": np.flatnonzero(self._rest_starts).tolist(),
        }

    def state(self) -> dict[str, Any]:
        """The state before the window and the rows given out of it, small and JSON-able."""
        return {**(self._start if self.left else self._now()), "given": self.given if self.left else 0}

    def load(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken, which builds the window again if it was begun."""
        self.reader.load(state["reader"])
        self.tokens, self._window = state["tokens"], state["window"]
        self._rest = np.array(state["rest"], dtype=np.int32)
        self._rest_starts = np.zeros(len(self._rest), dtype=bool)
        self._rest_starts[state["rest_starts"]] = True
        if state["given"]:
            self.build()
            self.given = state["given"]

    def build(self) -> None:
        """Draws, shuffles, tokenizes and packs the next window.

        At least one row comes of it, unless the source has ended. The tokens that do not fill a row wait for the next
        window; at the very end they are padded.
        """
        self._start = self._now()
        tokens, starts = [self._rest], [self._rest_starts]
        drawn = 0
        while sum(map(len, tokens)) < self._length:
            texts = self.reader.take(self._documents, self._characters)
            if not texts:
                break
            chance = np.random.default_rng([*self._seed, self._window, drawn])
            drawn += len(texts)
            flat, lengths = self._tokenize(texts)
            ends = np.cumsum(lengths)
            order = chance.permutation(len(texts))
            tokens.append(np.concatenate([flat[ends[place] - lengths[place] : ends[place]] for place in order]))
            starts.append(np.zeros(len(flat), dtype=bool))
            starts[-1][np.cumsum(lengths[order]) - lengths[order]] = True
            self.tokens += len(flat)
        self._window += 1
        self._rest, self._rest_starts = np.concatenate(tokens), np.concatenate(starts)
        self.rows, self.given = self._packed(-len(self._rest) % self._length if self.reader.ended else 0), 0

    def _packed(self, short: int) -> Rows:
        """Rows of the tokens at hand, and of so many more that are padding; what does not fill one stays at hand."""
        tokens = np.pad(self._rest, (0, short), constant_values=self._pad)
        packed = pack(tokens, np.pad(self._rest_starts, (0, short)), self._length)
        self._rest, self._rest_starts = packed.rest, packed.rest_starts
        if short:
            packed.rows.labels[-1, -short:] = IGNORED
            packed.rows.tokens[-1] -= short
        return packed.rows

    def facts(self) -> dict[str, Any]:
        """Counts the rows and tokens drawn so far."""
        return {
            "tokens": self.tokens,
            "epochs": self.reader.epoch,
            "documents": self.reader.documents,
            "rows": self.reader.rows,
            **self.reader.tallies(),
        }
