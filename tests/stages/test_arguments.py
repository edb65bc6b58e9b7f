"""`training:` is passed through to the trainers: what they would refuse or pass over is said before anything begins."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import recipe, write, write_data
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hfpipe.cli import main
from hfpipe.recipe import load_recipe
from hfpipe.recipe.passthrough import stage_fields
from hfpipe.recipe.raw import RawStage
from hfpipe.recipe.rules.training import check_ranges
from hfpipe.recipe.stage_config import KINDS
from hfpipe.stages.arguments import stage_arguments


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def _stage(folder: Path, data: Path, kind: str, **training: object) -> Path:
    """A recipe of one stage of the tiny recipe, with these fields in its `training:`."""
    content = recipe(data) | {"output_dir": str(folder / "run"), "evaluate": {}}
    content = {key: value for key, value in content.items() if key not in ("merge", "push")}
    stage = next(stage for stage in content["stages"] if stage["kind"] == kind)
    stage["training"] = {**stage["training"], "max_steps": 2, **training}
    return write(folder, content | {"stages": [stage]})


@pytest.mark.parametrize(
    ("training", "code", "told"),
    [
        ({"gradient_accumulation_steps": 0}, 2, "found 0; allowed is a whole number from 1"),
        ({"per_device_train_batch_size": -1}, 2, "found -1; allowed is a whole number from 1"),
        ({"per_device_train_batch_size": 10**12}, 2, "allowed is a whole number from 1 up to 1,048,576"),
        ({"max_length": -4}, 2, "found -4; allowed is a whole number from 1"),
        ({"max_steps": 0}, 2, "found 0; allowed is a whole number from 1, or -1 for epochs"),
        ({"max_steps": -1, "num_train_epochs": -1}, 2, "found -1; allowed is a number above 0"),
        ({"weight_decay": float("nan")}, 2, "found nan, which nothing can be set to"),
        ({"adam_epsilon": float("inf")}, 2, "found inf, which nothing can be set to"),
        ({"adam_epsilon": 0}, 2, "a number above 0"),  # 0 / 0 where a gradient is 0
        ({"save_only_model": True}, 2, "continued exactly"),
        ({"truncation_mode": "keep_end"}, 2, "cut at their end"),
        ({"train_sampling_strategy": "group_by_length"}, 2, "shuffled by the recipe's `seed`"),
        ({"eos_token": "</s>"}, 2, "It is the tokenizer's"),
        ({"model_init_kwargs": {"dtype": "float32"}}, 2, "words of `model:`"),
        ({"eval_on_start": True}, 2, "early_stopping"),
        ({"save_strategy": "best"}, 2, "early_stopping"),
        ({"learning_rate": -1}, 2, "found -1; allowed is a number from 0"),
        ({"learning_rate": 1e300}, 2, "found 1e+300; allowed is a number from 0 up to 3.4e+38"),
        ({"weight_decay": 1e300}, 2, "found 1e+300; allowed is a number from 0 up to 3.4e+38"),
        ({"save_total_limit": -2}, 2, "found -2; allowed is a whole number from 1"),
        ({"logging_steps": -3}, 2, "found -3; allowed is a number above 0"),
        ({"logging_steps": 10**30}, 2, "up to"),
        ({"optim_args": "lr=abc"}, 2, "optim_args: found lr=abc, and optim adamw_torch"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,nesterow=true"}, 2, "optim sgd takes no notice"),
        ({"optim": "sgd", "adam_beta2": 0.5}, 2, "adam_beta2: found 0.5, and optim sgd takes no notice"),
        ({"optim_target_modules": "all-linear"}, 2, "takes no notice"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": -2}},
            2,
            "lr_scheduler_type or its kwargs",
        ),
        ({"lr_scheduler_type": "constant", "warmup_steps": 1}, 2, "lr_scheduler_type constant takes no notice"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"num_cycles": 2}}, 2, "takes no notice"),
        ({"adam_beta1": 2.0}, 2, "Invalid beta"),
        ({"report_to": "nonsense"}, 2, "nonsense is not supported"),
        ({"report_to": "dvclive"}, 4, "install"),
        ({"optim": "schedule_free_adamw"}, 4, "pip install schedulefree"),
        ({"use_liger_kernel": True}, 4, "pip install liger-kernel"),
        ({"fsdp": "full_shard"}, 2, "accelerate launch"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, 2, "lr_scheduler_kwargs"),
        ({"log_level_replica": "loudly"}, 2, "loudly"),
    ],
)
def test_what_a_trainer_would_refuse_is_refused_first(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], training: dict, code: int, told: str
) -> None:
    assert main(["run", str(_stage(tmp_path, data, "sft", **training))]) == code
    said = capsys.readouterr().err
    assert told in said
    assert "Traceback" not in said
    assert {path.name for path in (tmp_path / "run").glob("stages/*")} <= {"base"}


@pytest.mark.parametrize("lora", [{"lora_dropout": -1}, {"lora_dropout": 1.5}, {"lora_alpha": 0}, {"r": -8}])
def test_a_number_that_an_adapter_cannot_take_is_refused(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], lora: dict
) -> None:
    content = recipe(data)
    content["stages"][1]["lora"] |= lora
    assert main(["check", "--fast", str(write(tmp_path, content))]) == 2
    assert "; allowed is a" in capsys.readouterr().err


def test_every_number_that_is_passed_through_has_a_range() -> None:
    """A default of the installed classes may stand, and no option takes -3 or 1e300."""
    every = [(kind, name, field) for kind in KINDS for name, field in (stage_fields(kind) or {}).items()]
    for kind, name, field in every:
        if not {"int", "float"} & {one.word for one in field.kinds}:
            continue
        for value, refused in ((-3, True), (1e300, True), (field.default, False)):
            stage = RawStage(("stages", 0), {"training": {name: value}}, "s", kind)
            found = [fault for fault in check_ranges(stage) if fault.steps[-1] == name]
            assert bool(found) is refused, (kind, name, value)


def test_the_plain_schedules_and_optimizers_read_their_words(tmp_path: Path, data: Path) -> None:
    words = {"optim": "sgd", "optim_args": "momentum=0.9", "lr_scheduler_type": "cosine_with_min_lr"}
    words |= {"lr_scheduler_kwargs": {"min_lr": 1e-5}, "warmup_steps": 1}
    assert main(["check", str(_stage(tmp_path, data, "sft", **words))]) == 0


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_activations_are_recomputed_where_a_stage_asks_or_says_how(tmp_path: Path, data: Path, kind: str) -> None:
    how = {"activation_checkpointing_kwargs": {"every_n_layers": 2}}
    for training, expected in (({}, False), (how, True), (how | {"activation_checkpointing": False}, False)):
        stage = load_recipe(_stage(tmp_path, data, kind, **training)).stages[0]
        assert stage_arguments(stage, tmp_path, 0, 2).activation_checkpointing == expected


@pytest.mark.slow
def test_a_warmup_beyond_the_end_is_trained_with_a_warning(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(_stage(tmp_path, data, "sft", warmup_steps=8, learning_rate=0.01, logging_steps=1))
    told = "warmup_steps is 8 and the stage has 2 steps: learning_rate is never reached"
    for command in ("check", "run"):
        assert main([command, path]) == 0
        assert told in capsys.readouterr().out
    log = [json.loads(line) for line in (tmp_path / "run/stages/sounds/log.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in log if "loss" in row] == pytest.approx([0.0, 0.01 / 8])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_what_is_trained_by_autocast_is_what_is_saved(tmp_path: Path, data: Path, kind: str) -> None:
    """All weights, and LoRA, in bfloat16's arithmetic: the saved model is compared with the trained one without it."""
    assert main(["run", str(_stage(tmp_path, data, kind, bf16=True))]) == 0
    name = {"pretrain": "prose", "sft": "sounds"}[kind]
    assert json.loads((tmp_path / "run" / "stages" / name / "done.json").read_text())["steps"] == 2


