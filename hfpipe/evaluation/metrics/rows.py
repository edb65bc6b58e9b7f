"""Metrics that are functions of sums over rows, their errors, and the comparison of two models on the same rows.

A row gives a few numbers (its statistics), a score is computed from their sums. So to leave a row out, to draw rows
with replacement (the bootstrap, Efron 1979) or to exchange the rows of two models costs one product of matrices.
`benchmarks/coverage.py` measures how often the intervals hold and how often the test errs, by metric and rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.special import ndtr, stdtrit

from hfpipe.scores.scorecard import Paired, Z

SAMPLES = 1000  # of the bootstrap
EXCHANGES = 9_999  # of the test
EXACT_ROWS = 13  # with at most so many changed rows every exchange is tried: 8,192

Interval = tuple[float | None, float | None, float | None]  # standard error, lower and upper end of the 95 % interval


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
        """The exact way of counting, in the words of the metric's library; empty where it has none."""
        return ""

    def prepare(self) -> None:
        """Builds what the metric computes with."""

    def statistics(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        """The numbers of each row, (N, K)."""
        raise NotImplementedError

    def value(self, sums: np.ndarray) -> np.ndarray:
        """The scores of sums of statistics, (..., K) to (...)."""
        raise NotImplementedError

    def interval(self, value: float, statistics: np.ndarray) -> Interval:
        """Standard error and 95 % interval of a score."""
        return self.error(value, [statistics])

    def error(self, value: float, parts: Sequence[np.ndarray]) -> Interval:
        """Standard error and 95 % interval of a score, or of the difference of two models on the same rows.

        By the bootstrap: the rows are drawn for both models alike (Koehn 2004, aclanthology.org/W04-3250), and the
        percentiles are those that make up for few rows (Hesterberg 2015, arXiv:1411.5279, section 5.2).

        Args:
            value: The score, or the difference.
            parts: (N, K) statistics of the model; of two models, the later one's last.

        Returns:
            All None for a single row, which has no spread.
        """
        n = len(parts[0])
        if n < 2:
            return None, None, None
        draws = _last_less_first([self.value(resampled_sums(part)) for part in parts])
        widening = math.sqrt(n / (n - 1))
        tail = 100 * float(ndtr(widening * stdtrit(n - 1, 0.025)))
        low, high = np.percentile(draws, [tail, 100 - tail])
        return widening * float(np.std(draws, ddof=1)), min(float(low), value), max(float(high), value)

    def size(self, statistics: np.ndarray) -> int:
        """Counts the rows that the score is about."""
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

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float | None]:
        statistics = self.statistics(predictions, references)
        value = self.whole(predictions, references, statistics)
        stderr, low, high = self.interval(value, statistics)
        return {self.key: value, "stderr": stderr, "low": low, "high": high, "n": self.size(statistics)}


class Ratio(RowMetric):
    """A sum over a sum, (N, 2): means too, with ones below. Its errors are the jackknife's, with Student's t.

    Rows of very different size count for fewer: the degrees of freedom are those of Kish's effective number of rows
    (1965), so that a few long texts among short ones do not give too narrow an interval.
    """

    def value(self, sums: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # a row without a word, of which word_perplexity asks
            return sums[..., 0] / np.maximum(sums[..., 1], np.finfo(float).tiny)

    def error(self, value: float, parts: Sequence[np.ndarray]) -> Interval:
        without = _last_less_first([self.value(part.sum(0) - part) for part in parts])
        return jackknife(value, without, parts[0][:, 1])


class Share(Ratio):
    """A share of hits, with Wilson's interval (1927), which has a width even where every row is a hit."""

    def statistics(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        hits = [self.hit(prediction, reference) for prediction, reference in zip(predictions, references, strict=True)]
        return np.column_stack([np.asarray(hits, dtype=float), np.ones(len(hits))])

    def hit(self, prediction: Any, reference: Any) -> bool:
        """Returns True if a row is right."""
        raise NotImplementedError

    def interval(self, value: float, statistics: np.ndarray) -> Interval:
        return self.error(value, [statistics])[0], *wilson(value, len(statistics))


def jackknife(value: float, without: np.ndarray, sizes: np.ndarray) -> Interval:
    """Standard error and 95 % interval of a ratio by the jackknife (Tukey 1958).

    Args:
        value: The ratio of all rows.
        without: (N,) the ratio with each row left out.
        sizes: (N,) what each row adds below the line.

    Returns:
        All None for a single row, which has no spread.
    """
    n = len(without)
    if n < 2:
        return None, None, None
    stderr = float(np.sqrt((n - 1) / n * np.square(without - without.mean()).sum()))
    rows = sizes.sum() ** 2 / np.square(sizes).sum()
    half = float(stdtrit(max(1.0, rows - 1), 0.975)) * stderr
    return stderr, value - half, value + half


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


def paired_test(
    metric: RowMetric, before: tuple[Sequence[Any], Sequence[Any]], after: tuple[Sequence[Any], Sequence[Any]]
) -> Paired:
    """Compares two models on the same rows.

    The p-value is that of the randomization test (Fisher 1935; Noreen 1989): if nothing changed, each row might as well
    have come from the other model, so the difference is held against those with rows exchanged at random. It is exact
    however few or skewed the rows are; four changed rows give 0.125 at the least.

    Args:
        metric: A metric of ours.
        before: Predictions and references of one model.
        after: Those of the other, row by row.
    """
    n = len(before[0])
    # Together, so that both have the same columns: which classes there are is known from all the rows only.
    statistics = metric.statistics([*before[0], *after[0]], [*before[1], *after[1]])
    one, other = statistics[:n], statistics[n:]
    difference = float(metric.value(other.sum(0)) - metric.value(one.sum(0)))
    stderr, low, high = metric.error(difference, [one, other])
    return Paired(stderr or 0.0, _p_value(metric, one, other, difference), low, high)


def _p_value(metric: RowMetric, one: np.ndarray, other: np.ndarray, difference: float) -> float:
    """The two-sided p-value of the randomization test."""
    changed = (one != other).any(1)
    count = int(changed.sum())
    if not count or difference == 0:
        return 1.0
    half = (other - one)[changed] / 2
    middle = (one.sum(0) + other.sum(0)) / 2
    exact = count <= EXACT_ROWS
    if exact:
        signs = 1.0 - 2.0 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
    else:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), (EXCHANGES, count))
    moved = signs @ half
    found = metric.value(middle + moved) - metric.value(middle - moved)
    as_large = int((np.abs(found) >= abs(difference) * (1 - 1e-9)).sum())
    if exact:
        return as_large / len(found)
    p = (1 + as_large) / (1 + EXCHANGES)
    if as_large:
        return p
    # Beyond what so many exchanges can show: Hoeffding's bound (1963) of a sum with random signs.
    return min(p, 2 * math.exp(-(difference**2) / (2 * float(np.mean(np.square(found))))))


def _last_less_first(values: Sequence[np.ndarray]) -> np.ndarray:
    """The values of a single model, or the difference of two models'."""
    return values[0] if len(values) == 1 else values[-1] - values[0]
