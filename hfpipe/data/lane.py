"""A lane of the stream: draws documents from its share of every source and packs them, a window at a time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from hfpipe.data.encode import IGNORED
from hfpipe.data.packing import Packed, pack
from hfpipe.data.reader import Reader

FIRST_TOKENS_PER_CHARACTER = 0.25  # until a window has measured it


class Window(NamedTuple):
    """The rows that come of one window.

    Args:
        start: The lane's state before the window was built.
        packed: The rows; none only where the lane has ended.
        tokens: (N,) tokens of each row that are not padding.
        last: Whether every source has ended, so that nothing comes after this window.
        sources: Of each source so far: `tokens`, `epochs`, `rows`, and `Reader.tallies`.
    """

    start: dict[str, Any]
    packed: Packed
    tokens: np.ndarray
    last: bool
    sources: list[dict[str, Any]]


class Lane:
    """Builds windows one after the other.

    Args:
        readers: One for each source.
        weights: Share of the tokens that each source gives.
        tokenize: Texts to lists of tokens, each with its EOS.
        length: Tokens of a row.
        window_documents: Documents of a window.
        pad: The token that fills a lane's last row.
        seed: With the window's number, the seed of the window's shuffle.
    """

    def __init__(
        self,
        readers: list[Reader],
        weights: list[float],
        tokenize: Callable[[list[str]], list[list[int]]],
        length: int,
        window_documents: int,
        pad: int,
        seed: list[int],
    ) -> None:
        self.readers, self.weights, self.tokenize = readers, weights, tokenize
        self.length, self.window_documents, self.pad, self.seed = length, window_documents, pad, seed
        self.window = 0
        self.tokens = [0] * len(readers)  # that each source has given so far
        self.characters = [0] * len(readers)
        self.rest = np.zeros(0, dtype=np.int32)
        self.rest_starts = np.zeros(0, dtype=bool)

    def state(self) -> dict[str, Any]:
        """Where the lane stands between two windows, small and JSON-able."""
        return {
            "window": self.window,
            "sources": [reader.state() for reader in self.readers],
            "tokens": list(self.tokens),
            "characters": list(self.characters),
            "rest": self.rest.tolist(),
            "rest_starts": np.flatnonzero(self.rest_starts).tolist(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken."""
        self.window = state["window"]
        self.tokens, self.characters = list(state["tokens"]), list(state["characters"])
        self.rest = np.array(state["rest"], dtype=np.int32)
        self.rest_starts = np.zeros(len(self.rest), dtype=bool)
        self.rest_starts[state["rest_starts"]] = True
        for reader, saved in zip(self.readers, state["sources"], strict=True):
            reader.load(saved)

    def build(self) -> Window:
        """Draws, shuffles, tokenizes and packs the next window.

        At least one row comes of it, unless every source has ended. The tokens that do not fill a row wait for the
        next window; at the very end they are padded.
        """
        start = self.state()
        tokens, starts = [self.rest], [self.rest_starts]
        drawn = 0
        while sum(map(len, tokens)) < self.length:
            texts, origins = self._draw()
            if not texts:
                break
            order = np.random.default_rng([*self.seed, self.window, drawn]).permutation(len(texts))
            drawn += len(texts)
            documents = self.tokenize([texts[place] for place in order])
            lengths = np.array([len(document) for document in documents])
            np.add.at(given := np.array(self.tokens), np.array(origins)[order], lengths)
            self.tokens = given.tolist()
            tokens.append(np.fromiter(chain.from_iterable(documents), np.int32, lengths.sum()))
            starts.append(np.zeros(lengths.sum(), dtype=bool))
            starts[-1][np.cumsum(lengths) - lengths] = True
        self.window += 1
        flat, flat_starts = np.concatenate(tokens), np.concatenate(starts)
        last = all(reader.ended for reader in self.readers)
        short = -len(flat) % self.length if last else 0
        packed = pack(np.pad(flat, (0, short), constant_values=self.pad), np.pad(flat_starts, (0, short)), self.length)
        self.rest, self.rest_starts = packed.rest, packed.rest_starts
        kept = np.full(len(packed.input_ids), self.length)
        if short:
            packed.labels[-1, -short:] = IGNORED
            kept[-1] -= short
        return Window(start, packed, kept, last, self._source_facts())

    def _draw(self) -> tuple[list[str], list[int]]:
        """The next documents, each from the source whose tokens lag most behind its weight, and their sources.

        Before a document is tokenized its tokens are estimated from its characters; the window's true counts replace
        the estimates, so the shares are held over a run whatever the length of the documents.
        """
        ratios = [
            tokens / characters if characters else FIRST_TOKENS_PER_CHARACTER
            for tokens, characters in zip(self.tokens, self.characters, strict=True)
        ]
        estimates: list[float] = [float(tokens) for tokens in self.tokens]
        texts: list[str] = []
        origins: list[int] = []
        while len(texts) < self.window_documents:
            going = [source for source, reader in enumerate(self.readers) if not reader.ended]
            if not going:
                break
            source = min(going, key=lambda source: estimates[source] / self.weights[source])
            text = self.readers[source].next()
            if text is None:
                continue
            estimates[source] += len(text) * ratios[source] + 1
            self.characters[source] += len(text)
            texts.append(text)
            origins.append(source)
        return texts, origins

    def _source_facts(self) -> list[dict[str, Any]]:
        return [
            {
                "tokens": tokens,
                "epochs": reader.epoch,
                "rows": reader.rows,
                **reader.tallies(),
            }
            for tokens, reader in zip(self.tokens, self.readers, strict=True)
        ]
