"""`hfpipe evaluate MODEL FILE`: a file with suites alone scores any model; some suites, some rows; quick refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from hfpipe.cli import main
from hfpipe.evaluation.suites import suite_rows
from hfpipe.recipe import load_suites
from hfpipe.recipe.choose import chosen_suites


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of the tiny recipe, and its finished run in `run`."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny.write_data(folder)
    assert main(["run", str(tiny.write(folder, tiny.recipe(folder, merge=False)))]) == 0
    return folder


def suites_of(folder: Path, path: Path, **changes: Any) -> str:
    path.write_text(yaml.safe_dump({"evaluate": tiny.recipe(folder)["evaluate"], **changes}))
    return str(path)


def scores(output: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["suite"], row["metric"]): row for row in json.loads(output.read_text())}


@pytest.mark.slow
def test_a_file_of_suites_alone_gives_the_scores_of_the_run(folder: Path, tmp_path: Path) -> None:
    path, output = suites_of(folder, tmp_path / "suites.yaml"), tmp_path / "scores.json"
    assert main(["evaluate", str(folder / "run"), path, "--output", str(output)]) == 0
    of_run = {key[1:]: value for key, value in tiny.scores(folder / "run").items() if key[0] == "sounds"}
    assert {key: row["value"] for key, row in scores(output).items()} == pytest.approx(of_run)


@pytest.mark.slow
def test_an_adapter_without_a_tokenizer_is_scored_with_that_of_its_base(folder: Path, tmp_path: Path) -> None:
    path, stages = suites_of(folder, tmp_path / "suites.yaml"), folder / "run" / "stages"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(stages / "sounds" / "model" / name, adapter / name)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(stages / "prose" / "model")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    output = tmp_path / "scores.json"
    assert main(["evaluate", str(adapter), path, "--suite", "general", "--output", str(output)]) == 0
    (row,) = json.loads(output.read_text())
    assert row["value"] == pytest.approx(tiny.scores(folder / "run")["sounds", "general", "bits_per_byte"])


@pytest.mark.slow
def test_the_first_rows_of_a_fold_are_rows_of_that_fold(folder: Path, tmp_path: Path) -> None:
    """Dealt out anew among fewer rows, a fold would hold rows that were trained on."""
    suites = tiny.recipe(folder)["evaluate"]
    suites["sounds"]["data"]["fold"] = {"of": 12, "keep": 2}
    path = suites_of(folder, tmp_path / "suites.yaml", evaluate={"sounds": suites["sounds"]})
    command, said = ["evaluate", str(folder / "run" / "stages" / "prose" / "model"), path], []
    for limit in ([], ["--limit", "3"]):
        output = tmp_path / f"scores{len(limit)}.json"
        assert main([*command, *limit, "--output", str(output)]) == 0
        said.append([row["n"] for row in json.loads(output.read_text())])
    assert {*said[1]} == {3}
    rows = suite_rows(load_suites(path).evaluate["sounds"])
    limited = suite_rows(chosen_suites(load_suites(path), None, 3).evaluate["sounds"])
    assert {len(rows)} == {*said[0]}
    assert limited == rows[:3]


@pytest.mark.slow
def test_suites_and_rows_can_be_chosen(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = suites_of(folder, tmp_path / "suites.yaml"), tmp_path / "scores.json"
    command = ["evaluate", str(folder / "run" / "stages" / "prose" / "model"), path]
    assert main([*command, "--suite", "sounds", "--limit", "7", "--output", str(output)]) == 0
    assert {(suite, row["n"]) for (suite, _), row in scores(output).items()} == {("sounds", 7)}
    for words, told in (
        (["--suite", "sound"], "Did you mean sounds?"),
        (["--limit", "0"], "1 or more"),
        (["--stage", "prose"], "is not a run folder"),
    ):
        assert main([*command, *words]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluat": {}}, ["unknown key of a file of suites", "Did you mean evaluate?"]),
        ({"model": {"id": "team/base"}}, ["model.id", "hfpipe evaluate MODEL FILE"]),
        ({"evaluate": {}}, ["evaluate", "nothing in it"]),
        ({"evaluate": {"it": {"data": {"path": "x.jsonl"}, "metrics": ["acuracy"]}}}, ["Did you mean accuracy?"]),
    ],
)
def test_a_wrong_file_of_suites_is_told_before_anything_is_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: list[str]
) -> None:
    path = suites_of(folder, tmp_path / "suites.yaml", **changes)
    assert main(["evaluate", "team/nowhere", path]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


@pytest.mark.slow
def test_a_stage_that_is_not_finished_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, path = tmp_path / "run", suites_of(folder, tmp_path / "suites.yaml")
    shutil.copytree(folder / "run", run)
    (run / "stages" / "sounds" / "done.json").unlink()
    assert main(["evaluate", str(run), path, "--stage", "sounds"]) == 2
    assert "has not finished that stage" in capsys.readouterr().err
    (run / "stages" / "prose" / "done.json").unlink()
    assert main(["evaluate", str(run), path]) == 2
    assert "has no finished stage yet" in capsys.readouterr().err
