"""Scores of classes beyond accuracy: F1, precision, recall, Matthews correlation, expected calibration error.

The scores are scikit-learn's; the same from sums over rows serves the bootstrap, and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from sklearn import metrics as sklearn_metrics

from hfpipe.core.errors import RecipeError
from hfpipe.evaluation.metrics import names_of
from hfpipe.evaluation.metrics.rows import Interval, RowMetric, wilson

AVERAGES = ("macro", "micro", "weighted", "binary")
Answers = Sequence[str] | Sequence[list[str]]  # one class a row, or several


class ClassMetric(RowMetric):
    """A row's statistics are three blocks of a column per class: was right and said, was said, was right."""

    needs = "choice"
    several = True
    by_row = False
    lowest = 0.0  # of all values; the highest is 1

    def interval(self, value: float, statistics: np.ndarray) -> Interval:
        """The bootstrap's, or Wilson's of a share like the value where that is wider.

        Of few rows the bootstrap knows too little: where all are right, every resample is.
        """
        stderr, low, high = super().interval(value, statistics)
        size = 1 - self.lowest
        ends = wilson((value - self.lowest) / size, len(statistics))
        wide_low, wide_high = (self.lowest + size * end for end in ends)
        if low is None or high is None:
            return stderr, wide_low, wide_high
        return stderr, min(low, wide_low), max(high, wide_high)

    def names(self, answers: Iterable[str | list[str]]) -> list[str]:
        """The classes that are scored, in order."""
        return sorted(set().union(*map(names_of, answers)))

    def statistics(self, predictions: Answers, references: Answers) -> np.ndarray:
        names = self.names([*references, *predictions])
        said, right = (_indicators(side, names) for side in (predictions, references))
        return np.concatenate([said * right, said, right], axis=1)


class FScore(ClassMetric):
    """`precision`, `recall` and `f1`, the mean over the classes (macro); with `_micro` all rows are counted together.

    The classes are those that are said or right anywhere in the suite. Options, in scikit-learn's meaning: `average`,
    one of macro, micro, weighted and binary; and with binary the `pos_label`, the class that is scored.
    """

    def prepare(self) -> None:
        self.of, micro, _ = self.key.partition("_micro")
        self.average = self.options.get("average", "micro" if micro else "macro")
        if self.average not in AVERAGES or (self.average == "binary") != ("pos_label" in self.options):
            raise RecipeError(
                f"metric_options.{self.key}: found {self.options}; allowed is an `average` of {', '.join(AVERAGES)}, "
                "and with binary, and only then, the class that is scored as `pos_label`."
            )

    def names(self, answers: Iterable[str | list[str]]) -> list[str]:
        if self.average == "binary":
            return [str(self.options["pos_label"])]
        return super().names(answers)

    def whole(self, predictions: Answers, references: Answers, statistics: np.ndarray) -> float:
        _, said, right = (part.astype(int) for part in np.split(statistics, 3, axis=1))
        if self.average == "binary":
            if not right.any():
                raise RecipeError(f"{self.key}: no row is of the class {self.options['pos_label']!r} (pos_label).")
            said, right = said[:, 0], right[:, 0]
        score = getattr(sklearn_metrics, f"{self.of}_score")
        return float(score(right, said, average=self.average, zero_division=0))

    def value(self, sums: np.ndarray) -> np.ndarray:
        hits, said, right = np.split(sums, 3, axis=-1)
        if self.average == "micro":
            hits, said, right = (part.sum(-1, keepdims=True) for part in (hits, said, right))
        below = {"precision": said, "recall": right}.get(self.of, (said + right) / 2)
        scores = hits / np.where(below > 0, below, 1)
        if self.average == "weighted":
            return (scores * right).sum(-1) / np.maximum(right.sum(-1), 1)
        there = (said + right) > 0  # a class that is neither said nor right does not count
        return scores.sum(-1) / np.maximum(there.sum(-1), 1)


class MatthewsCorrelation(ClassMetric):
    """Correlation between what was said and what is right, for two or more classes (Gorodkin 2004); 0 is chance."""

    lowest = -1.0
    undefined = False

    @property
    def signature(self) -> str:
        return "undefined: all answers are of one class; 0 by convention" if self.undefined else ""

    def whole(self, predictions: Answers, references: Answers, statistics: np.ndarray) -> float:
        if not all(isinstance(answer, str) for answer in references):
            raise RecipeError(f"{self.key} is for one class a row, and these have several. Take f1 or f1_micro.")
        self.undefined = any(len(set(side)) < 2 for side in (predictions, references))
        return float(sklearn_metrics.matthews_corrcoef(references, predictions))

    def value(self, sums: np.ndarray) -> np.ndarray:
        hits, said, right = np.split(sums, 3, axis=-1)
        n = said.sum(-1)
        covariance = hits.sum(-1) * n - (said * right).sum(-1)
        square = (n**2 - np.square(said).sum(-1)) * (n**2 - np.square(right).sum(-1))
        return covariance / np.sqrt(np.where(square > 0, square, 1))


def _indicators(answers: Answers, names: Sequence[str]) -> np.ndarray:
    """(N, C): 1 where a row's answer names a class."""
    return np.array([[name in names_of(answer) for name in names] for answer in answers], dtype=float)


class CalibrationError(RowMetric):
    """The mean distance between confidence and accuracy over 15 bins of confidence (Guo et al. 2017, arXiv:1706.04599).

    Confidence is the probability of the chosen answer among the suite's answers. Resampled rows have a larger error as
    a rule, since noise within a bin counts as error: of the interval, the upper end is the one to read.
    """

    needs = "choice"
    takes = ("confidence", "correct")
    types = ("float64", "int64")
    higher_is_better = False
    by_row = False
    bins = 15

    def statistics(self, predictions: Sequence[float], references: Sequence[int]) -> np.ndarray:
        confidence, correct = np.asarray(predictions, dtype=float), np.asarray(references, dtype=float)
        place = np.clip(np.ceil(confidence * self.bins).astype(int) - 1, 0, self.bins - 1)
        bins = np.eye(self.bins)[place]
        return np.column_stack([bins * (confidence - correct)[:, None], np.ones(len(place))])

    def value(self, sums: np.ndarray) -> np.ndarray:
        return np.abs(sums[..., :-1]).sum(-1) / sums[..., -1]
