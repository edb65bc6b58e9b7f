"""Where the work of a stage lies in its folder: what it trained, or that at the strength it was dialled to."""

from __future__ import annotations

import json
from pathlib import Path

MODEL, DIAL = "model", "dial"


def strength_of(stage: Path) -> float | None:
    """The strength that a stage was dialled to so as to stay inside the budgets; None for the stage as it was trained.

    Args:
        stage: `stages/<stage>` in a run folder.
    """
    done = stage / "done.json"
    found = json.loads(done.read_text()).get("dialled") if done.exists() else None
    return found["strength"] if found else None


def model_of(stage: Path) -> Path:
    """The adapter or model that a stage hands on: to the next stage, to a merge, to the Hub."""
    return stage / (MODEL if strength_of(stage) is None else DIAL)


def predictions_at(stage: Path, strength: float) -> Path:
    """Where what a stage's model at a strength gave for each row of the suites is kept, one file a suite."""
    return stage / "strengths" / f"{strength:g}"


def predictions_of(stage: Path) -> Path:
    """The same of the model that the stage hands on."""
    strength = strength_of(stage)
    return stage / "predictions" if strength is None else predictions_at(stage, strength)
