"""A stage's trainer, made on the shapes of its model: what it refuses is told before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

from hfpipe.recipe import Recipe, Stage
from hfpipe.stages import TRAINERS
from hfpipe.stages.arguments import SHARDING_WORDS, clear_refusal, stage_arguments


def require_trainer(recipe: Recipe, stage: Stage, model: Any, tokenizer: Any) -> None:
    """Refuses what the trainer of a stage would refuse when the stage begins. Every rank has to call this.

    Args:
        recipe: The recipe.
        stage: The stage.
        model: Its model, with its adapter; shapes on the meta device, which the trainer may change.
        tokenizer: The run's tokenizer.

    Raises:
        RecipeError: The trainer refuses a word of `training:`, or the model cannot be trained by it.
    """
    plain = {key: value for key, value in stage.training.items() if key not in SHARDING_WORDS}
    arguments = stage_arguments(stage.model_copy(update={"training": plain}), Path("."), recipe.seed, 1)
    model.hf_device_map = {"": "meta"}  # a trainer leaves a model where its map says
    if stage.kind in TRAINERS:
        trainer = TRAINERS[stage.kind](stage, model, arguments, tokenizer)
    else:
        with clear_refusal(stage, "Trainer"):
            trainer = Trainer(model=model, args=arguments, processing_class=tokenizer)
    if trainer.args.activation_checkpointing:
        words: Any = trainer.args.activation_checkpointing_kwargs or {}
        _require_checkpointing(stage, model, dict(words))


def _require_checkpointing(stage: Stage, model: Any, words: dict[str, Any]) -> None:
    """Turns activation checkpointing on, as Trainer does before the first step, and tries its words."""
    with clear_refusal(stage, f"activation checkpointing with {words or 'its defaults'}"):
        layers = {key: words.pop(key) for key in ("every_n_layers", "offload") if key in words}
        model.activation_checkpointing_enable(words or None, **layers)
        if stage.kind == "sft" and stage.adapter is None:
            words.pop("selective", None)  # SFTTrainer's own, which beside an adapter does not reach it
        checkpoint(torch.neg, torch.zeros(1, requires_grad=True), **words or {"use_reentrant": False}).backward()
