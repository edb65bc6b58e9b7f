"""Overlap by content: which rows of a suite stand in the data of a stage.

A row is looked for by its texts: what it asks and answers as one, and each sentence of a pair. A row overlaps when one
of its texts, or a question of some length, is a text of the data, or when one document holds at least half of the words
of a text in runs of 13 (8 in texts under 27 words). Brown et al. 2020 (arXiv:2005.14165, appendix C) take any one run,
which in web text finds many innocent rows; those are only counted. The share is in the manner of Chowdhery et al. 2022
(arXiv:2204.02311). Of texts under 17 words, a copy with a changed word and another question of the same pattern look
the same; they are counted as near. Rows of question and answer that share a question, and not its answer, are near too,
unless the whole question is there, and asked for the same (a system turn that differs asks for something else, such as
another language). Words are compared without case and punctuation. A run that more than ten training
rows and several texts of the suites hold is a common phrase (a template, a licence).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
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
from hfpipe.recipe.row_formats import format_of, question_of, text_of, texts_of

GRAM = 13
COMMON = 10  # training rows: a sequence in more of them is a phrase
HELD = 0.5  # of a text's words
RUNS = ((27, GRAM), (17, 8), (11, 5), (6, 3))  # texts of at least so many words are looked for by runs of so many
FOUND = ("exact", "partly", "near", "touched")
NEAR = 8  # runs of fewer words show that texts are near, and not that one is a copy
QUESTION = 8  # words: shorter questions and answers are anybody's
# Scripts that put no space between words are compared character by character.
NO_SPACES = r"\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{NO_SPACES}]|[^\W_{NO_SPACES}]+")
AT_ONCE = 1_000_000  # characters
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass
class Overlap:
    """Rows that the suites share with a source, as places in the list of rows.

    Args:
        exact: Rows whose whole text is there.
        partly: Rows of which one row of the source has at least half the words of a text.
        near: Rows of short texts that differ by about a word from a row of the source.
        touched: Rows that share any one run of 13 words which is no common phrase.
        looked_at: Number of rows of the source.
    """

    exact: list[int] = field(default_factory=list)
    partly: list[int] = field(default_factory=list)
    near: list[int] = field(default_factory=list)
    touched: list[int] = field(default_factory=list)
    looked_at: int = 0


@dataclass(frozen=True)
class Found:
    """Content of the suites in one row that is trained on, before it is known how many other rows hold it too.

    Args:
        row: Its place.
        exact: Rows of the suites that have a text of it as a whole.
        parts: Hashes of the suites' questions and answers that it has as a whole.
        instruction: See `instruction_of`.
        answered: Whether it is a question and its answer.
        runs: Of each length, which of the suites' runs of words it holds.
    """

    row: int
    exact: list[int]
    parts: list[int]
    instruction: int
    answered: bool
    runs: list[np.ndarray]


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


def instruction_of(row: Mapping[str, Any]) -> int:
    """Returns a hash of what the system's turns of a conversation ask for; 0 where there is none."""
    said = [turn.get("content") or "" for turn in row.get("messages") or [] if turn["role"] == "system"]
    words = words_of("\n".join(map(str, said)))
    return _whole(words) if len(words) else 0


def answer_words(row: Mapping[str, Any]) -> int:
    """Returns how many of a row's last words are its answer: the completion, or the last turn of the assistant."""
    if "completion" in row:
        said = row["completion"]
    elif (turns := row.get("messages")) and turns[-1]["role"] == "assistant":
        said = turns[-1].get("content")
    else:
        return 0
    return len(words_of(said)) if isinstance(said, str) else 0


def parts_of(row: Mapping[str, Any]) -> list[str]:
    """The columns and turns of a row that are texts of their own, where it joins several: a question, an answer."""
    joined = [row[name] for columns in format_of(row).texts if len(columns) > 1 for name in columns]
    said = [row.get("messages") or [], *(part for part in joined if isinstance(part, list))]
    turns = [turn.get("content") for one in said for turn in one if turn["role"] != "system"]
    return [part for part in (*joined, *turns) if isinstance(part, str)]


