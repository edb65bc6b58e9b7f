"""The stream: shuffle, mixture, tokenization, packing and exact resume in one mechanism.

Its rows are documents one after the other, cut at the row's length, or whole examples of a fine-tune (`examples.py`).

The sources are cut into lanes, whose number is kept for the life of a run. Row n of the run comes from lane n % lanes,
and rank r serves the rows with n % ranks == r; lanes being a multiple of ranks, each lane has one rank, and the same
global batches come out on any number of them. A lane is read a window at a time (`lane.py`). Its state is the state at
the window's start and the rows given out since: a resume seeks there and builds one window again, however long the run.

The next window of each lane is built in background threads while the model trains. What was built ahead and not served
is not in the state, so nothing is lost or seen twice.
"""

from __future__ import annotations

import copy
import itertools
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
from datasets import Dataset, IterableDataset

from hfpipe.core.errors import RecipeError
from hfpipe.core.ranks import each, gather
from hfpipe.data.cleaning.text_rules import Finding, finding, judge
from hfpipe.data.masking import Frame, tokens_of_texts
from hfpipe.data.stream.examples import ExampleBuilder, Examples
from hfpipe.data.stream.lane import WINDOW_CHARACTERS, DocumentBuilder, Lane, RowBuilder, Window
from hfpipe.data.stream.prefetch import Prefetch
from hfpipe.data.stream.progress import COUNTED, Position, facts_of
from hfpipe.data.stream.shard_reader import BLOCK, Dealt, Row, ShardReader, deal, in_shards
from hfpipe.data.tokenize import IGNORED
from hfpipe.recipe import Source

DEFAULT_LANES = 8
WINDOW_DOCUMENTS = 500
JUDGED_BATCHES = 100


