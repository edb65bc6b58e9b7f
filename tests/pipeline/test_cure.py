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
    assert "use it:" not in told, "one of the cures is not what comes of it"
    for how in ("no cure", "self", "self-kl", "lower rate", "lower rank"):
        line = next(line for line in told.splitlines() if line.startswith(f"  {how}: "))
        assert "gain" in line
        assert "forgetting" in line
        assert " tokens" in line
    folder = tmp_path / "run/cure"
    stages = {score["stage"] for score in json.loads((folder / "scorecard.json").read_text())}
    cures = {"sounds", "sounds-self", "sounds-self-kl", "sounds-slower", "sounds-narrower"}
    assert stages == {"base", "prose", *cures}
    assert told.count("at strength 0.5: gain ") == len(cures)
    for name in cures:
        points = json.loads((folder / "stages" / name / "dial.json").read_text())["points"]
        assert [one["strength"] for one in points] == [0, 0.25, 0.5, 0.75, 1]
    assert "keep: the texts that sounds-self made of the same parent are taken over" in told
    made, taken = (folder / "stages" / name / "keep/texts.jsonl" for name in ("sounds-self", "sounds-self-kl"))
    assert made.read_text() == taken.read_text()
    narrow = json.loads((folder / "stages/sounds-narrower/model/adapter_config.json").read_text())
    assert (narrow["r"], narrow["lora_alpha"]) == (1, 2)
    assert "Gain against forgetting" in (folder / "report.md").read_text()
    assert not (folder / "shift.json").exists(), "it is in the folder of the recipe's own run"
    assert (tmp_path / "run/shift.json").exists()
    best = told.split("inside the budgets by: ")[1].split(". Its ")[0]
    cured = load_recipe(folder / "cured.yaml")
    stage = next(one for one in cured.stages if one.name == "sounds")
    assert (stage.kept.replay is not None) == best.startswith("self")
    assert (cured.evaluate["general"].budget_action == "dial") == ("at strength" in best)
    assert stage.training["num_train_epochs"] == 1
    assert "max_steps" not in stage.training
    assert cured.merge
    assert main(["cure", str(path), "--stage", "sounds", "--steps", "3"]) == 0
    assert capsys.readouterr().out.count("done before, skipped") == 6, "nothing is trained again"


@pytest.mark.slow
@pytest.mark.long
def test_a_cured_run_says_what_it_would_have_lost_where_that_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`cures:` compares at the end of a run; then the report and the card tell what was measured."""
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, merge=False)
    content["stages"][1]["keep"] = "self"
    content["evaluate"]["general"]["budget"] = "0.01%"
    content["evaluate"]["sounds"]["metrics"] = ["bits_per_byte"]
    content["cures"] = {"stage": "sounds", "dial": False}
    report = tmp_path / "run/report.md"
    assert main(["run", str(tiny.write(tmp_path, content)), "--set", "cures=false"]) in (0, 3)
    assert "What it would have lost without was not measured" in report.read_text()
    assert "Measured:" not in report.read_text()
    capsys.readouterr()
    code = main(["run", str(tmp_path / "tiny.yaml")])
    compared = capsys.readouterr().out.split("into ")[-1]
    assert "sounds: done before, skipped" in compared, "what the recipe has is one of the cures"
    assert [line.split(":")[0] for line in compared.splitlines() if ": sft (" in line] == [
        f"sounds-{how}" for how in ("none", "self-kl", "slower", "narrower")
    ]
    assert (tmp_path / "run/cure/scorecard.json").is_file()
    card = (tmp_path / "run/stages/sounds/model/README.md").read_text()
    for page in (report.read_text(), card):
        assert "Stage sounds keeps what its parent can do (12.5 % of it on its parent's own texts): it forgot" in page
        assert "Without that the same stage forgot" in page
    assert "Forgetting, the mean loss on general against the best score before:" in card
    assert ("Measured: sounds-" in report.read_text()) == (code == 3)


def test_a_comparison_without_anything_to_compare_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = tiny.recipe(tmp_path, evaluate={}, cures={"stage": "soundz"}, seeds=[1, 2], merge=False)
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    told = capsys.readouterr().err
    for words in ("Did you mean sounds?", "there is no suite to compare by", "`seeds` makes several models"):
        assert words in told


@pytest.mark.parametrize(("stage", "text"), [("soundz", "Did you mean sounds?"), ("prose", "there is nothing to keep")])
def test_a_stage_that_cannot_be_cured_is_refused(
    tmp_path: Path, stage: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cure", str(tiny.write(tmp_path, tiny.recipe(tmp_path))), "--stage", stage]) == 2
    assert text in capsys.readouterr().err
