"""Dirty rows: what is left out, what is cut or mended, and how it is counted.

The rules, in this order, for every text that is trained on:

- a value that is missing, or is not a text: left out;
- a text with bytes that are not UTF-8 (`decoding.py` marks them where a file is read): left out, for nobody knows what
  they were; a file in another encoding is not learned as noise, it ends the run by `max_dirty_share`;
- a text beyond the limit of characters: cut there;
- control characters that no text needs (C0 and DEL, without tab, line feed, form feed and carriage return; the set of
  ftfy's `remove_control_chars`): removed;
- lone surrogates, halves of a character: replaced by U+FFFD;
- a text without anything but white space: left out.

What is left out is dirty and counts for `max_dirty_share`; what is cut or mended is trained on, and only reported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset

from hfpipe.core.errors import DataError
from hfpipe.data.sources.batches import blocks_of
from hfpipe.data.sources.decoding import LONE, UNDECODABLE
from hfpipe.data.sources.templates import BESIDE_MESSAGES, COMPLETION_TURNS
from hfpipe.recipe import Source

MAX_CHARACTERS = 10_000_000  # of a document; what is longer is cut
ROW_CHARACTERS = 1_000_000  # of a text of a row that is cut to max_length tokens later
LISTED = 20  # ids of rows that the report names
JUDGED_ROWS = 1_000  # of a source, before its share of dirty rows means anything

LOOK = "Look at its files, its `where`, `skip` and `take`, and at what cleaning removes."
CONTROL = bytes({*range(0x20), 0x7F} - {*b"\t\n\f\r"})
SURROGATES = re.compile(f"[\ud800-\udfff{LONE}]")
MISSING, NOT_TEXT, NOT_UTF8, EMPTY = "missing", "not a text", "not UTF-8", "empty"
CUT, CONTROLS, HALVES = "cut for length", "control characters removed", "lone surrogates replaced"


def tidy(text: Any, limit: int = MAX_CHARACTERS) -> tuple[str | None, Sequence[str]]:
    """A text as it is trained on, or None; and what was done to it, or why it is left out.

    Args:
        text: A value of the data.
        limit: Characters that are kept.
    """
    if not isinstance(text, str):
        return None, (MISSING if text is None else NOT_TEXT,)
    done = []
    if len(text) > limit:
        text = text[:limit]
        done.append(CUT)
    if not text.isascii():
        if UNDECODABLE in text:
            return None, (NOT_UTF8,)
        mended = SURROGATES.sub("\ufffd", text)
        if mended != text:
            text = mended
            done.append(HALVES)
    encoded = text.encode()  # deleting bytes is far quicker than a search for characters
    if len(kept := encoded.translate(None, CONTROL)) < len(encoded):
        text = kept.decode()
        done.append(CONTROLS)
    if not text or text.isspace():
        return None, (EMPTY,)
    return text, done


def tidy_row(row: Mapping[str, Any], limit: int = ROW_CHARACTERS) -> tuple[dict[str, Any] | None, Sequence[str]]:
    """A row of fine-tuning with its texts as they are trained on, or None; and what was done, or why it is left out.

    A prompt may be empty, and so may the content of a turn that calls a tool.

    Args:
        row: A row with the columns of a role; `id`, `label` and what stands beside messages are not looked at.
        limit: Characters of each text that are kept.
    """
    new, done = dict(row), dict[str, None]()
    for column, value in row.items():
        if column in ("id", "label", COMPLETION_TURNS, *BESIDE_MESSAGES):
            continue
        if column == "messages" or ("chosen" in row and isinstance(value, list)):  # a prompt or an answer in turns
            new[column], found = _tidy_turns(value, limit)
        else:
            new[column], found = tidy(value, limit)
            if column == "prompt" and found == (EMPTY,):
                new[column], found = "", ()
        if new[column] is None:
            return None, found
        done |= dict.fromkeys(found)
    return new, [*done]


def _tidy_turns(turns: Any, limit: int) -> tuple[list[Any] | None, Sequence[str]]:
    """A conversation; see `tidy_row`."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return None, (MISSING if turns is None else NOT_TEXT,)
    new, done, said = [], dict[str, None](), False
    for turn in turns:
        content = turn.get("content")
        if not (content is None or isinstance(content, str)):  # a picture among its parts, or a number
            return None, (NOT_TEXT,)
        if content:
            content, found = tidy(content, limit)
            if content is None and found != (EMPTY,):
                return None, found
            said = said or content is not None
            done |= dict.fromkeys(found if content is not None else ())
            turn = {**turn, "content": content or ""}
        new.append(turn)
    return (new, [*done]) if said else (None, (EMPTY,))


