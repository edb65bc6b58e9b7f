"""Every package that hfpipe imports is declared in pyproject.toml, with a lowest version that `make test-oldest` tries.

wandb is the exception: a tracker is the user's own, and Trainer looks for it.
"""

import ast
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hfpipe"
NAMES = {"sklearn": "scikit-learn", "yaml": "pyyaml", "charset_normalizer": "charset-normalizer"}  # as pip knows them
OF_THE_USER = {"wandb"}
BOUND = {  # break what hfpipe does between major versions; below 1, between minor ones
    *(
        "accelerate",
        "bitsandbytes",
        "codecarbon",
        "datasets",
        "datasketch",
        "datatrove",
        "httpx2",
        "huggingface_hub",
        "peft",
        "pydantic",
    ),
    *("sacrebleu", "torch", "torchao", "transformers", "trl"),
}


def requirements() -> dict[str, Requirement]:
    """Returns every requirement of pyproject.toml by its name, those of the extras too; not hfpipe's own extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [Requirement(one) for one in sum(project["optional-dependencies"].values(), project["dependencies"])]
    return {one.name: one for one in found if one.name != "hfpipe"}


def imported() -> dict[str, Path]:
    """Returns the top-level packages that the modules of hfpipe import, anywhere, each with one of the modules."""
    found: dict[str, Path] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {name.partition(".")[0]: path for name in names}
    return {name: path for name, path in found.items() if name not in {*sys.stdlib_module_names, "hfpipe", "_signal"}}


@pytest.mark.parametrize("name", sorted(set(imported()) - OF_THE_USER))
def test_an_import_is_declared_with_its_lowest_version(name: str) -> None:
    declared = requirements().get(NAMES.get(name, name))
    assert declared is not None, f"{imported()[name]} imports {name}"
    assert any(each.operator == ">=" for each in declared.specifier), declared


@pytest.mark.parametrize("name", sorted(BOUND))
def test_a_library_that_hfpipe_leans_on_has_an_upper_bound(name: str) -> None:
    assert any(each.operator == "<" for each in requirements()[name].specifier), name
