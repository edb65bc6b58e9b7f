"""`every` of a suite: it is scored while a stage trains, which changes nothing that is trained."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from hfpipe.cli import main


def write(folder: Path, every: int | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_data(folder)
    recipe = tiny.recipe(folder, merge=False)
    recipe["stages"] = recipe["stages"][:1]
    recipe["model"]["architecture"]["attention_dropout"] = 0.1  # draws random numbers at every step
    recipe["evaluate"] = {"general": recipe["evaluate"]["general"] | ({"every": every} if every else {})}
    return tiny.write(folder, recipe)


def scores(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run/stages/prose/scores.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run/stages/prose/model/model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_scores_while_a_stage_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second and the fourth of six steps are scored; the last one is the score of the stage."""
    assert main(["run", str(write(tmp_path / "plain", None))]) == 0
    capsys.readouterr()
    assert main(["run", str(write(tmp_path / "looked", 2))]) == 0
    said = capsys.readouterr().out
    found = scores(tmp_path / "looked")
    assert [(row["step"], row["suite"], row["metric"]) for row in found] == [
        (2, "general", "bits_per_byte"),
        (4, "general", "bits_per_byte"),
    ]
    assert f"step 2  general bits_per_byte {found[0]['value']:.4f}" in said
    card = tiny.scores(tmp_path / "looked/run")
    assert card["base", "general", "bits_per_byte"] > found[0]["value"] > found[1]["value"]
    assert found[1]["value"] > card["prose", "general", "bits_per_byte"]
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "looked"))
    assert not (tmp_path / "plain/run/stages/prose/scores.jsonl").exists()
    assert main(["run", str(write(tmp_path / "looked", 3))]) == 0
    assert "step 1" not in capsys.readouterr().out  # another number trains and scores nothing again


@pytest.mark.slow
@pytest.mark.long
def test_an_interrupted_stage_has_the_scores_of_a_whole_one(tmp_path: Path) -> None:
    assert main(["run", str(write(tmp_path / "whole", 1))]) == 0
    path = write(tmp_path / "cut", 1)
    process = tiny.start("run", str(path))
    tiny.wait_for(tmp_path / "cut/run/stages/prose/checkpoint-2/manifest.json", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert main(["run", str(path)]) == 0
    assert scores(tmp_path / "cut") == scores(tmp_path / "whole")
    assert [row["step"] for row in scores(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_file_that_trains_nothing_has_no_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "suites.yaml"
    path.write_text("evaluate: {general: {data: {path: builtin, name: text}, metrics: [bits_per_byte], every: 5}}\n")
    assert main(["evaluate", str(tmp_path), str(path)]) == 2
    assert "trains nothing" in capsys.readouterr().err
