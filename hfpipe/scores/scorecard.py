"""Scores: one number with its n and standard error; the scorecard; what was gained and what was forgotten.

Numbers are data and pages are views: every report and card reads the scorecard that is written here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hfpipe.core.files import write_json
from hfpipe.recipe.stage_config import BASE as BASE

# With five rows that all change one way, a sign test still gives p = 0.06: fewer than six tell no difference.
FEWEST_ROWS = 6


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
        paired: Earlier stage to the standard error of the difference to its score, from a paired bootstrap over the
            rows that both were scored on (Koehn 2004, aclanthology.org/W04-3250).
        ideal: The best value of a score that can be too high and too low (a share of preferences); None of any other.
        signature: How exactly the metric counts, in its library's own words (sacrebleu); empty where it has none.
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
    paired: dict[str, float] = field(default_factory=dict)
    signature: str = ""
    ideal: float | None = None
    baselines: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return self.suite, self.metric

    @property
    def merit(self) -> float:
        """How good the score is, whatever its direction: more is better."""
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

    `gain` is positive when the score became better, whatever its direction; `stderr` is that of the difference: the
    paired one where it is known, else with the two scores taken as independent, which is larger as a rule.
    """

    before: Score
    after: Score

    @property
    def difference(self) -> float:
        return _apart(self.after.value, self.before.value)

    @property
    def gain(self) -> float:
        return _apart(self.after.merit, self.before.merit)

    @property
    def stderr(self) -> float:
        if self.before.stage in self.after.paired:
            return self.after.paired[self.before.stage]
        return math.hypot(self.before.stderr or 0.0, self.after.stderr or 0.0)

    @property
    def relative(self) -> float:
        """The gain as a share of the score before; infinite when that was zero."""
        if self.gain == 0:
            return 0.0
        return self.gain / abs(self.before.value) if self.before.value else math.copysign(math.inf, self.gain)

    @property
    def loss(self) -> str:
        """What was lost, in words: `3.1% of`, or `0.04 of nearness to 0.5 in` where the score has an ideal."""
        if self.after.ideal is not None:
            return f"{-self.gain:.3g} of nearness to {self.after.ideal:g} in"
        return f"{-self.relative:.1%} of" if self.relative > -100 else "more than a hundred times of"

    @property
    def beyond_noise(self) -> bool:
        """Whether the change is outside a 95 % interval; never so with fewer than six rows."""
        return self.after.n >= FEWEST_ROWS and abs(self.gain) > 1.96 * self.stderr

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of `gain`; None with fewer than six rows, or where no error is known."""
        if self.after.n < FEWEST_ROWS or self.stderr == 0 or not math.isfinite(self.gain):
            return None
        return self.gain - 1.96 * self.stderr, self.gain + 1.96 * self.stderr

    @property
    def rows_needed(self) -> int | None:
        """Rows that would tell a change of this size from noise, as the error falls with their root; None without one.

        Above `after.n` the evaluation set is too small for the difference that is read off it.
        """
        if self.gain == 0:
            return None
        return max(FEWEST_ROWS, math.ceil(self.after.n * (1.96 * self.stderr / self.gain) ** 2))


def read_scorecard(path: Path) -> list[Score]:
    """Reads scorecard.json."""
    return [Score(**row) for row in json.loads(path.read_text())]


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


def last_change(scores: Sequence[Score], stage: str, key: tuple[str, str]) -> Change | None:
    """From the stage before to `stage`: what this one stage did."""
    order = stages_of(scores)
    by_stage = {score.stage: score for score in scores if score.key == key}
    earlier = [name for name in order[: order.index(stage)] if name in by_stage]
    if not earlier or stage not in by_stage:
        return None
    return Change(by_stage[earlier[-1]], by_stage[stage])


def forgetting(scores: Sequence[Score], stage: str, key: tuple[str, str]) -> Change | None:
    """From the best earlier score (the base included) to `stage`; a negative gain is what was forgotten.

    The best earlier score, and not only the base, is the reference, so that what one stage taught and the next one lost
    counts too, and a model that starts from nothing has something to forget (Chaudhry et al. 2018, arXiv:1801.10112).
    """
    order = stages_of(scores)
    by_stage = {score.stage: score for score in scores if score.key == key}
    earlier = [by_stage[name] for name in order[: order.index(stage)] if name in by_stage]
    if not earlier or stage not in by_stage:
        return None
    best = max(earlier, key=lambda score: score.merit)
    return Change(best, by_stage[stage])


def over_budget(scores: Sequence[Score], stage: str, suite: str, budget: float) -> list[Change]:
    """The changes of a suite whose loss is above `budget`, beyond the noise.

    The budget is a share of the score before; of a score with an ideal it is how much further from that it may be.
    """
    found = []
    for key in dict.fromkeys(score.key for score in scores if score.suite == suite and score.stage == stage):
        change = forgetting(scores, stage, key)
        if change is None:
            continue
        allowed = budget if change.after.ideal is not None else budget * abs(change.before.value)
        if change.beyond_noise and -change.gain - 1.96 * change.stderr > allowed:
            found.append(change)
    return found