class Tally:
    """Rows counted by what was found, and the ids of the first.

    Args:
        counts: Reason to rows.
        ids: Of different rows, at most `LISTED`.
    """

    def __init__(self, counts: Mapping[str, int] | None = None, ids: Sequence[str] = ()) -> None:
        self.counts, self.ids = dict(counts or {}), list(ids)

    def add(self, reasons: Sequence[str], name: str) -> None:
        """Counts a row that has a name."""
        for why in reasons:
            self.counts[why] = self.counts.get(why, 0) + 1
        if len(self.ids) < LISTED and name not in self.ids:
            self.ids.append(name)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {why}" for why, count in self.counts.items())

    @property
    def encoding_advice(self) -> str:
        """Returns advice on files that are not UTF-8, where there are any."""
        return " For files that are not UTF-8, give the source its `encoding`." if NOT_UTF8 in self.counts else ""


def merged(tallies: Sequence[Tally]) -> Tally:
    """Tallies of one source, over its lanes."""
    reasons = sorted({why for tally in tallies for why in tally.counts})
    counts = {why: sum(tally.counts.get(why, 0) for tally in tallies) for why in reasons}
    names = dict.fromkeys(name for tally in tallies for name in tally.ids)
    return Tally(counts, [*names][:LISTED])


def refuse_dirt(source: Source, dirty: Tally, rows: int, max_dirty_share: float) -> None:
    """Raises a DataError when too many of the rows that were read of a source are dirty."""
    if len(dirty) <= max_dirty_share * rows:
        return
    blank = " Of a text file with blank lines, `sample_by: paragraph` makes its paragraphs the documents."
    raise DataError(
        f"source {source.path!r}: {len(dirty):,} of {rows:,} rows read are dirty ({dirty}), more than the "
        f"{max_dirty_share:.2%} that max_dirty_share allows. The first: {', '.join(dirty.ids)}. Correct them, "
        f"leave them out with `where`, or raise max_dirty_share of the stage.{dirty.encoding_advice}"
        f"{blank if source.path == 'text' and EMPTY in dirty.counts else ''}"
    )


@dataclass(frozen=True)
class Finding:
    """Counts of the rows of a source that the lanes found dirty, mended or removed.

    Args:
        rows: Rows read, each counted once.
        whole: Whether every one of the lanes has read all that is its own.
        tokens: Tokens of its documents.
        dirty: Rows that were left out.
    """

    rows: int
    whole: bool
    tokens: int
    dirty: Tally


def finding(lanes: Sequence[Mapping[str, Any]], whole: bool) -> Finding:
    """Sums up the facts of lanes on a source (see `Window`), of all lanes or of those that have begun."""
    return Finding(
        rows=sum(facts["rows"] for facts in lanes),
        whole=whole and all(facts["epochs"] for facts in lanes),
        tokens=sum(facts["tokens"] for facts in lanes),
        dirty=merged([Tally(facts["dirty"], facts["dirty_ids"]) for facts in lanes]),
    )


def judge(source: Source, findings: Sequence[Finding], max_dirty_share: float) -> None:
    """Raises a DataError when a source has too many dirty rows, or not one document, in the lanes of all ranks."""
    whole = all(found.whole for found in findings)
    rows = sum(found.rows for found in findings)
    if whole or rows >= JUDGED_ROWS:
        refuse_dirt(source, merged([found.dirty for found in findings]), rows, max_dirty_share)
    if whole and not any(found.tokens for found in findings):
        raise DataError(f"source {source.path!r} has no document with text in it. {LOOK}")


@dataclass
class Read:
    """The rows read from a source that is held as rows.

    Args:
        rows: Rows read.
        dirty: Those that were left out.
        mended: Those that were cut or mended.
    """

    rows: int = 0
    dirty: Tally = field(default_factory=Tally)
    mended: Tally = field(default_factory=Tally)

    def facts(self) -> dict[str, Any]:
        """The facts for the report, as `TokenStream.facts` has them."""
        dirty = {"dirty": self.dirty.counts, "dirty_ids": self.dirty.ids}
        return {"rows": self.rows, **dirty, "mended": self.mended.counts, "mended_ids": self.mended.ids}


def tidy_rows(
    rows: Dataset | IterableDataset, source: Source, read: Read, limit: int = ROW_CHARACTERS
) -> Iterator[dict[str, Any]]:
    """The rows of a source one after the other as they are trained on; what was found is counted in `read`."""
    for block in blocks_of(rows, source):
        for values in zip(*block.values(), strict=True):
            row, found = tidy_row(dict(zip(block, values, strict=True)), limit)
            read.rows += 1
            if found:
                name = values[list(block).index("id")] if "id" in block else None
                name = f"row {read.rows - 1}" if name is None else str(name)
                (read.dirty if row is None else read.mended).add(found, name)
            if row is not None:
                yield row
