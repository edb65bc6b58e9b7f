"""A training step against its limit: a bare PyTorch loop, the stock trainer and `hfpipe run`, by processor time.

    python benchmarks/step.py [--only sft lora] [--sizes small wide] [--steps 8] [--rounds 3]

All three train one Llama from the same weights on the same rows, with AdamW and a clipped gradient, each in a process
of its own, in turns. The bare loop takes the model's own loss. The stock trainer is TRL's SFTTrainer, and transformers'
Trainer for `pretrain` and `classification`. Loading, saving and the first steps are left out of the speed; the start is
all that comes before the first step: imports, rows, the model. Memory is the highest resident set of the whole process.

Rows have 256 tokens: of `sft`, `lora` and `qlora` 60 % are trained. `packed` has examples of 32 to 256 tokens for one
epoch, packed into 512 by hfpipe and SFTTrainer (`packing: true`), while the bare loop pads batches of 8. `grouped` has
the same examples in batches of 8: grouped by length by hfpipe, as it does by default, and by SFTTrainer
(`group_by_length`), as they come in the bare loop. All train the same tokens, so speed is that of useful tokens.

Two sizes: `small` has 7 M parameters and 8,192 tokens, `wide` 21 M and 49,152.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROWS, LENGTH, WARM, PACKED = 8, 256, 2, 512
SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "vocab_size": 8192},
    "wide": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 49152},
}
KINDS = ("pretrain", "sft", "lora", "qlora", "classification", "packed", "grouped")
UNEVEN = ("packed", "grouped")  # examples of many lengths
LORA = {"r": 16, "target_modules": "all-linear"}
NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
PROMPT = round(LENGTH * 0.4)
SPECIAL = ("<pad>", "<eos>")


def write_base(folder: Path, size: str) -> None:
    """Saves a model of random weights and a tokenizer whose words are its tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    set_seed(0)
    names = [*SPECIAL, *(f"w{number}" for number in range(SIZES[size]["vocab_size"] - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = LlamaConfig(
        num_attention_heads=8,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **SIZES[size],
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def rows_of(kind: str, size: str, steps: int) -> list[dict[str, Any]]:
    """Returns the rows of all steps as texts, the same for all three."""
    draw = random.Random(1)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(SIZES[size]['vocab_size'] - len(SPECIAL))}" for _ in range(count))

    count = ROWS * (WARM + steps)
    if kind == "pretrain":
        return [{"text": words(LENGTH - 1)} for _ in range(count)]
    if kind == "classification":
        return [{"text": words(LENGTH), "label": number % 2} for number in range(count)]
    lengths = [draw.randint(32, LENGTH) if kind in UNEVEN else LENGTH for _ in range(count)]
    return [
        {"prompt": words(round(length * 0.4)), "completion": " " + words(length - round(length * 0.4) - 1)}
        for length in lengths
    ]


def tokens_of(kind: str, rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Returns rows as input_ids and labels, as the bare loop and the stock trainer take them."""
    found = []
    for row in rows:
        if kind == "classification":
            found.append({"input_ids": tokenizer(row["text"])["input_ids"], "labels": row["label"]})
            continue
        prompt = tokenizer(row["prompt"])["input_ids"] if "prompt" in row else []
        ids = prompt + tokenizer(row.get("completion") or row["text"])["input_ids"] + [tokenizer.eos_token_id]
        found.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    return found


def model_of(kind: str, folder: Path) -> Any:
    """Loads the model that a kind of training begins with, for the bare loop and the stock trainer."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        BitsAndBytesConfig,
        set_seed,
    )

    set_seed(0)
    loader = AutoModelForSequenceClassification if kind == "classification" else AutoModelForCausalLM
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **NF4)} if kind == "qlora" else {}
    model = loader.from_pretrained(folder, dtype=torch.float32, **options)
    model.config.use_cache = False
    if kind == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if kind in ("lora", "qlora"):
        model = get_peft_model(model, LoraConfig(**LORA, task_type=TaskType.CAUSAL_LM))
    return model


class Clock:
    """Measures the processor seconds of the steps after the first ones; of all where the rows differ."""

    def __init__(self, kind: str) -> None:
        self.skipped = 0 if kind in UNEVEN else WARM
        self.step, self.began, self.seconds, self.start = 0, 0.0, 0.0, 0.0

    def begin(self) -> None:
        """Is called before the first step."""
        self.step, self.began = 0, time.process_time()
        self.start = self.began

    def ended(self) -> None:
        """Is called after each step."""
        self.step += 1
        if self.step == self.skipped:
            self.began = time.process_time()
        self.seconds = time.process_time() - self.began


def batches(rows: list[dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    """Yields padded batches, input_ids, attention_mask and labels each (ROWS, L)."""
    import torch

    for begin in range(0, len(rows), ROWS):
        some = rows[begin : begin + ROWS]
        longest = max(len(row["input_ids"]) for row in some)
        missing = [longest - len(row["input_ids"]) for row in some]
        batch = {
            "input_ids": [row["input_ids"] + [0] * less for row, less in zip(some, missing, strict=True)],
            "attention_mask": [[1] * (longest - less) + [0] * less for less in missing],
            "labels": [row["labels"] for row in some]
            if kind == "classification"
            else [row["labels"] + [-100] * less for row, less in zip(some, missing, strict=True)],
        }
        yield {key: torch.tensor(value) for key, value in batch.items()}


def bare(kind: str, folder: Path, rows: list[dict[str, Any]]) -> Clock:
    """Trains by a plain loop; returns the clock of its steps."""
    import torch
    from transformers import AutoTokenizer

    tokens = tokens_of(kind, rows, AutoTokenizer.from_pretrained(folder))
    model = model_of(kind, folder).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, clock = torch.optim.AdamW(trained, lr=1e-4, fused=True), Clock(kind)
    clock.begin()
    for batch in batches(tokens, kind):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.ended()
    return clock


def _callback(clock: Clock) -> type:
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.ended()

    return StepClock


def stock(kind: str, folder: Path, rows: list[dict[str, Any]]) -> Clock:
    """Trains by SFTTrainer or Trainer; returns the clock of its steps."""
    from datasets import Dataset
    from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    plain = kind in ("pretrain", "classification")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options: dict[str, Any] = {
        "output_dir": str(folder.parent / "stock"),
        "num_train_epochs": 1,
        "per_device_train_batch_size": ROWS if kind != "packed" else ROWS * LENGTH // PACKED,
        "learning_rate": 1e-4,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "optim": "adamw_torch_fused",
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    clock = Clock(kind)
    asked: dict[str, Any] = {"model": model_of(kind, folder), "processing_class": tokenizer}
    asked["callbacks"] = [_callback(clock)]
    if plain:
        data = Dataset.from_list(tokens_of(kind, rows, tokenizer))
        asked["data_collator"] = DataCollatorWithPadding(tokenizer) if kind == "classification" else None
        trainer = Trainer(args=TrainingArguments(**options), train_dataset=data, **asked)
    else:
        if kind == "grouped":
            options["train_sampling_strategy"] = "group_by_length"
        sft = SFTConfig(max_length=PACKED if kind == "packed" else LENGTH, packing=kind == "packed", **options)
        trainer = SFTTrainer(args=sft, train_dataset=Dataset.from_list(rows), **asked)
    trainer.train()
    return clock


def ours(kind: str, folder: Path, rows: list[dict[str, Any]]) -> Clock:
    """Trains by `hfpipe run` on a file of the rows; returns the clock of its steps."""
    import yaml

    from hfpipe.cli import main
    from hfpipe.core.importing import importing

    with importing():  # as the command does it, a moment earlier
        from transformers import trainer

    data = folder.parent / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage: dict[str, Any] = {
        "name": "timed",
        "kind": kind if kind in ("pretrain", "classification") else "sft",
        "data": [{"path": str(data)}],
        "global_batch_size": ROWS if kind != "packed" else ROWS * LENGTH // PACKED,
        "training": {
            "num_train_epochs": 1,
            "learning_rate": 1e-4,
            "max_length": PACKED if kind == "packed" else LENGTH,
            "per_device_train_batch_size": ROWS if kind != "packed" else ROWS * LENGTH // PACKED,
            "save_strategy": "no",
        },
    }
    if kind in ("lora", "qlora"):
        stage["lora"] = dict(LORA)
    if kind == "qlora":
        stage["quantization"] = {"type": "nf4", "bnb_4bit_compute_dtype": "float32"}
    if kind == "packed":
        stage["training"]["packing"] = True
    recipe = {
        "name": "step",
        "output_dir": str(folder.parent / "run"),
        "model": {"id": str(folder)},
        "stages": [stage],
        "evaluate": {},
        "energy": False,
        "shift": False,
    }
    path = folder.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    clock = Clock(kind)
    trainer.DEFAULT_CALLBACKS.append(_callback(clock))
    if main(["run", str(path)]):
        raise SystemExit("hfpipe run failed")
    return clock


WAYS: dict[str, Callable[..., Clock]] = {"bare": bare, "stock": stock, "hfpipe": ours}


def measured(way: str, kind: str, size: str, steps: int) -> dict[str, float]:
    """Runs one way in a process of its own; returns the seconds of its start and its steps, and its peak in MiB."""
    line = [sys.executable, __file__, "--way", way, "--only", kind, "--sizes", size, "--steps", str(steps)]
    ended = subprocess.run(line, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{way} {kind} {size} failed:\n{ended.stdout}{ended.stderr}")
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def one_way(way: str, kind: str, size: str, steps: int) -> None:
    """Trains in this process, and prints what `measured` reads."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "base"
        # The model is made in a process of its own, so that its memory is not counted.
        if not os.fork():
            write_base(folder, size)
            os._exit(0)
        os.wait()
        rows, before = rows_of(kind, size, steps), time.process_time()
        with contextlib.redirect_stdout(sys.stderr):
            clock = WAYS[way](kind, folder, rows)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) / 1024
    print(json.dumps({"seconds": clock.seconds, "start": clock.start - before, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--way", choices=list(WAYS), help="this one alone, as JSON")
    options = parser.parse_args()
    if options.way:
        one_way(options.way, options.only[0], options.sizes[0], options.steps)
        return
    print("speed, peak memory and start as shares of the bare loop's, medians of the rounds (lowest to highest)")
    for kind in options.only:
        for size in options.sizes:
            found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(options.rounds):
                for way, each in found.items():
                    each.append(measured(way, kind, size, options.steps))
            for way in ("stock", "hfpipe"):
                pairs = list(zip(found["bare"], found[way], strict=True))
                speed = [limit["seconds"] / one["seconds"] for limit, one in pairs]
                memory, start = (
                    statistics.median(one[word] / limit[word] for limit, one in pairs) for word in ("peak", "start")
                )
                spread = f"{statistics.median(speed):.2f} ({min(speed):.2f} to {max(speed):.2f})"
                print(f"{kind:14} {size:6} {way:7} speed {spread}  memory {memory:.2f}  start {start:.2f}")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
