"""Trainer arguments of a stage, and whether the libraries take what a recipe passes through to them."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import is_liger_kernel_available

from hfpipe.core import ranks
from hfpipe.core.errors import MachineError, RecipeError
from hfpipe.data.masking import Masking, frame_of
from hfpipe.model.load import compute_dtype
from hfpipe.model.muon import require_muon
from hfpipe.recipe import Pretrain, Recipe, Stage
from hfpipe.stages.trackers import require_login

SHARDING_WORDS = ("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "accelerator_config")
PRECISION = "ACCELERATE_MIXED_PRECISION"  # accelerate writes the word of its launch there
_OF_THE_OPTIMIZER = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules")


@contextmanager
def clear_refusal(stage: Stage, who: str) -> Iterator[None]:
    """Turns what a library says of a stage's `training:` into a UserError.

    Args:
        stage: The stage.
        who: The library's class or function.

    Raises:
        RecipeError: A value is refused.
        MachineError: A package is not installed.
    """
    try:
        yield
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError, ArithmeticError) as error:
        text = f"stages.{stage.name}.training: {who} refuses it: {' '.join(str(error).split()).rstrip('.')}."
        lacking = isinstance(error, ImportError) or "install" in text  # some say so by a ValueError
        if isinstance(error, RuntimeError) and not (lacking or isinstance(error, NotImplementedError)):
            raise
        raise (MachineError if lacking else RecipeError)(text) from error


def stage_arguments(stage: Stage, folder: Path, seed: int, max_steps: int, **more: Any) -> Any:
    """The trainer's own arguments: hfpipe's defaults, over them the recipe's, over them what hfpipe decides itself.

    Raises:
        RecipeError: Their class refuses them.
        MachineError: They need a package that is not installed.
    """
    module, name = stage.ARGUMENTS
    cls = getattr(import_module(module), name)
    on_gpu = torch.cuda.is_available() and not ranks.on_cpu()
    half = compute_dtype() if on_gpu else None
    training = {key: value for key, value in stage.training.items() if key in cls.__dataclass_fields__}
    defaults = {
        "logging_steps": max(1, min(10, max_steps // 10)),
        "report_to": "none",
        "log_level_replica": "passive",  # transformers lets all ranks but the first warn
        "use_cpu": ranks.on_cpu() or not (on_gpu or torch.backends.mps.is_available()),
        "bf16": half == torch.bfloat16 and not training.get("fp16", False),
        "fp16": half == torch.float16 and not training.get("bf16", False),
        "tf32": True if on_gpu and torch.cuda.is_tf32_supported() else None,  # for what autocast leaves in float32
        "save_strategy": "steps",
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(max(1, max_steps // 20), max_steps - 1),  # its first step changes nothing
        "average_tokens_across_devices": True,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
    }
    if not training.get("gradient_checkpointing"):  # its older name
        # TRL's default is True; fit.py turns it on where it is needed.
        defaults["activation_checkpointing"] = bool(recomputes(stage))
    decided = {
        **stage.decided,
        "output_dir": str(folder),
        "seed": seed,
        "max_steps": max_steps,
        "ignore_data_skip": True,  # the source continues where the checkpoint stands, without a replay
        "remove_unused_columns": False,
        "hub_private_repo": True,  # of a Space of trackio
        "save_total_limit": None,  # CheckpointCallback removes the old ones, once the new one is whole
    }
    if stage.early_stopping is not None:  # schedules that follow a score ask for it here
        decided["eval_strategy"] = "steps"
    words = {**defaults, **training, **decided, **more}
    precision = "bf16" if words["bf16"] else "fp16" if words["fp16"] else "no"
    # Trainer takes the launch's where the stage says neither, and what DeepSpeed is told has to be the trainer's.
    with clear_refusal(stage, cls.__name__), patch_environment(**{PRECISION: precision}):
        arguments = cls(**words)
    arguments.eval_strategy = IntervalStrategy.NO  # a trainer would want rows; see stages/scored.py
    return arguments


def recomputes(stage: Stage) -> bool | None:
    """Returns whether a stage asks to recompute its activations in the backward pass; None if it says nothing of it.

    One that only says how to do it (`activation_checkpointing_kwargs`) asks for it.
    """
    words = "activation_checkpointing", "gradient_checkpointing"
    asked = [stage.training.get(word) for word in words]
    said = any(stage.training.get(f"{word}_kwargs") for word in words)
    return next((bool(one) for one in asked if one is not None), True if said else None)


def require_arguments(recipe: Recipe, tokenizer: Any) -> None:
    """Refuses values that a library would refuse when a stage begins, before anything is scored or trained.

    Raises:
        RecipeError: The arguments' class, the optimizer, the schedule of the learning rate or the collator of masks
            refuses them.
        MachineError: They need a package that is not installed.
    """
    for stage in recipe.stages:
        if stage.training.get("fsdp") and ranks.ranks() == 1:
            raise RecipeError(
                f"stages.{stage.name}.training.fsdp needs several ranks, and this is one process. Start the run by "
                "`accelerate launch`, or leave it out."
            )
        _require_deepspeed(stage)
        # A sharding set up here would hold for the base too, which is scored on one device.
        plain = {key: value for key, value in stage.training.items() if key not in SHARDING_WORDS}
        arguments = stage_arguments(stage.model_copy(update={"training": plain}), Path("."), recipe.seed, 1)
        with clear_refusal(stage, "Trainer"):
            arguments.get_process_log_level()
            for callback in get_reporting_integration_callbacks(arguments.report_to):
                callback()
            if arguments.use_liger_kernel and not is_liger_kernel_available():
                raise ImportError("use_liger_kernel needs liger-kernel: pip install liger-kernel")
            if getattr(arguments, "activation_offloading", False) and not torch.accelerator.is_available():
                raise ValueError("activation_offloading moves what lies on a GPU, and there is none")
        ranks.on_main(partial(require_login, stage.name, arguments.report_to))
        with clear_refusal(stage, f"optim {_word(arguments.optim)}"):
            optimizer = _optimizer(arguments)
        if stage.muon is not None:
            with clear_refusal(stage, "torch.optim.Muon"):
                require_muon(stage.muon)
        with clear_refusal(stage, "lr_scheduler_type or its kwargs"):
            _rates(arguments, optimizer, arguments.lr_scheduler_kwargs)
            _require_effect(stage, arguments, optimizer)
        if isinstance(stage, Pretrain) and stage.objective == "masked":
            frame_of(tokenizer, words=Masking(tokenizer, stage.masking or {}, recipe.seed).collator.whole_word_mask)


def _require_deepspeed(stage: Stage) -> None:
    """Refuses a DeepSpeed file that is not there or not JSON, and DeepSpeed where it is not installed."""
    given = stage.training.get("deepspeed")
    if not given:
        return
    named = f"stages.{stage.name}.training.deepspeed"
    if isinstance(given, str):
        try:
            content = json.loads(Path(given).read_bytes())
        except OSError as error:
            raise RecipeError(
                f"{named}: {given} cannot be read ({error.strerror}). Name a file of DeepSpeed."
            ) from error
        except ValueError as error:
            raise RecipeError(f"{named}: {given} is not JSON: {error}.") from error
        if not isinstance(content, dict):
            raise RecipeError(f"{named}: {given} holds no mapping, as a file of DeepSpeed does.")
    if importlib.util.find_spec("deepspeed") is None:
        raise MachineError(f"{named} needs deepspeed, which is not installed: pip install deepspeed. Or leave it out.")


def _optimizer(arguments: TrainingArguments) -> torch.optim.Optimizer:
    """The optimizer of one parameter; plain SGD stands for those that are made for a model."""
    kind, options = _chosen(arguments) or (torch.optim.SGD, {"lr": arguments.learning_rate})
    return kind([torch.nn.Parameter(torch.zeros(1))], **options)


def _chosen(arguments: TrainingArguments) -> tuple[Any, dict[str, Any]] | None:
    """Returns the class of the optimizer and its words; None for those that are made for a model."""
    try:
        return Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ValueError as error:
        if "model" not in str(error):
            raise
        return None


def _rates(arguments: TrainingArguments, optimizer: torch.optim.Optimizer, kwargs: Any, warmup: int = 5) -> list[float]:
    """Returns the learning rates of ten steps, of which `warmup` are the warmup's."""
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": arguments.learning_rate}
    schedule = get_scheduler(arguments.lr_scheduler_type, optimizer, warmup, 10, scheduler_specific_kwargs=kwargs)
    rates = []
    for _ in range(10):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        if hasattr(schedule, "lr_lambdas"):  # the others follow a score
            optimizer.step()
            schedule.step()
    return rates


