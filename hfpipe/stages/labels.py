"""The labels of a classification stage: read, made one problem with its classes, and compared with the suites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from hfpipe.core import ranks
from hfpipe.core.errors import DataError, RecipeError
from hfpipe.data.cleaning.text_rules import Read, refuse_dirt, tidy_rows
from hfpipe.data.labels import Problem, classes_of, plain_labels, problem_of
from hfpipe.data.sources.formats import Rows
from hfpipe.data.sources.load import load_rows
from hfpipe.data.token_store import LABEL, Columns, Concatenated, TokenStore, made_once, told, write_columns
from hfpipe.data.tokenize import IGNORED
from hfpipe.evaluation.answers import require_known_classes, tells_apart
from hfpipe.recipe import Classification, Recipe, Source
from hfpipe.stages.stage_run import StageRun

BLOCK = 1_000  # sentences tokenized at a time


@dataclass
class Labelled:
    """The labels of a classification stage, of the rows that have a sentence and a label.

    Args:
        labels: The labels, see `data.labels.plain_labels`.
        declared: The names that the data itself gives to its classes, in order.
        sources: What was read, by source.
        whole: Whether every row was looked at.
    """

    labels: list[Any] = field(default_factory=list)
    declared: list[str] = field(default_factory=list)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    whole: bool = True

    def declare(self, names: Sequence[str]) -> None:
        """Adds the names that a source gives to its classes."""
        self.declared += [name for name in names if name not in self.declared]

    def add(self, source: Source, labels: Sequence[Any], facts: dict[str, Any]) -> None:
        """Adds the labels of a source."""
        self.labels += labels
        self.sources[f"{len(self.sources)}: {source.title}"] = facts


@dataclass(frozen=True)
class Head:
    """The classes that a classification stage trains a head for.

    Args:
        problem: transformers' word for it.
        names: The classes in order; none of a regression.
    """

    problem: Problem
    names: list[str]

    def __str__(self) -> str:
        return f"{self.problem} ({', '.join(self.names) or 'a number'})"


def first_labels(stage: Classification, at_most: int) -> Labelled:
    """Reads the labels of the first rows of each source of a stage.

    Raises:
        DataError: There is none, too many are dirty, or the labels cannot be read.
    """
    found = Labelled()
    for source in stage.data:
        rows, names = plain_labels(_opened(source), source.path, stage.labels)
        found.declare(names)
        read = Read()
        labels = [row["label"] for row in islice(with_label(rows, source, read), at_most)]
        found.whole = found.whole and read.rows < at_most
        refuse_dirt(source, read.dirty, read.rows, stage.max_dirty_share)
        found.add(source, labels, read.facts())
    return _not_empty(stage, found)


def _opened(source: Source) -> Rows:
    return load_rows(source, kinds=("classification",))


def _not_empty(stage: Classification, found: Labelled) -> Labelled:
    if not found.labels:
        raise DataError(f"stages.{stage.name}: no row has a sentence and a label.")
    return found


def with_label(rows: Rows, source: Source, read: Read) -> Iterator[dict[str, Any]]:
    """Yields the tidied rows of a source; those without a label count as dirty in `read`."""
    for row in tidy_rows(rows, source, read):
        if row["label"] is None:
            read.dirty.add(["without a label"], str(row.get("id", f"row {read.rows - 1}")))
        else:
            yield row


def labelled_tokens(run: StageRun, limit: int) -> tuple[Concatenated, Labelled]:
    """Returns the tokens of every sentence of the stage, in a fixed order, and their labels.

    Args:
        run: The stage.
        limit: Tokens of a row, beyond which a sentence is cut.

    Raises:
        DataError: As `first_labels`.
    """
    assert isinstance(run.stage, Classification)
    found, parts = Labelled(), []
    for source in run.stage.data:
        rows, names = plain_labels(_opened(source), source.path, run.stage.labels)
        found.declare(names)
        part, labels, facts = _tokens_of(run, source, rows, limit)
        parts.append(part)
        found.add(source, labels, facts)
    return Concatenated(parts), _not_empty(run.stage, found)


def _tokens_of(run: StageRun, source: Source, rows: Rows, limit: int) -> tuple[TokenStore, list[Any], dict[str, Any]]:
    """Tokenizes the sentences of a source, or finds their tokens from before; returns their labels and facts too."""
    stage = run.stage
    assert isinstance(stage, Classification)
    rows, removed = run.cleaner.rows(rows, source)
    pad = run.tokenizer.pad_token_id

    def make(path: Path) -> dict[str, Any]:
        read, codes, kinds = Read(), dict[str, int](), set[str]()
        clean = with_label(rows, source, read)

        def code(label: Any) -> list[float]:
            kinds.add(problem_of([label]))
            if isinstance(label, float):
                return [label]
            names = label if isinstance(label, list) else [label]
            return [codes.setdefault(name, len(codes)) for name in names]

        def blocks() -> Iterator[Columns]:
            while block := [*islice(clean, BLOCK)]:
                texts = [row["sentence"] for row in block]
                ids = run.tokenizer(texts, truncation=True, max_length=limit, return_attention_mask=False)["input_ids"]
                yield {
                    "input_ids": pa.array([row or [pad] for row in ids], pa.list_(pa.int32())),
                    LABEL: pa.array([code(row["label"]) for row in block], pa.list_(pa.float64())),
                }

        write_columns(path, told(blocks(), source.title, len(rows) if isinstance(rows, Dataset) else None))
        refuse_dirt(source, read.dirty, read.rows, stage.max_dirty_share)
        return {**read.facts(), "names": [*codes], "problem": next(iter(kinds), None)}

    words: list[Any] = ["label", limit, stage.labels, stage.max_dirty_share]
    if not isinstance(rows, Dataset):
        words += [run.hash, source.model_dump()]
    store, facts, before = made_once(rows, run.tokenizer, words, make, run.folder / "tokens")
    ranks.say(f"  {source.title}: {len(store):,} rows{', tokenized before' if before else ''}")
    names, problem = facts.pop("names"), facts.pop("problem")
    if problem == "regression":
        labels: list[Any] = [values[0] for values in store.lists(LABEL)]
    elif problem == "multi_label_classification":
        labels = [[names[int(value)] for value in values] for values in store.lists(LABEL)]
    else:
        labels = [names[int(values[0])] for values in store.lists(LABEL)]
    return store, labels, {**facts, **removed}


def head_for(stage: Classification, rows: Labelled, earlier: Head | None = None) -> Head:
    """The head that the rows of a stage and its words ask for.

    Args:
        stage: The stage.
        rows: Its rows.
        earlier: The head of the adapter that the stage trains further; None for a new one.

    Raises:
        DataError: The labels are no one problem, or not among the classes.
        RecipeError: The stage weighs classes that it has not, or the earlier head is another.
    """
    labels = rows.labels
    if len({problem_of([label]) for label in labels}) > 1:
        raise DataError(f"stages.{stage.name}: the sources mix class names, lists of them and numbers with a point.")
    problem = problem_of(labels)
    if stage.class_weights is not None and problem != "single_label_classification":
        raise RecipeError(
            f"stages.{stage.name}.class_weights needs one class name in each row, and these rows hold "
            f"{'numbers' if problem == 'regression' else 'several'}; remove it."
        )
    head = Head(problem, _names_of(stage, rows, problem, earlier))
    if earlier is not None and head != earlier:
        raise RecipeError(
            f"stages.{stage.name}: the rows and labels make a head for {head}, and the adapter that is trained "
            f"further has one for {earlier}. Give it the same, or write `parent_adapter: merge`."
        )
    return head


def _names_of(stage: Classification, rows: Labelled, problem: Problem, earlier: Head | None) -> list[str]:
    """The classes in order; none for numbers."""
    if problem == "regression":
        if any(label != label or label == IGNORED for label in rows.labels):
            raise DataError(f"stages.{stage.name}: a label is not a number, or is -100, which marks ignored rows.")
        return []
    found = classes_of(rows.labels)
    names = stage.labels or (earlier.names if earlier is not None else None) or rows.declared or found
    if unknown := [name for name in found if name not in names]:
        raise DataError(
            f"stages.{stage.name}: the data has the labels {', '.join(unknown[:5])}, which are not among "
            f"{', '.join(names)}. Correct `labels`, or leave it out to take those of the data."
        )
    if len(names) < 2:
        raise DataError(f"stages.{stage.name}: every row has the label {names[0]!r}; there is nothing to tell apart.")
    return list(names)


def require_fitting_suites(
    recipe: Recipe, stage: Classification, head: Head, suites: Mapping[str, list[dict[str, Any]]]
) -> None:
    """Refuses right answers that the stage's classifier could never give, before it is trained.

    Raises:
        DataError: There are some.
    """
    several = sum(other.kind == "classification" for other in recipe.stages) > 1
    for name, rows in suites.items():
        if "sentence" not in rows[0] or (several and not tells_apart(rows, head.problem, head.names)):
            continue  # of several classifiers another one may be asked
        if head.problem == "regression" and not isinstance(rows[0]["label"], float):
            raise DataError(
                f"stages.{stage.name}: the labels are numbers with a point, which makes a regression, and the "
                f"suite {name} has classes. Name the classes in `labels` of the stage, or give both the same labels."
            )
        if head.problem != "regression":
            try:
                require_known_classes(rows, head.names)
            except DataError as error:
                raise DataError(f"suite {name}: {error}") from error
