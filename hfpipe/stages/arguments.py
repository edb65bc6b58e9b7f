"""Trainer arguments of a stage, and whether the libraries take what a recipe passes through to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments, get_scheduler
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig

from hfpipe.data.masking import Masking, frame_of
from hfpipe.errors import RecipeError
from hfpipe.model.load import compute_dtype
from hfpipe.recipe import Pretrain, Recipe, Stage

ARGUMENTS: dict[str, type[TrainingArguments]] = {
    "pretrain": TrainingArguments,
    "sft": SFTConfig,
    "classification": TrainingArguments,
    "translation": Seq2SeqTrainingArguments,
}
_SHARDING = ("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "accelerator_config")


def stage_arguments(stage: Stage, folder: Path, seed: int, max_steps: int, **more: Any) -> Any:
    """The trainer's own arguments: hfpipe's defaults, over them the recipe's, over them what hfpipe decides itself.

    Raises:
        RecipeError: Their class refuses them.
    """
    cls = ARGUMENTS[stage.kind]
    on_gpu = torch.cuda.is_available()
    bf16 = on_gpu and compute_dtype() == torch.bfloat16
    training = {key: value for key, value in stage.training.items() if key in cls.__dataclass_fields__}
    defaults = {
        "logging_steps": max(1, min(10, max_steps // 10)),
        "report_to": "none",
        "use_cpu": not on_gpu and not torch.backends.mps.is_available(),
        "bf16": bf16 and not training.get("fp16", False),
        "gradient_checkpointing": on_gpu,
        "save_strategy": "steps",
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(max(1, max_steps // 20), max_steps - 1),  # its first step changes nothing
        "average_tokens_across_devices": True,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
    }
    decided = {
        "output_dir": str(folder),
        "seed": seed,
        "max_steps": max_steps,
        "ignore_data_skip": True,  # the source continues where the checkpoint stands, without a replay
        "remove_unused_columns": False,
        "save_total_limit": None,  # CheckpointCallback removes the old ones, once the new one is whole
    }
    if "activation_checkpointing" in training:
        defaults.pop("gradient_checkpointing")
    if stage.early_stopping is not None:  # schedules that follow a score ask for it here
        decided["eval_strategy"] = "steps"
    try:
        arguments = cls(**{**defaults, **training, **decided, **more})
    except (ValueError, TypeError) as error:
        raise RecipeError(f"stages.{stage.name}.training: {cls.__name__} refuses it: {error}") from error
    arguments.eval_strategy = IntervalStrategy.NO  # a trainer would want rows; see stages/selection.py
    return arguments


def require_arguments(recipe: Recipe, tokenizer: Any) -> None:
    """Refuses values that a library would refuse when a stage begins, before anything is scored or trained.

    Raises:
        RecipeError: The arguments' class, the schedule of the learning rate or the collator of masks refuses them.
    """
    for stage in recipe.stages:
        # A sharding set up here would hold for the base too, which is scored on one device.
        plain = {key: value for key, value in stage.training.items() if key not in _SHARDING}
        arguments = stage_arguments(stage.model_copy(update={"training": plain}), Path("."), recipe.seed, 1)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
        options = arguments.lr_scheduler_kwargs
        try:
            get_scheduler(arguments.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=options)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"stages.{stage.name}.training: lr_scheduler_type or its kwargs: {error}.") from error
        if isinstance(stage, Pretrain) and stage.objective == "masked":
            frame_of(tokenizer, words=Masking(tokenizer, stage.masking or {}, recipe.seed).collator.whole_word_mask)
