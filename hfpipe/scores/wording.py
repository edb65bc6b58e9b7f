"""Numbers, scores and changes in words: one format each, for the terminal, the report and the card.

A score or a change stands with its 95 % interval in brackets; where too few rows were scored to have one, that is said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hfpipe.recipe.metric_table import IN_NATS, SHARE_METRICS
from hfpipe.scores.scorecard import FEWEST_ROWS, Change, Score
from hfpipe.scores.tradeoff import Estimate


def number(value: float, metric: str = "") -> str:
    """A value of a metric: a share in percent, any other with four decimals, from 10 on with two, or four digits."""
    if metric in SHARE_METRICS:
        return percent(value)
    if 10 <= abs(value) < 1e6:
        return f"{value:.2f}"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 10 else f"{value:.4g}"


def percent(share: float) -> str:
    """A share in percent with one decimal; never `-0.0 %`."""
    return f"{round(100 * share, 1) + 0.0:.1f} %"


def between(low: str, high: str) -> str:
    """An interval of two written numbers; their unit is said once."""
    return f"{low.removesuffix(' %') if high.endswith(' %') else low} to {high}"


def interval(score: Score) -> str:
    """The 95 % interval of a score; empty where there is none."""
    if score.n < FEWEST_ROWS or score.low is None or score.high is None:
        return ""
    return between(number(score.low, score.metric), number(score.high, score.metric))


def describe(score: Score) -> str:
    """One score in words: `exact_match 30.5 % (24.5 to 37.2 %), n = 200`."""
    found = with_interval(number(score.value, score.metric), interval(score))
    return f"{score.metric} {found}, n = {score.n:,}"


def share_words(estimate: Estimate | None) -> tuple[str, str]:
    """A mean gain, or a difference of two, in percent, and its 95 % interval; each empty where there is none."""
    if estimate is None:
        return "", ""
    return percent(estimate.value), between(*map(percent, estimate.interval)) if estimate.interval else ""


def loss_words(estimate: Estimate | None) -> tuple[str, str]:
    """A mean loss and its interval, as `share_words`; one below zero is none, with the size of the improvement."""
    if estimate is not None and percent(estimate.value).startswith("-"):
        size, found = share_words(-estimate)
        return f"none, {size} better", found
    return share_words(estimate)


def with_interval(text: str, found: str) -> str:
    """A size with its interval in brackets."""
    return f"{text} ({found})" if found else text


@dataclass(frozen=True)
class ChangeWords:
    """A change, in the parts that a sentence or a row of a table is made of.

    Args:
        subject: Suite and metric.
        way: The values before and after.
        size: How much better or worse, in percent, in points, or in the metric's own unit.
        interval: The 95 % interval of the size; empty where there is none.
        note: Why the change tells nothing, if it does not; empty otherwise.
        mark: `better`, `worse`, or empty for a change within the noise.
    """

    subject: str
    way: str
    size: str
    interval: str
    note: str
    mark: str

    def __str__(self) -> str:
        size = with_interval(self.size, self.interval)
        return f"{self.subject} {self.way}: {size}" + (f", {self.note}" if self.note else "")


def change_words(change: Change) -> ChangeWords:
    """One change in words: `general bits_per_byte 1.0000 → 1.2000: 20.0 % worse (18.4 to 21.6 %)`."""
    before, after = change.before, change.after
    way = f"{number(before.value, before.metric)} → {number(after.value, after.metric)}"
    mark = ("better" if change.gain > 0 else "worse") if change.beyond_noise else ""
    size, found = _size(change)
    if before.stage in after.baselines:  # no model before it could answer
        others = [f"{name} {number(at, after.metric)}" for name, at in after.baselines.items() if name != before.stage]
        size = f"{size} than {before.stage}" + (f", {', '.join(others)}" if others else "")
    return ChangeWords(f"{after.suite} {after.metric}", way, size, found, _doubt(change), mark)


def _size(change: Change) -> tuple[str, str]:
    """Says by how much a score is better or worse, and the interval of that."""
    after, way = change.after, "better" if change.gain > 0 else "worse"
    if change.gain == 0:
        return ("unchanged" if change.difference == 0 else f"as far from {after.ideal:g}"), ""
    if not math.isfinite(change.gain):  # from or to a number that was too large
        return way, ""
    scale, form, unit = 1.0, "{:.3g}", ""
    if after.ideal is not None:
        way = f"{'nearer to' if change.gain > 0 else 'further from'} {after.ideal:g}"
    elif after.metric in SHARE_METRICS:
        scale, form, unit = 100.0, "{:.1f}", " points"
    elif after.metric in IN_NATS:
        unit = " nats"
    elif 100 <= abs(change.relative) < math.inf:
        return f"{way}, by a factor above 100", ""
    elif math.isfinite(change.relative):
        scale, form, unit = 100 / abs(change.before.value), "{:.1f}", " %"
    size = f"{form.format(abs(change.gain) * scale)}{unit} {way}"
    if change.interval is None:
        return size, ""
    low, high = sorted(math.copysign(scale, change.gain) * end for end in change.interval)
    return size, between(form.format(low), form.format(high) + ("" if unit in (" points", " nats") else unit))


def _doubt(change: Change) -> str:
    """The reason why a change shows nothing, and how many rows would; empty where it shows something."""
    if change.beyond_noise or change.gain == 0:
        return ""
    if change.after.n < FEWEST_ROWS:
        return f"{change.after.n} rows are too few to tell"
    needed = change.rows_needed
    if needed is None or needed <= change.after.n:
        return "within the noise"
    digits = max(0, len(str(needed)) - 2)
    rounded = math.ceil(needed / 10**digits) * 10**digits
    return f"within the noise of {change.after.n:,} rows; about {rounded:,} would tell it"
