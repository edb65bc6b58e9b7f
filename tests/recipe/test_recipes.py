"""Every shipped recipe: it has no fault, and begins with what it does, what it needs and its launch line."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from hfpipe.cli import main
from hfpipe.recipe import load_recipe
from hfpipe.recipe.shipped import shipped_recipes

ROOT = Path(__file__).parents[2]
RECIPES = shipped_recipes()


def test_the_recipes_that_the_readme_names_are_there() -> None:
    named = set(re.findall(r"recipes/([\w-]+)\.yaml", (ROOT / "README.md").read_text()))
    assert named
    assert named <= set(RECIPES) | {"x"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_has_no_fault_and_says_how_it_is_used(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--fast", str(RECIPES[name])]) == 0
    assert "no fault found" in capsys.readouterr().out
    assert load_recipe(RECIPES[name]).name == name
    opening = []
    for line in RECIPES[name].read_text().splitlines():
        if not line.startswith("#"):
            break
        opening.append(line)
    comment = "\n".join(opening)
    assert len(opening) >= 3
    assert "eeds" in comment
    assert f"hfpipe run recipes/{name}.yaml" in comment


def test_recipes_are_listed_and_copied_and_nothing_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)
    assert main(["recipes", "--copy", "quickstart"]) == 0
    assert (tmp_path / "quickstart.yaml").read_text() == RECIPES["quickstart"].read_text()
    (tmp_path / "quickstart.yaml").write_text("mine")
    assert main(["recipes", "--copy", "quickstart"]) == 2
    assert (tmp_path / "quickstart.yaml").read_text() == "mine"
    assert main(["recipes", "--copy", "quikstart"]) == 2
    assert "Did you mean quickstart?" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_launch_config_is_one_that_accelerate_reads(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_machines == yaml.safe_load(path.read_text())["num_machines"]


def test_a_wheel_carries_every_package_and_the_recipes() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "hfpipe").rglob("__init__.py")}
    assert set(declared["packages"]) == folders | {"hfpipe.shipped_recipes"}
    assert (ROOT / declared["package-dir"]["hfpipe.shipped_recipes"]).resolve() == RECIPES["quickstart"].parent
