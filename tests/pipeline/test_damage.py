"""A finished stage whose files are not those that were written is neither skipped nor scored, merged or pushed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny

from hfpipe.cli import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    tiny.write_data(folder)
    content = tiny.recipe(folder, shift=False)
    content["evaluate"] = {"general": content["evaluate"]["general"]}
    assert main(["run", str(tiny.write(folder, content))]) == 0
    return folder


def copied(finished: Path, folder: Path) -> tuple[Path, list[str]]:
    """The stages of a copy of the run, and the command that runs it again."""
    shutil.copytree(finished / "run", folder / "run")
    return folder / "run" / "stages", ["run", str(finished / "tiny.yaml"), "--set", f"output_dir={folder / 'run'}"]


def spoil(path: Path) -> None:
    """Turns one byte of a file round."""
    with path.open("r+b") as file:
        file.seek(-3, 2)
        byte = file.read(1)
        file.seek(-3, 2)
        file.write(bytes([byte[0] ^ 255]))


def test_scores_under_the_name_of_another_suite_are_worked_out_again(finished: Path, tmp_path: Path) -> None:
    stages, again = copied(finished, tmp_path)
    path = stages / "sounds" / "scores.json"
    whole = json.loads(path.read_text())
    spoilt = json.loads(path.read_text())
    spoilt["general"]["scores"][0]["suite"] = "another"
    path.write_text(json.dumps(spoilt))
    assert main(again) == 0
    assert json.loads(path.read_text()) == whole


def test_a_record_that_lacks_what_a_metric_takes_is_not_compared(finished: Path, tmp_path: Path) -> None:
    stages, again = copied(finished, tmp_path)
    path = stages / "base" / "predictions" / "general.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    del records[0]["likelihood"]["bytes"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(again) == 0


@pytest.mark.slow
@pytest.mark.parametrize("missing", [False, True])
def test_damaged_weights_are_used_by_no_command_and_trained_again(
    finished: Path, tmp_path: Path, missing: bool, capsys: Any
) -> None:
    stages, again = copied(finished, tmp_path)
    weights = stages / "sounds" / "model" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.unlink() if missing else spoil(weights)
    run = str(tmp_path / "run")
    for command in (["merge", run], ["dial", run], ["push", run, "--repo-id", "me/x"], ["evaluate", run, again[1]]):
        assert main(command) == 4, command
        assert "adapter_model.safetensors" in capsys.readouterr().err
    assert main(again) == 0
    assert "the finished stage is damaged" in capsys.readouterr().out
    assert weights.read_bytes() == whole
    assert len(list(stages.glob("sounds.*"))) == 1
    assert main(["clean", run]) == 0
    assert "whose weights were damaged" in capsys.readouterr().out


@pytest.mark.slow
def test_a_small_file_that_has_changed_is_not_worth_a_training(finished: Path, tmp_path: Path, capsys: Any) -> None:
    stages, again = copied(finished, tmp_path)
    (stages / "prose" / "model" / "generation_config.json").write_text("{}")
    assert main(again) == 4
    assert "generation_config.json is missing or has another size" in capsys.readouterr().err
    assert (stages / "prose" / "done.json").exists()


@pytest.mark.slow
def test_a_damaged_merge_is_made_again(finished: Path, tmp_path: Path) -> None:
    stages, again = copied(finished, tmp_path)
    weights = stages / "sounds" / "merged" / "model.safetensors"
    whole = weights.read_bytes()
    spoil(weights)
    assert main(["push", str(tmp_path / "run"), "--repo-id", "me/x", "--what", "merged"]) == 4
    assert main(again) == 0
    assert weights.read_bytes() == whole


@pytest.mark.slow
def test_done_json_lists_every_file_of_the_model(finished: Path) -> None:
    stage = finished / "run" / "stages" / "prose"
    files = json.loads((stage / "done.json").read_text())["files"]
    assert set(files) == {path.name for path in (stage / "model").iterdir()} - {"README.md"}
