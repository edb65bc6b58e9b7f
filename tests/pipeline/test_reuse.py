"""Earlier training is found again, continued where only the length has grown, and never deleted by a run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import Seq2SeqTrainingArguments
from trl import SFTConfig

from hfpipe.cli import main
from hfpipe.pipeline.reuse import WITHOUT_EFFECT, bound_to_length
from hfpipe.recipe import Sft

STEPS = 4


def recipe(folder: Path, **training: Any) -> str:
    """One sft stage of 97 rows on a model from nothing, at a learning rate that does not follow from its length."""
    folder.mkdir(exist_ok=True)
    tiny.write_data(folder)
    content = tiny.recipe(folder, evaluate={}, merge=False)
    stage = content["stages"][1]
    del stage["lora"]
    stage["training"] = {"max_steps": STEPS, "learning_rate": "2e-3", "lr_scheduler_type": "constant", "max_length": 32}
    stage["training"] |= training
    content["stages"] = [stage]
    return str(tiny.write(folder, content))


def run(path: str, *changes: str) -> None:
    assert main(["run", path, *(word for change in changes for word in ("--set", f"stages.sounds.{change}"))]) == 0


def stage_of(folder: Path) -> Path:
    return folder / "run" / "stages" / "sounds"


def weights(stage: Path) -> dict[str, torch.Tensor]:
    return load_file(stage / "model" / "model.safetensors")


def assert_equal(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 4 steps."""
    folder = tmp_path_factory.mktemp("reuse") / "one"
    run(recipe(folder))
    return folder


@pytest.mark.slow
def test_words_that_change_no_weight_leave_a_finished_stage_alone(trained: Path, capsys: Any) -> None:
    before = (stage_of(trained) / "model" / "model.safetensors").stat().st_mtime_ns
    words = "{max_steps: 4, learning_rate: 0.002, lr_scheduler_type: constant, max_length: 32, logging_steps: 1, "
    words += "save_steps: 1, report_to: none, weight_decay: 0.0, num_train_epochs: 2, "
    words += "per_device_train_batch_size: 4, gradient_checkpointing: false}"
    run(str(trained / "tiny.yaml"), f"training={words}", "max_dirty_share=0.5")
    assert "sounds: done before, skipped" in capsys.readouterr().out
    assert (stage_of(trained) / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert not list(stage_of(trained).parent.glob("sounds.*"))


@pytest.mark.slow
def test_a_longer_training_goes_on_and_is_what_it_would_have_been(trained: Path, tmp_path: Path, capsys: Any) -> None:
    path = str(trained / "tiny.yaml")
    run(path, "training.max_steps=8")
    output = capsys.readouterr().out
    assert "it differs from" in output
    assert "continuing from checkpoint-4" in output
    run(recipe(tmp_path / "whole", max_steps=8))
    assert_equal(stage_of(trained), stage_of(tmp_path / "whole"))
    logs = [(stage_of(one) / "log.jsonl").read_text().splitlines() for one in (trained, tmp_path / "whole")]
    steps = [[json.loads(line)["step"] for line in log] for log in logs]
    assert steps[0] == steps[1] == list(range(1, 9))
    run(path)
    assert "is back from" in capsys.readouterr().out
    assert json.loads((stage_of(trained) / "done.json").read_text())["steps"] == STEPS
    run(path, "training.max_steps=8")
    output = capsys.readouterr().out
    assert "is back from" in output
    assert "step " not in output, "nothing is trained twice"
    run(path)


@pytest.mark.slow
def test_a_stage_that_is_lengthened_several_times_has_the_log_of_all_its_steps(tmp_path: Path) -> None:
    for count in range(1, 6):
        run(recipe(tmp_path / "one", max_steps=count))
        lines = (stage_of(tmp_path / "one") / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, count + 1))


@pytest.mark.slow
def test_a_last_batch_that_was_filled_up_is_trained_again(tmp_path: Path, capsys: Any) -> None:
    epochs = {"max_steps": -1, "num_train_epochs": 1, "save_steps": 3, "save_total_limit": 9}
    path = recipe(tmp_path / "grown", **epochs)  # 97 rows of 16 at once: 6 whole steps and one of one row
    run(path)
    run(path, "training.num_train_epochs=2")
    assert "continuing from checkpoint-6" in capsys.readouterr().out
    run(recipe(tmp_path / "whole", **{**epochs, "num_train_epochs": 2}))
    assert_equal(stage_of(tmp_path / "grown"), stage_of(tmp_path / "whole"))


@pytest.mark.slow
def test_where_the_schedule_follows_from_the_length_it_begins_anew_and_says_so(tmp_path: Path, capsys: Any) -> None:
    path = recipe(tmp_path / "cosine", lr_scheduler_type="cosine")
    run(path)
    first = weights(stage_of(tmp_path / "cosine"))
    run(path, "training.max_steps=6")
    output = capsys.readouterr().out
    assert "only its length has changed, but the schedule `cosine` plans" in output
    assert "continuing from" not in output
    run(path)  # both versions stay
    kept = weights(stage_of(tmp_path / "cosine"))
    assert all(first[name].equal(kept[name]) for name in first)
    assert len(list(stage_of(tmp_path / "cosine").parent.glob("sounds.*/done.json"))) == 1


@pytest.mark.slow
def test_clean_shows_what_was_moved_aside_and_removes_it_when_told_to(tmp_path: Path, capsys: Any) -> None:
    path = recipe(tmp_path / "clean")
    run(path)
    for number in (1, 2):
        run(path, f"training.learning_rate={number}e-4")
    folder = stage_of(tmp_path / "clean")
    aside = sorted(folder.parent.glob("sounds.*"))
    assert len(aside) == 2, "each version that was trained is kept"
    capsys.readouterr()
    assert main(["clean", str(tmp_path / "clean" / "run")]) == 0
    output = capsys.readouterr().out
    assert all(f"{one}: another version of stage sounds, trained to its end, 4 steps" in output for one in aside)
    assert f"{folder / 'checkpoint-4'}: a longer training" in output
    assert all(one.exists() for one in aside)
    assert main(["clean", str(tmp_path / "clean" / "run"), "--yes"]) == 0
    assert not list(folder.parent.glob("sounds.*"))
    assert (folder / "model" / "model.safetensors").exists()
    run(path, "training.learning_rate=2e-4")
    assert "done before, skipped" in capsys.readouterr().out


def test_the_words_without_effect_are_words_of_the_installed_libraries() -> None:
    fields = {field.name for one in (SFTConfig, Seq2SeqTrainingArguments) for field in dataclasses.fields(one)}
    assert fields | {"save_minutes"} >= WITHOUT_EFFECT  # a word of ours beside the library's


@pytest.mark.parametrize(
    ("training", "rows", "bound"),
    [
        ({"max_steps": 4}, None, True),
        ({"max_steps": 4}, 10, False),
        ({"max_steps": -1}, None, False),
        ({}, None, False),
    ],
)
def test_own_texts_as_many_as_the_steps_need_bind_a_stage_to_its_length(
    training: dict[str, Any], rows: int | None, bound: bool
) -> None:
    replay = {"replay": {}} if rows is None else {"replay": {"rows": rows}}
    words = {"name": "chat", "kind": "sft", "data": [{"path": "json"}], "keep": replay}
    stage = Sft.model_validate({**words, "training": {**training, "lr_scheduler_type": "constant"}})
    assert (bound_to_length(stage) is not None) == bound
