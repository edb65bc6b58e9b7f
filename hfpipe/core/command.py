"""Commands that start hfpipe again, in a process of its own or by hand, and import nothing from the working directory.

Python's `-m` looks for modules in the working directory first. A file `html.py` that lies there would then run in
place of the standard library's, with the token of this machine in its environment. `-P` turns that off.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

PACKAGE = Path(__file__).absolute().parents[1]
# PYTHONPATH may name the working directory too, and what `.pth` files import would come from there before a line of
# ours runs: `-E` keeps it out, and its other folders are added here. A checkout that is not installed comes last,
# behind every library.
_START = """
import os, sys
package = sys.argv.pop(1)
named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
sys.path[:] = [*(path for path in named + sys.path if path not in ("", os.getcwd(), package)), package]
import runpy
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""


def python_command(module: str) -> list[str]:
    """Returns the command that runs a module of hfpipe in a process of its own."""
    return [sys.executable, "-E", "-P", "-c", _START, str(PACKAGE.parent), module]


def our_command() -> str:
    """Returns how this installation is called from here; it may lie in an environment that is not activated."""
    if shutil.which("hfpipe"):
        return "hfpipe"
    script = Path(sys.executable).with_name("hfpipe")
    if os.access(script, os.X_OK):
        return _from_here(script)
    return f"{_from_here(Path(sys.executable))} -P -m hfpipe"


def _from_here(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
