"""Small data: early stopping on a suite, repeated seeds, folds, by the command line and the run folder."""

import json
import statistics
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file

from hfpipe.cli import main


def sounds_only(folder: Path, **changes: object) -> dict:
    """The tiny recipe with its adapter stage alone, on a base from nothing, and no merge."""
    content = tiny.recipe(folder, merge=False, shift=False, energy=False)
    content["stages"] = [content["stages"][1]]
    del content["evaluate"]["general"]
    return {**content, **changes}


def stopped_recipe(folder: Path) -> dict:
    content = sounds_only(folder)
    stage = content["stages"][0]
    stage["early_stopping"] = {"suite": "sounds", "metric": "bits_per_byte", "patience": 2}
    # A rate this high makes the score better at first and then worse.
    stage["training"] = {"num_train_epochs": 6, "learning_rate": 0.08, "max_length": 64, "eval_steps": 2}
    return content


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    tiny.write_data(folder)
    assert main(["run", str(tiny.write(folder, stopped_recipe(folder)))]) == 0
    return folder / "run"


@pytest.mark.slow
def test_the_best_checkpoint_becomes_the_model_and_training_stops_early(stopped: Path) -> None:
    done = json.loads((stopped / "stages" / "sounds" / "done.json").read_text())
    chosen = done["early_stopping"]
    steps, values = zip(*chosen["evaluations"], strict=True)
    assert chosen["value"] == min(values)
    assert chosen["step"] == steps[values.index(min(values))]
    assert steps[-1] == done["steps"] == chosen["step"] + 4, "two evaluations without a better one"
    assert chosen["stopped_early"]
    assert done["steps"] < 36
    assert tiny.scores(stopped)["sounds", "sounds", "bits_per_byte"] == pytest.approx(chosen["value"], abs=1e-6)
    report = (stopped / "report.md").read_text()
    assert f"step {chosen['step']}" in report
    assert "flatters" in report


@pytest.mark.slow
def test_a_schedule_follows_the_score_upwards(tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    content = stopped_recipe(tmp_path)
    stage = content["stages"][0]
    stage["early_stopping"] |= {"metric": "accuracy", "patience": None}  # more is better, and torch's own way is less
    stage["training"] |= {"lr_scheduler_type": "reduce_lr_on_plateau", "logging_steps": 1, "num_train_epochs": 3}
    stage["training"]["lr_scheduler_kwargs"] = {"patience": 0, "factor": 0.5}
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    folder = tmp_path / "run" / "stages" / "sounds"
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["learning_rate"] for row in logged if "learning_rate" in row}
    best, expected = -1.0, 0.08
    evaluations = json.loads((folder / "done.json").read_text())["early_stopping"]["evaluations"]
    assert len(dict(evaluations)) == len(evaluations), "the last step is scored once"
    for step, value in evaluations[:-1]:
        expected *= 1.0 if value > best * 1.0001 else 0.5  # torch's threshold
        best = max(best, value)
        assert rates.get(step + 1, expected) == pytest.approx(expected)
    assert expected < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, None], ids=["on the way", "after the last evaluation"])
def test_an_interrupted_choice_is_the_uninterrupted_one(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int | None
) -> None:
    tiny.write_data(tmp_path)
    path = tiny.write(tmp_path, stopped_recipe(tmp_path))
    from hfpipe.stages.checkpoints import CheckpointCallback

    done = json.loads((stopped / "stages" / "sounds" / "done.json").read_text())
    at, on_save = step or done["steps"], CheckpointCallback.on_save

    def killed(self: CheckpointCallback, args, state, control, **more) -> None:
        on_save(self, args, state, control, **more)
        if state.global_step == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointCallback, "on_save", killed)
        assert main(["run", str(path)]) == 130
    assert main(["run", str(path)]) == 0
    folders = [run / "stages" / "sounds" for run in (stopped, tmp_path / "run")]
    one, other = (json.loads((folder / "done.json").read_text())["early_stopping"] for folder in folders)
    assert {**one, "evaluations": None} == {**other, "evaluations": None}
    weights, others = (load_file(folder / "model" / "adapter_model.safetensors") for folder in folders)
    assert all((weights[name] == others[name]).all() for name in weights)


