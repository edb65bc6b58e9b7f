"""A preference stage whose weights are spread over ranks by FSDP2 has the losses and weights of one rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from fsdp_on_cpu import FSDP
from safetensors.torch import load_file

from hfpipe.cli import main
from hfpipe.model.create import create_model, train_tokenizer

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
BESIDE = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"lora": {"r": 4}},
    "LoRA in 4 bits": {
        "lora": {"r": 4},
        "quantization": {"type": "nf4", "bnb_4bit_quant_storage": "float32"},
    },
    "LoRA and modules": {"lora": BESIDE},
    "LoRA, modules and near": {"lora": BESIDE, "keep": {"replay": {"share": 0.3, "rows": 24}, "kl": {"weight": 2.0}}},
    "LoRA and rows": {"lora": {"r": 4, "trainable_token_indices": [5, 40]}},
    "full and kept": {"keep": {"replay": {"share": 0.3, "rows": 24}}},
    "full and near": {"keep": {"replay": {"share": 0.3, "rows": 24}, "kl": {"weight": 2.0}, "l2": {"weight": 0.5}}},
    "LoRA and near": {"lora": {"r": 4}, "keep": {"replay": {"share": 0.3, "rows": 24}, "kl": {"weight": 2.0}}},
}


def pair(number: int) -> dict[str, str]:
    animal, other = tiny.ANIMALS[number % 6], tiny.ANIMALS[(number + 1) % 6]
    rejected = f" {tiny.SOUNDS[other]}" * (1 + number % 3)
    return {"prompt": f"{number}: the {animal} said", "chosen": f" {tiny.SOUNDS[animal]}", "rejected": rejected}


def found(run: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    lines = (run / "stages/dpo/log.jsonl").read_text().splitlines()
    (file,) = (run / "stages/dpo/model").glob("*model.safetensors")
    return [json.loads(line)["loss"] for line in lines], load_file(file)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_losses_and_weights_are_those_of_one_rank(method: str, tmp_path: Path) -> None:
    rows = [pair(number) for number in range(37)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer([" ".join(row.values()) for row in rows], 320, 128)
    create_model({"model_type": "llama", **SHAPE}, tokenizer, 0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    training = {"max_length": 64, "learning_rate": 2e-3, "logging_steps": 1, "max_steps": 5}
    stage = {"name": "dpo", "kind": "preference", "data": [{"path": str(tmp_path / "pairs.jsonl")}]}
    stage |= {"global_batch_size": 8, "training": training, **METHODS[method]}
    for name in ("one", "two"):
        recipe = {"name": "x", "output_dir": str(tmp_path / name), "seed": 0, "energy": False}
        recipe |= {"model": {"id": str(tmp_path / "base")}, "stages": [stage]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(tmp_path / "one.yaml")]) == 0
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*line, str(Path(__file__).parents[1] / "fsdp_on_cpu.py"), "run", str(tmp_path / "two.yaml")],
        env=os.environ | FSDP | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stdout
    (losses, weights), (expected, others) = found(tmp_path / "two"), found(tmp_path / "one")
    assert losses == pytest.approx(expected, abs=1e-5)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], atol=2e-5, rtol=1e-4)
