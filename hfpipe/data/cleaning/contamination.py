"""Overlap by content: which rows of a suite stand in the data of a stage.

A row overlaps when its whole text does, or when one document has at least half of its 13-word sequences. Brown et al.
2020 (arXiv:2005.14165, appendix C) take any one, which in web text finds many innocent rows; those are only counted.
The share is in the manner of Chowdhery et al. 2022 (arXiv:2204.02311). As in the former, words are compared without
case and punctuation, and a sequence in more than ten training rows is a common phrase (a template, a licence).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from xxhash import xxh3_64_intdigest

from hfpipe.core import ranks
from hfpipe.core.errors import DataError
from hfpipe.core.files import write_json
from hfpipe.data.sources.batches import rows_of
from hfpipe.data.sources.load import load_rows
from hfpipe.recipe import Recipe, Source
from hfpipe.recipe.row_formats import text_of

GRAM = 13
COMMON = 10  # training rows: a sequence in more of them is a phrase
HELD = 0.5  # of a row's sequences
# Scripts that put no space between words are compared character by character.
NO_SPACES = r"\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{NO_SPACES}]|[^\W_{NO_SPACES}]+")
AT_ONCE = 1_000_000  # characters
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass
class Overlap:
    """What the rows of suites share with a source: places in the list of rows.

    Args:
        exact: Rows whose whole text is there.
        partly: Rows of which one row of the source has at least half the sequences.
        touched: Rows that share any one sequence which is no common phrase.
        looked_at: Number of rows of the source.
    """

    exact: list[int] = field(default_factory=list)
    partly: list[int] = field(default_factory=list)
    touched: list[int] = field(default_factory=list)
    looked_at: int = 0


def words_of(text: str) -> np.ndarray:
    """(W,) one hash a word, without case and punctuation; the same in every process."""
    if len(text) > AT_ONCE:  # a list of ten million words is a gigabyte; one word may be cut in two
        return np.concatenate([words_of(text[start : start + AT_ONCE]) for start in range(0, len(text), AT_ONCE)])
    return np.fromiter(map(xxh3_64_intdigest, map(str.encode, WORD.findall(text.lower()))), np.uint64)


def grams_of(words: np.ndarray, length: int = GRAM) -> np.ndarray:
    """(W - length + 1,) hashes of all sequences; one of all the words where there are fewer."""
    size = min(length, len(words))
    if not size:
        return words
    rolled = np.zeros(len(words) - size + 1, np.uint64)
    for place in range(size):
        rolled = (rolled ^ (words[place : len(words) - size + 1 + place] * MULTIPLIER)) * MULTIPLIER
        rolled ^= rolled >> np.uint64(29)
    return rolled


def _whole(words: np.ndarray) -> int:
    return xxh3_64_intdigest(words.tobytes())


class SuiteIndex:
    """The rows of suites, ready to be looked for.

    Args:
        rows: The rows, with `text`, `prompt` and `completion`, `messages` or other columns of text.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        words = [words_of(text_of(row)) for row in rows]
        self._whole: dict[int, list[int]] = {}
        for place, one in enumerate(words):
            if len(one):
                self._whole.setdefault(_whole(one), []).append(place)
        self._lengths = set(map(len, words)) - {0}
        grams = [np.unique(grams_of(one)) if len(one) >= GRAM else np.zeros(0, np.uint64) for one in words]
        joined = np.concatenate([np.zeros(0, np.uint64), *grams])
        self._known, places = np.unique(joined, return_inverse=True)  # (K,) sequences of all rows
        owners = np.repeat(np.arange(len(rows)), [len(one) for one in grams])
        order = np.argsort(places, kind="stable")
        self._place, self._owner = places[order], owners[order]  # (G,) each sequence of each row, by sequence
        self._first = np.searchsorted(self._place, np.arange(len(self._known) + 1))
        self._count = len(rows)

    def found_in(self, words: np.ndarray) -> tuple[list[int], np.ndarray]:
        """The rows that a text is as a whole, and which of the rows' sequences it holds, each once."""
        rows = self._whole.get(_whole(words), []) if len(words) in self._lengths else []
        if len(words) < GRAM or not len(self._known):
            return rows, np.zeros(0, np.int64)
        grams = grams_of(words)
        places = np.minimum(np.searchsorted(self._known, grams), len(self._known) - 1)
        return rows, np.unique(places[self._known[places] == grams])

    def look_in(self, rows: Iterable[dict[str, Any]]) -> Overlap:
        """Looks for the suites' rows in rows that are trained on."""
        overlap, exact = Overlap(), set()
        seen = np.zeros(len(self._known), np.int64)  # training rows that hold each sequence
        hits: list[np.ndarray] = []  # of each training row that holds any, which
        for row in rows:
            overlap.looked_at += 1
            whole, found = self.found_in(words_of(text_of(row)))
            exact |= {*whole}
            if len(found):
                seen[found] += 1
                hits.append(found.astype(np.int32))
        telling = seen <= COMMON
        sizes = np.bincount(self._owner[telling[self._place]], minlength=self._count)  # telling sequences of each row
        partly, touched = set(), set()
        for found in hits:
            owners = [self._owner[self._first[place] : self._first[place + 1]] for place in found[telling[found]]]
            if owners:
                here, shared = np.unique(np.concatenate(owners), return_counts=True)
                touched |= {*here.tolist()}
                partly |= {*here[shared >= HELD * sizes[here]].tolist()}
        overlap.exact, overlap.partly, overlap.touched = sorted(exact), sorted(partly), sorted(touched)
        return overlap


