"""Measures hfpipe on a GPU: a bare PyTorch loop, stock TRL and hfpipe side by side, in one call of under ten minutes.

    python benchmarks/gpu.py [--only 135M 1B 8B] [--ways full lora qlora] [--steps 10] [--json gpu.json]

Nothing is downloaded: the models have published shapes and random weights, the documents random tokens of all lengths,
packed into rows. All train on the same documents with AdamW, in bf16 where the GPU has it. Of each cell the table says
useful tokens per second, the share of the GPU's peak (MFU), the peak memory and hfpipe's prediction of it. Then a
profile of one step of hfpipe's by part, and the losses of 50 steps of the smallest model beside the bare loop's.

`--only tiny` runs on a CPU too, to see that it works. See benchmarks/GPU.md for the first hour on a new card.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from hfpipe.core.files import GIB
from hfpipe.core.upstream import override
from hfpipe.data.dataloader import BatchLoader
from hfpipe.data.row_order import PackedRows
from hfpipe.model.load import compute_dtype
from hfpipe.model.memory import PeakMeter
from hfpipe.model.varlen_attention import use_varlen_attention
from hfpipe.recipe import Sft
from hfpipe.stages.arguments import stage_arguments
from hfpipe.stages.causal_loss import WithFastLoss
from hfpipe.stages.cost import peak_flops
from hfpipe.stages.memory import Setting, predict

WARM = 3
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {  # config, rows of a micro-batch, tokens of a row
    "tiny": ({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}, 2, 128),
    "135M": (
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49_152,
            "tie_word_embeddings": True,
        },
        16,
        2048,
    ),
    "1B": (
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
            "tie_word_embeddings": True,
        },
        8,
        2048,
    ),
    "8B": (
        {
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
        },
        2,
        4096,
    ),
}
WAYS = ("full", "lora", "qlora")
LORA = {"r": 16, "target_modules": "all-linear"}
ON_GPU = torch.cuda.is_available()


class Ours(WithFastLoss, SFTTrainer):
    """The trainer of an sft stage."""


class Clock(TrainerCallback):
    """Seconds of the steps after the first ones."""

    def __init__(self) -> None:
        self.begin = self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if ON_GPU:
            torch.cuda.synchronize()
        if state.global_step == WARM:
            self.begin = time.perf_counter()
        self.seconds = time.perf_counter() - self.begin


class Packed:
    """Serves packed rows to a `BatchLoader`, batch after batch.

    Args:
        documents: Token ids of each document.
        tokens: Of a row.
    """

    def __init__(self, documents: list[np.ndarray], tokens: int) -> None:
        epoch = PackedRows(np.array([len(one) for one in documents]), tokens, seed=0).epoch(0)
        self.rows = []
        for number in range(epoch.rows):
            parts = [documents[one] for one in epoch.row(number)]
            ids = np.concatenate(parts)
            places = np.concatenate([np.arange(len(part)) for part in parts])
            self.rows.append({"input_ids": ids, "position_ids": places, "labels": np.where(places == 0, -100, ids)})

    def batches(self, rows: int) -> Iterator[list[dict[str, np.ndarray]]]:
        """Yields the batches in order."""
        for begin in range(0, len(self.rows) - rows + 1, rows):
            yield self.rows[begin : begin + rows]


def documents_of(shape: str, steps: int) -> list[np.ndarray]:
    """Returns documents for a number of steps: 100 tokens to a row long, most of them short."""
    config, rows, tokens = SHAPES[shape]
    chance = np.random.default_rng(0)
    found, left = [], rows * tokens * (steps + WARM + 2)
    while left > 0:
        size = int(min(tokens, max(tokens // 20, chance.lognormal(np.log(tokens / 5), 0.8))))
        found.append(chance.integers(2, config.get("vocab_size", 32_000), size))
        left -= size
    return found


def model_of(shape: str, way: str, dtype: torch.dtype) -> Any:
    """Returns a model with random weights, on the device; always the same."""
    set_seed(0)
    config, _, tokens = SHAPES[shape]
    with torch.device("cuda" if ON_GPU else "cpu"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(max_position_embeddings=tokens, **config), dtype=dtype)
    if way == "qlora":
        with tempfile.TemporaryDirectory() as folder:  # bitsandbytes quantizes what it loads
            model.save_pretrained(folder)
            del model
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=_four_bits())
    model.config.use_cache = False
    return model


def _four_bits() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(),
    )


def words_of(shape: str, way: str) -> dict[str, Any]:
    """Returns the words of a stage's `training:`; what a GPU of 80 GB has no room for is made smaller."""
    _, rows, tokens = SHAPES[shape]
    words: dict[str, Any] = {"per_device_train_batch_size": rows, "max_length": tokens, "learning_rate": 1e-4}
    if shape == "8B":
        words["activation_checkpointing"] = True
        if way == "full":
            words["optim"] = "adamw_8bit"
    return words


