"""A training step against its limit: hfpipe and SFTTrainer beside a bare PyTorch loop, in turns, by processor time.

    python benchmarks/step.py [--steps 8] [--rounds 3] [--only sft lora]

All train the same Llama from the same weights with AdamW and a clipped gradient, on rows of one length of which 60 % of
the tokens are trained (all of them when pretraining). The bare loop takes the model's own loss. They take turns in one
process, so that a busy machine slows all of them. Loading, saving and the first steps are left out.

Two sizes: `small` has 7 M parameters and 8,192 tokens, `wide` 21 M and 49,152.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from hfpipe.stages.causal_loss import WithFastLoss

ROWS, LENGTH, WARM = 8, 256, 2
SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "vocab_size": 8192},
    "wide": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 49152},
}
TRAINED = {"pretrain": 1.0, "sft": 0.6, "lora": 0.6}
SAVES: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "logging_strategy": "no", "disable_tqdm": True}


class Ours(WithFastLoss, SFTTrainer):
    """SFTTrainer with the loss that hfpipe gives it."""


class Clock(TrainerCallback):
    """Measures processor seconds of the steps after the first ones."""

    def __init__(self) -> None:
        self.begin = self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARM:
            self.begin = time.process_time()
        self.seconds = time.process_time() - self.begin


def model_of(kind: str, size: str) -> Any:
    """Returns the model that a kind of training begins with; always the same weights."""
    set_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(num_attention_heads=8, tie_word_embeddings=True, **SIZES[size]))
    model.config.use_cache = False
    if kind == "lora":
        options = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, options)
    return model


def rows_of(kind: str, size: str, steps: int) -> dict[str, torch.Tensor]:
    """Returns the rows of all steps: input_ids and labels, each (N, L)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, SIZES[size]["vocab_size"], (ROWS * steps, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, : round(LENGTH * (1 - TRAINED[kind]))] = -100
    return {"input_ids": ids, "labels": labels}


def bare(kind: str, size: str, steps: int) -> float:
    """Processor seconds of a step of a plain loop."""
    model, rows = model_of(kind, size).train(), rows_of(kind, size, WARM + steps)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    begin = 0.0
    for number in range(WARM + steps):
        if number == WARM:
            begin = time.process_time()
        batch = {key: value[number * ROWS : (number + 1) * ROWS] for key, value in rows.items()}
        model(**batch, attention_mask=torch.ones_like(batch["input_ids"])).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return (time.process_time() - begin) / steps


def trained(trainer_class: Callable[..., Any], kind: str, size: str, steps: int) -> float:
    """Processor seconds of a step of SFTTrainer or of hfpipe's form of it, on rows that are tokens already."""
    rows = Dataset.from_dict({key: value.tolist() for key, value in rows_of(kind, size, WARM + steps).items()})
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=str(Path(folder)),
            max_steps=WARM + steps,
            per_device_train_batch_size=ROWS,
            learning_rate=1e-4,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            optim="adamw_torch_fused",
            max_length=LENGTH,
            dataset_kwargs={"skip_prepare_dataset": True},
            **SAVES,
        )
        clock = Clock()
        trainer = trainer_class(
            model=model_of(kind, size),
            args=arguments,
            train_dataset=rows,
            processing_class=_tokenizer(),
            callbacks=[clock],
        )
        if isinstance(trainer, Ours):
            trainer.use_fast_loss()
        trainer.train()
    return clock.seconds / steps


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<eos>": 1}
    plain = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(TRAINED), choices=list(TRAINED))
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    options = parser.parse_args()
    print("speed as a share of the bare loop's, median of the rounds (lowest to highest)")
    for kind in options.only:
        for size in options.sizes:
            ratios: dict[str, list[float]] = {"SFTTrainer": [], "hfpipe": []}
            for _ in range(options.rounds):
                limit = bare(kind, size, options.steps)
                for name, trainer in (("SFTTrainer", SFTTrainer), ("hfpipe", Ours)):
                    ratios[name].append(limit / trained(trainer, kind, size, options.steps))
            for name, found in ratios.items():
                spread = f"({min(found):.2f} to {max(found):.2f})"
                print(f"{kind:9} {size:6} {name:11} {statistics.median(found):.2f} {spread}", flush=True)


if __name__ == "__main__":
    main()
