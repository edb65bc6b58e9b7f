"""DeepSpeed ZeRO-2 and 3 on CPU ranks, by the shipped files: the same losses, scores and weights as on one rank.

Skipped where DeepSpeed is not installed: `DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed`.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from fsdp_on_cpu import environment_of
from test_spread import assert_same, labelled, steps, translated

from hfpipe.cli import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


def spread(path: Path, level: int) -> str:
    """Runs a recipe on two CPU ranks under DeepSpeed; what they said."""
    plan = environment_of(f"deepspeed_zero{level}.yaml", "--num_processes", "2") | {"ACCELERATE_MIXED_PRECISION": "no"}
    here = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launcher, "-m", "hfpipe", "run", str(path)],
        env=os.environ | plan | here,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def chain(folder: Path) -> dict[str, Any]:
    """All weights, then an adapter that is merged, with gradients that are cut to a norm."""
    content = tiny.recipe(folder, energy=False, shift=False)
    content["stages"][0]["training"]["max_grad_norm"] = 0.1
    return content


def taken(folder: Path) -> dict[str, Any]:
    """An adapter that is taken out of the weights of its base."""
    content = tiny.recipe(folder, energy=False, shift=False)
    content["stages"][1]["lora"]["init_lora_weights"] = "pissa"
    return content


@pytest.mark.parametrize("level", [2, 3])
@pytest.mark.parametrize("made", [chain, labelled, taken, translated], ids=lambda made: made.__name__)
def test_every_kind_is_that_of_one_rank(tmp_path: Path, made: Any, level: int) -> None:
    for place in ("one", "two"):
        folder = tmp_path / place
        folder.mkdir()
        tiny.write_data(folder)
        content = made(folder)
        path = tiny.write(folder, content)
        if place == "one":
            assert main(["run", str(path)]) == 0
        else:
            spread(path, level)
    assert_same(tmp_path / "two" / "run", tmp_path / "one" / "run", [stage["name"] for stage in content["stages"]])


@pytest.mark.parametrize("level", [2, 3])
def test_a_checkpoint_is_continued(tmp_path: Path, level: int) -> None:
    assert main(["run", str(steps(tmp_path / "one", 6))]) == 0
    for count in (4, 6):
        said = spread(steps(tmp_path / "two", count), level)
    assert "continuing from checkpoint-4" in said
    assert_same(tmp_path / "two" / "run", tmp_path / "one" / "run", ["prose"])
