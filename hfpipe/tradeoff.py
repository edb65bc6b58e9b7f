"""Gain against forgetting: what a model gained and lost, each as one number with its noise.

The suites with a budget are the ones to be kept; the gain is on the others. A metric's relative gain is its improvement
as a share of the largest absolute score among the models that are compared, so that a score which starts at zero counts
once and not infinitely; its forgetting is the loss against the best score before, as a share of it, which is what a
budget limits. Metrics are averaged in their suite, and suites with one another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from hfpipe.recipe.words import Suite
from hfpipe.scores import Change, Score, forgetting, over_budget

Key = tuple[str, str]


@dataclass(frozen=True)
class Estimate:
    """A mean of relative changes and its standard error, in shares.

    The errors of the metrics of one suite are taken as if they went together, those of two suites as independent.
    """

    value: float
    stderr: float

    @property
    def beyond_noise(self) -> bool:
        return abs(self.value) > 1.96 * self.stderr


@dataclass(frozen=True)
class Point:
    """One model on the plane of gain and forgetting.

    Args:
        gain: On the suites without a budget; None where there are none.
        forgetting: On the suites with one, positive for a loss; None where there are none.
        over: The changes that exceed their budget.
    """

    gain: Estimate | None
    forgetting: Estimate | None
    over: list[Change]


def kept_suites(suites: Mapping[str, Suite]) -> list[str]:
    """The suites that are to be kept: those with a budget."""
    return [name for name, suite in suites.items() if suite.budget is not None]


def scales_of(scores: Iterable[Score]) -> dict[Key, float]:
    """By suite and metric the largest absolute score among models that are compared."""
    scales: dict[Key, float] = {}
    for score in scores:
        if math.isfinite(score.value):
            scales[score.key] = max(scales.get(score.key, 0.0), abs(score.value))
    return scales


def mean_gain(changes: Iterable[Change], scales: Mapping[Key, float]) -> Estimate | None:
    """The mean relative gain of changes; None without one."""
    return _mean(
        (change.after.suite, change.gain / scale, change.stderr / scale)
        for change in changes
        if math.isfinite(change.gain) and (scale := scales.get(change.after.key) or 1.0)
    )


def _mean(found: Iterable[tuple[str, float, float]]) -> Estimate | None:
    """Of (suite, value, error): metrics averaged in their suite, suites with one another."""
    by_suite: dict[str, list[tuple[float, float]]] = {}
    for suite, value, error in found:
        by_suite.setdefault(suite, []).append((value, error))
    if not by_suite:
        return None
    values = [fmean(value for value, _ in rows) for rows in by_suite.values()]
    errors = [fmean(error for _, error in rows) for rows in by_suite.values()]
    return Estimate(fmean(values), math.hypot(*errors) / len(errors))


def point(
    suites: Mapping[str, Suite],
    line: Sequence[Score],
    start: Sequence[Score],
    end: Sequence[Score],
    scales: Mapping[Key, float],
) -> Point:
    """Where a model stands.

    Args:
        suites: The recipe's.
        line: The scores of what came before it, the base first.
        start: The scores that its gain is counted from.
        end: Its own.
        scales: See `scales_of`.
    """
    kept = kept_suites(suites)
    before = {score.key: score for score in start}
    gains = [Change(before[score.key], score) for score in end if score.key in before and score.suite not in kept]
    every = [*line, *end]
    lost, over = [], []
    for name in kept:
        for score in end:
            if score.suite == name and (change := forgetting(every, score.stage, score.key)):
                size = abs(change.before.value) or abs(change.gain) or 1.0
                lost.append((name, -change.gain / size, change.stderr / size))
        if end:
            over += over_budget(every, end[0].stage, name, suites[name].budget or 0.0)
    return Point(mean_gain(gains, scales), _mean(lost), over)
