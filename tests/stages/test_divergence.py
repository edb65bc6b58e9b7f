"""A loss that is no number stops every kind of stage, with step and rows; what cannot be saved is told before."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from plain import make_encoder, make_model
from transformers import AutoModelForCausalLM, GenerationConfig

from hfpipe.cli import main


def recipe(folder: Path, kind: str, **training: Any) -> Path:
    """One stage of a kind, 12 steps, on a model whose loss grows without limit at the learning rate given."""
    tiny.write_data(folder)
    rows = [json.loads(line) for line in (folder / "sounds.jsonl").read_text().splitlines()]
    labelled = [{"sentence": row["note"], "label": row["sound"]} for row in rows]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    content = tiny.recipe(folder, evaluate={}, merge=False)
    stage = dict(content["stages"][0 if kind == "pretrain" else 1], name="it", kind=kind)
    stage.pop("lora", None)
    if kind == "classification":
        content["model"] = {"id": str(make_encoder(folder / "base"))}
        stage["data"] = [{"path": "json", "data_files": str(folder / "labelled.jsonl"), "split": "train"}]
    stage["training"] = {"max_steps": 12, "max_length": 32, "save_steps": 1, "logging_steps": 1, **training}
    content["stages"] = [stage]
    return tiny.write(folder, content)


@pytest.mark.parametrize("kind", ["pretrain", "sft", "classification"])
def test_a_loss_that_is_no_number_stops_the_stage(tmp_path: Path, kind: str, capsys: Any) -> None:
    words = {"learning_rate": 1e30, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "optim": "sgd"}
    path = recipe(tmp_path, kind, **words)
    assert main(["run", str(path)]) == 5
    said = capsys.readouterr()
    assert "the loss or the gradient is no longer a finite number" in said.err
    assert "The rows of that step: '" in said.err
    assert "loss 0.0000" not in said.out
    assert not (tmp_path / "run" / "stages" / "it" / "model").exists()
    steps = [json.loads(line) for line in (tmp_path / "run" / "stages" / "it" / "log.jsonl").read_text().splitlines()]
    assert all(isinstance(row["loss"], float) and abs(row["loss"]) < float("inf") for row in steps)
    assert len(steps) < 6


def test_weights_that_the_last_step_has_spoilt_are_told(tmp_path: Path, capsys: Any) -> None:
    """No loss comes after the last step, so what is saved is looked at."""
    assert main(["run", str(recipe(tmp_path, "sft", learning_rate=1e30, max_steps=1))]) == 5
    assert "after its last step the model's answers are no longer numbers" in capsys.readouterr().err
    assert not (tmp_path / "run" / "stages" / "it" / "model").exists()


@pytest.mark.slow
def test_a_small_part_of_an_epoch_is_a_step(tmp_path: Path) -> None:
    assert main(["run", str(recipe(tmp_path, "sft", num_train_epochs=0.001, max_steps=-1))]) == 0
    assert json.loads((tmp_path / "run" / "stages" / "it" / "done.json").read_text())["steps"] == 1


@pytest.mark.slow
def test_sampling_words_of_a_base_that_does_not_sample_are_left_out_with_a_word(tmp_path: Path, capsys: Any) -> None:
    path = recipe(tmp_path, "sft", learning_rate=1e-3, max_steps=1)
    base = make_model(tmp_path / "base", llama=True)
    config = json.loads((base / "generation_config.json").read_text())
    config.pop("_from_model_config", None)
    (base / "generation_config.json").write_text(json.dumps(config | {"temperature": 0.9, "top_p": 0.6}))
    words = ["--set", f"model={{id: {base}}}"]
    assert main(["run", str(path), *words]) == 0
    assert "the generation config of the base sets temperature, top_p" in capsys.readouterr().out
    GenerationConfig.from_pretrained(tmp_path / "run" / "stages" / "it" / "model").validate(strict=True)
    assert main(["run", str(path), *words, "--set", "stages.it.lora={r: 2}", "--set", "merge=true"]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "stages" / "it" / "merged")
