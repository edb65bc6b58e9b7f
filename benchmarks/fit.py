"""Writes two tables of docs/benchmarks.md from the models' shapes: what trains in which memory, and how fast.

python benchmarks/fit.py > table.md      # some minutes, no GPU
"""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hfpipe.core.files import GIB
from hfpipe.stages.cost import flops_per_token, peak_flops
from hfpipe.stages.memory import CACHED, CONTEXT, Setting, predict

CARDS = (8, 12, 16, 24, 48, 80, 141)  # GB as they are sold
USABLE = 0.975 * GIB  # of each, what the driver leaves (78 GiB of an H100 of 80 GB)
BF16 = torch.bfloat16
LORA = {"type": "lora", "r": 16, "target_modules": "all-linear"}
TOKENS = 2048
GLOBAL_BATCH = 16
DEVICES = {"T4": 16, "RTX 3090": 24, "RTX 4090": 24, "L40S": 48, "A100": 80, "H100": 80, "H200": 141}
SHARE = 0.4  # of a device's peak, which a good training of rows of this length reaches


def shape(hidden: int, inner: int, layers: int, heads: int, keys: int, vocabulary: int, tied: bool = False) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


# The published shapes of SmolLM2-135M, Llama 3.2 1B and 3B, Llama 3.1 8B and 70B, Qwen2.5 14B and 32B.
MODELS = {
    "135M": ("llama", shape(576, 1536, 30, 9, 3, 49_152, tied=True)),
    "1B": ("llama", shape(2048, 8192, 16, 32, 8, 128_256, tied=True)),
    "3B": ("llama", shape(3072, 8192, 28, 24, 8, 128_256, tied=True)),
    "8B": ("llama", shape(4096, 14_336, 32, 32, 8, 128_256)),
    "14B": ("qwen2", shape(5120, 13_824, 48, 40, 8, 152_064)),
    "32B": ("qwen2", shape(5120, 27_648, 64, 40, 8, 152_064)),
    "70B": ("llama", shape(8192, 28_672, 80, 64, 8, 128_256)),
}
FULL = Setting("sft", "cuda", tokens=TOKENS, autocast=BF16)
ADAPTER = replace(FULL, dtype=BF16, adapter=LORA)
# From what keeps the most to what needs the least; of each, the micro-batches that are tried.
WAYS = {
    "full": FULL,
    "full, checkpointing": replace(FULL, checkpointing={}),
    "full, checkpointing, 8-bit AdamW": replace(FULL, checkpointing={}, optim="adamw_8bit"),
    "LoRA": ADAPTER,
    "LoRA, checkpointing": replace(ADAPTER, checkpointing={}),
    "QLoRA, checkpointing": replace(ADAPTER, checkpointing={}, bits=4, compute=BF16),
}


def needed(name: str, way: Setting, rows: int) -> float:
    """Bytes of a card that a training takes: the prediction, what the allocator leaves unused, and the CUDA context.

    A deep model's is that of 8 and 16 layers, continued: each further layer takes as much as the one before.
    """
    kind, fields = MODELS[name]
    setting = replace(way, rows=rows, accumulation=GLOBAL_BATCH // rows)
    layers = fields["num_hidden_layers"]

    def of(count: int) -> float:
        return predict(AutoConfig.for_model(kind, **fields | {"num_hidden_layers": count}), setting).total * (
            1 + CACHED
        )

    if layers <= 16:
        return of(layers) + CONTEXT
    few, more = of(8), of(16)
    return more + (layers - 16) * (more - few) / 8 + CONTEXT


def most_rows(name: str, way: Setting, sizes: list[float]) -> tuple[list[int], float]:
    """Returns the largest micro-batch, up to 16 rows, that fits in each of `sizes` bytes, and the bytes of one row."""
    one, eight, sixteen = (needed(name, way, rows) for rows in (1, 8, 16))
    a_row = (sixteen - eight) / 8  # the same each time, once the rows are what takes most
    takes = {rows: max(one, sixteen - (16 - rows) * a_row) for rows in (1, 2, 4, 8, 16)}
    return [max((rows for rows, taken in takes.items() if taken <= size), default=0) for size in sizes], one


def flops(name: str, way: Setting) -> float:
    """Returns the FLOPs for each token: those of a step, and of the second forward pass of checkpointing.

    An adapter's own weights, and 4-bit weights that are made whole again, are left out.
    """
    kind, fields = MODELS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    if way.adapter is not None:
        model.requires_grad_(False)
    trained = flops_per_token(model)
    forward = trained / (2 if way.adapter is not None else 3)
    return trained + (forward if way.checkpointing is not None else 0)


def rounded(number: float) -> str:
    """Two digits, as an estimate has no more."""
    return f"{int(float(f'{number:.1e}')):,}"


def main() -> None:
    print("| model | way | " + " | ".join(f"{card} GB" for card in CARDS) + " | GiB at 1 row |")
    print("| --- | --- | " + " | ".join("---" for _ in CARDS) + " | --- |")
    speeds = []
    for name in MODELS:
        for way, setting in WAYS.items():
            sizes = [card * USABLE for card in (*CARDS, *DEVICES.values())]
            rows, one = most_rows(name, setting, sizes)
            if not any(rows):
                continue
            fits, runs = rows[: len(CARDS)], rows[len(CARDS) :]
            print(f"| {name} | {way} | {' | '.join(str(n or '') for n in fits)} | {one / GIB:.1f} |", flush=True)
            a_second = {device: SHARE * (peak_flops(device) or 0) / flops(name, setting) for device in DEVICES}
            cells = [rounded(a_second[device]) if n else "" for device, n in zip(DEVICES, runs, strict=True)]
            speeds.append(f"| {name} | {way} | {' | '.join(cells)} |")
    print("\n| model | way | " + " | ".join(f"{device}, {size} GB" for device, size in DEVICES.items()) + " |")
    print("| --- | --- | " + " | ".join("---" for _ in DEVICES) + " |")
    print("\n".join(speeds))


if __name__ == "__main__":
    main()
