"""A streamed sft stage: the same weights on one rank and two, stopped or not, packed or not."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from hfpipe.cli import main

pytestmark = pytest.mark.slow


def recipe(folder: Path, output: str, packing: bool, **stage: Any) -> Path:
    """Animals by a stream of two files and a table, with replayed prose."""
    tiny.write_data(folder)
    content = tiny.recipe(folder, merge=False, evaluate={}, output_dir=str(folder / output))
    sounds = content["stages"][1]
    template = sounds["data"][0]["template"]
    lines = (folder / "sounds.jsonl").read_text().splitlines(keepends=True)
    for number in range(2):
        (folder / f"part{number}.jsonl").write_text("".join(lines[number::2]))
    streamed = {"path": str(folder / "part*.jsonl"), "streaming": True, "weight": 0.8, "template": template}
    table = {"path": str(folder / "asked.jsonl"), "weight": 0.2, "template": template}
    training = {"max_steps": 24, "learning_rate": "2e-3", "max_length": 64, "save_steps": 4, "packing": packing}
    sounds |= {"data": [streamed, table], "global_batch_size": 8, "training": training, "lanes": 4}
    content["stages"] = [{**sounds, **stage}]
    return tiny.write(folder, content, f"{output}.yaml")


def weights(folder: Path, output: str) -> dict[str, torch.Tensor]:
    return load_file(folder / output / "stages/sounds/model/adapter_model.safetensors")


def facts(folder: Path, output: str) -> dict[str, Any]:
    return json.loads((folder / output / "stages/sounds/done.json").read_text())["data"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("packing", [False, True])
def test_a_streamed_stage_is_the_same_killed_and_on_two_ranks(tmp_path: Path, packing: bool) -> None:
    assert main(["run", str(recipe(tmp_path, "whole", packing))]) == 0
    killed = tiny.start("run", str(recipe(tmp_path, "killed", packing)))
    while killed.poll() is None and not list((tmp_path / "killed/stages/sounds").glob("checkpoint-*/manifest.json")):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    said = killed.communicate()[0]
    assert killed.returncode == -signal.SIGKILL, said
    assert main(["run", str(tmp_path / "killed.yaml")]) == 0
    config = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu.yaml"
    both = tiny.start(
        "run",
        str(recipe(tmp_path, "ranks", packing)),
        launch=("accelerate.commands.launch", "--config_file", str(config)),
    )
    said = both.communicate(timeout=300)[0]
    assert both.returncode == 0, said
    whole, found = weights(tmp_path, "whole"), facts(tmp_path, "whole")
    for other in ("killed", "ranks"):
        exact = other == "killed"
        for name, weight in weights(tmp_path, other).items():
            torch.testing.assert_close(weight, whole[name], atol=0 if exact else 1e-5, rtol=0 if exact else 1e-4)
        # What is padded where no rows are shared depends on the micro-batches, and is said of those of this process.
        same = facts(tmp_path, other)
        assert {**same, "padding_share": 0} == {**found, "padding_share": 0}
    shares = [source["token_share"] for source in found["sources"].values()]
    assert shares == pytest.approx([0.8, 0.2], abs=0.05)
    assert found["rows"] == 24 * 8


def test_words_that_a_streamed_stage_cannot_have_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, "run", packing=True)
    assert main(["check", "--fast", str(path)]) == 0
    endless = tmp_path / "endless.yaml"
    endless.write_text(path.read_text().replace("max_length: 64", "max_length: null"))
    assert main(["check", "--fast", str(endless)]) == 2
    assert "of a stream that is packed is a number" in " ".join(capsys.readouterr().err.split())
    assert main(["check", "--fast", str(path), "--set", "stages.sounds.training.max_steps=-1"]) == 2
    assert "stages.sounds.lanes" in capsys.readouterr().err
    assert main(["prepare", str(path)]) == 0
    assert "is read and tokenized while it trains" in capsys.readouterr().out