class SuiteIndex:
    """The rows of suites, ready to be looked for.

    Args:
        rows: The rows, in any format.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        texts, answers = [], []
        for place, row in enumerate(rows):
            said = texts_of(row)
            texts += [(place, words_of(text)) for text in said]
            answers += [answer_words(row) if len(said) == 1 else 0] * len(said)
        self._instructions = [instruction_of(row) for row in rows]
        questions = [(place, words_of(question_of(row))) for place, row in enumerate(rows)]
        self._whole = _by_whole(texts)
        self._parts = _by_whole([(place, words) for place, words in (*texts, *questions) if len(words) >= QUESTION])
        self._lengths = {len(words) for _, words in (*texts, *questions)} - {0}
        longest = (10**9, *(least for least, _ in RUNS))
        self._runs = [_Runs(GRAM, texts, answers)]  # of all texts, and of the texts of each length
        for number, (least, size) in enumerate(RUNS):
            chosen = [place for place, (_, words) in enumerate(texts) if least <= len(words) < longest[number]]
            self._runs.append(_Runs(size, [texts[place] for place in chosen], [answers[place] for place in chosen]))

    def look_at(self, row: Mapping[str, Any], place: int, *, near: bool = True) -> Found | None:
        """Returns what a row that is trained on holds; None where that is nothing.

        Args:
            row: The row.
            place: Its place in the source.
            near: Whether short runs are looked for too, which only show that texts are near.
        """
        texts = [words_of(text) for text in texts_of(row)]
        exact = {one for words in texts if len(words) in self._lengths for one in self._whole.get(_whole(words), ())}
        every = [*texts, *(words_of(part) for part in parts_of(row))]
        parts = {_whole(words) for words in every if len(words) in self._lengths} & self._parts.keys()
        nothing = np.zeros(0, np.int64)
        wanted = [near or one.size >= NEAR for one in self._runs]
        runs = [
            np.unique(np.concatenate([nothing, *(one.found_in(words) for words in texts if asked)]))
            for one, asked in zip(self._runs, wanted, strict=True)
        ]
        if not (exact or parts or any(len(kinds) for kinds in runs)):
            return None
        return Found(place, sorted(exact), sorted(parts), instruction_of(row), answer_words(row) > 0, runs)

    def look_in(self, rows: Iterable[dict[str, Any]]) -> Overlap:
        """Looks for the suites' rows in rows that are trained on."""
        looked_at, found = 0, []
        for row in rows:
            found += [one] if (one := self.look_at(row, looked_at)) is not None else []
            looked_at += 1
        overlap, _ = self.judge(found)
        overlap.looked_at = looked_at
        return overlap

    def judge(self, found: Sequence[Found]) -> tuple[Overlap, set[int]]:
        """Judges all that rows of one source hold.

        Args:
            found: Of each row that holds anything.

        Returns:
            The suites' rows that overlap; and the rows of the source that make them, or hold a run of 13 words of a
            suite's that few rows hold.
        """
        exact = {place for one in found for place in one.exact}
        guilty = {one.row for one in found if one.exact}
        seen = Counter(part for one in found for part in one.parts)
        for one in found:
            for part in one.parts:
                if seen[part] <= COMMON or len(self._parts[part]) == 1:  # others are the one question of a whole task
                    known = [place for place in self._parts[part] if self._asks_for(place, one.instruction)]
                    exact |= {*known}
                    guilty |= {one.row} if known else set()
        partly: set[int] = set()
        near: set[int] = set()
        for number, runs in enumerate(self._runs[1:], 1):
            held, other_answer, by = runs.held([(one.row, one.runs[number], one.answered) for one in found])
            (partly if runs.size >= NEAR else near).update(held)
            near |= other_answer
            guilty |= by if runs.size >= NEAR else set()
        touched, _, _ = self._runs[0].held([(one.row, one.runs[0], one.answered) for one in found], share=0.0)
        counts = np.bincount(np.concatenate([np.zeros(0, np.int64), *(one.runs[0] for one in found)]))
        guilty |= {one.row for one in found if (counts[one.runs[0]] <= COMMON).any()}
        overlap = Overlap(sorted(exact), sorted(partly), sorted(near - exact - partly), sorted(touched))
        return overlap, guilty

    def _asks_for(self, place: int, instruction: int) -> bool:
        """Returns True if a row of the suites asks for what an instruction asks for; 0 is none, which fits any."""
        return not instruction or self._instructions[place] in (0, instruction)


