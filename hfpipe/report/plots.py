"""The plots of report.html, as SVG that stands in the page: no file beside it, the page's own text colour and fonts."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

from cycler import cycler
from matplotlib.figure import Figure

from hfpipe.scores import Score

INK = "#010203"  # drawn in this colour, written as currentColor: right on a light and on a dark page
BLUE, ORANGE = "#3b76d6", "#d9742b"
STYLE: Any = {
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
    "axes.prop_cycle": cycler(color=[BLUE, ORANGE, "#3a9a5b", "#b04fb8", "#c2a12a", "#7a8594"]),
}


def loss_curve(stage: str, steps: Sequence[int], losses: Sequence[float], unit: str) -> str:
    """The training loss of a stage.

    Args:
        stage: Name of the stage.
        steps: Optimizer steps, (N,).
        losses: Mean loss since the step before, (N,).
        unit: Of the losses; empty where they have none.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.6))
        axes = figure.subplots()
        axes.plot(steps, losses, color=BLUE, linewidth=1.6, marker="." if len(steps) < 25 else None)
        axes.set(xlabel="step", ylabel=f"loss ({unit})" if unit else "loss", title=cut(stage))
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
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.6))
        axes = figure.subplots()
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
        axes.set(ylabel=first.metric, title=f"{cut(first.suite)} ({first.way})")
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
