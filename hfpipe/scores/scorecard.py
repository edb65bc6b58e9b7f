"""Scores: one number with its n and standard error; the scorecard; what was gained and what was forgotten.

Numbers are data and pages are views: every report and card reads the scorecard that is written here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

from hfpipe.core.files import load_json, write_json
from hfpipe.recipe.config import Suite
from hfpipe.recipe.source_config import BASE as BASE

Z = 1.96  # standard errors to each side of a value, between which 95 % of a normal distribution lie
FEWEST_ROWS = 6  # with five rows that all change one way, an exact test still gives p = 0.06
ALPHA = 0.05  # a change is told where its p-value, corrected for all comparisons of its stage, is below
Key: TypeAlias = tuple[str, str]  # suite and metric


@dataclass(frozen=True)
class Paired:
    """The difference of two models on the rows that both were scored on, the later one's score less the earlier one's.

    Args:
        stderr: Standard error of the difference.
        p: Two-sided p-value of the hypothesis that nothing changed; None in a scorecard from before it was computed.
        low: Lower end of the 95 % interval of the difference.
        high: Upper end.
    """

    stderr: float
    p: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Score:
    """One metric of one suite after one stage.

    Args:
        stage: The stage that was scored; `base` before any training.
        suite: Name of the suite.
        metric: Name of the metric.
        value: The score; bits, shares and counts in the metric's own unit.
        stderr: Standard error of `value`; None where the metric has none.
        n: Rows that were scored.
        higher_is_better: Direction of the metric.
        low: Lower end of the 95 % interval of `value`.
        high: Upper end.
        paired: Earlier stage to the difference from its score on the rows that both were scored on.
        ideal: The best value of a score that can be too high and too low (a share of preferences); None of any other.
        signature: How exactly the metric counts, in its library's own words (sacrebleu), and which prompts were cut.
        baselines: What answers without a model score on the same rows, by name (`the majority class`, `chance`); empty
            where there are no labels to give them.
    """

    stage: str
    suite: str
    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool
    low: float | None = None  # None in a scorecard of a version that had no intervals
    high: float | None = None
    paired: dict[str, Paired] = field(default_factory=dict)
    signature: str = ""
    ideal: float | None = None
    baselines: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Reads `paired` as JSON holds it: mappings, or only the standard errors in older scorecards."""
        plain = {
            stage: Paired(**_known(Paired, one))
            if isinstance(one, dict)
            else one
            if isinstance(one, Paired)
            else Paired(one)
            for stage, one in self.paired.items()
        }
        object.__setattr__(self, "paired", plain)

    @property
    def key(self) -> Key:
        return self.suite, self.metric

    @property
    def merit(self) -> float:
        """The score with its direction turned so that more is better."""
        if self.ideal is not None:
            return -abs(self.value - self.ideal)
        return self.value if self.higher_is_better else -self.value

    @property
    def arrow(self) -> str:
        """The direction in which the score becomes better: `↑`, `↓`, or `→ 0.5`."""
        if self.ideal is not None:
            return f"→ {self.ideal:g}"
        return "↑" if self.higher_is_better else "↓"


def _apart(one: float, other: float) -> float:
    """The difference of two scores; zero where it is what sums in another order leave."""
    return 0.0 if math.isclose(one, other, rel_tol=1e-12, abs_tol=1e-12) else one - other


