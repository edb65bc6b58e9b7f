"""The stream of pretraining: shuffle, mixture, tokenization, packing and exact resume in one mechanism.

The sources are cut into lanes, whose number is kept for the life of a run. Row n of the run comes from lane n % lanes,
and rank r serves the rows with n % ranks == r; lanes being a multiple of ranks, each lane has one rank, and the same
global batches come out on any number of them. A lane is read a window at a time (`lane.py`). Its state is the state at
the window's start and the rows given out since: a resume seeks there and builds one window again, however long the run.

The next window of each lane is built in a background thread while the model trains. What was built ahead and not served
is not in the state, so nothing is lost or seen twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from hfpipe.data.lane import LISTED, Lane, Reader, Window
from hfpipe.data.packing import count
from hfpipe.errors import RecipeError
from hfpipe.ranks import gather
from hfpipe.recipe import Source

DEFAULT_LANES = 8
WINDOW_DOCUMENTS = 500


class TokenStream:
    """Serves one rank's packed rows, endlessly.

    Args:
        sources: Rows with a column `text`.
        tokenizer: A fast tokenizer; BOS is put before each document where it does so itself, EOS after each.
        max_length: L, tokens of a row.
        weights: Share of the tokens from each source; equal when absent.
        lanes: Number of lanes; the smallest multiple of the ranks from 8 up when absent.
        seed: Seed of the shuffles.
        rank: This rank.
        ranks: Number of ranks.
        window_documents: Documents of a window.
        origins: What the sources were opened from, for messages and the report.

    Raises:
        RecipeError: `lanes` is not a multiple of `ranks`.
    """

    def __init__(
        self,
        sources: Sequence[Dataset | IterableDataset],
        tokenizer: Any,
        *,
        max_length: int,
        weights: Sequence[float] | None = None,
        lanes: int | None = None,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        window_documents: int = WINDOW_DOCUMENTS,
        origins: Sequence[Source] | None = None,
    ) -> None:
        self.sources, self.tokenizer, self.max_length = list(sources), tokenizer, max_length
        self.weights = list(weights or [1.0] * len(self.sources))
        self.origins = list(
            origins or [Source.model_validate({"path": f"source {number}"}) for number in range(len(sources))]
        )
        self.seed, self.rank, self.ranks, self.window_documents = seed, rank, ranks, window_documents
        self._backend = tokenizer.backend_tokenizer
        ids = tokenizer("")["input_ids"]
        self._bos = [tokenizer.bos_token_id] if ids[:1] == [tokenizer.bos_token_id] else []
        self._eos = [tokenizer.eos_token_id]
        self._open(lanes or -(-DEFAULT_LANES // ranks) * ranks)

    def _open(self, lanes: int) -> None:
        if lanes % self.ranks:
            fits = [count for count in range(1, lanes + 1) if lanes % count == 0]
            raise RecipeError(
                f"the stream has {lanes} lanes, which {self.ranks} ranks cannot share evenly; start it on "
                f"{', '.join(map(str, fits))} ranks, or give a new run `lanes:` that is a multiple of the ranks."
            )
        self.lanes = lanes
        self._mine = range(self.rank, lanes, self.ranks)
        self._built = {lane: self._lane(lane) for lane in self._mine}
        self._start = {lane: built.state() for lane, built in self._built.items()}  # of the window being served
        self._window: dict[int, Window] = {}
        self._given = dict.fromkeys(self._mine, 0)
        self._facts: dict[int, dict[str, int]] = {  # of the windows before this one
            lane: {"documents": 0, "tokens": 0, "continued_rows": 0} for lane in self._mine
        }
        self._next = 0  # rows that this rank has served

    def _lane(self, lane: int) -> Lane:
        readers = [
            Reader(rows, lane, self.lanes, origin) for rows, origin in zip(self.sources, self.origins, strict=True)
        ]
        seed = [self.seed, lane]
        return Lane(readers, self.weights, self._tokenize, self.max_length, self.window_documents, seed)

    def _tokenize(self, texts: list[str]) -> list[np.ndarray]:
        """One call of the Rust tokenizer, on all cores."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*self._bos, *encoding.ids, *self._eos], dtype=np.int32) for encoding in encodings]

    def batches(self, rows: int) -> Iterator[list[dict[str, Any]]]:
        """Yields lists of `rows` rows of this rank: `input_ids`, `position_ids` and `labels`, (L,) each.

        Raises:
            DataError: A source has no usable document.
        """
        self._backend.no_truncation()
        self._backend.no_padding()
        executor = ThreadPoolExecutor(1, thread_name_prefix="stream")
        try:
            ahead = {lane: executor.submit(self._built[lane].build) for lane in self._mine}
            while True:
                yield [self._row(executor, ahead) for _ in range(rows)]
        finally:
            executor.shutdown(wait=False, cancel_futures=True)

    def _row(self, executor: ThreadPoolExecutor, ahead: dict[int, Future[Window]]) -> dict[str, Any]:
        lane = self._mine[self._next % len(self._mine)]
        while lane not in self._window or self._given[lane] == len(self._window[lane].rows.input_ids):
            if lane in self._window:  # it is served whole
                self._facts[lane] = self._counted(lane)
                del self._window[lane]
                self._given[lane] = 0
            self._window[lane] = ahead[lane].result()
            self._start[lane] = self._window[lane].start
            ahead[lane] = executor.submit(self._built[lane].build)
        place, packed = self._given[lane], self._window[lane].rows
        self._given[lane] += 1
        self._next += 1
        return {
            "input_ids": packed.input_ids[place],
            "position_ids": packed.position_ids[place],
            "labels": packed.labels[place],
        }

    def state_dict(self) -> dict[str, Any]:
        """The position after the last row served: of each lane the start of its window and the rows given since."""
        states = {
            str(lane): {"start": self._start[lane], "given": self._given[lane], "facts": dict(self._facts[lane])}
            for lane in self._mine
        }
        return {"lanes": self.lanes, "served": self._next * self.ranks, "states": states}

    @staticmethod
    def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
        """The states of all ranks as one."""
        merged = {lane: state for part in states for lane, state in part["states"].items()}
        return {"lanes": states[0]["lanes"], "served": states[0]["served"], "states": merged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where the merged states of all ranks stand, on this or another number of ranks.

        Raises:
            RecipeError: The recorded lanes are not a multiple of the ranks.
        """
        self._open(state["lanes"])
        self._next = state["served"] // self.ranks
        for lane in self._mine:
            saved = state["states"][str(lane)]
            self._built[lane].load(saved["start"])
            self._start[lane], self._given[lane] = saved["start"], saved["given"]
            self._facts[lane] = dict(saved["facts"])

    def _counted(self, lane: int) -> dict[str, int]:
        """What a lane has served up to now."""
        if lane not in self._window:
            return self._facts[lane]
        current = count(self._window[lane].rows, self._given[lane])
        return {key: value + current[key] for key, value in self._facts[lane].items()}

    def report(self) -> dict[str, Any]:
        """What all ranks have served: documents, tokens; of each source epochs, share of the tokens, dirty rows.

        Epochs, shares and dirty rows are those of the documents drawn so far, the windows built ahead included. Every
        rank has to call this.
        """
        mine = {
            "lanes": [self._counted(lane) for lane in self._mine],
            "readers": [[reader.facts() for reader in lane.readers] for lane in self._built.values()],
            "tokens": [lane.tokens for lane in self._built.values()],
        }
        parts = gather(mine)
        counts = [counted for part in parts for counted in part["lanes"]]
        total = {key: sum(counted[key] for counted in counts) for key in counts[0]}
        tokens = np.sum([given for part in parts for given in part["tokens"]], axis=0)
        sources = {}
        for number, origin in enumerate(self.origins):
            readers = [lane[number] for part in parts for lane in part["readers"]]
            reasons = sorted({why for reader in readers for why in reader["dirty"]})
            sources[f"{number}: {origin.path}"] = {
                "epochs": min(reader["epoch"] for reader in readers),
                "token_share": round(float(tokens[number] / max(tokens.sum(), 1)), 4),
                "dirty": {why: sum(reader["dirty"].get(why, 0) for reader in readers) for why in reasons},
                "dirty_ids": [name for reader in readers for name in reader["dirty_ids"]][:LISTED],
            }
        return {**total, "lanes": self.lanes, "sources": sources}
