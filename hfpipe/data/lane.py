"""A lane of the stream: the rows of its share of every source, interleaved by the weights, a window at a time.

A row is of one source alone, and sources take turns row by row: so their shares hold to within a row, however long
documents are, and at every place of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from hfpipe.data.packing import Rows
from hfpipe.data.reader import Reader
from hfpipe.data.strand import Strand

WINDOW_CHARACTERS = 2_000_000  # of a window, which 500 books would make too large


class Window(NamedTuple):
    """The rows that come of one window.

    Args:
        start: The lane's state before the window was built.
        rows: The rows; none only where the lane has ended.
        origins: (N,) the source of each row.
        last: Whether every source has ended, so that nothing comes after this window.
        sources: Of each source so far, as drawn: `tokens`, `epochs`, `documents` of an epoch, `rows`, and
            `Reader.tallies`.
    """

    start: dict[str, Any]
    rows: Rows
    origins: np.ndarray
    last: bool
    sources: list[dict[str, Any]]


class Lane:
    """Builds windows one after the other.

    Args:
        readers: One for each source.
        weights: Share of the tokens that each source gives.
        tokenize: Texts to their tokens one after the other, each with its EOS, and of each how many.
        length: Tokens of a row.
        window_documents: Documents of a window, of all sources together.
        pad: The token that fills the last row of a source.
        seed: With the numbers of lane, source and window, the seed of the window's shuffle.
        lane: Which of the lanes it is.
        lanes: How many there are.
        replayed: Of each source, whether it is another stage's. Those keep their part of the weights to the end, and
            the lane ends without them; the part of an own source that has ended falls to the other own ones.
    """

    def __init__(
        self,
        readers: list[Reader],
        weights: list[float],
        tokenize: Callable[[list[str]], tuple[np.ndarray, np.ndarray]],
        length: int,
        window_documents: int,
        pad: int,
        seed: int,
        lane: int,
        lanes: int,
        replayed: list[bool] | None = None,
    ) -> None:
        shares = [weight / sum(weights) for weight in weights]
        self._strands = [
            Strand(
                reader,
                tokenize,
                length,
                max(1, round(window_documents * share)),
                round(WINDOW_CHARACTERS * share) + 1,
                pad,
                [seed, lane, number],
            )
            for number, (reader, share) in enumerate(zip(readers, shares, strict=True))
        ]
        self._weights = shares
        self._replayed = [number for number, other in enumerate(replayed or []) if other]
        self._own = [number for number in range(len(readers)) if number not in self._replayed]
        # Of each source, what part of a row's turn it has waited already: in each lane another, in no order, so that
        # the lanes do not give one source all at once, and rounding evens out.
        places = [np.random.default_rng([seed, number]).permutation(lanes)[lane] for number in range(len(readers))]
        self._waited = [(place + 0.5) / lanes for place in places]
        self._given = [0] * len(readers)  # rows
        self._saved: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """Where the lane stands between two windows, small and JSON-able."""
        return {"given": list(self._given), "strands": [strand.state() for strand in self._strands]}

    def load(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken; with the next window, for windows that were begun are built again."""
        self._saved = state

    def build(self) -> Window:
        """The next rows: until one source needs documents again."""
        if self._saved is not None:
            self._given = list(self._saved["given"])
            for strand, saved in zip(self._strands, self._saved["strands"], strict=True):
                strand.load(saved)
            self._saved = None
        start = self.state()
        begins = [strand.given for strand in self._strands]
        order: list[int] = []
        while (source := self._next()) is not None:
            strand = self._strands[source]
            if not strand.left:
                if order:
                    break
                strand.build()
                begins[source] = 0
                continue
            strand.given += 1
            self._given[source] += 1
            order.append(source)
        parts = [strand.rows.part(begin, strand.given) for begin, strand in zip(begins, self._strands, strict=True)]
        origins = np.array(order, dtype=np.int64)
        facts = [strand.facts() for strand in self._strands]
        return Window(start, _interleaved(parts, origins), origins, self._next() is None, facts)

    def _next(self) -> int | None:
        """The source of the next row; None where every own one has ended.

        It is the one that lags most behind its weight; before that, whether it is an own or a replayed one.
        """
        own = [source for source in self._own if not self._strands[source].ended]
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
