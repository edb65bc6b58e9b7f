"""A lane of the stream: draws documents from its share of every source and packs them, a window at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from hfpipe.data.encode import IGNORED
from hfpipe.data.packing import Packed, pack
from hfpipe.data.reader import Reader

MEASURED = 16  # documents of a source that are tokenized as they are drawn, before characters tell their tokens
TOGETHER = 50  # documents of a mixture that are tokenized in one call
GOLDEN = 0.6180339887  # its multiples lie evenly between 0 and 1

Document: TypeAlias = tuple[int, np.ndarray]  # which source it came from, and its tokens


class Window(NamedTuple):
    """The rows that come of one window.

    Args:
        start: The lane's state before the window was built.
        packed: The rows; none only where the lane has ended.
        tokens: (N,) tokens of each row that are not padding.
        given: (N, S, 2) tokens of each row, and documents that begin in it, by source.
        last: Whether every source has ended, so that nothing comes after this window.
        sources: Of each source so far, as drawn: `tokens`, `epochs`, `documents` of an epoch, `rows`, and
            `Reader.tallies`.
    """

    start: dict[str, Any]
    packed: Packed
    tokens: np.ndarray
    given: np.ndarray
    last: bool
    sources: list[dict[str, Any]]


class Lane:
    """Builds windows one after the other.

    Args:
        readers: One for each source.
        weights: Share of the tokens that each source gives.
        tokenize: Texts to their tokens one after the other, each with its EOS, and of each how many.
        length: Tokens of a row.
        window_documents: Documents of a window.
        pad: The token that fills a lane's last row.
        seed: With the window's number, the seed of the window's shuffle.
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
        seed: list[int],
        replayed: list[bool] | None = None,
    ) -> None:
        self.readers, self.weights, self.tokenize = readers, weights, tokenize
        self.length, self.window_documents, self.pad, self.seed = length, window_documents, pad, seed
        self._replayed = [number for number, other in enumerate(replayed or []) if other]
        self._own = [number for number in range(len(readers)) if number not in self._replayed]
        # Where in a document its lag is taken: at its beginning, every lane would be a document ahead of the weights.
        self._phase = (seed[-1] + 1) * GOLDEN % 1
        self.window = 0
        self.documents = [0] * len(readers)
        self.tokens = [0] * len(readers)  # that each source has given so far
        self.characters = [0] * len(readers)
        self.rest = np.zeros(0, dtype=np.int32)
        self.rest_starts = np.zeros(0, dtype=bool)
        self.rest_origins = np.zeros(0, dtype=np.int16)  # the source of each token

    def state(self) -> dict[str, Any]:
        """Where the lane stands between two windows, small and JSON-able."""
        return {
            "window": self.window,
            "sources": [reader.state() for reader in self.readers],
            "tokens": list(self.tokens),
            "characters": list(self.characters),
            "documents": list(self.documents),
            "rest": self.rest.tolist(),
            "rest_starts": np.flatnonzero(self.rest_starts).tolist(),
            "rest_origins": self.rest_origins.tolist(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken."""
        self.window = state["window"]
        self.tokens, self.characters = list(state["tokens"]), list(state["characters"])
        self.documents = list(state["documents"])
        self.rest = np.array(state["rest"], dtype=np.int32)
        self.rest_starts = np.zeros(len(self.rest), dtype=bool)
        self.rest_starts[state["rest_starts"]] = True
        self.rest_origins = np.array(state["rest_origins"], dtype=np.int16)
        for reader, saved in zip(self.readers, state["sources"], strict=True):
            reader.load(saved)

    def build(self) -> Window:
        """Draws, shuffles, tokenizes and packs the next window.

        At least one row comes of it, unless every source has ended. The tokens that do not fill a row wait for the
        next window; at the very end they are padded.
        """
        start = self.state()
        tokens, starts, origins = [self.rest], [self.rest_starts], [self.rest_origins]
        drawn = 0
        while sum(map(len, tokens)) < self.length:
            given = list(self.tokens)
            documents = self._draw()
            if not documents:
                break
            chance = np.random.default_rng([*self.seed, self.window, drawn])
            drawn += len(documents)
            ordered = self._in_order(documents, chance, given)
            lengths = np.array([len(document) for _, document in ordered])
            tokens.append(np.concatenate([document for _, document in ordered]))
            origins.append(np.repeat(np.array([source for source, _ in ordered], dtype=np.int16), lengths))
            starts.append(np.zeros(len(tokens[-1]), dtype=bool))
            starts[-1][np.cumsum(lengths) - lengths] = True
        self.window += 1
        flat, flat_starts = np.concatenate(tokens), np.concatenate(starts)
        last = all(self.readers[source].ended for source in self._own)
        short = -len(flat) % self.length if last else 0
        packed = pack(np.pad(flat, (0, short), constant_values=self.pad), np.pad(flat_starts, (0, short)), self.length)
        flat_origins, full = np.concatenate(origins), packed.input_ids.size
        counts = self._given(flat_origins[:full], flat_starts)
        self.rest, self.rest_starts, self.rest_origins = packed.rest, packed.rest_starts, flat_origins[full:]
        kept = np.full(len(packed.input_ids), self.length)
        if short:
            packed.labels[-1, -short:] = IGNORED
            kept[-1] -= short
        return Window(start, packed, kept, counts, last, self._source_facts())

    def _given(self, origins: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Tokens and beginnings of documents in each row by source; see `Window.given`.

        Args:
            origins: (T,) the source of each token of the rows, without padding.
            starts: (T or more,) True where a document begins.
        """
        short = -len(origins) % self.length
        rows = np.pad(origins, (0, short), constant_values=-1).reshape(-1, self.length)
        begins = np.pad(starts[: len(origins)], (0, short)).reshape(-1, self.length)
        of_sources = [rows == source for source in range(len(self.readers))]
        counts = [[mine.sum(axis=1), (mine & begins).sum(axis=1)] for mine in of_sources]
        return np.moveaxis(np.array(counts), -1, 0)

    def _in_order(self, drawn: list[Document], chance: np.random.Generator, given: list[int]) -> list[Document]:
        """A window's documents as they are served: shuffled, and of a mixture so that the shares hold at every place.

        Args:
            drawn: The documents.
            chance: What they are shuffled by.
            given: Tokens that each source had given before them; counted on.
        """
        shuffled = [drawn[place] for place in chance.permutation(len(drawn))]
        if len(self.readers) == 1:
            return shuffled
        waiting = [[one for one in shuffled if one[0] == source] for source in range(len(self.readers))]
        ordered: list[Document] = []
        while len(ordered) < len(drawn):
            source = self._next([number for number, left in enumerate(waiting) if left], given, self.tokens)
            ordered.append(waiting[source].pop())
            given[source] += len(ordered[-1][1])
        return ordered

    def _draw(self) -> list[Document]:
        """The next documents, each from the source whose tokens lag most behind its weight.

        Until a document is tokenized its tokens are estimated from its characters; every `TOGETHER` documents the true
        counts replace the estimates, so the shares are held over a run whatever the length of the documents.
        """
        texts: list[str] = []
        origins: list[int] = []
        if len(self.readers) == 1:  # nothing to weigh
            texts = self.readers[0].take(self.window_documents)
            self.characters[0] += sum(map(len, texts))
            self.documents[0] += len(texts)
            return self._tokens_of(texts, [0] * len(texts))
        estimates: list[float] = [float(tokens) for tokens in self.tokens]
        documents: list[Document] = []
        while len(documents) + len(texts) < self.window_documents:
            if len(texts) == TOGETHER:
                documents += self._tokens_of(texts, origins)
                estimates, texts, origins = [float(tokens) for tokens in self.tokens], [], []
            going = [source for source in self._own if not self.readers[source].ended]
            if not going:
                break
            source = self._next(going + self._replayed, estimates, estimates)
            for text in self.readers[source].take(1):
                if self.documents[source] < MEASURED:
                    estimates[source] += len(self.tokenize([text])[0])
                else:
                    estimates[source] += len(text) * estimates[source] / self.characters[source]
                self.characters[source] += len(text)
                self.documents[source] += 1
                texts.append(text)
                origins.append(source)
        return documents + self._tokens_of(texts, origins)

    def _tokens_of(self, texts: list[str], origins: list[int]) -> list[Document]:
        """The tokens of each document, counted for the source that it came from."""
        if not texts:
            return []
        tokens, lengths = self.tokenize(texts)
        for source, length in zip(origins, lengths.tolist(), strict=True):
            self.tokens[source] += length
        ends = np.cumsum(lengths)
        places = zip(origins, (ends - lengths).tolist(), ends.tolist(), strict=True)
        return [(source, tokens[start:end]) for source, start, end in places]

    def _next(self, sources: list[int], given: Sequence[float], drawn: Sequence[float]) -> int:
        """The one of sources that lags most behind its weight; before that, whether it is an own or a replayed one.

        Args:
            sources: Those that may come next.
            given: Tokens that each source has given.
            drawn: Tokens of the documents that were drawn from each, for the length of a document.
        """

        def lag(sources: list[int]) -> float:
            """Tokens given, and a part of the next document, for the weight.

            The part is another in each lane, so that over the lanes nothing is ahead or behind however long documents
            are.
            """
            length = sum(drawn[source] for source in sources) / max(
                sum(self.documents[source] for source in sources), 1
            )
            tokens = sum(given[source] for source in sources) + self._phase * length
            return tokens / sum(self.weights[source] for source in sources)

        if self._replayed:
            own = [source for source in sources if source in self._own]
            replayed = [source for source in sources if source in self._replayed]
            if own and replayed:
                sources = replayed if lag(self._replayed) < lag(self._own) else own
        return min(sources, key=lambda source: lag([source]))

    def _source_facts(self) -> list[dict[str, Any]]:
        return [
            {
                "tokens": tokens,
                "epochs": reader.epoch,
                "documents": reader.documents,
                "rows": reader.rows,
                **reader.tallies(),
            }
            for tokens, reader in zip(self.tokens, self.readers, strict=True)
        ]