def _require_effect(stage: Stage, arguments: TrainingArguments, optimizer: torch.optim.Optimizer) -> None:
    """Refuses words of the optimizer and the schedule that these take no notice of.

    Raises:
        RecipeError: There is one.
    """
    chosen, fields = _chosen(arguments), type(arguments).__dataclass_fields__
    others = {key: fields[key].default for key in _OF_THE_OPTIMIZER if stage.training.get(key) is not None}
    tried = [(key, value) for key, value in others.items() if stage.training[key] != value]
    words = str(stage.training.get("optim_args") or "").split(",")
    tried += [("optim_args", ",".join(words[:at] + words[at + 1 :])) for at in range(len(words)) if len(words) > 1]
    for key, value in tried if chosen else ():
        if _chosen(_with(arguments, key, value)) == chosen:
            raise _without_effect(stage, key, f"optim {_word(arguments.optim)}")
    schedule = f"lr_scheduler_type {_word(arguments.lr_scheduler_type)}"
    if stage.training.get("lr_scheduler_kwargs"):
        with suppress(TypeError):  # a schedule that reads its words refuses this one
            _rates(arguments, optimizer, {"no word of a schedule": 0})
            raise _without_effect(stage, "lr_scheduler_kwargs", schedule)
    if stage.training.get("warmup_steps"):
        warm, cold = (_rates(arguments, optimizer, arguments.lr_scheduler_kwargs, steps) for steps in (5, 0))
        if warm == cold and any(warm):
            raise _without_effect(stage, "warmup_steps", schedule)


def _with(arguments: TrainingArguments, key: str, value: Any) -> TrainingArguments:
    other = copy.copy(arguments)
    setattr(other, key, value)
    return other


def _word(value: Any) -> str:
    """Returns what a recipe calls a member of an enum."""
    return str(getattr(value, "value", value))


def _without_effect(stage: Stage, key: str, owner: str) -> RecipeError:
    return RecipeError(
        f"stages.{stage.name}.training.{key}: found {stage.training[key]}, and {owner} takes no notice of it, or of a "
        "part of it. Leave that out."
    )
