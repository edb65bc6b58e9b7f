"""The recipes that come with hfpipe."""

from __future__ import annotations

import difflib
import re
import shutil
import sys
import textwrap
from pathlib import Path

from hfpipe.core.errors import RecipeError
from hfpipe.core.files import write_text


def recipes_folder() -> Path:
    """`recipes/` of a checkout, or the copy inside an installed package."""
    packaged = Path(__file__).parents[1] / "shipped_recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "recipes"


def shipped_recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}


def list_recipes() -> str:
    """One line a recipe, on a terminal broken at its width: its name and the first sentence of its opening comment."""
    found = shipped_recipes()
    widest = max(map(len, found))
    lines = [f"{name:{widest}}  {_first_sentence(path)}" for name, path in found.items()]
    if sys.stdout.isatty():
        columns = max(shutil.get_terminal_size().columns, widest + 20)
        lines = [textwrap.fill(line, columns, subsequent_indent=" " * (widest + 2)) for line in lines]
    return "\n".join([*lines, "", "start from one: hfpipe recipes --copy NAME"])


def _first_sentence(path: Path) -> str:
    """The first sentence of a recipe's opening comment, which may go over several lines."""
    comment: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# yaml-language-server:"):
            comment.append(line.lstrip("# "))
    return re.split(r"(?<=[.!?])\s", " ".join(comment))[0]


def copy_recipe(name: str) -> str:
    """Copies a recipe into the current folder and says what to do with it.

    Raises:
        RecipeError: There is no such recipe, or a file of its name is here already.
    """
    found = shipped_recipes()
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1) or [one for one in found if name and name in one]
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise RecipeError(f"there is no recipe {name!r}; there are {', '.join(found)}.{hint}")
    target = Path(f"{name}.yaml")
    if target.exists():
        raise RecipeError(f"{target} is here already; rename it or go to another folder. Nothing was overwritten.")
    write_text(target, found[name].read_text())
    return f"{target} written. Edit it, then: hfpipe check {target}"
