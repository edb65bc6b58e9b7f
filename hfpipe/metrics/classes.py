"""Of classes, beyond the share that is right: F1, precision, recall and the correlation of Matthews, by scikit-learn.

The scores are scikit-learn's; the same from sums over rows serves the bootstrap, and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn import metrics as sklearn_metrics

from hfpipe.metrics.rows import RowMetric


class ClassMetric(RowMetric):
    """A row's statistics are three blocks of a column per class: was right and said, was said, was right."""

    needs = "choice"
    by_row = False

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        names = {name: place for place, name in enumerate(dict.fromkeys([*references, *predictions]))}
        said = np.eye(len(names))[[names[name] for name in predictions]]
        right = np.eye(len(names))[[names[name] for name in references]]
        return np.concatenate([said * right, said, right], axis=1)


class FScore(ClassMetric):
    """`precision`, `recall` and `f1`, the mean over the classes (macro); `f1_micro` counts all rows together."""

    def whole(self, predictions: Sequence[str], references: Sequence[str], statistics: np.ndarray) -> float:
        name, micro, _ = self.key.partition("_micro")
        options: dict[str, Any] = {"average": "micro" if micro else "macro", "zero_division": 0}
        return float(getattr(sklearn_metrics, f"{name}_score")(references, predictions, **options))

    def value(self, sums: np.ndarray) -> np.ndarray:
        hits, said, right = np.split(sums, 3, axis=-1)
        if self.key == "f1_micro":
            hits, said, right = (part.sum(-1, keepdims=True) for part in (hits, said, right))
        below = {"precision": said, "recall": right}.get(self.key, (said + right) / 2)
        there = (said + right) > 0  # a class that is neither said nor right does not count
        return (hits / np.where(below > 0, below, 1)).sum(-1) / np.maximum(there.sum(-1), 1)


class MatthewsCorrelation(ClassMetric):
    """Correlation between what was said and what is right, for two or more classes (Gorodkin 2004); 0 is chance."""

    def whole(self, predictions: Sequence[str], references: Sequence[str], statistics: np.ndarray) -> float:
        return float(sklearn_metrics.matthews_corrcoef(references, predictions))

    def value(self, sums: np.ndarray) -> np.ndarray:
        hits, said, right = np.split(sums, 3, axis=-1)
        n = said.sum(-1)
        covariance = hits.sum(-1) * n - (said * right).sum(-1)
        square = (n**2 - np.square(said).sum(-1)) * (n**2 - np.square(right).sum(-1))
        return covariance / np.sqrt(np.where(square > 0, square, 1))
