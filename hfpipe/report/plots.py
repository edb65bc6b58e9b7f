"""The plots of report.html, as SVG that stands in the page: no file beside it, the page's own text colour and fonts."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

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
        axes.set(xlabel="step", ylabel=f"loss ({unit})" if unit else "loss", title=stage)
        axes.grid(axis="y")
        return _svg(
            figure, f"Training loss of stage {stage}: {losses[0]:.4f} at the first entry, {losses[-1]:.4f} last"
        )


def score_by_stage(scores: Sequence[Score]) -> str:
    """One metric of one suite after every stage, with 95 % intervals.

    Args:
        scores: One score a stage, in order.
    """
    first = scores[0]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.6))
        axes = figure.subplots()
        ends = [(s.low, s.high) if s.low is not None and s.high is not None else (s.value, s.value) for s in scores]
        errors = [[s.value - low for s, (low, _) in zip(scores, ends, strict=True)]]
        errors.append([high - s.value for s, (_, high) in zip(scores, ends, strict=True)])
        places = range(len(scores))
        axes.errorbar(places, [score.value for score in scores], errors, color=ORANGE, marker="o", capsize=4)
        axes.set_xticks(list(places), [score.stage for score in scores])
        axes.set_xlim(-0.4, len(scores) - 0.6)
        axes.set(ylabel=first.metric, title=f"{first.suite} ({first.way})")
        axes.grid(axis="y")
        values = ", ".join(f"{score.stage} {score.value:.4f}" for score in scores)
        return _svg(figure, f"{first.suite} {first.metric} by stage: {values}")


def _svg(figure: Figure, label: str) -> str:
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
