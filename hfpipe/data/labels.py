"""Labels of `sentence` + `label` rows: the problem they pose, their classes, and batches of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from datasets import ClassLabel, Features, Value
from datasets import List as ListOf

from hfpipe.core.errors import DataError
from hfpipe.data.token_store import Concatenated
from hfpipe.data.tokenize import IGNORED

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


def plain_labels(
    rows: Any, path: str, classes: Sequence[str] | None = None, *, as_classes: bool = False
) -> tuple[Any, list[str]]:
    """Labels as names: numbers of a ClassLabel become its names, other whole numbers and true or false their text.

    Args:
        rows: Rows with a column `label`.
        path: Of their source, for the message.
        classes: Names that the recipe gives to the classes 0, 1, 2... of data that has none.
        as_classes: Whether whole numbers with a point are classes in any case: a suite says so by its metrics.

    Returns:
        The rows with `label` as text (one class), a list of texts (several) or a number with a point (regression), and
        the names in the order that the data set gives them; none where it gives none. A label outside of a ClassLabel
        (-1 on the hidden test sets of GLUE) becomes None. Lists of one length of nothing but 0 and 1 have a place for
        each class. Whole numbers written with a point are classes where the recipe names them, or where some are
        missing: that is how a CSV is read.

    Raises:
        DataError: The column holds something else.
    """
    feature = (rows.features or {}).get("label")
    several = isinstance(feature, ListOf)
    inner = feature.feature if isinstance(feature, ListOf) else feature
    dtype = inner.dtype if isinstance(inner, Value) else ""
    is_float, is_number = dtype.startswith("float"), "int" in dtype or dtype.startswith("float") or dtype == "bool"
    flags = several and is_number and _are_flags(_first_labels(rows))
    if is_float and not several and not _are_classes(rows, as_classes or bool(classes)):
        return rows, []
    if not isinstance(inner, ClassLabel) and not (is_number or dtype in ("string", "large_string")):
        is_float = several = True  # nothing that can be read
    if is_float and several and not flags:
        raise DataError(
            f"source {path!r}: `label` holds {feature}; allowed are class names or numbers, lists of them (several "
            "classes at once), and numbers with a point (regression). Name another column: `columns: {label: ...}`."
        )
    names = list(inner.names) if isinstance(inner, ClassLabel) else []
    given = list(classes or []) if is_number and not any(map(_is_whole, classes or [])) else []

    def name(value: Any) -> str | None:
        if value is None or value != value or (names and not 0 <= value < len(names)):
            return None
        if names:
            return names[value]
        value = int(value) if is_float else value
        return given[value] if given and 0 <= value < len(given) else str(value)

    def named(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        values = batch["label"]
        if flags:
            values = [None if value is None else [i for i, flag in enumerate(value) if flag] for value in values]
        if several:
            return {"label": [None if value is None else [name(v) for v in value] for value in values]}
        return {"label": [name(value) for value in values]}

    kind = ListOf(Value("string")) if several else Value("string")
    return rows.map(named, batched=True, features=Features({**rows.features, "label": kind})), names


LOOKED_AT = 1_000  # labels of a source, to tell what their numbers mean


def _first_labels(rows: Any) -> list[Any]:
    return [row["label"] for row in rows.select_columns(["label"]).take(LOOKED_AT)]


def _are_flags(labels: Sequence[Any]) -> bool:
    """Returns True if lists of numbers have a place for each class: one length, and nothing but 0 and 1."""
    lists = [label for label in labels if label is not None]
    lengths = {len(label) for label in lists}
    return len(lengths) == 1 and lengths != {0} and lengths != {1} and all(v in (0, 1) for one in lists for v in one)


def _are_classes(rows: Any, expected: bool) -> bool:
    """Returns True if numbers with a point are the numbers of classes."""
    labels = _first_labels(rows)
    present = [label for label in labels if label is not None and label == label]
    whole = bool(present) and all(label == int(label) for label in present if abs(label) < math.inf)
    return whole and (expected or len(present) < len(labels))


def _is_whole(name: str) -> bool:
    return name.removeprefix("-").isdigit()


def known_names(labels: Iterable[str | list[str]], known: Sequence[str]) -> dict[str, str]:
    """Maps the names in the data to the names that a model gives its classes.

    A name is a class of the same name, of the same name in other capitals (NEGATIVE), or a number in place of a name.

    Args:
        labels: Names of one class or of several.
        known: The classes of the model, in order.

    Returns:
        The model's name of each; none of a name that it has no class for.
    """
    folded = {name.casefold(): name for name in known}
    numbered = {} if any(map(_is_whole, known)) else {str(number): name for number, name in enumerate(known)}
    exact = dict(zip(known, known, strict=True))
    found = {}
    for name in {name for label in labels for name in (label if isinstance(label, list) else [label])}:
        if match := exact.get(name) or (folded.get(name.casefold()) if len(folded) == len(known) else None):
            found[name] = match
        elif name in numbered:
            found[name] = numbered[name]
    return found


def problem_of(labels: Sequence[Any]) -> Problem:
    """Regression for numbers, several classes for lists, one class for names."""
    if isinstance(labels[0], list):
        return "multi_label_classification"
    return "regression" if isinstance(labels[0], float) else "single_label_classification"


def classes_of(labels: Sequence[Any]) -> list[str]:
    """The names that occur, numbers in the order of numbers."""
    names = {name for label in labels for name in (label if isinstance(label, list) else [label])}
    return sorted(names, key=int) if all(map(_is_whole, names)) else sorted(names)


def balanced_weights(labels: Sequence[str], names: Sequence[str]) -> list[float]:
    """Weights of the classes that make all count alike: N / (C * count), as in scikit-learn (King and Zeng 2001)."""
    counts = Counter(labels)
    return [len(labels) / (len(names) * counts[name]) if counts[name] else 0.0 for name in names]


def label_ids(label: Any, names: Sequence[str]) -> list[int] | list[float]:
    """A label as the model takes it: [class], a 0 or 1 for each class, or [number]."""
    if isinstance(label, list):
        return [float(name in label) for name in names]
    return [label] if isinstance(label, float) else [names.index(label)]


class LabelledTokens:
    """Tokens of sentences with their labels as the model takes them.

    Args:
        tokens: The tokens.
        labels: Of each row its label.
        names: The classes in order.
    """

    def __init__(self, tokens: Concatenated, labels: Sequence[Any], names: Sequence[str]) -> None:
        self._tokens, self._labels, self._names = tokens, labels, names

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Returns `input_ids` (L,) and `labels`, see `label_ids`."""
        ids = self._tokens[number]["input_ids"]
        return {"input_ids": ids, "labels": label_ids(self._labels[number], self._names)}


