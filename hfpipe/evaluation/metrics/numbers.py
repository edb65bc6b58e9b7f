"""Metrics of numbers: mean squared and absolute error, and the correlations of Pearson and Spearman, by SciPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from hfpipe.evaluation.metrics.rows import Ratio, RowMetric


class MeanError(Ratio):
    """`mse` and `mae`: the mean over the rows of the squared, or the absolute, difference."""

    needs = "number"
    types = ("float64", "float64")
    higher_is_better = False

    def statistics(self, predictions: Sequence[float], references: Sequence[float]) -> np.ndarray:
        off = np.asarray(predictions, dtype=float) - np.asarray(references, dtype=float)
        return np.column_stack([np.square(off) if self.key == "mse" else np.abs(off), np.ones(len(off))])


class Correlation(RowMetric):
    """`pearsonr` and `spearmanr`; 0 where one side is always the same.

    The bootstrap of `spearmanr` draws rows with the ranks that they have among all.
    """

    needs = "number"
    types = ("float64", "float64")
    by_row = False

    def statistics(self, predictions: Sequence[float], references: Sequence[float]) -> np.ndarray:
        said, right = (np.asarray(side, dtype=float) for side in (predictions, references))
        if self.key == "spearmanr":
            said, right = stats.rankdata(said), stats.rankdata(right)
        said, right = said - said.mean(), right - right.mean()  # sums of squares of large numbers would lose digits
        return np.column_stack([np.ones(len(said)), said, right, said * said, right * right, said * right])

    def value(self, sums: np.ndarray) -> np.ndarray:
        n, said, right, said_square, right_square, product = np.moveaxis(sums, -1, 0)
        spread = (said_square - said**2 / n) * (right_square - right**2 / n)
        return (product - said * right / n) / np.sqrt(np.where(spread > 0, spread, np.inf))

    def whole(self, predictions: Sequence[float], references: Sequence[float], statistics: np.ndarray) -> float:
        if len(set(predictions)) < 2 or len(set(references)) < 2:
            return 0.0
        return float(getattr(stats, self.key)(predictions, references).statistic)
