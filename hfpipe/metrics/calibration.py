"""Expected calibration error: how far a model's confidence in its answers is from the share that is right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hfpipe.metrics.rows import RowMetric


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
