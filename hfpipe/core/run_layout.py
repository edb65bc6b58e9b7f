"""The places of a stage's work in its folder: what it trained, or that at the strength it was dialled to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfpipe.core.errors import MachineError
from hfpipe.core.files import fault_in, load_json, read_json

MODEL, DIAL, MERGED = "model", "dial", "merged"
ADAPTER_CONFIG = "adapter_config.json"  # of PEFT: a folder with one is an adapter
EDITABLE = (ADAPTER_CONFIG,)  # names the base, which a person may have moved; what it says is checked at a load
STRENGTH = "strength.json"  # in `dial`


def strength_of(stage: Path) -> float | None:
    """The strength that a stage was dialled to so as to stay inside the budgets; None for the stage as it was trained.

    Args:
        stage: `stages/<stage>` in a run folder.
    """
    done = stage / "done.json"
    found = load_json(done).get("dialled") if done.exists() else None
    return found["strength"] if found else None


def model_of(stage: Path) -> Path:
    """The adapter or model that a stage hands on: to the next stage, to a merge, to the Hub."""
    return stage / (MODEL if strength_of(stage) is None else DIAL)


def predictions_at(stage: Path, strength: float) -> Path:
    """The folder with the answers of a stage's model at a strength to each row of the suites, one file a suite."""
    return stage / "strengths" / f"{strength:g}"


def predictions_of(stage: Path) -> Path:
    """The same of the model that the stage hands on."""
    strength = strength_of(stage)
    return stage / "predictions" if strength is None else predictions_at(stage, strength)


def recorded_files(folder: Path) -> dict[str, list[Any]] | None:
    """Size and hash of the files of `model`, `dial` or `merged` of a stage as they were written; None if unknown."""
    stage = folder.parent
    if folder.name == DIAL:
        return read_json(folder / STRENGTH).get("files")
    return read_json(stage / ("merge.json" if folder.name == MERGED else "done.json")).get("files")


def damage_of(folder: Path) -> str | None:
    """Returns what has become of the files of `model`, `dial` or `merged` of a stage; None where they are whole."""
    files = recorded_files(folder)
    return None if files is None else fault_in(folder, files, EDITABLE)


def require_whole(folder: Path) -> None:
    """Refuses a model of a run whose files are not those that were written.

    Raises:
        MachineError: They are not.
    """
    if fault := damage_of(folder):
        raise MachineError(
            f"{folder} is damaged: {fault}. Nothing was done with it. Put the file back from a copy, or run the recipe "
            "again, which makes it anew."
        )
