"""Checkpoints pushed while a stage trains: no trouble with the Hub reaches the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_server import HubServer
from pushing import RECIPE, make_run
from transformers import TrainerControl, TrainerState, TrainingArguments

from hfpipe.hub import checkpoints
from hfpipe.hub.checkpoints import PushCheckpoints
from hfpipe.recipe import load_recipe


def save(callback: PushCheckpoints, run: Path, step: int) -> None:
    """Does Trainer's steps at a checkpoint, and at its end."""
    made, checkpoint = run / "stages/chat/model", run / f"stages/chat/checkpoint-{step}"
    checkpoint.mkdir()
    for file in made.iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    (checkpoint / "optimizer.pt").write_bytes(b"a pickle")
    arguments = TrainingArguments(output_dir=str(run / "stages/chat"), use_cpu=True)
    state, control = TrainerState(global_step=step, max_steps=step), TrainerControl()
    callback.on_save(arguments, state, control)
    callback.on_train_end(arguments, state, control)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_pushed_is_told_and_the_next_one_is_pushed(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in hub.env(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    push = {"repo_id": "me/toy", "checkpoints": "every_save", "deadline_seconds": 20.0}
    run = make_run(tmp_path / "run", RECIPE | {"push": push})
    recipe = load_recipe(run / "recipe.yaml")
    callback = PushCheckpoints(run, recipe, recipe.stages[1], (str(run / "stages/law/model"), None))
    hub.fail("/preupload/", 403)
    save(callback, run, 1)
    assert "step 1 was not pushed, training goes on: the token may not write" in capsys.readouterr().out
    hub.stall("/preupload/", seconds=3)
    monkeypatch.setattr(checkpoints, "PATIENCE", 1.0)
    save(callback, run, 2)
    save(callback, run, 3)  # while that of step 2 is under way
    assert callback.step == 2
    monkeypatch.setattr(checkpoints, "PATIENCE", 20.0)
    assert callback.process is not None
    callback.process.wait(20)
    save(callback, run, 4)
    output = capsys.readouterr().out
    assert "step 2" in output
    assert "the checkpoint of step 4 is at" in output
    assert list(hub.files("me/toy")) == [".gitattributes"]  # main is for what is finished
    assert hub.repos["model", "me/toy"].private
    files = hub.files("me/toy", "checkpoints-chat")
    assert {"adapter_model.safetensors", "README.md", "tokenizer.json"} <= set(files)
    assert not [name for name in files if name.endswith((".pt", ".bin"))]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/toy-base"


def test_no_checkpoint_of_an_adapter_that_fits_no_other_base(hub: HubServer, tmp_path: Path) -> None:
    push = {"repo_id": "me/toy", "checkpoints": "every_save"}
    content = json.loads(json.dumps(RECIPE | {"push": push}))
    content["stages"][1]["lora"]["init_lora_weights"] = "pissa"
    run = make_run(tmp_path / "run", content)
    recipe = load_recipe(run / "recipe.yaml")
    callback = PushCheckpoints(run, recipe, recipe.stages[1], ("me/base", None))
    save(callback, run, 1)
    assert hub.requests == []