@pytest.mark.slow
@pytest.mark.long
def test_seeds_give_mean_and_spread_and_each_repeat_is_the_plain_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_data(tmp_path)
    path = tiny.write(tmp_path, sounds_only(tmp_path, seeds=[1, 2]))
    assert main(["run", str(path)]) == 0
    assert "over 2 repeats" in capsys.readouterr().out
    run = tmp_path / "run"
    found = json.loads((run / "repeats.json").read_text())
    assert found["repeats"] == ["seed-1", "seed-2"]
    for row in found["scores"]:
        values = [tiny.scores(run / name)[row["stage"], row["suite"], row["metric"]] for name in found["repeats"]]
        assert list(row["values"].values()) == values
        assert row["mean"] == statistics.fmean(values)
        assert row["std"] == statistics.stdev(values)
        assert row["low"] <= row["mean"] <= row["high"]
    assert tiny.scores(run / "seed-1") != tiny.scores(run / "seed-2")
    page, text = (run / "report.html").read_text(), (run / "report.md").read_text()
    last = next(row for row in found["scores"] if row["metric"] == "bits_per_byte" and row["stage"] == "sounds")
    for shown in (f"{last['mean']:.4f}", f"{last['std']:.4f}"):
        assert shown in page
        assert shown in text
    alone = tiny.write(tmp_path, sounds_only(tmp_path, seed=2, output_dir=str(tmp_path / "alone")), "alone.yaml")
    assert main(["run", str(alone)]) == 0
    assert tiny.scores(tmp_path / "alone") == tiny.scores(run / "seed-2")
    assert main(["report", str(run)]) == 0
    capsys.readouterr()
    for command in (["merge", str(run)], ["evaluate", str(run), str(path)]):
        assert main(command) == 2
        assert f"holds 2 repeats (seed-1, seed-2), each a run of its own. Name one: {run}/seed-1" in (
            capsys.readouterr().err
        )


@pytest.mark.slow
@pytest.mark.long
def test_every_row_is_held_out_once_and_never_trained_on_in_that_repeat(tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    block = {"stage": "sounds", "folds": 3, "metrics": ["bits_per_byte"]}
    path = tiny.write(tmp_path, sounds_only(tmp_path, cross_validation=block))
    assert main(["run", str(path)]) == 0
    run, held_out = tmp_path / "run", []
    for number in (1, 2, 3):
        folder = run / f"fold-{number}" / "stages" / "sounds"
        lines = (folder / "predictions" / "held_out.jsonl").read_text().splitlines()
        ids = [json.loads(line)["id"] for line in lines]
        held_out += ids
        assert json.loads((folder / "done.json").read_text())["data"]["rows"] == 97 - len(ids)
    assert sorted(held_out) == sorted(f"s{number}" for number in range(97))
    found = json.loads((run / "repeats.json").read_text())
    row = next(row for row in found["scores"] if row["stage"] == "sounds" and row["suite"] == "held_out")
    assert row["n"] == 97
    # Student's t of 2 degrees of freedom, widened by the share of rows that folds have in common.
    assert row["high"] - row["mean"] == pytest.approx(4.302653 * row["std"] * (1 / 3 + 1 / 2) ** 0.5, rel=1e-5)
    gains = [_gain(run / f"fold-{number}") for number in (1, 2, 3)]
    assert row["gain"]["mean"] == pytest.approx(statistics.fmean(gains)), "fewer bits are a gain"


def _gain(run: Path) -> float:
    found = tiny.scores(run)
    return found["base", "held_out", "bits_per_byte"] - found["sounds", "held_out", "bits_per_byte"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": [1, 2], "push": {"repo_id": "me/x"}}, "`seeds` makes several models"),
        ({"seeds": [1, 1]}, "stands there twice"),
        ({"cross_validation": {"stage": "sound", "metrics": ["accuracy"]}}, "Did you mean sounds?"),
        ({"cross_validation": {"stage": "sounds", "metrics": ["acuracy"]}}, "Did you mean accuracy?"),
        ({"early": {"suite": "sond"}}, "Did you mean sounds?"),
        ({"early": {"suite": "sounds", "metric": "f1"}}, "'f1' is not a metric of sounds"),
        ({"fold": {"of": 3, "keep": 4}}, "a fold from 1 to 3"),
        ({"fold": {"of": 3}}, "either `keep`"),
    ],
)
def test_what_cannot_be_is_refused_by_the_file_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, said: str
) -> None:
    content = sounds_only(tmp_path)
    for key, place in (("early", "early_stopping"), ("fold", None)):
        if key in changes:
            where = content["stages"][0] if place else content["stages"][0]["data"][0]
            where[place or key] = changes[key]
    content |= {key: value for key, value in changes.items() if key not in ("early", "fold")}
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_fold_and_the_rest_share_no_row_and_are_no_overlap(tmp_path: Path) -> None:
    content = sounds_only(tmp_path, overlap="refuse")
    content["stages"][0]["data"][0]["fold"] = {"of": 10, "leave": 1}
    content["evaluate"]["sounds"]["data"] = {**content["stages"][0]["data"][0], "fold": {"of": 10, "keep": 1}}
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 0
    content["evaluate"]["sounds"]["data"]["fold"] = {"of": 10, "keep": 2}
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
