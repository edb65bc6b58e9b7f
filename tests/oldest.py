"""Prints pip constraints: the lowest version of each package that pyproject.toml names, for `make test-oldest`.

torch is the one of constraints.txt: where an older one is built for the CPU is for the user to know.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


def requirements() -> Iterator[str]:
    """Yields every requirement of pyproject.toml, those of the extras too; hfpipe's own extras are left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for group in (project["dependencies"], *project["optional-dependencies"].values()):
        yield from (one for one in group if not one.startswith("hfpipe["))


def lowest() -> dict[str, str]:
    """Returns the lowest allowed version by package."""
    found = (re.match(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", one) for one in requirements())
    return {one[1]: one[2] for one in found if one}


if __name__ == "__main__":
    for name, version in lowest().items():
        if name != "torch":
            print(f"{name}=={version}")
    print(re.search(r"^torch==.*", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0])  # type: ignore[index]
