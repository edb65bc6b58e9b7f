"""The plots of the price: stages on the plane of gain and forgetting, and the two along the strengths of a dial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hfpipe.report.plots import BLUE, INK, ORANGE, STYLE, cut, svg_of

if TYPE_CHECKING:
    from hfpipe.report.price import Placed

Z = 1.96  # 95 % of a normal distribution
SIZE = (4.2, 2.9)


def _plane(axes: Any) -> None:
    axes.set(xlabel="forgetting (left is better)", ylabel="gain (up is better)")
    axes.axhline(0, color=INK, linewidth=0.6, alpha=0.5)
    axes.axvline(0, color=INK, linewidth=0.6, alpha=0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(PercentFormatter(1.0))
    axes.margins(0.18)
    axes.grid()


def tradeoff_plots(stages: Sequence[Placed]) -> list[str]:
    """Gain against forgetting with 95 % intervals: a plot for each parent of several stages, or one of all stages.

    Args:
        stages: The stages; each stands where it came to from the model it started from, which is at zero.
    """
    known = [one for one in stages if one.where.gain is not None and one.where.forgetting is not None]
    families = {one.parent: [other for other in known if other.parent == one.parent] for one in known}
    families = {parent: children for parent, children in families.items() if len(children) > 1}
    if not families:
        return [_tradeoff(known, "each stage against what it started from")] if known else []
    return [_tradeoff(children, f"stages that start from {cut(parent)}") for parent, children in families.items()]


def _tradeoff(stages: Sequence[Placed], title: str) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE)
        axes = figure.subplots()
        told = []
        for number, one in enumerate(stages):
            gain, loss = one.where.gain, one.where.forgetting
            assert gain is not None
            assert loss is not None
            look: dict[str, Any] = {
                "color": f"C{number}",
                "marker": "os^Dv*"[number % 6],
                "capsize": 3,
                "elinewidth": 1,
            }
            name = f"{cut(one.stage)} ({'all weights' if one.method == 'full' else one.method})"
            axes.errorbar(loss.value, gain.value, Z * gain.stderr, Z * loss.stderr, ls="none", label=name, **look)
            told.append(f"{one.stage}: gain {gain.value:.1%}, forgetting {loss.value:.1%}")
        _plane(axes)
        axes.set_title(title)
        axes.legend(frameon=False, fontsize=9)
        return svg_of(figure, f"Gain against forgetting. {'; '.join(told)}")


def dial_plots(dial: dict[str, Any]) -> list[str]:
    """Gain and forgetting along the strengths, and against each other; without forgetting the first alone.

    Args:
        dial: What dial.json holds.
    """
    points = dial["points"]
    lines = [(key, color) for key, color in (("gain", BLUE), ("forgetting", ORANGE)) if points[0][key] is not None]
    told = "; ".join(
        f"at {one['strength']:g} " + ", ".join(f"{key} {one[key]:.1%}" for key, _ in lines) for one in points
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE)
        axes = figure.subplots()
        at = [one["strength"] for one in points]
        for key, color in lines:
            values, errors = [one[key] for one in points], [Z * one[f"{key}_stderr"] for one in points]
            axes.errorbar(at, values, errors, color=color, marker="o", markersize=4, capsize=3, label=key)
        if dial["best"] is not None:
            axes.axvline(dial["best"], color=INK, linestyle=":", linewidth=1, label=f"best: {dial['best']:g}")
        axes.set(xlabel="strength", title=cut(dial["stage"]))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(axis="y")
        axes.legend(frameon=False, fontsize=9)
        plots = [svg_of(figure, f"The dial of {dial['stage']}: {told}")]
        if len(lines) == 2:
            plots.append(_curve(dial))
    return plots


def _curve(dial: dict[str, Any]) -> str:
    """Gain against forgetting, a point for each strength; hollow where a budget is exceeded."""
    points = dial["points"]
    figure = Figure(figsize=SIZE)
    axes = figure.subplots()
    axes.plot([one["forgetting"] for one in points], [one["gain"] for one in points], color=INK, alpha=0.4, linewidth=1)
    for one in points:
        filled = "none" if one["over"] else BLUE
        size = 9 if one["strength"] == dial["best"] else 5
        axes.plot(one["forgetting"], one["gain"], "o", color=BLUE, markerfacecolor=filled, markersize=size)
        place = (one["forgetting"], one["gain"])
        axes.annotate(f"{one['strength']:g}", place, xytext=(6, 5), textcoords="offset points", fontsize=9)
    _plane(axes)
    axes.set_title("strengths; hollow: over a budget")
    return svg_of(figure, f"Gain against forgetting of {dial['stage']} at each strength")
