"""What our metrics share: each is a function of sums over rows, so that resampling costs one product of matrices.

A row gives a few numbers (its statistics), a score is computed from their sums. The bootstrap (Efron 1979; for two
models on the same rows Koehn 2004, aclanthology.org/W04-3250) draws rows with replacement: with the numbers of draws as
a matrix (samples, rows), all resampled sums are that matrix times the statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

SAMPLES = 1000
Z = 1.96  # 95 % of a normal distribution


class RowMetric(evaluate.Metric):
    """An `evaluate` module whose score is a function of sums over rows.

    A subclass says what it needs from the model (`needs`), which two entries of a row's record it `takes` as prediction
    and reference, their types, and gives `statistics` and `value`. `compute` returns the score under the metric's name,
    with `stderr`, `low` and `high` (95 %) beside it.

    Args:
        name: The metric's name in a recipe.
        options: What the recipe's `metric_options` say.
    """

    needs = "generation"
    takes = ("prediction", "reference")
    types: tuple[str, str] = ("string", "string")
    several = False  # whether predictions and references may be lists of names: several classes at once
    higher_is_better = True
    ideal: float | None = None  # the best value of a score that can be too high and too low
    rows: str | None = None  # what the rows must have, beside what the model gives
    by_row = True  # whether a row alone has a score

    def __init__(self, name: str, **options: Any) -> None:
        self.key, self.options = name, options
        self.prepare()
        super().__init__(keep_in_memory=True)

    @property
    def signature(self) -> str:
        """How exactly the metric counts, in its library's own words; empty where it has none."""
        return ""

    def prepare(self) -> None:
        """Builds what the metric computes with."""

    def statistics(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        """The numbers of each row, (N, K)."""
        raise NotImplementedError

    def value(self, sums: np.ndarray) -> np.ndarray:
        """The scores of sums of statistics, (..., K) to (...)."""
        raise NotImplementedError

    def interval(self, value: float, statistics: np.ndarray, draws: np.ndarray) -> tuple[float, float, float]:
        """Standard error and 95 % interval: by the bootstrap, unless the metric knows better."""
        low, high = np.percentile(draws, [2.5, 97.5])
        return _spread(draws), min(float(low), value), max(float(high), value)

    def size(self, statistics: np.ndarray) -> int:
        """How many of the rows the score is about."""
        return len(statistics)

    def whole(self, predictions: Sequence[Any], references: Sequence[Any], statistics: np.ndarray) -> float:
        """The score of all rows."""
        return float(self.value(statistics.sum(0)))

    def _info(self) -> evaluate.MetricInfo:
        sides = dict(zip(("predictions", "references"), map(datasets.Value, self.types), strict=True))
        forms = [datasets.Features(sides)]
        if self.several:  # first: a list would pass for a string, but not a string for a list
            forms.insert(0, datasets.Features({side: datasets.List(value) for side, value in sides.items()}))
        return evaluate.MetricInfo(description=self.__doc__ or "", citation="", features=forms)

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        statistics = self.statistics(predictions, references)
        value = self.whole(predictions, references, statistics)
        stderr, low, high = self.interval(value, statistics, self.value(resampled_sums(statistics)))
        return {self.key: value, "stderr": stderr, "low": low, "high": high, "n": self.size(statistics)}


class Ratio(RowMetric):
    """A sum over a sum, (N, 2): means too, with ones below. Its standard error is the delta method's."""

    def value(self, sums: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # a row without a word, of which word_perplexity asks
            return sums[..., 0] / np.maximum(sums[..., 1], np.finfo(float).tiny)

    def interval(self, value: float, statistics: np.ndarray, draws: np.ndarray) -> tuple[float, float, float]:
        above, below = statistics.T
        stderr = float(np.sqrt(np.square(above - above.sum() / below.sum() * below).sum()) / below.sum())
        return stderr, *super().interval(value, statistics, draws)[1:]


class Share(Ratio):
    """A share of hits, with Wilson's interval (1927), which has a width even where every row is a hit."""

    def statistics(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        hits = [self.hit(prediction, reference) for prediction, reference in zip(predictions, references, strict=True)]
        return np.column_stack([np.asarray(hits, dtype=float), np.ones(len(hits))])

    def hit(self, prediction: Any, reference: Any) -> bool:
        """Whether a row is right."""
        raise NotImplementedError

    def interval(self, value: float, statistics: np.ndarray, draws: np.ndarray) -> tuple[float, float, float]:
        return super().interval(value, statistics, draws)[0], *wilson(value, len(statistics))


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) of a share of n rows."""
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * float(np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)))
    return max(0.0, middle - half), min(1.0, middle + half)


def resampled_sums(statistics: np.ndarray, samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
    """Sums of statistics over rows drawn with replacement, (samples, K); the same rows for the same n and seed."""
    generator, n = np.random.default_rng(seed), len(statistics)
    shares = np.full(n, 1 / n)
    parts = [
        generator.multinomial(n, shares, size=min(100, samples - start)).astype(float) @ statistics
        for start in range(0, samples, 100)
    ]
    return np.concatenate(parts)


def paired_stderr(
    metric: RowMetric, before: tuple[Sequence[Any], Sequence[Any]], after: tuple[Sequence[Any], Sequence[Any]]
) -> float:
    """Standard error of the difference of two scores on the same rows, which are drawn for both alike.

    Args:
        metric: A metric of ours.
        before: Predictions and references of one model.
        after: Those of the other, row by row.
    """
    n = len(before[0])
    # Together, so that both have the same columns: which classes there are is known from all the rows only.
    statistics = metric.statistics([*before[0], *after[0]], [*before[1], *after[1]])
    draws = [metric.value(resampled_sums(part)) for part in (statistics[:n], statistics[n:])]
    return _spread(draws[1] - draws[0])


def _spread(draws: np.ndarray) -> float:
    return float(np.std(draws, ddof=1))
