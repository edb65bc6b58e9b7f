"""`hfpipe preview`: the first rows of each stage as the model will see them, on a terminal or as a page."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hfpipe.core import display
from hfpipe.core.errors import MachineError
from hfpipe.core.files import write_text
from hfpipe.core.output import has_colours, painted
from hfpipe.data.cleaning.text_rules import Read, refuse_dirt, tidy_rows
from hfpipe.data.labels import plain_labels
from hfpipe.data.sources.load import load_rows
from hfpipe.data.tokenize import IGNORED
from hfpipe.pipeline.check import run_tokenizer
from hfpipe.pipeline.context import quiet_libraries
from hfpipe.recipe import Classification, Recipe
from hfpipe.recipe.row_formats import formats_of_stage
from hfpipe.report.layout import render
from hfpipe.stages.compatibility import encode_rows


@dataclass(frozen=True)
class Token:
    """A token of a row.

    Args:
        text: Its text; that of a part of a letter is the sign for one.
        id: Its number.
        trained: Whether it is learned.
    """

    text: str
    id: int
    trained: bool


@dataclass(frozen=True)
class Row:
    """A row as the model sees it.

    Args:
        stage: The stage.
        source: The title of its source.
        number: Its place in it.
        learned: What is learned of it, in words.
        tokens: Its tokens.
        rejected: Those of the answer that is not preferred; none elsewhere.
        runs: The text of the tokens in runs of trained and untrained ones, and of the rejected answer.
    """

    stage: str
    source: str
    number: int
    learned: str
    tokens: Sequence[Token]
    rejected: Sequence[Token]
    runs: tuple[Sequence[tuple[str, bool]], Sequence[tuple[str, bool]]]


def preview(recipe: Recipe, count: int, page: str | None = None) -> None:
    """Shows the first rows of each stage; tokens that are trained on are green (or in brackets).

    Args:
        recipe: The recipe.
        count: Rows of each source.
        page: A file for a page of HTML, token by token; printed when None.

    Raises:
        UserError: The data cannot be read, or the page not be written.
    """
    quiet_libraries()
    if page is not None:
        text = render("preview.html", title=f"{recipe.name}: the first rows", rows=list(first_rows(recipe, count)))
        try:
            write_text(Path(page), text)
        except OSError as error:
            raise MachineError(f"{page} cannot be written: {error.strerror}.") from error
        display.say(f"written to {page}", "result")
        return
    coloured, rows = has_colours(sys.stdout), list(first_rows(recipe, count))
    display.clear()
    for row in rows:
        print(f"{row.stage}, {row.source}, row {row.number}: {len(row.tokens)} tokens, {row.learned}")
        print(_painted(row.runs[0], coloured))
        if row.rejected:
            print("rejected:")
            print(_painted(row.runs[1], coloured))
        print()


def first_rows(recipe: Recipe, count: int) -> Iterator[Row]:
    """Yields the first rows of each source of each stage, tokenized as the stage does.

    Args:
        recipe: The recipe.
        count: Rows of each source.

    Raises:
        UserError: The data cannot be read.
    """
    tokenizer = run_tokenizer(recipe)
    for stage in recipe.stages:
        for source in stage.data:
            opened = load_rows(source, kinds=formats_of_stage(stage.kind))
            if isinstance(stage, Classification):
                opened, _ = plain_labels(opened, source.path, stage.labels)
            read = Read()
            rows = list(islice(tidy_rows(opened, source, read), count))
            if not rows:
                refuse_dirt(source, read.dirty, read.rows, 0.0)
            limit = stage.training.get("max_length") or 1024
            encoded = encode_rows(rows, stage, tokenizer, limit, recipe.seed, source)
            if len(encoded) < len(rows):
                left = f"{len(rows) - len(encoded)} of {len(rows)} rows have no token to train on"
                display.say(f"{stage.name}, {source.title}: {left} within max_length ({limit}), and are not shown\n")
            for number, row in enumerate(encoded):
                ids, labels = row["input_ids"], row["labels"]
                learned = f"{sum(label != IGNORED for label in labels)} trained"
                if stage.kind == "classification":  # the text is read, and its label is learned
                    labels, learned = [IGNORED] * len(ids), f"label {rows[number]['label']!r}"
                other = row.get("rejected_ids", [])
                begin = sum(label == IGNORED for label in labels)
                others = [IGNORED] * begin + list(other[begin:])
                yield Row(
                    stage.name,
                    source.title,
                    number,
                    learned,
                    _tokens(ids, labels, tokenizer),
                    _tokens(other, others, tokenizer),
                    (_runs(ids, labels, tokenizer), _runs(other, others, tokenizer)),
                )


def _tokens(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> list[Token]:
    return [
        Token(tokenizer.decode([token]), int(token), label != IGNORED)
        for token, label in zip(ids, labels, strict=False)  # a pair's labels are of its other side
    ]


def _runs(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> list[tuple[str, bool]]:
    """The text of tokens in runs of trained and untrained ones."""
    found = []
    start = 0
    flags = [label != IGNORED for label in labels]
    for end in range(1, len(flags) + 1):
        if end == len(flags) or flags[end] != flags[start]:
            found.append((tokenizer.decode(ids[start:end]), flags[start]))
            start = end
    return found


def _painted(runs: Sequence[tuple[str, bool]], coloured: bool) -> str:
    """Runs as one text, with a mark for what is trained."""
    return "".join(
        text if not trained else painted(text, "green") if coloured else f"[[{text}]]" for text, trained in runs
    )
