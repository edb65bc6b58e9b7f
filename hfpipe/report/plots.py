"""Plots of report.html, as SVG in the page: no file beside it, the page's own text colour and fonts.

Besides curves and scores by stage: the stages on the plane of gain and forgetting, and the two along the dial.
"""

from __future__ import annotations

import io
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpipe.core.files import each_in_jsonl
from hfpipe.recipe.metric_table import SHARE_METRICS
from hfpipe.scores.scorecard import Score
from hfpipe.scores.tradeoff import Estimate, Point, estimate_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"  # drawn in this colour, written as currentColor: right on a light and on a dark page
BLUE, ORANGE = "#3b76d6", "#d9742b"
COLOURS = [BLUE, ORANGE, "#3a9a5b", "#b04fb8", "#c2a12a", "#7a8594"]
STYLE: Any = {
    "text.parse_math": False,  # a name with two dollar signs is no formula
    "svg.fonttype": "none",  # text stays text: small, sharp, found by a search
    "svg.hashsalt": "hfpipe",  # the same run gives the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
}

SIZE, SMALL = (4.2, 2.9), (4.2, 2.6)  # inches


@contextmanager
def _drawn(size: tuple[float, float] = SIZE) -> Iterator[tuple[Any, Any]]:
    """Gives a figure and its axes in this style. A run imports matplotlib here, at its end, and not as it starts."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.rcsetup import cycler

    with matplotlib.rc_context(STYLE | {"axes.prop_cycle": cycler(color=COLOURS)}):
        figure = Figure(figsize=size)
        yield figure, figure.subplots()


def _in_percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))


@dataclass(frozen=True)
class Placed:
    """A stage on the plane of gain and forgetting, against the model it started from.

    Args:
        stage: Its name.
        parent: That of what it started from.
        method: What it trained: full, LoRA, ...
        where: Its gain and forgetting.
    """

    stage: str
    parent: str
    method: str
    where: Point


def losses_of(stage: Path) -> tuple[Sequence[int], Sequence[float]]:
    """Reads the steps and losses that a stage has logged, (N,) each; none of a stage without a log.

    Args:
        stage: Its folder.
    """
    steps, losses = array("q"), array("d")
    if (stage / "log.jsonl").exists():
        for row in each_in_jsonl(stage / "log.jsonl"):
            if "loss" in row:
                steps.append(row["step"])
                losses.append(row["loss"])
    return steps, losses


def loss_curves(stage: str, runs: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> str:
    """The training losses of one stage in several runs.

    Args:
        stage: Name of the stage.
        runs: By run its optimizer steps, (N,), and its losses, (N,).
    """
    with _drawn() as (figure, axes):
        for number, (name, (steps, losses)) in enumerate(runs.items()):
            axes.plot(steps, losses, linewidth=1.4, label=cut(name), linestyle=_line(number), **_look(number, steps))
        axes.set(xlabel="step", ylabel="loss", title=cut(stage))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y")
        axes.legend(frameon=False, fontsize=8)
        told = "; ".join(f"{name} {losses[-1]:.4f} at step {steps[-1]}" for name, (steps, losses) in runs.items())
        return svg_of(figure, f"Training losses of stage {stage}: {told}")


def _line(number: int) -> str:
    return ("-", "--", ":")[number // len(COLOURS) % 3]


def _look(number: int, steps: Sequence[int]) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": "." if len(steps) < 25 else None}


def loss_curve(stage: str, steps: Sequence[int], losses: Sequence[float], unit: str) -> str:
    """The training loss of a stage.

    Args:
        stage: Name of the stage.
        steps: Optimizer steps, (N,).
        losses: Mean loss since the step before, (N,).
        unit: Of the losses; empty where they have none.
    """
    with _drawn(SMALL) as (figure, axes):
        axes.plot(steps, losses, color=BLUE, linewidth=1.6, marker="." if len(steps) < 25 else None)
        axes.set(xlabel="step", ylabel=f"loss ({unit})" if unit else "loss", title=cut(stage))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y")
        return svg_of(
            figure, f"Training loss of stage {stage}: {losses[0]:.4f} at the first entry, {losses[-1]:.4f} last"
        )


def score_by_stage(scores: Sequence[Score], parents: Mapping[str, str]) -> str:
    """One metric of one suite after every stage, with 95 % intervals.

    Args:
        scores: One score a stage, in order.
        parents: What each stage started from; a line goes from there to it.
    """
    first = scores[0]
    with _drawn(SMALL) as (figure, axes):
        ends = [(s.low, s.high) if s.low is not None and s.high is not None else (s.value, s.value) for s in scores]
        errors = [[s.value - low for s, (low, _) in zip(scores, ends, strict=True)]]
        errors.append([high - s.value for s, (_, high) in zip(scores, ends, strict=True)])
        places = range(len(scores))
        values = [score.value for score in scores]
        axes.errorbar(places, values, errors, color=ORANGE, marker="o", capsize=4, linestyle="none")
        place = {score.stage: number for number, score in enumerate(scores)}
        for number, score in enumerate(scores):
            if (start := place.get(parents.get(score.stage, ""))) is not None:
                axes.plot([start, number], [values[start], values[number]], color=ORANGE, linewidth=1.5)
        names = [cut(score.stage, 16) for score in scores]
        axes.set_xticks(list(places), names)
        if sum(map(len, names)) > 36:  # they would run into one another
            axes.tick_params("x", labelrotation=35, labelsize=8)
            for text in axes.get_xticklabels():
                text.set(ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.4, len(scores) - 0.6)
        axes.set(title=f"{cut(first.suite)} {first.metric} {first.arrow}")
        if first.metric in SHARE_METRICS:
            _in_percent(axes.yaxis)
        axes.grid(axis="y")
        told = ", ".join(f"{score.stage} {score.value:.4f}" for score in scores)
        return svg_of(figure, f"{first.suite} {first.metric} by stage: {told}")


def cut(name: str, length: int = 24) -> str:
    """A name that fits into a plot."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def svg_of(figure: Figure, label: str) -> str:
    """The figure as an element for a page, with a text for those who cannot see it."""
    figure.set_layout_engine("tight")
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([\w-]+)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg)
    escaped = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escaped}"', 1)


