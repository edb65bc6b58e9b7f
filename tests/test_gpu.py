"""Checks that need a CUDA device: bf16 training, a 4-bit base, and a resume on the accelerator."""

import json
import signal
import time
from pathlib import Path

import pytest
import tiny
import torch

from hfpipe.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


def test_a_4_bit_adapter_trains_scores_and_merges_on_the_gpu(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path)
    content["stages"][1]["quantization"] = "nf4"
    torch.cuda.reset_peak_memory_stats()
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    assert torch.cuda.max_memory_allocated() > 0, "the run did not use the GPU"
    run = tmp_path / "run"
    found = tiny.scores(run)
    assert found["prose", "general", "bits_per_byte"] < found["base", "general", "bits_per_byte"] - 0.1
    assert (run / "stages" / "sounds" / "merged" / "model.safetensors").is_file()
    assert json.loads((run / "environment.json").read_text())["hardware"]["gpus"]


def test_what_the_gpu_has_no_room_for_is_merged_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path)
    content["stages"][1]["quantization"] = "nf4"
    for module in ("hfpipe.model.load", "hfpipe.pipeline.context"):
        monkeypatch.setattr(f"{module}.has_room", lambda size, free: False)
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    merge = json.loads((tmp_path / "run/stages/sounds/merge.json").read_text())
    assert merge["base"] == min(merge["costs"], key=merge["costs"].get)
    assert merge["suites"] == [], "the merged model is scored on no suite"


def test_a_killed_run_goes_on_to_the_scores_of_an_uninterrupted_one(tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    assert main(["run", str(tiny.write(tmp_path, tiny.recipe(tmp_path)))]) == 0
    killed = tiny.write(tmp_path, tiny.recipe(tmp_path, output_dir=str(tmp_path / "killed")), "killed.yaml")
    process = tiny.start("run", str(killed))
    checkpoint = tmp_path / "killed" / "stages" / "prose" / "checkpoint-2"
    deadline = time.monotonic() + 300
    while not checkpoint.is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(["run", str(killed)]) == 0
    whole, resumed = tiny.scores(tmp_path / "run"), tiny.scores(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        if key[2] == "bits_per_byte":  # sums on a GPU are not bit-identical from run to run
            assert resumed[key] == pytest.approx(value, rel=1e-2), key
