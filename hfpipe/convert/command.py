"""`hfpipe convert FILE`: a recipe from another tool's config."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from hfpipe.convert import words
from hfpipe.convert.draft import Draft, Note
from hfpipe.convert.read import read_config, recognize
from hfpipe.convert.render import render
from hfpipe.core.errors import RecipeError

# The tools, and the module that holds the table of each.
TOOLS = {
    "axolotl": "axolotl",
    "llama-factory": "llama_factory",
    "trl": "trl",
    "torchtune": "torchtune",
    "oumi": "oumi",
    "ms-swift": "ms_swift",
}
_HEADINGS = {
    "lost": "LOST, and it changes the weights:",
    "changed": "Said otherwise:",
    "unneeded": "Left out, without an effect on the weights:",
}


def convert_file(path: Path, tool: str | None = None) -> tuple[str, list[Note]]:
    """A recipe from a config, and what it does not say.

    Args:
        path: The config.
        tool: One of `TOOLS`; told by the keys when absent.

    Raises:
        RecipeError: The file is no config that is known.
        OutOfScope: It is a config for something that hfpipe does not do.
    """
    config, text, named = read_config(path)
    tool = tool or named or recognize(config, path)
    draft = Draft(tool, config, text, str(path.parent))
    fill: Callable[[Draft], None] = import_module(f"hfpipe.convert.{TOOLS[tool]}").convert
    fill(draft)
    return render(recipe_of(draft, path), _head(draft, path), {}), draft.notes


def recipe_of(draft: Draft, path: Path) -> dict[str, Any]:
    """The whole recipe of a draft.

    Raises:
        RecipeError: The config names no model or no data.
    """
    if not draft.take("model.id") and not draft.take("model.architecture"):
        raise RecipeError(f"{path} names no model, so it is no config of a training.")
    if not draft.stage["data"]:
        raise RecipeError(f"{path} names no data to train on, so it is no config of a training.")
    words.streams_need_steps(draft)
    words.warmup_of_constant(draft)
    words.warmup_within_steps(draft)
    recipe = {"name": name_of(path), **draft.recipe, "stages": [draft.stage]}
    if draft.suites:
        recipe["evaluate"] = draft.suites
    return recipe


def name_of(path: Path, otherwise: str = "converted") -> str:
    """A name for the run, of the file's name; another one where that has no Latin letter or digit."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")
    return name or otherwise


def _head(draft: Draft, path: Path) -> list[str]:
    """Comments above the recipe: where it came from, and what it does not say."""
    lines = [
        f"Converted from the {draft.tool} config {path.name} by `hfpipe convert`.",
        "  hfpipe check THIS-FILE    looks for faults, and predicts memory and time",
    ]
    return [*lines, *told(draft.notes)]


def told(notes: list[Note]) -> list[str]:
    """Notes as lines: what is lost first; keys that share a reason share a line."""
    lines = []
    for kind, heading in _HEADINGS.items():
        reasons: dict[str, list[str]] = {}
        for note in notes:
            if note.kind == kind:
                reasons.setdefault(note.why, []).append(note.key)
        if reasons:
            lines += [heading, *(f"  {', '.join(keys)}: {why}" for why, keys in reasons.items())]
    return lines


def run(path: str, tool: str | None, output: str | None) -> None:
    """Converts a file, and writes the recipe to standard output or to a file that is not there yet.

    Raises:
        RecipeError: See `convert_file`; or the file to write exists.
    """
    recipe, notes = convert_file(Path(path), tool)
    if output is None:
        print(recipe, end="")
    else:
        try:
            with Path(output).open("x", encoding="utf-8") as file:
                file.write(recipe)
        except FileExistsError:
            raise RecipeError(f"{output} exists already. Remove it, or name another file with -o.") from None
        except OSError as error:
            raise RecipeError(f"{output} cannot be written: {error.strerror}.") from error
    for line in told([note for note in notes if note.kind != "unneeded"]):
        print(line, file=sys.stderr)
    left = sum(note.kind == "unneeded" for note in notes)
    if left:
        print(
            f"Left out without an effect on the weights: {left}; the recipe's first lines name them.", file=sys.stderr
        )
    if output is not None:
        print(f"wrote {output}; look for faults with: hfpipe check {output}", file=sys.stderr)