def _legend_below(figure: Figure, axes: Any) -> None:
    """A legend below the axes, where it covers no interval; the figure grows by its lines."""
    names = axes.get_legend_handles_labels()[1]
    columns = 3 if max(map(len, names), default=0) < 14 else 2
    lines = -(-len(names) // columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * lines)
    look: dict[str, Any] = {"frameon": False, "fontsize": 9, "handletextpad": 0.4, "columnspacing": 1.2}
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=columns, **look)


def _plane(axes: Any) -> None:
    axes.set(xlabel="forgetting (less is better, below 0 %: improved)", ylabel="gain (more is better)")
    axes.axhline(0, color=INK, linewidth=0.6, alpha=0.5)
    axes.axvline(0, color=INK, linewidth=0.6, alpha=0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(nbins=5)
        _in_percent(axis)
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


def front(runs: Sequence[Placed]) -> str:
    """Several runs on one plane, and the line of those of which no other one gained more and forgot less.

    Args:
        runs: The runs, with a gain and a forgetting each; their method is not shown.
    """
    return _tradeoff(runs, "runs, each against its base", line=True)


def _tradeoff(stages: Sequence[Placed], title: str, *, line: bool = False) -> str:
    with _drawn() as (figure, axes):
        told, places = [], []
        several = len({one.method for one in stages}) > 1
        for number, one in enumerate(stages):
            gain, loss = one.where.gain, one.where.forgetting
            assert gain is not None
            assert loss is not None
            places.append((loss.value, gain.value))
            look: dict[str, Any] = {
                "color": COLOURS[number % len(COLOURS)],
                "marker": "os^Dv*"[(number + number // len(COLOURS)) % 6],
                "capsize": 3,
                "elinewidth": 1,
            }
            how = {"full": " (all weights)", "": ""}.get(one.method, f" ({one.method})") if several else ""
            name = f"{cut(one.stage)}{how}"
            up, right = ([[arm] for arm in _arms(estimate)] for estimate in (gain, loss))
            axes.errorbar(loss.value, gain.value, up, right, ls="none", label=name, **look)
            told.append(f"{one.stage}: gain {gain.value:.1%}, forgetting {loss.value:.1%}")
        if line:
            axes.plot(*zip(*undominated(places), strict=True), color=INK, alpha=0.4, linewidth=1, zorder=0)
        _plane(axes)
        axes.set_title(title)
        _legend_below(figure, axes)
        return svg_of(figure, f"Gain against forgetting. {'; '.join(told)}")


def undominated(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (forgetting, gain) of which no other has less of the one and more of the other, in order."""
    found: list[tuple[float, float]] = []
    for loss, gain in sorted(places, key=lambda place: (place[0], -place[1])):
        if not found or gain > found[-1][1]:
            found.append((loss, gain))
    return found


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
    with _drawn() as (figure, axes):
        at = [one["strength"] for one in points]
        for key, color in lines:
            values = [one[key] for one in points]
            errors = [_arms(estimate) for one in points if (estimate := estimate_of(one, key))]
            axes.errorbar(
                at, values, [*zip(*errors, strict=True)], color=color, marker="o", markersize=4, capsize=3, label=key
            )
        if dial["best"] is not None:
            axes.axvline(dial["best"], color=INK, linestyle=":", linewidth=1, label=f"best: {dial['best']:g}")
        axes.set(xlabel="strength", title=cut(dial["stage"]))
        _in_percent(axes.yaxis)
        axes.grid(axis="y")
        _legend_below(figure, axes)
        plots = [svg_of(figure, f"The dial of {dial['stage']}: {told}")]
        if len(lines) == 2:
            plots.append(_curve(dial))
    return plots


def _arms(one: Estimate) -> tuple[float, float]:
    """The lengths by which the 95 % interval of an estimate reaches down and up."""
    low, high = one.interval or (one.value, one.value)
    return one.value - low, high - one.value


def _curve(dial: dict[str, Any]) -> str:
    """Gain against forgetting, a point for each strength; hollow where a budget is exceeded."""
    points = dial["points"]
    with _drawn() as (figure, axes):
        axes.plot(
            [one["forgetting"] for one in points], [one["gain"] for one in points], color=INK, alpha=0.4, linewidth=1
        )
        for one in points:
            filled = "none" if one["over"] else BLUE
            size = 9 if one["strength"] == dial["best"] else 5
            axes.plot(one["forgetting"], one["gain"], "o", color=BLUE, markerfacecolor=filled, markersize=size)
            place = (one["forgetting"], one["gain"])
            axes.annotate(f"{one['strength']:g}", place, xytext=(6, 5), textcoords="offset points", fontsize=9)
        _plane(axes)
        axes.set_title("strengths; hollow: over a budget")
        return svg_of(figure, f"Gain against forgetting of {dial['stage']} at each strength")