@dataclass(frozen=True)
class Change:
    """The way from one score to another of the same suite and metric.

    `gain` is positive when the score became better, whatever its direction. Error, interval and p-value are those of
    the rows in common where they are known; else the two scores are taken as independent, which is wider as a rule.

    Args:
        before: The earlier score.
        after: The later one.
        adjusted: The p-value corrected for all comparisons of the stage (see `adjusted_p`); None for one comparison.
    """

    before: Score
    after: Score
    adjusted: float | None = None

    @property
    def difference(self) -> float:
        return _apart(self.after.value, self.before.value)

    @property
    def gain(self) -> float:
        return _apart(self.after.merit, self.before.merit)

    @property
    def stderr(self) -> float:
        if paired := self.after.paired.get(self.before.stage):
            return paired.stderr
        return math.hypot(self.before.stderr or 0.0, self.after.stderr or 0.0)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of `gain`; None where no error is known."""
        if not math.isfinite(self.gain):
            return None
        paired = self.after.paired.get(self.before.stage)
        half = t_quantile(self._freedom) * self.stderr
        low, high = self.difference - half, self.difference + half
        if paired and paired.low is not None and paired.high is not None:
            low, high = paired.low, paired.high
        if low == high:
            return None
        if self.after.ideal is not None:
            return self.gain - (self.difference - low), self.gain + (high - self.difference)
        return (low, high) if self.after.higher_is_better else (-high, -low)

    @property
    def p(self) -> float:
        """The two-sided p-value of this one comparison."""
        paired = self.after.paired.get(self.before.stage)
        if paired and paired.p is not None:
            return paired.p
        if self.difference == 0:
            return 1.0
        # However small the error looks, n rows that all change one way have p = 2 / 2^n by a sign test.
        by_error = t_p_value(self.difference / self.stderr, self._freedom) if self.stderr else 0.0
        return max(by_error, least_p(self.after.n))

    @property
    def _freedom(self) -> int:
        return max(1, min(self.before.n, self.after.n) - 1)

    @property
    def relative(self) -> float:
        """The gain as a share of the score before; infinite when that was zero."""
        if self.gain == 0:
            return 0.0
        return self.gain / abs(self.before.value) if self.before.value else math.copysign(math.inf, self.gain)

    @property
    def loss(self) -> str:
        """The loss in words: `3.1% of`, or `0.04 of nearness to 0.5 in` where the score has an ideal."""
        if self.after.ideal is not None:
            return f"{-self.gain:.3g} of nearness to {self.after.ideal:g} in"
        return f"{-self.relative:.1%} of" if self.relative > -100 else "more than a hundred times of"

    @property
    def beyond_noise(self) -> bool:
        """True if the change is told from noise, at 5 % over all comparisons of the stage."""
        return self.gain != 0 and (self.p if self.adjusted is None else self.adjusted) < ALPHA

    @property
    def rows_needed(self) -> int | None:
        """Rows that would tell a change of this size from noise, as the error falls with their root; None without one.

        Above `after.n` the evaluation set is too small for the difference that is read off it.
        """
        if self.gain == 0:
            return None
        return max(FEWEST_ROWS, math.ceil(self.after.n * (t_quantile(self._freedom) * self.stderr / self.gain) ** 2))


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: half a 95 % interval in standard errors."""
    from scipy.special import stdtrit  # of scipy.special, which imports in a tenth of the time of scipy.stats

    return float(stdtrit(freedom, 0.975))


def t_p_value(t: float, freedom: int) -> float:
    """The two-sided p-value of a t statistic."""
    from scipy.special import stdtr

    return 2 * float(stdtr(freedom, -abs(t)))


def least_p(n: int) -> float:
    """The smallest p-value that n rows can give: all of them change one way."""
    return math.ldexp(1.0, 1 - n)


def adjusted_p(scores: Sequence[Score], stage: str) -> dict[tuple[Key, str], float]:
    """P-values of a stage's changes against every earlier stage, corrected together by Holm's method (1979).

    A report names the best of several earlier scores and looks at every suite: one comparison in twenty would look
    like a change where nothing changed. With the correction, at most one run in twenty says so anywhere.

    Args:
        scores: Those of one line of stages (`of_lineage`).
        stage: The stage whose changes are judged.

    Returns:
        By suite and metric, and earlier stage.
    """
    order = stages_of(scores)
    after = {score.key: score for score in scores if score.stage == stage}
    raw = {
        (score.key, score.stage): Change(score, after[score.key]).p
        for score in scores
        if score.key in after and score.stage in order[: order.index(stage)]
    }
    adjusted, largest = {}, 0.0
    for place, (which, p) in enumerate(sorted(raw.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p * (len(raw) - place)))
        adjusted[which] = largest
    return adjusted


