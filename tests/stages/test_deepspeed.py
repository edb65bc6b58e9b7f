"""DeepSpeed ZeRO-2 and 3 on CPU ranks, by the shipped files: the same losses, scores and weights as on one rank.

Skipped where DeepSpeed is not installed: `DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed`.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fsdp_on_cpu import environment_of
from safetensors.torch import load_file
from spreading import QUIET, assert_same, labelled, sized, steps, translated

from hfpipe.cli import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


PEAKS = Path(__file__).parents[1] / "peaks_by_phase.py"


def spread(path: Path, level: int, ranks: int = 2, peaks: Path | None = None) -> str:
    """Runs a recipe on CPU ranks under DeepSpeed, which leave their peaks in a folder if given; what they said."""
    plan = environment_of(f"deepspeed_zero{level}.yaml", "--num_processes", str(ranks))
    here = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    ended = subprocess.run(
        [*launcher, *((str(PEAKS),) if peaks else ("-m", "hfpipe")), "run", str(path)],
        env=os.environ | plan | here | {"PEAKS": str(peaks)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
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


def test_the_peak_memory_of_each_stage_is_predicted_in_bf16(tmp_path: Path) -> None:
    """DeepSpeed leaves its own linear layers behind the first stage."""
    tiny.write_data(tmp_path)
    content = chain(tmp_path)
    for stage in content["stages"]:
        stage["training"]["bf16"] = True
    told = spread(tiny.write(tmp_path, content), 3)
    assert "no prediction of the peak memory" not in told
    assert "as the launch says" not in told
    for stage in content["stages"]:
        cost = json.loads((tmp_path / "run" / "stages" / stage["name"] / "cost.json").read_text())
        assert cost["attempts"][-1]["predicted_memory"]["total"] > 0


def rounded(folder: Path) -> dict[str, Any]:
    """An adapter on a base in 4 bits."""
    content = tiny.recipe(folder, energy=False, shift=False)
    content["stages"][1]["quantization"] = {"type": "nf4", "bnb_4bit_quant_storage": "float32"}
    return content


def spoken(folder: Path) -> dict[str, Any]:
    """An adapter beside its parent's own texts."""
    content = tiny.recipe(folder, merge=False, **QUIET)
    content["stages"][1] |= {"keep": {"replay": {"rows": 8}}}
    return content


@pytest.mark.parametrize("level", [2, 3])
@pytest.mark.parametrize("made", [chain, labelled, spoken, taken, translated, rounded], ids=lambda made: made.__name__)
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


def both(folder: Path, place: str, count: int) -> Path:
    """Steps of all weights, of an adapter, and of one that trains a head in full beside it."""
    tiny.write_data(folder)
    content = tiny.recipe(folder, merge=False, output_dir=str(folder / place), **QUIET)
    prose, sounds = content["stages"]
    for stage in (prose, sounds):
        stage["training"] |= {"max_steps": count, "save_steps": 2, "lr_scheduler_type": "constant", "logging_steps": 1}
    with_head = sounds["lora"] | {"modules_to_save": ["lm_head"]}
    sounds |= {"parent": "base"}
    content["stages"] = [prose, sounds, {**sounds, "name": "head", "lora": with_head}]
    return tiny.write(folder, content, f"{place}.yaml")


def test_what_is_continued_on_as_many_ranks_is_the_same_to_the_bit(tmp_path: Path) -> None:
    spread(both(tmp_path, "through", 4), 3)
    shutil.copytree(tmp_path / "through/stages/base", tmp_path / "halves/stages/base")
    for count in (2, 4):
        said = spread(both(tmp_path, "halves", count), 3)
    assert said.count("continuing from checkpoint-2") == 3
    for stage in ("prose", "sounds", "head"):
        (file,) = (tmp_path / "through/stages" / stage / "model").glob("*.safetensors")
        found, again = load_file(file), load_file(tmp_path / "halves" / file.relative_to(tmp_path / "through"))
        assert found.keys() == again.keys()
        assert all(torch.equal(tensor, again[name]) for name, tensor in found.items())


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "all"])
def test_no_rank_reads_more_than_its_part_and_a_layer(tmp_path: Path, adapter: bool) -> None:
    """The peaks until the first step, while the base is scored too, beside those of a model of nearly no size."""
    peaks = {}
    for hidden in (32, 320):
        folder = tmp_path / str(hidden)
        content = sized(folder, hidden, adapter)
        content["stages"][0]["training"] |= {"max_steps": 1}
        spread(tiny.write(folder, content), 3, ranks=4, peaks=folder / "peaks")
        peaks[hidden] = [json.loads(path.read_text()) for path in sorted((folder / "peaks").iterdir())]
    size = (tmp_path / "320" / "base" / "model.safetensors").stat().st_size
    assert size >= 200e6
    shares = [
        {phase: (large[phase] - small[phase]) / size for phase in large}
        for small, large in zip(peaks[32], peaks[320], strict=True)
    ]
    assert len(shares) == 4
    assert max(share["read"] for share in shares) <= 0.4
