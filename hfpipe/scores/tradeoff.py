"""Gain against forgetting: what a model gained and lost, each as one number with its noise.

The suites with a budget are the ones to be kept; the gain is on the others (see `kept_keys`). A metric's relative gain
is its improvement as a share of what a flawless model scores, or, of a metric without such a score, of the largest
absolute score among the models that are compared, so that no start near zero makes a small gain count for much. Its
forgetting is the loss against the best score before, as a share of it, which is what a budget limits. A score of bias
is nothing to gain on: it counts where it has a budget. Metrics are averaged in their suite, then the suites.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from hfpipe.recipe.config import Suite
from hfpipe.recipe.metric_table import BIAS_METRICS, FULL_MARKS
from hfpipe.scores.scorecard import BASE, Change, Key, Score, Z, change_since, forgetting, judge_budget


@dataclass(frozen=True)
class Estimate:
    """A mean of relative changes, its standard error and its 95 % interval, in shares.

    The errors of the metrics of one suite are taken as if they went together, those of two suites as independent. The
    ends of the intervals are averaged likewise, each by its distance from the value (Zou and Donner 2008), so that a
    mean of one change has the interval of that change.

    Args:
        value: The mean.
        stderr: Its standard error; 0 where none is known.
        ends: The ends of its interval; worked out of the error when None.
    """

    value: float
    stderr: float
    ends: tuple[float, float] | None = None

    @property
    def beyond_noise(self) -> bool:
        return self.value != 0 and (self.interval is None or not self.interval[0] <= 0 <= self.interval[1])

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval; None where no error is known."""
        if self.ends is not None or not self.stderr:
            return self.ends
        return self.value - Z * self.stderr, self.value + Z * self.stderr

    def __neg__(self) -> Estimate:
        return Estimate(-self.value, self.stderr, None if self.ends is None else (-self.ends[1], -self.ends[0]))


def estimate_of(one: Mapping[str, Any], key: str) -> Estimate | None:
    """The gain or the forgetting of a point of dial.json."""
    ends = one.get(f"{key}_interval")  # not in a dial of an earlier version
    return None if one[key] is None else Estimate(one[key], one[f"{key}_stderr"], tuple(ends) if ends else None)


@dataclass(frozen=True)
class Point:
    """One model on the plane of gain and forgetting.

    Args:
        gain: On what is not to be kept; None where that is nothing.
        forgetting: On what is to be kept, positive for a loss; None where that is nothing.
        over: The changes that exceed their budget.
    """

    gain: Estimate | None
    forgetting: Estimate | None
    over: list[Change]


def gains_and_losses(scores: Sequence[Score]) -> tuple[list[Change], list[Change]]:
    """The gains of the last stage over the base, and its losses against the best score before it, beyond the noise.

    A metric that nothing before the last stage could be scored on is compared with the best answer without a model.

    Args:
        scores: The scores of one line of stages, the base first.
    """
    last = scores[-1].stage if scores else BASE
    if last == BASE:
        return [], []
    end = {score.key: score for score in scores if score.stage == last}
    gained = [change for key in end if (change := change_since(scores, BASE, last, key))]
    lost = [change for key in end if (change := forgetting(scores, last, key))]
    new = (from_baseline(score) for score in end.values() if is_first(scores, score))
    changes = [*gained, *(change for change in new if change)]
    return (
        [change for change in changes if change.gain > 0 and change.beyond_noise],
        [change for change in lost if change.gain < 0 and change.beyond_noise],
    )


def is_first(scores: Sequence[Score], score: Score) -> bool:
    """Returns True if no model before it has a score of this kind, as a base has none without a head for classes."""
    return score.stage != BASE and all(one.stage == score.stage for one in scores if one.key == score.key)


def from_baseline(score: Score) -> Change | None:
    """The change from the best answer without a model to a score; None where no such answer is known."""
    answers = [replace(score, stage=name, value=value, stderr=0.0) for name, value in score.baselines.items()]
    best = max(answers, key=lambda answer: answer.merit, default=None)
    return Change(replace(best, paired={}, low=None, high=None), replace(score, paired={})) if best else None


def kept_suites(suites: Mapping[str, Suite]) -> list[str]:
    """The suites that are to be kept: those with a budget."""
    return [name for name, suite in suites.items() if suite.budget is not None]


def kept_keys(suites: Mapping[str, Suite], start: Sequence[Score], ends: Sequence[Sequence[Score]]) -> set[Key]:
    """The metrics that count as forgetting, all others count as gain.

    Those of the suites with a budget. Where no suite has one, the scores themselves say it: what became worse, on the
    whole and beyond the noise of one model at least.

    Args:
        suites: The recipe's.
        start: The scores that all of `ends` started from.
        ends: Those of the models that are compared.
    """
    if kept := kept_suites(suites):
        return {score.key for scores in (start, *ends) for score in scores if score.suite in kept}
    before = {score.key: score for score in start}
    found: dict[Key, list[Change]] = {}
    for score in (score for end in ends for score in end if score.key in before and _can_gain(score)):
        found.setdefault(score.key, []).append(Change(before[score.key], score))
    return {
        key
        for key, changes in found.items()
        if sum(change.gain for change in changes) < 0
        and any(change.gain < 0 and change.beyond_noise for change in changes)
    }


