"""One table of what cannot be combined with weights that are spread over ranks, asked before anything is loaded.

The docs print it (docs/scaling.md) and a test walks it entry by entry.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from hfpipe.core import ranks
from hfpipe.core.errors import RecipeError
from hfpipe.model.load import trains_rows
from hfpipe.recipe import Recipe, Stage

SPREADING = ("fsdp", "zero3")  # a rank has a part of the weights only


@dataclass(frozen=True)
class Refusal:
    """A combination that cannot be.

    Args:
        name: It, in the words of the docs.
        holds: Whether a stage is such a one, under "none", "fsdp", "zero1", "zero2" or "zero3", in its recipe.
        reason: Why it cannot be, and what to do; a sentence or two.
    """

    name: str
    holds: Callable[[Stage, str, Recipe], bool]
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


def _require_copies() -> None:
    """Refuses sizes of hybrid sharding that are not those of this launch, which accelerate refuses after the load."""
    copies, each = _size("DP_REPLICATE"), _size("DP_SHARD")
    if _flag("ACCELERATE_USE_PARALLELISM_CONFIG") and copies > 1 and copies * each != ranks.ranks():
        raise RecipeError(
            f"the launch asks for {copies} copies of the weights over {each} ranks each (dp_replicate_size and "
            f"dp_shard_size of parallelism_config), which are {copies * each} ranks, and has {ranks.ranks()}. Write "
            "sizes whose product is the number of ranks."
        )


def _size(name: str) -> int:
    given = os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1")
    return int(given) if given.isdigit() else 1


def _trains_rows(stage: Stage, recipe: Recipe) -> bool:
    given = recipe.model.tokenizer
    added = given is not None and bool(given.add_tokens or given.add_special_tokens)
    return stage.adapter is not None and (added or trains_rows(stage.adapter))


def _stores_bytes(stage: Stage) -> bool:
    block = stage.quantized
    return block is not None and block.type == "nf4" and (block.bnb_4bit_quant_storage or "uint8") == "uint8"


REFUSALS = (
    Refusal(
        "FSDP of the first version (`fsdp_version: 1`)",
        lambda stage, plan, _: _flag("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") == "1",
        "what it saves was never compared with what it trained here. Write `fsdp_version: 2`, as "
        "recipes/accelerate/fsdp2.yaml does.",
    ),
    Refusal(
        "tensor, context or sequence parallelism (`parallelism_config`)",
        lambda stage, plan, _: any(_size(name) > 1 for name in ("TP", "CP", "SP")),
        "the ranks of such a group need the same rows, and hfpipe gives each rank its own. Use FSDP2, which spreads "
        "weights, gradients and optimizer over all ranks.",
    ),
    Refusal(
        "`quantization: int8` with FSDP or ZeRO-3",
        lambda stage, plan, _: plan in SPREADING and stage.quantized is not None and stage.quantized.type == "int8",
        "bitsandbytes keeps 8-bit weights as integers with states of their own, which are not spread. Take nf4 with "
        "`bnb_4bit_quant_storage: bfloat16`, or start the run without sharding.",
    ),
    Refusal(
        "`quantization: nf4` in bytes with FSDP or ZeRO-3",
        lambda stage, plan, _: plan in SPREADING and _stores_bytes(stage),
        "4-bit weights that are stored as bytes are not spread: every rank would hold all of them. Write "
        "`quantization: {type: nf4, bnb_4bit_quant_storage: bfloat16}`.",
    ),
    Refusal(
        "`muon` with FSDP or ZeRO-3",
        lambda stage, plan, _: plan in SPREADING and stage.muon is not None,
        "it works on whole matrices, of which a rank has a part. Start plain ranks, or leave it out.",
    ),
    Refusal(
        "`qat` with FSDP or ZeRO-3",
        lambda stage, plan, _: plan in SPREADING and stage.fake_quantized is not None,
        "the rounding of weights that are spread over ranks was never compared with that of whole ones here. Start "
        "plain ranks, or leave it out.",
    ),
    Refusal(
        "rows of embeddings beside an adapter (`trainable_token_indices`, added tokens) with ZeRO-3",
        lambda stage, plan, recipe: plan == "zero3" and _trains_rows(stage, recipe),
        "PEFT reads the rows past DeepSpeed, which gathers a weight for the pass of its own module alone. Use FSDP2 or "
        "ZeRO-2, or name the whole modules in `modules_to_save`.",
    ),
    Refusal(
        "`kl` or `l2` of `keep:` with DeepSpeed",
        lambda stage, plan, _: plan.startswith("zero") and (stage.kept.kl is not None or stage.kept.l2 is not None),
        "they compare weights, or what the head says, outside of a pass through the model. Use FSDP2, or leave them "
        "out.",
    ),
    Refusal(
        "`counterfactual` with FSDP or DeepSpeed",
        lambda stage, plan, _: plan != "none" and getattr(stage, "counterfactual", None) is not None,
        "it asks the model and its head twice in a step, which was never compared with one rank here. Start plain "
        "ranks, or write `augment: {swap: gender}` at the source, which works there.",
    ),
    Refusal(
        "`early_stopping` with DeepSpeed",
        lambda stage, plan, _: plan.startswith("zero") and stage.early_stopping is not None,
        "a rank does not have the whole model to score. Use FSDP, or leave it out.",
    ),
    Refusal(
        "FSDP on CPUs",
        lambda stage, plan, _: plan == "fsdp" and ranks.state().distributed_type.value in _without_accelerator(),
        "accelerate shards on accelerators only, and turns FSDP off without a word where it finds none. Start it on "
        "GPUs, or without FSDP.",
    ),
)


def require_combinations(recipe: Recipe) -> None:
    """Refuses what cannot be combined with the plan of this launch, before anything is loaded.

    Raises:
        RecipeError: A stage asks for it, or the launch has other ranks than its own sizes say; the message says why
            and what to do.
    """
    _require_copies()
    for stage in recipe.stages:
        require_plan(recipe, stage, plan_of_launch(stage))


def require_plan(recipe: Recipe, stage: Stage, plan: str) -> None:
    """Refuses what a stage cannot combine with a plan, see `plan_of_launch`.

    Raises:
        RecipeError: The stage asks for it; the message says why and what to do.
    """
    for refusal in REFUSALS:
        if refusal.holds(stage, plan, recipe):
            raise RecipeError(f"stages.{stage.name}: {refusal.name} cannot be: {refusal.reason}")