TABLE_ROWS, STREAM_ROWS = 100_000, 10_000  # looked at: about ten seconds, and what a network brings in as long
NAMED = 3  # rows of a suite that a message names
Rows = Sequence[dict[str, Any]]


def require_no_overlap(recipe: Recipe, suites: Mapping[str, Rows], folder: Path | None = None) -> list[dict[str, Any]]:
    """Looks for the rows of every suite in the data of every stage.

    Args:
        recipe: The recipe; with `overlap: report` nothing is refused.
        suites: The rows of every suite.
        folder: The run folder, where overlap.json keeps what was found; None for nowhere.

    Returns:
        A line for each source and suite, see `_pairs`.

    Raises:
        DataError: A suite's row is trained on.
    """
    pairs: list[dict[str, Any]] = []
    if ranks.is_main() and suites:
        pairs = list(_pairs(recipe, suites))
        if folder is not None:
            write_json(folder / "overlap.json", {"pairs": pairs})
    pairs = ranks.from_main(pairs)
    found = [line for line, pair in zip(overlap_lines(pairs), pairs, strict=True) if pair["which"]]
    if found and recipe.overlap == "refuse":
        more = f" So do rows of {len(found) - 1} more pairs of suite and source." if len(found) > 1 else ""
        raise DataError(
            f"{found[0]}.{more} A score on rows that were trained on says nothing. Leave them out of the source "
            "(`decontaminate: true`, `where`, another split) or out of the suite, or write `overlap: report` to go on "
            "and have it in the report."
        )
    return pairs


def overlap_lines(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was found, a sentence for each pair."""
    lines = []
    for pair in pairs:
        source = f"{pair['looked_at']:,} rows of stages.{pair['stage']} ({pair['source']})"
        if pair["which"]:
            text = f"suite {pair['suite']}: {pair['held']:,} of {pair['rows']:,} rows stand in {source}"
            lines.append(
                f"{text}, as a whole or by half or more of their 13-word sequences: {'; '.join(pair['which'])}"
            )
        else:
            lines.append(f"suite {pair['suite']}: no row stands in {source}")
    return lines


def _pairs(recipe: Recipe, suites: Mapping[str, Rows]) -> Iterable[dict[str, Any]]:
    """For each source and suite: `rows` of the suite, `looked_at`, and how many are `exact`, `partly`, `touched`."""
    index = SuiteIndex([row for rows in suites.values() for row in rows])
    for stage in recipe.stages:
        for source in stage.data:
            if source.decontaminate:  # what overlaps is removed before the stage trains, and counted there
                continue
            found = index.look_in(_rows(source, recipe.seed))
            start = 0
            for name, rows in suites.items():
                here = range(start, start + len(rows))
                start += len(rows)
                held = [place for place in sorted({*found.exact, *found.partly}) if place in here]
                yield {
                    "stage": stage.name,
                    "source": source.title,
                    "suite": name,
                    "rows": len(rows),
                    "looked_at": found.looked_at,
                    "held": len(held),
                    **{key: sum(p in here for p in getattr(found, key)) for key in ("exact", "partly", "touched")},
                    "which": [_name(rows[place - here.start], place - here.start) for place in held[:NAMED]],
                }


def _rows(source: Source, seed: int) -> Iterable[dict[str, Any]]:
    """Rows of a source: of a large table at even distances, of a stream the first."""
    rows = load_rows(source, seed=seed)
    if not isinstance(rows, Dataset):
        return islice(rows_of(rows, source), STREAM_ROWS)
    if len(rows) > TABLE_ROWS:
        rows = rows.select([place * len(rows) // TABLE_ROWS for place in range(TABLE_ROWS)])
    return rows_of(rows, source)


def _name(row: Mapping[str, Any], place: int) -> str:
    """A row's id, or its place, and its first words."""
    words = " ".join(text_of(dict(row)).split()[:8])
    return f"{row.get('id', f'row {place}')} '{words[:60]}...'"