def _can_gain(score: Score) -> bool:
    """Returns False for metrics of bias, which are measured beside the task and not learned."""
    return score.ideal is None and score.metric not in BIAS_METRICS


def scales_of(scores: Iterable[Score]) -> dict[Key, float]:
    """The score of a flawless model by suite and metric, or the largest absolute one among those compared."""
    scales: dict[Key, float] = {}
    for score in scores:
        if math.isfinite(score.value):
            largest = max(scales.get(score.key, 0.0), abs(score.value))
            scales[score.key] = FULL_MARKS.get(score.metric, largest)
    return scales


def _mean(found: Iterable[tuple[Change, float]]) -> Estimate | None:
    """The mean of the gains, each by its scale: metrics are averaged in their suite, then suites with one another."""
    by_suite: dict[str, list[tuple[float, float, float, float]]] = {}
    for change, scale in found:
        gain = change.gain
        low, high = change.interval or (gain, gain)
        sizes = (gain, change.stderr, gain - low, high - gain)
        by_suite.setdefault(change.after.suite, []).append(tuple(size / scale for size in sizes))  # type: ignore[arg-type]
    if not by_suite:
        return None
    values, errors, below, above = zip(
        *(map(fmean, zip(*rows, strict=True)) for rows in by_suite.values()), strict=True
    )
    value = fmean(values)
    error, under, over = (math.hypot(*sizes) / len(sizes) for sizes in (errors, below, above))
    return Estimate(value, error, (value - under, value + over) if under or over else None)


def point(
    suites: Mapping[str, Suite],
    line: Sequence[Score],
    start: Sequence[Score],
    end: Sequence[Score],
    scales: Mapping[Key, float],
    kept: set[Key],
) -> Point:
    """The gain and the forgetting of a model.

    Args:
        suites: The recipe's.
        line: The scores of what came before it, the base first.
        start: The scores that its gain is counted from.
        end: Its own.
        scales: See `scales_of`.
        kept: See `kept_keys`.
    """
    before = {score.key: score for score in start}
    asked = [score for score in end if score.key not in kept and _can_gain(score)]
    changes = [Change(before[s.key], s) if s.key in before else from_baseline(s) for s in asked]
    gains = [change for change in changes if change]
    every = [*line, *end]
    lost = [change for score in end if score.key in kept and (change := forgetting(every, score.stage, score.key))]
    over = []
    for name in kept_suites(suites) if end else ():
        over += judge_budget(every, end[0].stage, name, suites[name]).over
    return Point(_gain(gains, scales), _loss(lost), over)


ONE_LIKELIHOOD = ("bits_per_byte", "word_perplexity", "perplexity")  # of one suite: the same bits in three units


def _told_once(changes: Iterable[Change]) -> list[Change]:
    """Changes without those that tell a suite's likelihood again in another unit; bits per byte come first."""
    every = list(changes)
    there = {change.after.key for change in every}
    return [
        change
        for change in every
        if change.after.metric not in ONE_LIKELIHOOD
        or not any(
            (change.after.suite, metric) in there
            for metric in ONE_LIKELIHOOD[: ONE_LIKELIHOOD.index(change.after.metric)]
        )
    ]


def _gain(changes: Iterable[Change], scales: Mapping[Key, float]) -> Estimate | None:
    finite = [change for change in _told_once(changes) if math.isfinite(change.gain)]
    shares = [(change, scales.get(change.after.key) or 1.0) for change in finite]
    return _mean(shares)


def _loss(changes: Iterable[Change], scales: Mapping[Key, float] | None = None) -> Estimate | None:
    found = []
    for change in (change for change in _told_once(changes) if math.isfinite(change.gain)):
        size = (scales or {}).get(change.after.key) or abs(change.before.value) or abs(change.gain) or 1.0
        size = 1.0 if change.after.ideal is not None else size  # a budget is how much further from the ideal it may be
        found.append((change, size))
    mean = _mean(found)
    return None if mean is None else -mean


@dataclass(frozen=True)
class Comparison:
    """Two models from one parent.

    Args:
        learned: How much more the second gained than the first, in shares; None where there is nothing to gain on.
        forgot: How much more it forgot; None where there is nothing to be kept.
    """

    learned: Estimate | None
    forgot: Estimate | None


def compare(
    start: Sequence[Score],
    first: Sequence[Score],
    second: Sequence[Score],
    scales: Mapping[Key, float],
    kept: set[Key],
) -> Comparison:
    """Compares two models that started from one parent with each other, row by row where both were scored on the same.

    Args:
        start: The parent's scores.
        first: The scores of one.
        second: Those of the other.
        scales: See `scales_of`.
        kept: See `kept_keys`.
    """
    before, other = ({score.key: score for score in scores} for scores in (start, first))
    both = [_between(other[score.key], score) for score in second if score.key in other and score.key in before]
    sizes = {key: abs(score.value) for key, score in before.items()}
    return Comparison(
        _gain([change for change in both if change.after.key not in kept and _can_gain(change.after)], scales),
        _loss([change for change in both if change.after.key in kept], sizes),
    )


def _between(first: Score, second: Score) -> Change:
    """The change from one score to another, with its paired error whichever of the two was scored last."""
    if first.stage not in second.paired and second.stage in first.paired:
        second = replace(second, paired={**second.paired, first.stage: first.paired[second.stage]})
    return Change(first, second)
