"""Text that was cleaned before the run, by another engine; a stage reads it in place of its sources.

It lies in `cleaned/KEY` of the run folder. The key is made of the words that decide what stays, so a recipe finds it
without another word, and does not find what an earlier wording of it left there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfpipe.core.files import read_json
from hfpipe.recipe import Recipe, Source, Stage, Suite, hash_of

DONE = "done.json"  # written last, with what was found in each source


@dataclass(frozen=True)
class Cleaned:
    """The text of one source that stays.

    Args:
        source: Parquet files with the columns `id` and `text`, read as a table or a stream as the source is.
        facts: Rows that were read, removed, dirty and mended, for the report.
    """

    source: Source
    facts: dict[str, Any]


def cleaned_sources(stage: Stage) -> list[Source]:
    """The sources of a stage of which rows are removed, in the order in which they are judged: tables come first."""
    return sorted((one for one in stage.data if one.cleaned), key=lambda one: bool(one.passed_through.get("streaming")))


def key_of(stage: Stage, suites: Mapping[str, Suite]) -> str:
    """Returns a hash of all that decides what of a stage's sources stays."""
    sources = [source.model_copy(update={"weight": None}) for source in cleaned_sources(stage)]
    compared = any(source.decontaminate for source in sources)
    return hash_of([sources, {name: suite.data for name, suite in suites.items()} if compared else None])[:16]


def folder_of(run_folder: Path, stage: Stage, suites: Mapping[str, Suite]) -> Path:
    """Returns the folder of a stage's cleaned text."""
    return run_folder / "cleaned" / key_of(stage, suites)


def is_cleaned(run_folder: Path, stage: Stage, suites: Mapping[str, Suite]) -> bool:
    """Returns True if the sources of a stage were cleaned before."""
    return stage.kind == "pretrain" and (folder_of(run_folder, stage, suites) / DONE).exists()


def find_cleaned(run_folder: Path, recipe: Recipe, stage: Stage) -> dict[int, Cleaned]:
    """The cleaned text of a stage's sources and of those it replays, by the identity of the source.

    Args:
        run_folder: The run folder.
        recipe: The recipe.
        stage: The stage.
    """
    replay = getattr(stage, "replay", None)
    replayed = [other for other in recipe.stages if replay is not None and other.name == replay.stage]
    found = {}
    for one in (stage, *replayed):
        if not is_cleaned(run_folder, one, recipe.evaluate):
            continue
        folder = folder_of(run_folder, one, recipe.evaluate)
        told: list[dict[str, Any]] = read_json(folder / DONE)["sources"]
        for number, (source, facts) in enumerate(zip(cleaned_sources(one), told, strict=True)):
            files = str(text_folder(folder, number) / "*.parquet")
            streaming = source.passed_through.get("streaming", False)
            words = {"path": "parquet", "data_files": files, "split": "train", "streaming": streaming}
            found[id(source)] = Cleaned(Source.model_validate(words), facts)
    return found


def text_folder(folder: Path, number: int) -> Path:
    """Returns the folder of the text of a source, by its number among those of the stage that are cleaned."""
    return folder / "text" / str(number)
