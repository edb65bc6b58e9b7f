"""Pairs of a chosen and a rejected answer: which the model finds likelier, and by how much; and how long it answers.

The change of `preference_margin` since a stage's parent is the mean reward margin of DPO (Rafailov et al. 2023,
arXiv:2305.18290, section 4) divided by its beta: the rewards are beta times the gain in log-likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hfpipe.evaluation.metrics.rows import Ratio, Share


class PreferenceAccuracy(Share):
    """The share of pairs whose chosen answer is likelier than the rejected one; a tie is none."""

    needs = "pair"
    takes = ("chosen", "rejected")
    types = ("float64", "float64")

    def hit(self, prediction: float, reference: float) -> bool:
        return prediction > reference


class PreferenceAccuracyPerToken(PreferenceAccuracy):
    """The same with log-likelihoods divided by the tokens of the answer, so that length alone decides nothing."""

    takes = ("chosen_per_token", "rejected_per_token")


class PreferenceMargin(Ratio):
    """Mean over the pairs of the chosen answer's log-likelihood less the rejected one's, in nats."""

    needs = "pair"
    takes = ("chosen", "rejected")
    types = ("float64", "float64")

    def statistics(self, predictions: Sequence[float], references: Sequence[float]) -> np.ndarray:
        margins = np.asarray(predictions, dtype=float) - np.asarray(references, dtype=float)
        return np.column_stack([margins, np.ones(len(margins))])


class PreferenceMarginPerToken(PreferenceMargin):
    """The same with log-likelihoods divided by the tokens of the answer: nats per token."""

    takes = ("chosen_per_token", "rejected_per_token")


class LengthRatio(Ratio):
    """Characters of the generated answers over those of the right ones: above 1 the model says more, below less."""

    ideal = 1.0

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        return np.array(
            [[len(said.strip()), len(right.strip())] for said, right in zip(predictions, references, strict=True)]
        )
