"""One table of what cannot be combined with weights that are spread over ranks, asked before anything is loaded.

The docs print it (docs/scaling.md) and a test walks it entry by entry.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import Trainer

from hfpipe.core import ranks
from hfpipe.core.errors import MachineError, RecipeError
from hfpipe.model.adapter import CHANGE_THE_BASE
from hfpipe.recipe import Recipe, Stage

SPREADING = ("fsdp", "zero3")  # a rank has a part of the weights only


@dataclass(frozen=True)
class Refusal:
    """A combination that cannot be.

    Args:
        name: It, in the words of the docs.
        holds: Whether a stage is such a one, under "none", "fsdp", "zero1", "zero2" or "zero3".
        reason: Why it cannot be, and what to do; a sentence or two.
    """

    name: str
    holds: Callable[[Stage, str], bool]
    reason: str


def plan_of_launch(stage: Stage) -> str:
    """Returns the plan of this launch (or of the stage's own `fsdp:`), as accelerate reads it from the environment."""
    if stage.training.get("fsdp") or _flag("ACCELERATE_USE_FSDP"):
        return "fsdp"
    if stage.training.get("deepspeed") or _flag("ACCELERATE_USE_DEEPSPEED"):
        level = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        return f"zero{level}" if level in "123" else "none"
    return "none"


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def _without_accelerator() -> tuple[str, ...]:
    """Returns accelerate's names of ranks that it does not shard; a process without a launcher is told elsewhere."""
    return ("MULTI_CPU", "NO") if _flag("ACCELERATE_USE_FSDP") else ("MULTI_CPU",)


def _size(name: str) -> int:
    given = os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1")
    return int(given) if given.isdigit() else 1


def _initial(stage: Stage) -> str:
    return str((stage.adapter or {}).get("init_lora_weights", ""))


def _stores_bytes(stage: Stage) -> bool:
    block = stage.quantized
    return block is not None and block.type == "nf4" and (block.bnb_4bit_quant_storage or "uint8") == "uint8"


REFUSALS = (
    Refusal(
        "FSDP of the first version (`fsdp_version: 1`)",
        lambda stage, plan: _flag("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") == "1",
        "what it saves was never compared with what it trained here. Write `fsdp_version: 2`, as "
        "recipes/accelerate/fsdp2.yaml does.",
    ),
    Refusal(
        "tensor, context or sequence parallelism (`parallelism_config`)",
        lambda stage, plan: any(_size(name) > 1 for name in ("TP", "CP", "SP")),
        "the ranks of such a group need the same rows, and hfpipe gives each rank its own. Use FSDP2, which spreads "
        "weights, gradients and optimizer over all ranks.",
    ),
    Refusal(
        "`quantization: int8` with FSDP or ZeRO-3",
        lambda stage, plan: plan in SPREADING and stage.quantized is not None and stage.quantized.type == "int8",
        "bitsandbytes keeps 8-bit weights as integers with states of their own, which are not spread. Take nf4 with "
        "`bnb_4bit_quant_storage: bfloat16`, or start the run without sharding.",
    ),
    Refusal(
        "`quantization: nf4` in bytes with FSDP or ZeRO-3",
        lambda stage, plan: plan in SPREADING and _stores_bytes(stage),
        "4-bit weights that are stored as bytes are not spread: every rank would hold all of them. Write "
        "`quantization: {type: nf4, bnb_4bit_quant_storage: bfloat16}`.",
    ),
    Refusal(
        "PiSSA, OLoRA and other `init_lora_weights` that change the base, with ZeRO-3",
        lambda stage, plan: plan == "zero3" and _initial(stage).startswith(CHANGE_THE_BASE),
        "the adapter could not be turned back into one for the base as it came. Use FSDP2, or leave it out.",
    ),
    Refusal(
        "FSDP on CPUs",
        lambda stage, plan: plan == "fsdp" and ranks.state().distributed_type.value in _without_accelerator(),
        "accelerate shards on accelerators only, and turns FSDP off without a word where it finds none. Start it on "
        "GPUs, or without FSDP.",
    ),
)


def require_combinations(recipe: Recipe) -> None:
    """Refuses what cannot be combined with the plan of this launch, before anything is loaded.

    Raises:
        RecipeError: A stage asks for it; the message says why and what to do.
    """
    for stage in recipe.stages:
        plan = plan_of_launch(stage)
        for refusal in REFUSALS:
            if refusal.holds(stage, plan):
                raise RecipeError(f"stages.{stage.name}: {refusal.name} cannot be: {refusal.reason}")


def require_plan(trainer: Trainer, checkpoint: Path, stage: str) -> None:
    """Refuses a checkpoint that was saved under another plan, which Trainer cannot read.

    Raises:
        MachineError: It was saved under FSDP and the launch has none, or the other way round.
    """
    under, now = any(checkpoint.glob("pytorch_model_fsdp*")), bool(trainer.is_fsdp_enabled)
    if under != now:
        was, is_now = ("under", "without") if under else ("without", "under")
        raise MachineError(
            f"stages.{stage}: {checkpoint.name} was saved {was} FSDP, and this launch is {is_now} it. Start the run as "
            f"before, on any number of ranks. Or move {checkpoint} away, and what is before it is taken."
        )
