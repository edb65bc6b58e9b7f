"""Shared by the tests of weights that are spread over ranks: how a recipe is launched and compared; some recipes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fsdp_on_cpu import FSDP, environment_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from hfpipe.cli import main

LAUNCHER = Path(__file__).parent / "fsdp_on_cpu.py"
QUIET: dict[str, Any] = {"energy": False, "shift": False}
# Shipped files, the ranks that they are tried on here, and what such a launch says beside them.
SHIPPED: dict[str, tuple[int, tuple[str, ...]]] = {
    "fsdp2_hybrid.yaml": (
        4,
        ("--parallelism_config_dp_replicate_size", "2", "--parallelism_config_dp_shard_size", "2"),
    ),
    "fsdp2_offload.yaml": (2, ()),
}


def shipped(file: str) -> tuple[int, dict[str, str]]:
    """Returns the number of ranks that a shipped file is tried on, and the plan that it gives them."""
    ranks, words = SHIPPED[file]
    return ranks, environment_of(file, "--num_processes", str(ranks), *words) | {"ACCELERATE_USE_CPU": "true"}


def spread(
    path: Path, ranks: int, *more: str, code: int = 0, plan: dict[str, str] | None = None, **environment: str
) -> str:
    """Runs a recipe under FSDP2 on CPU ranks; what they said."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    ended = subprocess.run(
        [*line, str(LAUNCHER), "run", str(path), *more],
        env=os.environ | FSDP | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (plan or {}) | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert (ended.returncode == 0) == (code == 0), ended.stdout
    return ended.stdout


def run_on(path: Path, ranks: int, plan: dict[str, str] | None = None) -> str:
    """Runs a recipe on one rank without a launcher, or on several under FSDP2; what several said."""
    if ranks > 1:
        return spread(path, ranks, plan=plan)
    assert main(["run", str(path)]) == 0
    return ""


def losses(run: Path, stage: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "stages" / stage / "log.jsonl").read_text().splitlines()]


def samples(run: Path, stage: str) -> list[str]:
    path = run / "stages" / stage / "samples.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def assert_same(run: Path, one: Path, stages: list[str]) -> None:
    for stage in stages:
        assert losses(run, stage) == pytest.approx(losses(one, stage), abs=1e-4)
        assert_same_weights(*(each / "stages" / stage / "model" for each in (run, one)))
        assert samples(run, stage) == samples(one, stage)
    assert tiny.scores(run) == pytest.approx(tiny.scores(one), abs=2e-3)


def assert_same_weights(folder: Path, other: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in other.iterdir())
    for file in folder.glob("*.safetensors"):
        found, expected = load_file(file), load_file(other / file.name)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], atol=2e-4, rtol=1e-3, msg=f"{file} {name}")


def labelled(folder: Path) -> dict[str, Any]:
    """Three stages on an encoder from nothing: masked text, a head trained in full, and one beside an adapter."""
    content = tiny.recipe(folder, merge=False, energy=False)
    content["model"]["architecture"] = dict(tiny.ENCODER)
    source = {"path": "json", "data_files": str(folder / "sounds.jsonl"), "split": "train"}
    meaning = {"template": {"sentence": "{note}: the {animal}"}, "columns": {"label": "sound"}}
    training = {"num_train_epochs": 1, "learning_rate": "2e-3", "max_length": 64}
    kinds = {"kind": "classification", "data": [source | meaning], "global_batch_size": 16, "training": training}
    content["stages"] = [
        content["stages"][0] | {"objective": "masked"},
        kinds | {"name": "whole"},
        kinds | {"name": "beside", "parent": "prose", "lora": {"r": 4, "target_modules": "all-linear"}},
    ]
    held = {"path": "json", "data_files": str(folder / "held.jsonl"), "split": "train"}
    asked = {"path": "json", "data_files": str(folder / "asked.jsonl"), "split": "train"}
    content["evaluate"] = {
        "masked": {"data": held, "metrics": ["masked_accuracy"]},
        "kinds": {"data": asked | meaning, "metrics": ["accuracy"]},
    }
    return content


def translated(folder: Path) -> dict[str, Any]:
    """All weights of an encoder-decoder model from nothing, and an adapter on it."""
    content = tiny.recipe(folder, merge=False, **QUIET)
    sizes = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    content["model"]["architecture"] = {"model_type": "t5"} | sizes
    template = {"source": "{note}: {animal}", "target": "{sound}"}
    source = {"path": "json", "data_files": str(folder / "sounds.jsonl"), "split": "train", "template": template}
    training = {"max_steps": 4, "learning_rate": "2e-3", "max_length": 64}
    stage = {"kind": "translation", "data": [source], "global_batch_size": 16, "training": training}
    content["stages"] = [stage | {"name": "all"}, stage | {"name": "part", "lora": {"r": 4}}]
    asked = source | {"data_files": str(folder / "asked.jsonl")}
    content["evaluate"] = {"sounds": {"data": asked, "metrics": ["exact_match", "bits_per_byte"]}}
    return content


def steps(folder: Path, count: int, **training: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tiny.write_data(folder)
    content = tiny.recipe(folder, merge=False, evaluate={}, **QUIET)
    content["stages"] = content["stages"][:1]
    training = {"max_steps": count, "lr_scheduler_type": "constant", "logging_steps": 1} | training
    content["stages"][0]["training"] |= training
    return tiny.write(folder, content)


def base(folder: Path, hidden: int) -> str:
    """A Llama with random weights and a tokenizer of a run from nothing; 0.3 GB at a hidden size of 320."""
    (folder / "made").mkdir(parents=True)
    tiny.write_data(folder / "made")
    content = tiny.recipe(folder / "made", merge=False, evaluate={}, **QUIET)
    content["stages"] = content["stages"][:1]
    content["stages"][0]["training"] |= {"max_steps": 1}
    assert main(["run", str(tiny.write(folder / "made", content))]) == 0
    made = folder / "made" / "run" / "stages" / "base" / "model"
    config = LlamaConfig.from_pretrained(
        made, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=48, num_attention_heads=4
    )
    config.num_key_value_heads, config.head_dim = 4, hidden // 4
    target = folder / "base"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    for file in made.glob("token*"):
        (target / file.name).write_bytes(file.read_bytes())
    return str(target)


def sized(folder: Path, hidden: int, adapter: bool = True) -> dict[str, Any]:
    """One stage, of an adapter or of all weights, and one small suite on a model of some size; makes `peaks` too."""
    (folder / "peaks").mkdir(parents=True)
    tiny.write_data(folder)
    content = tiny.recipe(folder, merge=False, **QUIET)
    content["model"] = {"id": base(folder, hidden)}
    stage, suite = content["stages"][adapter] | {"global_batch_size": 4}, content["evaluate"]["sounds"]
    if adapter:
        stage["lora"] = {"r": 2, "target_modules": ["q_proj"]}
    suite |= {"metrics": ["bits_per_byte"], "batch_size": 2}
    suite["data"]["take"] = 8
    return content | {"stages": [stage], "evaluate": {"sounds": suite}}