def collate_labelled(rows: Sequence[dict[str, Any]], pad_token_id: int, multiple: int = 1) -> dict[str, torch.Tensor]:
    """Stacks rows into tensors, padded on the right.

    Args:
        rows: `{"input_ids": [L], "labels": see label_ids}`; rows with `is_padding` fill the last batch and are ignored.
        pad_token_id: Fills `input_ids`.
        multiple: L is rounded up to a multiple of this.

    Returns:
        `input_ids` and `attention_mask` (B, L); `labels` (B,) classes, (B, C) or (B, 1) floats. -100 is ignored.
    """
    length = max(len(row["input_ids"]) for row in rows)
    length += -length % multiple
    first = next((row["labels"] for row in rows if not row.get("is_padding")), [IGNORED])
    labels = [[IGNORED] * len(first) if row.get("is_padding") else row["labels"] for row in rows]
    batch = {
        "input_ids": torch.full((len(rows), length), pad_token_id),
        "attention_mask": torch.zeros((len(rows), length), dtype=torch.long),
        "labels": torch.tensor(labels, dtype=torch.float32 if isinstance(first[0], float) else torch.long),
    }
    if not isinstance(first[0], float):
        batch["labels"] = batch["labels"][:, 0]
    for index, row in enumerate(rows):
        size = len(row["input_ids"])
        batch["input_ids"][index, :size] = torch.as_tensor(row["input_ids"])
        batch["attention_mask"][index, :size] = 1
    return batch
