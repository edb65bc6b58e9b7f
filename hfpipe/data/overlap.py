"""Overlap by content: which rows of a suite stand in the data of a stage.

A row overlaps when its whole text does, or when one document has at least half of its 13-word sequences. Brown et al.
2020 (arXiv:2005.14165, appendix C) take any one, which in web text finds many innocent rows; those are only counted.
The share is in the manner of Chowdhery et al. 2022 (arXiv:2204.02311). As in the former, words are compared without
case and punctuation, and a sequence in more than ten training rows is a common phrase (a template, a licence).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from hfpipe.data.shift import text_of

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
