"""A pretrain step against its limit: hfpipe's tokens per second beside a bare PyTorch loop on the same rows.

    python benchmarks/train.py [--steps 20] [--rounds 3]

Both train the same Llama from the same fresh weights on the same packed rows, with AdamW and a clipped gradient, on the
GPU in bf16 autocast where there is one. They take turns in one process, so that a busy machine slows both. Loading,
saving and the first steps are left out on both sides; hfpipe's figure is what its own log.jsonl says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from hfpipe.data.sources.load import load_rows
from hfpipe.data.stream.dataset import TokenStream
from hfpipe.model.load import ModelRef, load_model
from hfpipe.model.tokenizer import load_tokenizer
from hfpipe.pipeline.run import run_recipe
from hfpipe.recipe import Recipe

ROWS, LENGTH = 8, 512
WARM_STEPS = 4
SOURCE = {"path": "builtin", "name": "text"}


def recipe(folder: Path, steps: int) -> Recipe:
    """A pretrain stage of a Llama of about 7 M parameters, and nothing else."""
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8}
    training = {"max_steps": WARM_STEPS + steps, "max_length": LENGTH, "logging_steps": WARM_STEPS}
    stage = {
        "name": "bench",
        "kind": "pretrain",
        "data": [SOURCE],
        "global_batch_size": ROWS,
        "training": {**training, "save_strategy": "no", "gradient_checkpointing": False},
    }
    model = {
        "architecture": {"model_type": "llama", "max_position_embeddings": LENGTH, **sizes},
        "tokenizer": {"train": {"vocab_size": 8192, "take": 3000}},
    }
    return Recipe.model_validate({"name": "bench", "output_dir": str(folder), "model": model, "stages": [stage]})


def ours(folder: Path, steps: int) -> float:
    """Tokens per second of a run, as its log says."""
    run_recipe(recipe(folder, steps))
    rows = [json.loads(line) for line in (folder / "stages" / "bench" / "log.jsonl").read_text().splitlines()]
    return statistics.median(row["tokens_per_second"] for row in rows[1:])


def bare(base: Path, steps: int) -> float:
    """Tokens per second of a plain loop over the same rows, made ahead."""
    options = recipe(base, steps).model
    tokenizer = load_tokenizer(str(base))
    model: Any = load_model(ModelRef(str(base), options), frozen=False).train()
    stream = TokenStream([load_rows(recipe(base, steps).stages[0].data[0], seed=42)], tokenizer, max_length=LENGTH)
    names = ("input_ids", "position_ids", "labels")
    batches = [
        {name: torch.stack([torch.as_tensor(row[name]).long() for row in rows]).to(model.device) for name in names}
        for rows in islice(stream.batches(ROWS), WARM_STEPS + steps)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    on_gpu = model.device.type == "cuda"
    begin = 0.0
    for number, batch in enumerate(batches):
        if number == WARM_STEPS:
            if on_gpu:
                torch.cuda.synchronize()
            begin = time.perf_counter()
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=on_gpu):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if on_gpu:
        torch.cuda.synchronize()
    return steps * ROWS * LENGTH / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ratios = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / str(number)
            speed = ours(run, options.steps)
            limit = bare(run / "stages" / "base" / "model", options.steps)
        ratios.append(speed / limit)
        print(f"round {number + 1}: {speed:,.0f} tokens/s, bare loop {limit:,.0f}: {ratios[-1]:.2f}")
    print(f"hfpipe's pretrain step runs at {statistics.median(ratios):.2f} of a bare PyTorch loop")


if __name__ == "__main__":
    main()
