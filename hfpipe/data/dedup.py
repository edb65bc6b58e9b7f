"""Cleaning of a source: duplicates, near duplicates and what overlaps the suites are removed before a stage trains.

One pass over the source, after `skip`, `take` and `where`, judges every row among all others, whichever file or lane
they are in. What it finds is kept in the stage's folder, so that a resumed run does not look again. The ranks share the
pass; the main process judges, and what it finds does not depend on how many there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from hfpipe.core import display, ranks
from hfpipe.core.errors import MachineError
from hfpipe.data.cleaning.cleaned import Cleaned
from hfpipe.data.cleaning.contamination import SuiteIndex
from hfpipe.data.cleaning.minhash import Row, counts_of, judge, remove_sketch, write_sketch
from hfpipe.data.cleaning.text_rules import LISTED, Read, tidy_rows
from hfpipe.data.sources.formats import Rows, roles_of
from hfpipe.data.sources.load import load_rows
from hfpipe.data.stream.shard_reader import ShardReader
from hfpipe.recipe import Recipe, Source, hash_of
from hfpipe.recipe.row_formats import text_of

PIECES = 8  # of a table, for the ranks to share
CHARACTERS = 12  # that are looked at for each token of a stream that will be read: three times those of English
LEAST_ROWS = 2_000  # of each lane, which reads windows of hundreds ahead
ReadRows = Callable[[], Iterator[Row | None]]


@dataclass(frozen=True)
class Judged:
    """A source that was judged.

    Args:
        source: The source.
        pieces: What its rows say, in pieces that ranks share.
        digest: Hash of all that its judgement depends on.
        sketches: Of each piece, where its sketch is written.
        reasons: Why each row is removed; 0 where it stays.
    """

    source: Source
    pieces: Sequence[ReadRows]
    digest: str
    sketches: list[Path]
    reasons: np.ndarray


def require_cleaning(recipe: Recipe) -> None:
    """Raises a MachineError when near duplicates are to be found and datasketch is not installed."""
    asked = any(source.near is not None for stage in recipe.stages for source in stage.data)
    if asked and find_spec("datasketch") is None:
        raise MachineError(
            "`deduplicate: near` needs datasketch, which is not installed here. Install it with `pip install "
            "datasketch`, or write `deduplicate: exact`, which needs nothing."
        )


def cleaning_of(source: Source) -> str:
    """Names the rows that are removed from a source, in words."""
    near = None if source.near is None else f"near duplicates from a similarity of {source.near:g}"
    what = [near, "duplicates" if source.deduplicate == "exact" else None]
    return ", ".join(filter(None, [*what, "what overlaps a suite" if source.decontaminate else None]))


class Cleaner:
    """Cleans the sources of a stage.

    Args:
        folder: Where what was found is kept, seen by every rank.
        key: Hash of the stage, and of its suites where a source is compared with them.
        suites: The rows of every suite.
        groups: Sources whose `deduplicate` counts what another of them has as seen: the one that is judged first keeps
            it. A source without the word neither loses rows nor is looked at.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        suites: Mapping[str, Sequence[dict[str, Any]]],
        groups: Sequence[Sequence[Source]] = (),
        cleaned: Mapping[int, Cleaned] | None = None,
    ) -> None:
        self._folder, self._key, self._suites, self._groups = folder, key, suites, groups
        self._cleaned = cleaned or {}
        self._done: dict[int, Judged] = {}  # by the identity of the source: two may say the same

    def documents(self, source: Source, rows: Callable[[], Rows]) -> tuple[Rows, dict[str, Any]]:
        """The documents of a source, cleaned before or as `tables` cleans them, and facts for the report.

        Args:
            source: The source.
            rows: Opens it.
        """
        if (found := self._cleaned.get(id(source))) is not None:
            return load_rows(found.source, kinds=("text",)), found.facts
        return self.tables(rows(), source)

    def tables(
        self, rows: Dataset | IterableDataset, source: Source
    ) -> tuple[Dataset | IterableDataset, dict[str, Any]]:
        """Cleans a table as `rows` does; a stream is left to `shares`."""
        return self.rows(rows, source) if isinstance(rows, Dataset) else (rows, {})

    def rows(self, rows: Dataset | IterableDataset, source: Source) -> tuple[Dataset | IterableDataset, dict[str, Any]]:
        """The rows of a source that stay, and facts for the report. Every rank has to call this."""
        if not source.cleaned:
            return rows, {}
        if isinstance(rows, Dataset):
            ends = [len(rows) * piece // PIECES for piece in range(PIECES + 1)]
            parts = [rows.select(range(*ends[piece : piece + 2])) for piece in range(PIECES)]
            found = self._judged(source, [_rows_of(part, source) for part in parts], len(rows))
        else:
            found = self._judged(source, [_rows_of(rows, source)], None)
        reasons = np.concatenate(found)
        facts: dict[str, Any] = {"removed": counts_of(reasons), "removed_ids": []}
        if isinstance(rows, IterableDataset):
            return rows.filter(lambda _, place: not reasons[place], with_indices=True), facts
        gone = np.flatnonzero(reasons)
        first = rows.select(gone[:LISTED]) if len(gone) else []
        facts["removed_ids"] = [str(row.get("id", f"row {place}")) for row, place in zip(first, gone, strict=False)]
        return rows.select(np.flatnonzero(reasons == 0)), facts

    def shares(
        self, rows: IterableDataset, lanes: int, source: Source, tokens: int | None = None
    ) -> list[np.ndarray] | None:
        """The reason why each row of each lane's share is removed; 0 where it stays. Every rank has to call this.

        Args:
            rows: A stream with a column `text`, and shards enough for the lanes.
            lanes: Number of shares.
            source: What the rows were opened from.
            tokens: What each lane will read, so that a stream may be longer than anyone can look at; None for all. Far
                more is looked at, and a lane that comes to the end of that begins its share anew.
        """
        if not source.cleaned or id(source) in self._cleaned:
            return None
        characters = None if tokens is None else tokens * CHARACTERS
        texts = [_rows_of_share(rows, lane, lanes, source, characters) for lane in range(lanes)]
        return self._judged(source, texts, characters)

    def _judged(self, source: Source, pieces: Sequence[ReadRows], size: int | None) -> list[np.ndarray]:
        """The reasons of each piece, looked up or worked out."""
        sharing = self._sharing(source)
        before = takewhile(lambda key: key != id(source), self._done)
        earlier = [self._done[key] for key in before if key in sharing]
        seen = {name: len(rows) for name, rows in self._suites.items()} if source.decontaminate else None
        before_it = [*sharing.values(), *(one.digest for one in earlier)]
        digest = hash_of([self._key, source, len(pieces), size, seen, before_it])[:16]
        path = self._folder / f"{digest}.npz"
        sketches = [self._folder / f"{digest}-{number}" for number in range(len(pieces))]
        judged = Judged(source, pieces, digest, sketches, np.zeros(0, np.uint8))
        if not ranks.from_main(path.exists()):
            self._look([*earlier, judged], path, near=any(one.near is not None for one in sharing.values()))
        saved = np.load(path)
        self._done[id(source)] = replace(judged, reasons=saved["reasons"])
        if ranks.is_main() and sharing.keys() <= self._done.keys():  # nobody is left who would compare with them
            for sketch in [sketch for key in sharing for sketch in self._done[key].sketches]:
                remove_sketch(sketch)
        return np.split(saved["reasons"], np.cumsum(saved["sizes"])[:-1])

    def _sharing(self, source: Source) -> dict[int, Source]:
        """The sources that share what they have seen with this one, itself among them."""
        group = next((group for group in self._groups if any(one is source for one in group)), ())
        others = [one for one in group if one.deduplicate is not None and source.deduplicate is not None]
        return {id(one): one for one in [*others, source]}

    def _look(self, judged: Sequence[Judged], path: Path, *, near: bool) -> None:
        """Judges the last of sources that share what they have seen, and keeps what it finds in `path`."""
        begin = time.perf_counter()
        *earlier, last = judged
        source = last.source
        wanted = [
            (piece, sketch, one.source.decontaminate)
            for one in judged
            for piece, sketch in zip(one.pieces, one.sketches, strict=True)
        ]
        index = None
        if any(suites for _, _, suites in wanted):
            index = SuiteIndex([row for rows in self._suites.values() for row in rows])

        def write_all() -> None:
            for piece, sketch, suites in wanted[ranks.rank() :: ranks.ranks()]:
                if not sketch.with_suffix(".npz").exists():
                    write_sketch(piece(), sketch, near=near, index=index if suites else None)

        def judge_all() -> None:
            if not ranks.is_main():
                return
            reasons, sizes = judge(
                last.sketches,
                exact=source.deduplicate == "exact",
                near=source.near,
                suites=index if source.decontaminate else None,
                earlier=[(one.sketches, one.reasons) for one in earlier],
            )
            beside = path.with_name(f".{path.name}")
            with beside.open("wb") as file:
                np.savez_compressed(file, reasons=reasons, sizes=sizes)
            beside.replace(path)
            found = ", ".join(f"{count:,} ({why})" for why, count in counts_of(reasons).items()) or "nothing"
            seconds = time.perf_counter() - begin
            ranks.say(f"  {source.title}: {len(reasons):,} rows cleaned in {seconds:.0f} s, removed: {found}")

        with display.doing(f"cleaning {source.title}"):
            ranks.each(write_all)
            ranks.each(judge_all)


def _rows_of(rows: Dataset | IterableDataset, source: Source) -> ReadRows:
    """Returns each row in its place; None for the dirty ones."""

    def tidy() -> Iterator[Row | None]:
        read, given = Read(), 0
        for row in tidy_rows(rows, source, read):
            yield from [None] * (read.rows - 1 - given)
            yield row
            given = read.rows
        yield from [None] * (read.rows - given)

    return tidy


def _rows_of_share(rows: IterableDataset, lane: int, lanes: int, source: Source, most: int | None) -> ReadRows:
    """Returns the rows of a lane's first share, each in its place, up to so many characters; None for dirt."""

    def tidy() -> Iterator[Row | None]:
        whole = roles_of(rows) != "text"
        reader, given, characters = ShardReader(rows, lane, lanes, source, epochs=1, whole=whole), 0, 0
        while read := reader.take(1):
            row = read[0] if whole else {"text": read[0]}
            yield from [None] * (reader.rows - 1 - given)
            yield row
            given = reader.rows
            characters += len(text_of(row))
            if most is not None and given >= LEAST_ROWS and characters >= most:
                return
        yield from [None] * (reader.rows - given)

    return tidy
