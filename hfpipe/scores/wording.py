"""Numbers, scores and changes in words, for the terminal, the report and the card."""

from __future__ import annotations

import math

from hfpipe.recipe.metric_table import SHARE_METRICS
from hfpipe.scores.scorecard import Change, Score


def number(score: Score) -> str:
    """A score as it is printed everywhere: shares in percent, the rest with four digits."""
    if score.metric in SHARE_METRICS:
        error = "" if score.stderr is None else f" ± {score.stderr * 100:.1f}"
        return f"{score.value * 100:.1f}{error} %"
    return plain_number(score)


def plain_number(score: Score) -> str:
    """A score with four digits, and the error of those that have one."""
    small_or_large = not 1e-3 <= abs(score.value) < 1e6 and score.value != 0
    form, error_form = (".4g", ".2g") if small_or_large else (".4f", ".4f")
    error = "" if score.stderr is None else f" ± {score.stderr:{error_form}}"
    return f"{score.value:{form}}{error}"


def describe(change: Change) -> str:
    """One change in words: `bits_per_byte 3.2 -> 1.9 (41 % better)`."""
    before, after = change.before, change.after
    way = "better" if change.gain > 0 else "worse"
    if change.gain == 0:
        size = "unchanged" if change.difference == 0 else f"as far from {after.ideal:g}"
    elif after.ideal is not None:
        size = f"{abs(change.gain):.3g} {'nearer to' if change.gain > 0 else 'further from'} {after.ideal:g}"
    elif after.metric in SHARE_METRICS:
        size = f"{abs(change.gain) * 100:.1f} points {way}"
    elif 100 <= abs(change.relative) < math.inf:
        size = f"{way}, by a factor above 100"
    elif not math.isfinite(change.relative):  # from zero, or from a number that was too large
        size = f"{abs(change.gain):.3g} {way}" if math.isfinite(change.gain) else way
    else:
        size = f"{abs(change.relative):.1%} {way}"
    noise = "" if change.beyond_noise or change.gain == 0 else f", within the noise{_too_small(change)}"
    return f"{after.suite} {after.metric} {number(before)} -> {number(after)} ({size}{noise})"


def _too_small(change: Change) -> str:
    """How many rows would tell a difference that is too small for this suite."""
    needed = change.rows_needed
    if needed is None or needed <= change.after.n:
        return ""
    rounded = math.ceil(needed / 10 ** (len(str(needed)) - 2)) * 10 ** (len(str(needed)) - 2) if needed > 99 else needed
    return f" of {change.after.n} rows; about {rounded:,} would tell it"


def describe_first(score: Score) -> str:
    """A score that has none before it, in words."""
    return f"{score.suite} {score.metric} {number(score)}"