def change_since(scores: Sequence[Score], since: str, stage: str, key: Key) -> Change | None:
    """The change of a score from one stage to a later one; None where either has none."""
    by_stage = {score.stage: score for score in scores if score.key == key}
    if since == stage or since not in by_stage or stage not in by_stage:
        return None
    return Change(by_stage[since], by_stage[stage], adjusted_p(scores, stage).get((key, since)))


def score_of(row: Mapping[str, Any]) -> Score:
    """Returns a score from its row in a file; a key that this version does not know is passed over."""
    return Score(**_known(Score, row))


def _known(kind: type, row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key in {one.name for one in fields(kind)}}


def read_scorecard(path: Path) -> list[Score]:
    """Reads scorecard.json."""
    return [score_of(row) for row in load_json(path)]


def write_scorecard(scores: Iterable[Score], path: Path) -> None:
    """Writes scorecard.json in one piece."""
    write_json(path, [asdict(score) for score in scores])


def stages_of(scores: Sequence[Score]) -> list[str]:
    """Names of the scored stages in order."""
    return list(dict.fromkeys(score.stage for score in scores))


def of_lineage(scores: Sequence[Score], lineage: Sequence[str]) -> list[Score]:
    """The scores of one line of stages (`Recipe.lineage`): a stage is compared with what it came from.

    Stages that start from the same parent have nothing to forget of each other.
    """
    return [score for score in scores if score.stage in lineage]


def last_change(scores: Sequence[Score], stage: str, key: Key) -> Change | None:
    """The change from the stage before to `stage`."""
    earlier = _scored_before(scores, stage, key)
    return change_since(scores, earlier[-1].stage, stage, key) if earlier else None


def forgetting(scores: Sequence[Score], stage: str, key: Key) -> Change | None:
    """The change from the best earlier score (the base included) to `stage`; a negative gain is what was forgotten.

    The best earlier score, and not only the base, is the reference, so that what one stage taught and the next one lost
    counts too, and a model that starts from nothing has something to forget (Chaudhry et al. 2018, arXiv:1801.10112).
    """
    earlier = _scored_before(scores, stage, key)
    return change_since(scores, max(earlier, key=lambda score: score.merit).stage, stage, key) if earlier else None


def _scored_before(scores: Sequence[Score], stage: str, key: Key) -> list[Score]:
    order = stages_of(scores)
    earlier = order[: order.index(stage)] if stage in order else []
    return [score for name in earlier for score in scores if score.stage == name and score.key == key]


@dataclass(frozen=True)
class Budget:
    """Compares the scores of one suite with its budget.

    Args:
        over: Changes whose loss is told to be above the budget.
        undecided: Changes whose measured loss is above it, though it may be noise.
    """

    over: list[Change]
    undecided: list[Change]


def judge_budget(scores: Sequence[Score], stage: str, name: str, suite: Suite) -> Budget:
    """Holds the losses of a suite against its budget.

    The budget is a share of the score before; of a score with an ideal it is how much further from that it may be. A
    loss is over it where the 95 % interval of the change is, and the change is told from noise. Where a suite has so
    few rows that no loss could ever be told, the measured loss decides, unless its `too_few_rows` says `pass`.

    Args:
        scores: Those of one line of stages (`of_lineage`).
        stage: The stage that is judged.
        name: The suite's name.
        suite: The suite, with its budget.
    """
    over, undecided = [], []
    budget = suite.budget if suite.budget is not None else math.inf
    comparisons = len(adjusted_p(scores, stage)) if stage in stages_of(scores) else 0
    for key in dict.fromkeys(score.key for score in scores if score.suite == name and score.stage == stage):
        change = forgetting(scores, stage, key)
        if change is None:
            continue
        allowed = budget if change.after.ideal is not None else budget * abs(change.before.value)
        if not -change.gain > allowed:
            continue
        least = -change.interval[1] if change.interval else -change.gain  # the loss at the better end of the interval
        told = change.beyond_noise and least > allowed
        too_few = least_p(change.after.n) * comparisons >= ALPHA
        if told or (too_few and suite.too_few_rows == "fail"):
            over.append(change)
        else:
            undecided.append(change)
    return Budget(over, undecided)