def weights_dtype(way: str) -> torch.dtype:
    """Returns hfpipe's default: whole weights that are trained stay in float32."""
    return torch.float32 if way == "full" else compute_dtype()


def bare(shape: str, way: str, steps: int) -> tuple[float, list[float]]:
    """Seconds of a step of a plain loop on the packed rows, with a block mask, and its losses."""
    model = model_of(shape, way, weights_dtype(way)).train()
    if way != "full":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    words = words_of(shape, way)
    if words.get("activation_checkpointing"):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    if words.get("optim") == "adamw_8bit":
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=1e-4)
    half = torch.autocast("cuda", compute_dtype()) if ON_GPU else nullcontext()
    losses, begin = [], 0.0
    for number, batch in enumerate(_loader(shape, steps)):
        if number == WARM:
            _wait()
            begin = time.perf_counter()
        if number == WARM + steps:
            break
        batch = {key: value.to(model.device) for key, value in batch.items()}
        with half:
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    _wait()
    return (time.perf_counter() - begin) / steps, [float(loss) for loss in losses]


def hfpipe(shape: str, way: str, steps: int, callbacks: tuple[Any, ...] = ()) -> tuple[float, list[float]]:
    """Seconds of a step as an sft stage with `packing` takes it, and its losses."""
    words = words_of(shape, way) | {"packing": True, "logging_steps": 1, "lr_scheduler_type": "constant"}
    stage = Sft(
        kind="sft", name="bench", data=[{"path": "builtin", "name": "text"}], training=words | {"warmup_steps": 0}
    )
    model = model_of(shape, way, weights_dtype(way))
    use_varlen_attention(model)
    if way != "full":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    plain = {"packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}, "save_strategy": "no"}
    with tempfile.TemporaryDirectory() as folder:
        arguments = stage_arguments(stage, Path(folder), 0, WARM + steps, **plain)
        clock = Clock()
        trainer = Ours(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list([{"input_ids": [0, 0], "labels": [0, 0]}]),  # not read
            processing_class=_tokenizer(),
            callbacks=[clock, *callbacks],
        )
        trainer.use_fast_loss()
        loader = _loader(shape, steps)
        override(trainer, get_train_dataloader=lambda: loader)
        trainer.train()
    return clock.seconds / steps, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def stock(shape: str, way: str, steps: int) -> tuple[float, list[float]]:
    """Seconds of a step of SFTTrainer as it comes, with its own packing."""
    documents = documents_of(shape, steps)
    words = words_of(shape, way)
    checkpointing = words.pop("activation_checkpointing", False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=WARM + steps,
            packing=True,
            bf16=ON_GPU and compute_dtype() == torch.bfloat16,
            use_cpu=not ON_GPU,
            gradient_checkpointing=checkpointing,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
            **words,
        )
        clock = Clock()
        trainer = SFTTrainer(
            model=model_of(shape, way, weights_dtype(way)),
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": [one.tolist() for one in documents]}),
            processing_class=_tokenizer(),
            peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA) if way != "full" else None,
            callbacks=[clock],
        )
        trainer.train()
    return clock.seconds / steps, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def _loader(shape: str, steps: int) -> BatchLoader:
    _, rows, tokens = SHAPES[shape]
    source: Any = Packed(documents_of(shape, steps), tokens)
    return BatchLoader(source, rows, 0)


