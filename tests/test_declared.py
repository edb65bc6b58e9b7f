"""Every package that hfpipe imports is declared in pyproject.toml, with a lowest version that `make test-oldest` tries.

wandb is the exception: a tracker is the user's own, and Trainer looks for it.
"""

import ast
import sys
from pathlib import Path

import pytest
from oldest import lowest, requirements
from packaging.requirements import Requirement

PACKAGE = Path(__file__).parent.parent / "hfpipe"
NAMES = {"sklearn": "scikit-learn", "yaml": "pyyaml", "charset_normalizer": "charset-normalizer"}  # as pip knows them
OF_THE_USER = {"wandb"}
BOUND = {  # break what hfpipe does between major versions; below 1, between minor ones
    *("accelerate", "bitsandbytes", "codecarbon", "datasets", "httpx2", "huggingface_hub", "peft", "pydantic"),
    *("sacrebleu", "torch", "transformers", "trl"),
}


def imported() -> dict[str, Path]:
    """Returns the top-level packages that the modules of hfpipe import, anywhere, each with one of the modules."""
    found: dict[str, Path] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {name.partition(".")[0]: path for name in names}
    return {name: path for name, path in found.items() if name not in {*sys.stdlib_module_names, "hfpipe", "_signal"}}


@pytest.mark.parametrize("name", sorted(imported()))
def test_what_is_imported_is_declared(name: str) -> None:
    assert name in OF_THE_USER or NAMES.get(name, name) in lowest(), f"{imported()[name]} imports {name}"


@pytest.mark.parametrize("name", sorted(BOUND))
def test_a_library_that_hfpipe_leans_on_has_an_upper_bound(name: str) -> None:
    [bound] = [one.specifier for one in map(Requirement, requirements()) if one.name == name]
    assert any(each.operator == "<" for each in bound), name