def packed(found: Sequence[Found]) -> dict[str, np.ndarray]:
    """Returns what rows hold as arrays of numbers, for a file; see `unpacked`."""
    pairs = {
        "exact": [(place, value) for place, one in enumerate(found) for value in one.exact],
        "parts": [(place, value) for place, one in enumerate(found) for value in one.parts],
        **{
            f"runs{number}": [(place, value) for place, one in enumerate(found) for value in one.runs[number].tolist()]
            for number in range(len(RUNS) + 1)
        },
    }
    rows = [(one.row, one.instruction, one.answered) for one in found]
    return {"rows": np.array(rows, np.uint64).reshape(-1, 3)} | {
        name: np.array(values, np.uint64).reshape(-1, 2) for name, values in pairs.items()
    }


def unpacked(arrays: Mapping[str, np.ndarray], begin: int = 0) -> list[Found]:
    """Returns what `packed` made arrays of.

    Args:
        arrays: The arrays.
        begin: What is added to the places of the rows.
    """
    rows = arrays["rows"].tolist()

    def parts(name: str) -> list[np.ndarray]:
        pairs = arrays[name]
        return np.split(pairs[:, 1], np.searchsorted(pairs[:, 0], np.arange(1, len(rows))))

    names = ("exact", "parts", *(f"runs{number}" for number in range(len(RUNS) + 1)))
    columns = [parts(name) for name in names] if rows else []
    return [
        Found(
            row + begin,
            columns[0][place].tolist(),
            columns[1][place].tolist(),
            instruction,
            bool(answered),
            [column[place].astype(np.int64) for column in columns[2:]],
        )
        for place, (row, instruction, answered) in enumerate(rows)
    ]


def _by_whole(texts: Iterable[tuple[int, np.ndarray]]) -> dict[int, list[int]]:
    """Rows by the hash of all words of a text."""
    found: dict[int, list[int]] = {}
    for place, words in texts:
        if len(words):
            found.setdefault(_whole(words), []).append(place)
    return found


