"""`hfpipe cure`: the same stage with several cures from one parent, compared, and the best written as a recipe."""

import json
from pathlib import Path

import pytest
import tiny

from hfpipe.cli import main
from hfpipe.recipe import load_recipe


@pytest.mark.slow
@pytest.mark.long
def test_cures_are_compared_and_the_best_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path)
    content["evaluate"] = {"general": {**content["evaluate"]["general"], "budget": "50%"}, "sounds": {
        **content["evaluate"]["sounds"], "metrics": ["bits_per_byte"]}}  # fmt: skip
    path = tiny.write(tmp_path, content)
    assert main(["run", str(path), "--set", "merge=false"]) == 0
    capsys.readouterr()
    assert main(["cure", str(path), "--stage", "sounds", "--steps", "3"]) == 0
    told = capsys.readouterr().out
    assert "prose: done before, skipped" in told
    for how in ("none", "self", "self-kl", "lower rate"):
        line = next(line for line in told.splitlines() if line.startswith(f"  {how}: "))
        assert "gain" in line
        assert "forgetting" in line
        assert " tokens" in line
    folder = tmp_path / "run/cure"
    stages = {score["stage"] for score in json.loads((folder / "scorecard.json").read_text())}
    assert stages == {"base", "prose", "sounds", "sounds-self", "sounds-self-kl", "sounds-slower"}
    assert "Gain against forgetting" in (folder / "report.md").read_text()
    best = told.split("inside the budgets by: ")[1].split(".")[0]
    cured = load_recipe(folder / "cured.yaml")
    stage = next(one for one in cured.stages if one.name == "sounds")
    assert (stage.kept.replay is not None) == best.startswith("self")
    assert stage.training["num_train_epochs"] == 1
    assert "max_steps" not in stage.training
    assert cured.merge
    assert main(["cure", str(path), "--stage", "sounds", "--steps", "3"]) == 0
    assert capsys.readouterr().out.count("done before, skipped") == 5, "nothing is trained again"


@pytest.mark.parametrize(("stage", "text"), [("soundz", "Did you mean sounds?"), ("prose", "there is nothing to keep")])
def test_a_stage_that_cannot_be_cured_is_refused(
    tmp_path: Path, stage: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cure", str(tiny.write(tmp_path, tiny.recipe(tmp_path))), "--stage", stage]) == 2
    assert text in capsys.readouterr().err
