"""One source in a lane of the stream: its documents, shuffled, tokenized and packed a window at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hfpipe.data.encode import IGNORED
from hfpipe.data.packing import Rows, pack
from hfpipe.data.reader import Reader


class Strand:
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
        reader: Reader,
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
        """Whether nothing is left."""
        return not self.left and self.reader.ended and not len(self._rest)

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
        """What was drawn so far."""
        return {
            "tokens": self.tokens,
            "epochs": self.reader.epoch,
            "documents": self.reader.documents,
            "rows": self.reader.rows,
            **self.reader.tallies(),
        }
