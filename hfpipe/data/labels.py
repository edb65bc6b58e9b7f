"""Labels of `sentence` + `label` rows: the problem they pose, their classes, and batches of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from datasets import ClassLabel, Features, Value
from datasets import List as ListOf

from hfpipe.data.encode import IGNORED
from hfpipe.errors import DataError

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


def plain_labels(rows: Any, path: str) -> tuple[Any, list[str]]:
    """Labels as names: numbers of a ClassLabel become its names, other whole numbers and true or false their text.

    Args:
        rows: Rows with a column `label`.
        path: Of their source, for the message.

    Returns:
        The rows with `label` as text (one class), a list of texts (several) or a number with a point (regression), and
        the names in the order that the data set gives them; none where it gives none. A label outside of a ClassLabel
        (-1 on the hidden test sets of GLUE) becomes None.

    Raises:
        DataError: The column holds something else.
    """
    feature = (rows.features or {}).get("label")
    several = isinstance(feature, ListOf)
    inner = feature.feature if isinstance(feature, ListOf) else feature
    if isinstance(inner, ClassLabel):
        names = list(inner.names)
    elif isinstance(inner, Value) and inner.dtype.startswith("float") and not several:
        return rows, []
    elif isinstance(inner, Value) and (inner.dtype in ("bool", "string", "large_string") or "int" in inner.dtype):
        names = []
    else:
        raise DataError(
            f"source {path!r}: `label` holds {feature}; allowed are class names or numbers, lists of them (several "
            "classes at once), and numbers with a point (regression). Name another column: `columns: {label: ...}`."
        )

    def name(value: Any) -> str | None:
        if value is None or (names and not 0 <= value < len(names)):
            return None
        return names[value] if names else str(value)

    def named(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        values = batch["label"]
        return {"label": [[name(v) for v in value] if several else name(value) for value in values]}

    kind = ListOf(Value("string")) if several else Value("string")
    return rows.map(named, batched=True, features=Features({**rows.features, "label": kind})), names


def problem_of(labels: Sequence[Any]) -> Problem:
    """Regression for numbers, several classes for lists, one class for names."""
    if isinstance(labels[0], list):
        return "multi_label_classification"
    return "regression" if isinstance(labels[0], float) else "single_label_classification"


def classes_of(labels: Sequence[Any]) -> list[str]:
    """The names that occur, numbers in the order of numbers."""
    names = {name for label in labels for name in (label if isinstance(label, list) else [label])}
    numbers = all(name.removeprefix("-").isdigit() for name in names)
    return sorted(names, key=int) if numbers else sorted(names)


def balanced_weights(labels: Sequence[str], names: Sequence[str]) -> list[float]:
    """Weights of the classes that make all count alike: N / (C * count), as in scikit-learn (King and Zeng 2001)."""
    counts = Counter(labels)
    return [len(labels) / (len(names) * counts[name]) if counts[name] else 0.0 for name in names]


def label_ids(label: Any, names: Sequence[str]) -> list[int] | list[float]:
    """A label as the model takes it: [class], a 0 or 1 for each class, or [number]."""
    if isinstance(label, list):
        return [float(name in label) for name in names]
    return [label] if isinstance(label, float) else [names.index(label)]


def collate_labelled(rows: Sequence[dict[str, Any]], pad_token_id: int, multiple: int = 1) -> dict[str, torch.Tensor]:
    """Stacks rows into tensors, padded on the right.

    Args:
        rows: `{"input_ids": [L], "labels": see label_ids}`; rows with `blank` fill the last batch and are ignored.
        pad_token_id: Fills `input_ids`.
        multiple: L is rounded up to a multiple of this.

    Returns:
        `input_ids` and `attention_mask` (B, L); `labels` (B,) classes, (B, C) or (B, 1) floats. -100 is ignored.
    """
    length = max(len(row["input_ids"]) for row in rows)
    length += -length % multiple
    first = next((row["labels"] for row in rows if not row.get("blank")), [IGNORED])
    labels = [[IGNORED] * len(first) if row.get("blank") else row["labels"] for row in rows]
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