@pytest.mark.slow
def test_the_stage_decides_its_precision_and_not_the_launch(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = []
    for precision in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        folder = tmp_path / precision
        folder.mkdir()
        assert main(["run", str(_stage(folder, data, "pretrain"))]) == 0
        told = "trains in float32, and not in bf16 as the launch says" in capsys.readouterr().out
        assert told == (precision == "bf16")
        weights.append((folder / "run" / "stages" / "prose" / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


class AwayCallback(TrainerCallback):
    """A tracker whose server goes away."""

    def on_log(self, *given: object, **named: object) -> None:
        raise ConnectionError("no way to https://me:a-password@tracker")


@pytest.mark.slow
def test_a_tracker_that_fails_does_not_end_the_training(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "away", AwayCallback)
    assert main(["run", str(_stage(tmp_path, data, "sft", report_to=["away"], logging_steps=1))]) == 0
    said = capsys.readouterr().out
    assert said.count("Away failed and gets nothing more of this stage; the training goes on: no way to") == 1
    assert "a-password" not in said


def test_wandb_is_asked_to_log_in_before_anything_is_trained(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def login() -> None:
        raise RuntimeError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=login))
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", TrainerCallback)
    assert main(["run", str(_stage(tmp_path, data, "sft", report_to=["wandb"]))]) == 4
    said = capsys.readouterr().err
    assert "stages.sounds.training.report_to: wandb says: No API key configured." in said
    assert "WANDB_MODE=offline" in said
    assert not (tmp_path / "run/stages/sounds").exists()