class TokenStream:
    """Serves one rank's rows, endlessly or until every document was read once.

    Args:
        sources: Rows with a column `text`.
        tokenizer: A fast tokenizer; BOS is put before each document where it does so itself, EOS after each.
        max_length: L, tokens of a row.
        weights: Share of the tokens from each source; equal when absent.
        lanes: Number of lanes; when absent the smallest multiple of the ranks from 8 up, or fewer where the tables have
            no more rows than that.
        seed: Seed of the shuffles.
        rank: This rank.
        ranks: Number of ranks.
        window_documents: Documents of a window.
        origins: What the sources were opened from, for messages and the report.
        replayed: Of each source, whether it is another stage's, see `Lane`. Such a source begins anew in any case.
        exhausted: What becomes of a source that is read to its end. "repeat": it begins anew in that lane, and the
            stream is endless. "stop": after `epochs` of them the others go on without it. Its last row in a lane is
            padded then, rows stand in for a lane that ends before the others, and all ranks serve the same number of
            batches.
        epochs: How often each source is read where it stops.
        max_dirty_share: Share of a source's rows that may be dirty (missing, empty, not a text). It is judged once
            all ranks have read `JUDGED_ROWS` different rows of the source, or all of it.
        prefetch: Whether windows are built ahead in background threads.
        cleaned: Judges the rows of a source, given by its number, before it is read in lanes; see `Cleaner.shares`.
        frame: Of rows for a masked model, which carry their number and no positions; None for the next token.
        unended: Texts that go on where nobody knows them, so that no EOS follows.
        examples: How rows are made of whole examples; the sources have the columns of any format of text then. None
            for documents.

    Raises:
        RecipeError: `lanes` is not a multiple of `ranks`, or the tokenizer has no EOS.
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
        replayed: Sequence[bool] | None = None,
        exhausted: Literal["repeat", "stop"] = "repeat",
        epochs: int = 1,
        max_dirty_share: float = 1.0,
        prefetch: bool = True,
        cleaned: Callable[[int, IterableDataset, int], list[np.ndarray] | None] | None = None,
        frame: Frame | None = None,
        unended: Collection[str] = (),
        examples: Examples | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None and frame is None and examples is None:
            raise RecipeError("the tokenizer has no EOS token, which ends each document of a stream; give it one.")
        self.frame, self._examples, self._cleaned, self._unended = frame, examples, cleaned, unended
        self._kept: list[dict[int, list[Row]]] = [{} for _ in sources]
        self._removed: list[list[np.ndarray] | None] = [None] * len(sources)
        self.sources, self.max_length = list(sources), max_length - (frame.size if frame else 0)  # without the frame
        self.weights = list(weights or [1.0] * len(self.sources))
        self.origins = list(
            origins or [Source.model_validate({"path": f"source {number}"}) for number in range(len(sources))]
        )
        self.replayed = list(replayed or [False] * len(self.sources))
        self.seed, self.rank, self.ranks, self.window_documents = seed, rank, ranks, window_documents
        self.epochs = None if exhausted == "repeat" else epochs
        self.prefetch, self.max_dirty_share = prefetch, max_dirty_share
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)  # its own: it runs in another thread
        self._backend.no_truncation()
        self._backend.no_padding()
        ids = tokenizer("")["input_ids"]
        self._bos = [tokenizer.bos_token_id] if ids[:1] == [tokenizer.bos_token_id] else []
        self._eos = [tokenizer.eos_token_id]
        if frame is not None:
            self._bos, self._eos = [], frame.after
        self._open(lanes or default_lanes(self.sources, ranks))

    def _open(self, lanes: int) -> None:
        """Stands at the beginning of `lanes` lanes."""
        if lanes % self.ranks:
            fits = [count for count in range(1, lanes + 1) if lanes % count == 0]
            raise RecipeError(
                f"the stream has {lanes} lanes, which {self.ranks} ranks cannot share evenly; start it on "
                f"{', '.join(map(str, fits))} ranks, or give a new run `lanes:` that is a multiple of the ranks."
            )
        self.lanes = lanes
        mine = range(self.rank, lanes, self.ranks)
        self._positions = {lane: Position(served=[[0, 0, 0] for _ in self.sources]) for lane in mine}
        self._served = 0  # rows that all ranks have served
        self._tokens = self._places = 0  # of the batches of this rank in this process, and with padding
        self._found: list[Finding] | None = None
        self.ended = False  # every document was served

    def _shards(self) -> list[Dealt | IterableDataset]:
        """The sources divided: tables dealt out, a stream cut into more shards where it has too few."""
        return [
            deal(rows, self.lanes, by_length=self.epochs is not None and self._examples is None)
            if isinstance(rows, Dataset)
            else in_shards(rows, self.lanes, origin)
            for rows, origin in zip(self.sources, self.origins, strict=True)
        ]

    def _clean(self, shards: Sequence[Dealt | IterableDataset]) -> None:
        """Has the streams judged. Every rank has to call this."""
        for number, rows in enumerate(shards):
            if self._cleaned is not None and isinstance(rows, IterableDataset):
                self._removed[number] = self._cleaned(number, rows, self.lanes)

    def _lane(self, lane: int, shards: Sequence[Dealt | IterableDataset]) -> Lane:
        """A lane at its position."""
        builders = [self._builder(number, rows, lane) for number, rows in enumerate(shards)]
        opened = Lane(builders, self.weights, self.seed, lane, self.lanes, self.replayed)
        start = self._positions[lane].start
        if start is not None:
            opened.load(start)
        return opened

    def _builder(self, number: int, rows: Dealt | IterableDataset, lane: int) -> RowBuilder:
        """A source in a lane."""
        reader = ShardReader(
            rows,
            lane,
            self.lanes,
            self.origins[number],
            None if self.replayed[number] else self.epochs,
            min(BLOCK, self.window_documents),
            self._removed[number],
            whole=self._examples is not None,
            kept=self._kept[number],
        )
        share = self.weights[number] / sum(self.weights)
        documents, characters = max(1, round(self.window_documents * share)), round(WINDOW_CHARACTERS * share) + 1
        place = (self.seed, lane, number)
        if self._examples is not None:
            return ExampleBuilder(reader, self._examples, self.max_length, documents, characters, place)
        return DocumentBuilder(reader, self._tokenize, self.max_length, documents, characters, self._eos[0], place)

    def _tokenize(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of documents, one after the other, and of each how many: one call of the Rust tokenizer."""
        words = self.frame is not None and self.frame.words
        tokens, lengths = array("i"), []  # a NumPy array for each document would take twice as long
        for text, ids in zip(texts, tokens_of_texts(texts, self._backend, words), strict=True):
            if text not in self._unended:
                ids += self._eos
            tokens.fromlist(self._bos + ids if self._bos else ids)
            lengths.append(len(self._bos) + len(ids))
        return np.frombuffer(tokens, dtype=np.int32), np.array(lengths)

    def batches(self, rows: int) -> Iterator[list[dict[str, Any]]]:
        """Yields lists of `rows` rows from this rank's position on: `input_ids`, `position_ids`, `labels`, (L,) each.

        With a frame they are `input_ids`, shorter than L only at the end of a source in a lane, and `number`. Each has
        the number of its `source` too, None of one that stands in for an ended lane.

        Raises:
            DataError: A source has no usable document, too many dirty rows, or cannot be read.
        """
        if self.ended:
            return
        shards = self._shards()
        self._clean(shards)
        build = {lane: self._lane(lane, shards).build for lane in self._in_order()}
        windows: dict[int, Window] = {}
        prefetch = Prefetch(build) if self.prefetch else None
        take = prefetch.take if prefetch else lambda lane: build[lane]()
        try:
            for count in itertools.count(1):
                batch = [self._row(take, windows) for _ in range(rows)]
                real = any(row is not None for row in batch)
                ended = all(position.ended for position in self._positions.values())
                # What all ranks have found is judged together; where data may end they have to speak at each batch.
                if self.epochs is not None or not count & (count - 1) or not count % JUDGED_BATCHES:
                    said = gather((real or not ended, self._findings()))
                    for number, source in enumerate(self.origins):
                        judge(source, [found[number] for _, found in said], self.max_dirty_share)
                    if self.epochs is not None and not any(going for going, _ in said):
                        self.ended = True  # Trainer asks again, for another epoch
                        return
                given = [self._padding() if row is None else row for row in batch]
                sizes = [len(row["input_ids"]) for row in given]
                self._tokens, self._places = self._tokens + sum(sizes), self._places + len(sizes) * max(sizes)
                yield given
        finally:
            if prefetch:
                prefetch.close()

    def length(self) -> int:
        """Rows of the run until every source was read for `epochs`, with those that stand in for an ended lane.

        It takes one reading and tokenization of each share. Every rank has to call this.
        """
        shards = self._shards()
        self._clean(shards)
        parts = each(lambda: {share: self._tokens_of(shards, share) for share in self._positions})
        tokens = {share: counts for part in parts for share, counts in part.items()}
        rows = 0
        for lane in range(self.lanes):
            read = [tokens[(lane + epoch) % self.lanes] for epoch in range(self.epochs or 1)]
            given = sum(-(-sum(of_source) // self.max_length) for of_source in zip(*read, strict=True))
            if given:
                rows = max(rows, (given - 1) * self.lanes + lane + 1)
        return rows

    def _tokens_of(self, shards: Sequence[Dealt | IterableDataset], share: int) -> list[int]:
        """Tokens of a share of each source."""
        counts = []
        for rows, origin, removed in zip(shards, self.origins, self._removed, strict=True):
            reader = ShardReader(rows, share, self.lanes, origin, epochs=1, removed=removed)
            counts.append(0)
            while texts := reader.take(self.window_documents, WINDOW_CHARACTERS):
                counts[-1] += len(self._tokenize(texts)[0])
        return counts

    def notes(self) -> list[str]:
        """Names streams that have fewer files, or parts of files, than there are lanes, which makes them slower."""
        lines = []
        for source, origin in zip(self.sources, self.origins, strict=True):
            if isinstance(source, Dataset):
                continue
            count = in_shards(source, self.lanes, origin).num_shards
            if count < self.lanes:
                lines.append(
                    f"source {origin.title!r} has fewer files or parts ({count}) than the stream has parallel "
                    f"lanes ({self.lanes}): each lane reads all of them and keeps its own rows; more files are quicker"
                )
        return lines

    def _next_lane(self) -> int:
        """The lane of this rank's next row."""
        return (self._served + (self.rank - self._served) % self.ranks) % self.lanes

    def _in_order(self) -> list[int]:
        """This rank's lanes, in the order in which they are needed."""
        return [(self._next_lane() + step) % self.lanes for step in range(0, self.lanes, self.ranks)]

    def _row(self, take: Callable[[int], Window], windows: dict[int, Window]) -> dict[str, Any] | None:
        """This rank's next row; None from a lane that has ended."""
        lane = self._next_lane()
        position = self._positions[lane]
        while lane not in windows or position.given == len(windows[lane].origins):
            if lane in windows:
                position.given = 0
            windows[lane] = take(lane)
            position.start, position.sources = windows[lane].start, windows[lane].sources
            self._found = None
            if not len(windows[lane].origins):
                break
        number = self._served + (self.rank - self._served) % self.ranks  # of the row in the run
        self._served += self.ranks
        place, window = position.given, windows[lane]
        if not len(window.origins):
            position.counts["rows"] += 1
            position.ended = True
            return None
        position.given += 1
        position.ended = window.last and position.given == len(window.origins)
        rows, source = window.rows, int(window.origins[place])
        row_counts = (1, rows.tokens[place], rows.documents[place], rows.cut[place], rows.continued[place])
        for name, count in zip(COUNTED, row_counts, strict=True):
            position.counts[name] += int(count)
        for kind, counts in enumerate((rows.tokens, rows.documents, rows.ended)):
            position.served[source][kind] += int(counts[place])
        if self.frame is not None:
            ids = self.frame.row(rows.input_ids[place][: rows.tokens[place]])
            return {"input_ids": ids, "number": number, "source": source}
        row = {"input_ids": rows.input_ids[place], "labels": rows.labels[place], "source": source}
        packed = self._examples is None or self._examples.packed
        return {**row, "position_ids": rows.position_ids[place]} if packed else row

    def _findings(self) -> list[Finding]:
        """Returns what this rank's lanes have found in each source by the end of the windows begun."""
        if self._found is None:
            lanes = [position.sources for position in self._positions.values() if position.sources]
            whole = len(lanes) == len(self._positions)
            self._found = [finding([lane[number] for lane in lanes], whole) for number in range(len(self.sources))]
        return self._found

    def _padding(self) -> dict[str, Any]:
        """A row that nothing is learned from."""
        if self.frame is not None:
            return {"input_ids": self.frame.row(np.zeros(0)), "number": 0, "source": None}
        return {
            "input_ids": np.full(self.max_length, self._eos[0], dtype=np.int32),
            "position_ids": np.arange(self.max_length, dtype=np.int32),
            "labels": np.full(self.max_length, IGNORED, dtype=np.int32),
            "source": None,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position after the last row served: of each lane the start of its window and the rows given since."""
        states = {str(lane): asdict(position) for lane, position in self._positions.items()}
        return {"lanes": self.lanes, "served": self._served, "states": states}

    @staticmethod
    def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
        """The states of all ranks as one."""
        merged = {lane: state for part in states for lane, state in part["states"].items()}
        return {"lanes": states[0]["lanes"], "served": states[0]["served"], "states": merged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stands where the merged states of all ranks stand, on this or another number of ranks.

        Raises:
            RecipeError: The recorded lanes are not a multiple of the ranks.
        """
        self._open(state["lanes"])
        self._served = state["served"]
        self._positions = {lane: Position(**copy.deepcopy(state["states"][str(lane)])) for lane in self._positions}

    @property
    def goes_on(self) -> bool:
        """True if a longer run stands at this position too: not where the data ends."""
        return self.epochs is None

    def facts(self) -> dict[str, Any]:
        """Reports the progress of all ranks, see `progress.facts_of`. Every rank has to call this."""
        by_lane = {lane: position for part in gather(self._positions) for lane, position in part.items()}
        positions = [by_lane[lane] for lane in sorted(by_lane)]  # the same on any number of ranks
        rows = [len(source) if isinstance(source, Dataset) else None for source in self.sources]
        found = facts_of(positions, self.max_length, self.origins, self.replayed, rows, self._removed)
        if self._examples is not None:  # whose rows are of many lengths
            tokens, places = np.sum(gather((self._tokens, self._places)), axis=0).tolist()
            full = found["rows"] * self.max_length if self._examples.packed else places
            given = found["tokens"] if self._examples.packed else tokens
            found["padding_share"] = round(1 - given / full, 4) if full else 0.0
        return found


def default_lanes(sources: Sequence[Dataset | IterableDataset], ranks: int) -> int:
    """The smallest multiple of the ranks from 8 up; for tables of fewer rows, the largest that gives each lane one."""
    lanes = -(-DEFAULT_LANES // ranks) * ranks
    rows = max(len(source) if isinstance(source, Dataset) else lanes for source in sources)
    return max(ranks, min(lanes, rows - rows % ranks))