class _Runs:
    """Texts of suites, looked for by their runs of `size` words.

    Args:
        size: Words of a run.
        texts: The row that each belongs to, and its words.
        answers: Of each text, how many of its last words are the answer to the rest; 0 for none.
    """

    def __init__(self, size: int, texts: Sequence[tuple[int, np.ndarray]], answers: Sequence[int]) -> None:
        long = [place for place, (_, words) in enumerate(texts) if len(words) >= size]
        texts = [texts[place] for place in long]
        self._answers = np.array([answers[place] for place in long], np.int64)
        runs = [grams_of(words, size) for _, words in texts]
        self.size, self._row = size, [place for place, _ in texts]
        self._starts = np.cumsum([0, *(len(words) for _, words in texts)])  # of each text among the words of all
        inside = [np.arange(len(words))[::-1] < own for (_, words), own in zip(texts, self._answers, strict=True)]
        self._said = np.append(0, np.cumsum(np.concatenate([np.zeros(0, bool), *inside])))  # answers' words before each
        joined = np.concatenate([np.zeros(0, np.uint64), *runs])
        self._known, kinds = np.unique(joined, return_inverse=True)  # (K,) runs of all texts
        order = np.argsort(kinds, kind="stable")
        # (R,) of each run of each text, by kind: the text, and the place of its first word in it
        self._text = np.repeat(np.arange(len(texts)), [len(one) for one in runs])[order]
        self._place = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(one)) for one in runs)])[order]
        self._first = np.searchsorted(kinds[order], np.arange(len(self._known) + 1))

    def found_in(self, words: np.ndarray) -> np.ndarray:
        """Returns the runs that a text holds, each once."""
        if len(words) < self.size or not len(self._known):
            return np.zeros(0, np.int64)
        runs = grams_of(words, self.size)
        kinds = np.minimum(np.searchsorted(self._known, runs), len(self._known) - 1)
        return np.unique(kinds[self._known[kinds] == runs])

    def held(
        self, hits: Sequence[tuple[int, np.ndarray, bool]], share: float = HELD
    ) -> tuple[set[int], set[int], set[int]]:
        """Returns the rows with a text of which one row that is trained on holds at least so much; 0 is any run.

        The words count that no common phrase covers; a text has to have a few of them.

        Args:
            hits: Of each row that is trained on: its place, the runs that it holds, and whether it has an answer.
            share: The share.

        Returns:
            The rows of suites; those of which it has the question, or one like it, and another answer; and the places
            of the rows that hold the former.
        """
        hits = [hit for hit in hits if len(hit[1])]
        if not hits:
            return set(), set(), set()
        seen = np.zeros(len(self._known), np.int64)  # rows that hold each
        for _, found, _ in hits:
            seen[found] += 1
        several = np.array([len(np.unique(self._text[a:b])) > 1 for a, b in pairwise(self._first)])
        telling = ~((seen > COMMON) & several)
        begins, ends = self._words_in(np.flatnonzero(~telling))
        depth = np.zeros(self._starts[-1] + 1, np.int64)
        np.add.at(depth, begins, 1)
        np.add.at(depth, ends, -1)
        self._own = np.append(0, np.cumsum(np.cumsum(depth)[:-1] == 0))  # words of all texts before each that tell
        own = np.diff(self._own[self._starts])
        enough = np.minimum(HELD * np.diff(self._starts), NEAR) if share else 1
        rows: set[int] = set()
        others: set[int] = set()
        by: set[int] = set()
        for place, found, answered in hits:
            covered = self._covered(found[telling[found]], self._own)
            held = (covered > 0) & (covered >= share * own) & (own >= enough)
            if share and answered and held.any():
                other = (self._answers > 0) & (self._covered(found, self._said) < share * self._answers)
                others.update(self._row[text] for text in np.flatnonzero(held & other).tolist())
                held &= ~other
            rows.update(self._row[text] for text in np.flatnonzero(held).tolist())
            by |= {place} if held.any() else set()
        return rows, others - rows, by

    def _inside(self, kinds: np.ndarray) -> np.ndarray:
        """The places of runs of these kinds in the arrays of all runs."""
        return np.concatenate([np.zeros(0, np.int64), *(np.arange(*self._first[kind : kind + 2]) for kind in kinds)])

    def _words_in(self, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and last word (exclusive) of each run of these kinds, among the words of all texts."""
        inside = self._inside(kinds)
        begins = np.sort(self._starts[self._text[inside]] + self._place[inside])
        return begins, begins + self.size

    def _covered(self, kinds: np.ndarray, counted: np.ndarray) -> np.ndarray:
        """(T,) how many words of each text the runs of these kinds cover, of those that `counted` sums up."""
        begins, ends = self._words_in(kinds)
        covered = np.zeros(len(self._row), np.int64)
        if len(begins):
            ends[:-1] = np.minimum(ends[:-1], begins[1:])
            text = np.searchsorted(self._starts, begins, side="right") - 1
            np.add.at(covered, text, counted[ends] - counted[begins])
        return covered


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
    """Describes the overlap, a sentence for each pair."""
    lines = []
    for pair in pairs:
        source = f"{pair['looked_at']:,} rows of stages.{pair['stage']} ({pair['source']})"
        if pair["which"]:
            stand = "stands" if pair["held"] == 1 else "stand"
            text = f"suite {pair['suite']}: {pair['held']:,} of {pair['rows']:,} rows {stand} in {source}"
            lines.append(f"{text}, as a whole or by half or more of their words: {'; '.join(pair['which'])}")
        else:
            short = "1 short one is" if pair["near"] == 1 else f"{pair['near']:,} short ones are"
            near = f"; {short} near to rows of it, within about a word" if pair["near"] else ""
            lines.append(f"suite {pair['suite']}: no row stands in {source}{near}")
    return lines


def _pairs(recipe: Recipe, suites: Mapping[str, Rows]) -> Iterable[dict[str, Any]]:
    """Facts on each source and suite: `rows` of the suite, `looked_at`, and how many rows were found in each way."""
    index = SuiteIndex([row for rows in suites.values() for row in rows])
    for stage in recipe.stages:
        for source in stage.data:
            if source.decontaminate:  # what overlaps is removed before the stage trains, and counted there
                continue
            found = index.look_in(_rows(source))
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
                    **{key: sum(p in here for p in getattr(found, key)) for key in FOUND},
                    "which": [_name(rows[place - here.start], place - here.start) for place in held[:NAMED]],
                }


def _rows(source: Source) -> Iterable[dict[str, Any]]:
    """Rows of a source: of a large table at even distances, of a stream the first."""
    rows = load_rows(source)
    if not isinstance(rows, Dataset):
        return islice(rows_of(rows, source), STREAM_ROWS)
    if len(rows) > TABLE_ROWS:
        rows = rows.select([place * len(rows) // TABLE_ROWS for place in range(TABLE_ROWS)])
    return rows_of(rows, source)


def _name(row: Mapping[str, Any], place: int) -> str:
    """A row's id, or its place, and its first words."""
    words = " ".join(text_of(dict(row)).split()[:8])
    return f"{row.get('id', f'row {place}')} '{words[:60]}...'"
