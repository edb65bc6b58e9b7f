"""hfpipe in Python: light to import, errors as exceptions, results as objects, and the notebook of the docs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

import hfpipe
from hfpipe import DataError, RecipeError, Run, check, evaluate, load_recipe, open_run, run

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebook.ipynb"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("api")
    tiny.write_data(folder)
    recipe = tiny.recipe(folder, merge=False)
    for stage in recipe["stages"]:
        stage["training"]["learning_rate"] = 2e-3
    return recipe


@pytest.fixture(scope="module")
def result(content: dict[str, Any]) -> Run:
    return run(content)


def test_every_name_is_there_and_none_is_imported_before_it_is_asked_for() -> None:
    assert all(getattr(hfpipe, name) is not None for name in hfpipe.__all__)
    heavy = "import sys, hfpipe; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", heavy], check=False).returncode == 0
    with pytest.raises(AttributeError):
        hfpipe.nothing  # noqa: B018 - the access is what is tested
    assert (Path(hfpipe.__file__).parent / "py.typed").is_file()


def test_a_recipe_is_a_file_a_mapping_or_a_name_and_its_faults_are_an_exception(content: dict[str, Any]) -> None:
    assert load_recipe(content, ["stages.sounds.lora.r=2"]).stages[1].lora == {**content["stages"][1]["lora"], "r": 2}
    assert load_recipe("quickstart").name == "quickstart"
    with pytest.raises(RecipeError, match="the recipe: stages"):
        load_recipe({**content, "stages": [{**content["stages"][0], "kind": "pretran"}]})
    with pytest.raises(RecipeError, match="There is no recipe at"):
        load_recipe("nowhere")


def test_check_returns_its_page_and_raises(content: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert "115,008 parameters" in check(content)
    assert capsys.readouterr().out == ""
    broken = json.loads(json.dumps(content))
    broken["stages"][1]["data"][0]["template"]["prompt"] = "{nothing}"
    with pytest.raises(DataError, match="nothing"):
        check(broken)


def test_run_and_evaluate_return_scores(result: Run, content: dict[str, Any]) -> None:
    assert result.scores.value("sounds", "accuracy") == result.scores.of(stage="sounds", metric="accuracy")[0].value
    assert [score.stage for score in result.scores.of("general")] == ["base", "prose", "sounds"]
    with pytest.raises(KeyError, match="there are base general bits_per_byte"):
        result.scores.value("nothing")
    again = evaluate(result, content, suite="general", stage="prose")
    assert len(again) == 1
    assert again.value("general") == pytest.approx(result.scores.value("general", stage="prose"))
    assert again.to_dicts()[0]["suite"] == "general"
    assert open_run(result.folder).scores == result.scores
    assert result.model().name == "model"
    with pytest.raises(RecipeError, match="Did you mean prose"):
        result.model("pros")
    with pytest.raises(RecipeError, match="is not a run folder"):
        open_run(result.folder.parent)


def test_what_a_notebook_shows_is_whole(result: Run) -> None:
    shown = pytest.importorskip("IPython.core.formatters").HTMLFormatter()
    page = shown(result)
    assert page.startswith('<iframe srcdoc="')
    assert page.count('"') == 8, "the report has to be quoted"
    assert shown(result.scores).count("<tr>") == 1 + len(result.scores)


@pytest.mark.slow
@pytest.mark.long
def test_the_notebook_of_the_docs_runs(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    import nbformat
    from jupyter_client.manager import AsyncKernelManager

    class Manager(AsyncKernelManager):
        """Starts the kernel with this Python, whatever kernels are installed."""

        def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
            return [sys.executable, "-m", "ipykernel_launcher", "-f", self.connection_file]

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_manager_class=Manager, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    shown = [out["data"] for cell in notebook.cells for out in cell.get("outputs", []) if "data" in out]
    assert any("<iframe srcdoc" in data.get("text/html", "") for data in shown)
