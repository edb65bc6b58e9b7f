"""Rows that offer a choice: multiple choice, minimal pairs, BBQ; what is asked of a model about each, and the answer.

A suite's rows keep the words of their source until here: `prompt` + `choices` + `answer`, where the choices are a list
or a table with labels (ARC) and the answer is a place, a letter, a label or a text; `prompt` + `completion` or
`prompt` + `answer` with the choices of the suite; `good` + `bad` sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hfpipe.core.errors import DataError, RecipeError
from hfpipe.evaluation.continuations import Pair
from hfpipe.recipe import Suite
from hfpipe.recipe.faults import listed

Row = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """The question of a row and its endings.

    Args:
        choices: The texts to choose from.
        answer: The place of the right one.
        pairs: For each choice the context, and the continuation whose likelihood counts.
    """

    choices: list[str]
    answer: int
    pairs: list[Pair]


def choice_form(row: Row, suite: Suite, common: Sequence[str] | None) -> Choice:
    """Returns the question of a row and its endings.

    Args:
        row: A row of a suite, as `plain_choices` leaves it.
        suite: The suite.
        common: The choices of every row, where the rows have none of their own.
    """
    if "good" in row:  # whole sentences; the bad one first, so that a tie is no preference for the good one
        sentences = [row["bad"], row["good"]]
        return Choice(sentences, 1, [("", (suite.delimiter or "") + sentence) for sentence in sentences])
    prompt = row["prompt"]
    choices = list(row.get("choices") or common or ())
    answer = row["answer"] if "answer" in row else choices.index(row["completion"])
    if suite.blank is not None:
        before, _, after = prompt.partition(suite.blank)
        return Choice(choices, answer, [(before + choice, " " + after.strip()) for choice in choices])
    between = (
        "" if "completion" in row else " " if suite.delimiter is None else suite.delimiter
    )  # a completion begins as it is written
    if not prompt or prompt[-1:].isspace():
        between = " " if suite.delimiter is None else suite.delimiter
    if "completion" in row or not prompt or prompt[-1:].isspace():  # a completion begins as it is written
        between = ""
    return Choice(choices, answer, [(prompt, (between if not text[:1].isspace() else "") + text) for text in choices])


def common_choices(suite: Suite, rows: Sequence[Row]) -> list[str]:
    """The choices of rows that have none of their own: those of the suite, else the different completions.

    Raises:
        RecipeError: There is nothing to choose from.
        DataError: A right answer is not among the choices.
    """
    if "completion" not in rows[0]:
        raise RecipeError(
            f"the metrics {', '.join(suite.metrics)} choose among answers: their suite needs `prompt` and "
            "`completion`, `prompt`, `choices` and `answer`, or `good` and `bad`."
        )
    choices = suite.choices or sorted({row["completion"] for row in rows})
    unknown = next((row["completion"] for row in rows if row["completion"] not in choices), None)
    if unknown is not None:
        raise DataError(f"the right answer {unknown!r} is not among the choices {choices}: it could never be chosen.")
    if len(choices) < 2 or (suite.choices is None and len(choices) > 100):
        raise RecipeError(
            f"the metric accuracy found {len(choices)} different completions to choose from; it is meant for 2 to 100. "
            "Name them under `choices`, or use exact_match for free answers."
        )
    return choices


def split_last_word(text: str) -> Pair:
    """A text without its last word, and that word with the space before it (LAMBADA, Paperno et al. 2016)."""
    given, space, word = text.rstrip().rpartition(" ")
    return given, space + word


def plain_choices(rows: Sequence[Row], suite: Suite) -> list[Row]:
    """Rows with an `answer`: their choices as a list of texts, and the answer as a place in it.

    An answer is a label of the choices' own table, the text of a choice, a letter (A is the first), or a number: from
    0, or from 1 where no row says 0 and some row says as many as it has choices. Rows without one (hidden test sets
    have -1 or nothing) are left out.

    Raises:
        DataError: A row's choices or its answer cannot be read.
    """
    kept = [(row, *_choices_of(row, suite)) for row in rows if row["answer"] not in (None, "", -1, "-1")]
    places = [_place(row["answer"], choices, labels) for row, choices, labels in kept]
    sizes = [(place, len(choices)) for place, (_, choices, _) in zip(places, kept, strict=True) if place is not None]
    first = int(all(place > 0 for place, _ in sizes) and any(place == size for place, size in sizes))
    plain = []
    for (row, choices, labels), place in zip(kept, places, strict=True):
        answer = _named(row["answer"], choices, labels) if place is None else place - first
        if answer is None or not 0 <= answer < len(choices):
            raise DataError(
                f"suite on {suite.data.path}: the answer {row['answer']!r} is none of the choices {listed(choices)}"
                f"{f', whose labels are {listed(labels)}' if labels else ''} (row {row.get('id', 'without an id')}). "
                "An answer is the place of a choice, its letter, its label or its text."
            )
        plain.append({**row, "choices": choices, "answer": answer})
    return plain


def _choices_of(row: Row, suite: Suite) -> tuple[list[str], list[str]]:
    """The texts of a row's choices, and their labels where the data has some."""
    if suite.choices is not None:
        return list(suite.choices), []
    choices = row.get("choices")
    labels: list[str] = []
    if isinstance(choices, dict) and "text" in choices:  # ARC: {text: [...], label: [...]}
        labels, choices = [str(label) for label in choices.get("label") or ()], choices["text"]
    elif isinstance(choices, dict) and all(isinstance(text, str) for text in choices.values()):
        labels, choices = [str(label) for label in choices], list(choices.values())
    elif isinstance(choices, list) and choices and all(isinstance(one, dict) and "text" in one for one in choices):
        labels, choices = [str(one["label"]) for one in choices if "label" in one], [one["text"] for one in choices]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(text, str) for text in choices):
        raise DataError(
            f"suite on {suite.data.path}: `choices` holds {str(choices)[:100]!r} (row {row.get('id', 'without an id')})"
            "; allowed are two or more texts, as a list or as {text: [...], label: [...]}. Columns of one choice each "
            "are named as a list, `columns: {choices: [one, other]}`; choices that all rows share stand in the suite."
        )
    return choices, labels


def _named(answer: Any, choices: Sequence[str], labels: Sequence[str]) -> int | None:
    """The place of an answer that is a label, a text or a letter."""
    text = str(answer)
    if text in labels:
        return labels.index(text)
    if text in choices:
        return list(choices).index(text)
    if len(text) == 1 and text.isalpha():
        return ord(text.upper()) - ord("A")
    return None


def _place(answer: Any, choices: Sequence[str], labels: Sequence[str]) -> int | None:
    """The number of an answer that is one; None where it is a label, a text or a letter."""
    if isinstance(answer, bool | int):
        return int(answer)
    if isinstance(answer, float) and answer.is_integer():
        return int(answer)
    text = str(answer).strip()
    return int(text) if text.isdigit() and _named(answer, choices, labels) is None else None
