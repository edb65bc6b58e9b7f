"""Predicted beside measured peak memory: each shape is a run of `hfpipe` in a process of its own, on made-up text.

    python benchmarks/memory.py             # all shapes, some minutes
    python benchmarks/memory.py llama bert  # those with one of these words in their name

Both figures stand in the stage's cost.json. "Above" is without what the process held before the model was loaded.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

SIZE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
LLAMA = {"model_type": "llama", **SIZE, "num_key_value_heads": 4}
QWEN = {"model_type": "qwen2", **SIZE, "num_key_value_heads": 4, "tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "n_embd": 512, "n_layer": 8, "n_head": 8, "vocab_size": 32000}
BERT = {"model_type": "bert", **SIZE, "max_position_embeddings": 512}
MODERNBERT = {"model_type": "modernbert", **SIZE}
T5 = {"model_type": "t5", "d_model": 512, "d_ff": 1024, "num_layers": 6, "num_heads": 8}
BART = {"model_type": "bart", "d_model": 512, "encoder_layers": 6, "decoder_layers": 6}
BART |= {"encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
DISTILBERT = {"model_type": "distilbert", "dim": 512, "hidden_dim": 2048, "n_layers": 6, "n_heads": 8}
OPT = {"model_type": "opt", "hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072, "num_hidden_layers": 8}
LORA = {"lora": {"r": 16}}
VOCABULARY = 32_000  # rows of the embeddings

# name: architecture, words of the stage, words of its training
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama pretrain": (LLAMA, {"kind": "pretrain"}, {"per_device_train_batch_size": 4, "max_length": 512}),
    "llama pretrain checkpointing": (
        LLAMA,
        {"kind": "pretrain"},
        {"per_device_train_batch_size": 4, "max_length": 512, "gradient_checkpointing": True},
    ),
    "llama pretrain accumulation sgd": (
        LLAMA,
        {"kind": "pretrain"},
        {"per_device_train_batch_size": 2, "max_length": 512, "gradient_accumulation_steps": 2, "optim": "sgd"},
    ),
    "llama pretrain eager": (
        LLAMA | {"attn_implementation": "eager"},
        {"kind": "pretrain"},
        {"per_device_train_batch_size": 4, "max_length": 512},
    ),
    "gpt2 pretrain adafactor": (
        GPT2,
        {"kind": "pretrain"},
        {"per_device_train_batch_size": 2, "max_length": 512, "optim": "adafactor"},
    ),
    "qwen2 sft": (QWEN, {"kind": "sft"}, {"per_device_train_batch_size": 4, "max_length": 512}),
    "qwen2 sft lora": (QWEN, {"kind": "sft", **LORA}, {"per_device_train_batch_size": 4, "max_length": 512}),
    "qwen2 sft lora checkpointing": (
        QWEN,
        {"kind": "sft", **LORA},
        {"per_device_train_batch_size": 8, "max_length": 512, "gradient_checkpointing": True},
    ),
    "qwen2 preference": (QWEN, {"kind": "preference"}, {"per_device_train_batch_size": 2, "max_length": 512}),
    "qwen2 preference lora": (
        QWEN,
        {"kind": "preference", **LORA},
        {"per_device_train_batch_size": 2, "max_length": 512},
    ),
    "llama sft qlora nf4": (
        LLAMA,
        {"kind": "sft", "quantization": "nf4", **LORA},
        {"per_device_train_batch_size": 4, "max_length": 512},
    ),
    "llama sft qlora int8": (
        LLAMA,
        {"kind": "sft", "quantization": "int8", **LORA},
        {"per_device_train_batch_size": 4, "max_length": 512},
    ),
    "bert masked": (
        BERT,
        {"kind": "pretrain", "objective": "masked"},
        {"per_device_train_batch_size": 8, "max_length": 256},
    ),
    "modernbert masked": (
        MODERNBERT,
        {"kind": "pretrain", "objective": "masked"},
        {"per_device_train_batch_size": 4, "max_length": 512},
    ),
    "bert classification lora": (
        BERT,
        {"kind": "classification", **LORA},
        {"per_device_train_batch_size": 16, "max_length": 256},
    ),
    "distilbert classification": (
        DISTILBERT,
        {"kind": "classification"},
        {"per_device_train_batch_size": 16, "max_length": 128},
    ),
    "opt sft lora": (OPT, {"kind": "sft", **LORA}, {"per_device_train_batch_size": 4, "max_length": 384}),
    "bart translation lora": (
        BART,
        {"kind": "translation", **LORA},
        {"per_device_train_batch_size": 4, "max_length": 128},
    ),
    "t5 translation": (T5, {"kind": "translation"}, {"per_device_train_batch_size": 4, "max_length": 256}),
}
COLUMNS = {
    "pretrain": {},
    "sft": {"template": {"prompt": "Go on:", "completion": " {text}"}},
    "preference": {"template": {"prompt": "Go on:", "chosen": " {text}", "rejected": " {other}"}},
    "classification": {"columns": {"sentence": "text", "label": "kind"}},
    "translation": {"columns": {"source": "text", "target": "other"}},
}


def write_rows(path: Path) -> None:
    """Writes 400 rows of 600 to 700 made-up words, more than any shape's max_length."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 8))) for _ in range(400)]

    def text() -> str:
        return " ".join(chance.choices(words, k=chance.randint(600, 700)))

    rows = ({"text": text(), "other": text(), "kind": chance.choice(["a", "b"])} for _ in range(400))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Runs a shape and returns the record of its cost.json."""
    architecture, words, training = SHAPES[name]
    architecture = dict(architecture)
    attention = architecture.pop("attn_implementation", None)
    model = {"architecture": architecture | {"vocab_size": VOCABULARY}}
    model |= {"attn_implementation": attention} if attention else {}
    source = {"path": "json", "data_files": str(folder / "rows.jsonl"), "split": "train", **COLUMNS[words["kind"]]}
    recipe = {
        "name": "memory",
        "output_dir": str(folder / name.replace(" ", "-")),
        "model": model | {"tokenizer": {"train": {"vocab_size": 1000}}},
        "stages": [{"name": "one", **words, "data": [source], "training": {"max_steps": 3, **training}}],
        "shift": False,
        "energy": False,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "hfpipe", "run", str(path)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{name}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return json.loads((Path(recipe["output_dir"]) / "stages" / "one" / "cost.json").read_text())["attempts"][-1]


def main() -> None:
    asked = sys.argv[1:]
    print(f"{'shape':34} {'predicted':>10} {'measured':>10} {'ratio':>6} {'above':>6}   MiB")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_rows(folder / "rows.jsonl")
        for name in SHAPES:
            if asked and not any(word in name for word in asked):
                continue
            record = measure(name, folder)
            parts = record["predicted_memory"]
            predicted, measured, before = parts["total"], record["peak_memory"], record["memory_before"]
            shown = ", ".join(f"{part} {size / 2**20:,.0f}" for part, size in parts.items() if part != "total" and size)
            above = (predicted - before) / max(measured - before, 1)
            print(
                f"{name:34} {predicted / 2**20:10,.0f} {measured / 2**20:10,.0f} {predicted / measured:6.2f} "
                f"{above:6.2f}   {shown}",
                flush=True,
            )


if __name__ == "__main__":
    main()