def _tokenizer() -> Any:
    plain = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def predicted(shape: str, way: str) -> int:
    """Returns hfpipe's prediction of the peak memory, in bytes, without CUDA's own."""
    config, rows, tokens = SHAPES[shape]
    words = words_of(shape, way)
    setting = Setting(
        "sft",
        "cuda" if ON_GPU else "cpu",
        rows=rows,
        tokens=tokens,
        dtype=weights_dtype(way),
        autocast=compute_dtype() if ON_GPU else None,
        optim=words.get("optim", "adamw_torch_fused"),
        checkpointing={} if words.get("activation_checkpointing") else None,
        packed=True,
    )
    if way != "full":
        setting = replace(setting, adapter={"type": "lora", **LORA})
    if way == "qlora":
        setting = replace(setting, bits=4, compute=compute_dtype())
    return predict(LlamaConfig(max_position_embeddings=tokens, **config), setting).total


def flops_of(shape: str, way: str) -> float:
    """Returns the FLOPs of a token: 6 for a parameter that is trained, 4 for one that is not, and attention's."""
    config, _, tokens = SHAPES[shape]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**config))
    weights = model.num_parameters() - (0 if config.get("tie_word_embeddings") else model.lm_head.weight.numel())
    attention = 6 * config["num_hidden_layers"] * config["hidden_size"] * tokens / 5  # documents are a fifth of a row
    return (6 if way == "full" else 4) * weights + attention


def cell(side: Callable[..., Any], shape: str, way: str, steps: int) -> dict[str, Any]:
    """Runs one side, and returns its figures or what it failed of."""
    _, rows, tokens = SHAPES[shape]
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
    meter = PeakMeter()
    try:
        seconds, losses = side(shape, way, steps)
    except (RuntimeError, ImportError, ValueError) as error:  # no room, or no package: the other cells go on
        return {"failed": str(error).split("\n")[0][:200]}
    peak = peak_flops(torch.cuda.get_device_name()) if ON_GPU else None
    speed = rows * tokens / seconds
    return {
        "tokens_per_second": round(speed),
        "mfu": round(speed * flops_of(shape, way) / peak, 3) if peak else None,
        "peak_gib": round((meter.read() - meter.before) / GIB, 2),
        "losses": [round(loss, 4) for loss in losses],
    }


def profile(shape: str, way: str) -> list[tuple[str, float]]:
    """Returns the parts of hfpipe's steps by their share of the device's time, the largest first."""
    kind = torch.profiler.ProfilerActivity.CUDA if ON_GPU else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as seen:
        hfpipe(shape, way, 1)
    word = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    times = Counter({row.key: getattr(row, word) for row in seen.key_averages()})
    total = sum(times.values()) or 1
    return [(name[:80], round(value / total, 3)) for name, value in times.most_common(15)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[name for name in SHAPES if name != "tiny"], choices=list(SHAPES))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    print(torch.cuda.get_device_name() if ON_GPU else "no GPU", torch.__version__, compute_dtype())
    found: dict[str, Any] = {}
    for shape in options.only:
        for way in options.ways:
            for side in (bare, stock, hfpipe):
                figures = found[f"{shape} {way} {side.__name__}"] = cell(side, shape, way, options.steps)
                told = {key: value for key, value in figures.items() if key != "losses"}
                print(f"{shape:5} {way:6} {side.__name__:7} {told}", flush=True)
            print(f"{shape:5} {way:6} predicted {predicted(shape, way) / GIB:.2f} GiB", flush=True)
    smallest = options.only[0]
    found["profile"] = profile(smallest, options.ways[0])
    for name, share in found["profile"]:
        print(f"{share:6.1%}  {name}")
    pair = [side(smallest, "full", 50)[1] for side in (bare, hfpipe)]
    found["losses"] = pair
    apart = max(abs(one - other) for one, other in zip(*pair, strict=True))
    print(f"losses of {len(pair[0])} steps of {smallest}: at most {apart:.4f} apart from the bare loop's")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
