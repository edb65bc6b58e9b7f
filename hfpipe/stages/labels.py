"""The labels of a classification stage: read, made one problem with its classes, and compared with the suites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from hfpipe.core.errors import DataError, RecipeError
from hfpipe.data.cleaning.text_rules import Read, refuse_dirt, tidy_rows
from hfpipe.data.dedup import Cleaner
from hfpipe.data.labels import Problem, classes_of, plain_labels, problem_of
from hfpipe.data.sources.load import load_rows
from hfpipe.data.tokenize import IGNORED
from hfpipe.evaluation.answers import require_known_classes, tells_apart
from hfpipe.recipe import Classification, Recipe


@dataclass
class Labelled:
    """The rows of a classification stage that have a sentence and a label.

    Args:
        texts: The sentences.
        labels: The labels, see `data.labels.plain_labels`.
        declared: The names that the data itself gives to its classes, in order.
        sources: What was read, by source.
        whole: Whether every row was looked at.
    """

    texts: list[str] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    declared: list[str] = field(default_factory=list)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    whole: bool = True


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


def labelled_rows(
    recipe: Recipe, stage: Classification, cleaner: Cleaner | None = None, at_most: int | None = None
) -> Labelled:
    """Reads the rows of a classification stage.

    Args:
        recipe: The recipe.
        stage: The stage of it.
        cleaner: Removes rows first, where the sources ask for it.
        at_most: Rows to look at of each source; None for all.

    Raises:
        DataError: There is none, too many are dirty, or the labels cannot be read.
    """
    found = Labelled()
    for source in stage.data:
        opened = load_rows(source, seed=recipe.seed, kinds=("classification",))
        rows, names = plain_labels(opened, source.path, stage.labels)
        found.declared += [name for name in names if name not in found.declared]
        read = Read()
        removed: dict[str, Any] = {}
        if cleaner is not None:
            rows, removed = cleaner.rows(rows, source)
        for row in islice(tidy_rows(rows, source, read), at_most):
            if row["label"] is None:
                read.dirty.add(["without a label"], str(row.get("id", f"row {read.rows - 1}")))
            else:
                found.texts.append(row["sentence"])
                found.labels.append(row["label"])
        found.whole = found.whole and (at_most is None or read.rows < at_most)
        refuse_dirt(source, read.dirty, read.rows, stage.max_dirty_share)
        found.sources[f"{len(found.sources)}: {source.title}"] = read.facts() | removed
    if not found.texts:
        raise DataError(f"stages.{stage.name}: no row has a sentence and a label.")
    return found


def head_of(stage: Classification, rows: Labelled, earlier: Head | None = None) -> Head:
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
