"""Whether a base can be loaded as a recipe's stages ask, by its config and its files' names: before any weight."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import has_file

from hfpipe.core.errors import MachineError, RecipeError
from hfpipe.model.load import AUTO_CLASSES, ModelRef, clear_errors, pickles_only, task_of
from hfpipe.recipe import Recipe

LEAST_LINEAR = 0.5  # share of the weights beside the embeddings that quantization must reach


def require_loadable(recipe: Recipe) -> None:
    """Refuses a base that a stage could not load, or not as the recipe asks.

    Raises:
        RecipeError: The base is quantized already, and a stage trains all weights or quantizes them again; its weights
            are pickles; or quantization would leave most of them as they are.
        MachineError: A stage quantizes, and bitsandbytes is not installed.
    """
    quantized = [stage.name for stage in recipe.stages if stage.quantized]
    if quantized and importlib.util.find_spec("bitsandbytes") is None:
        raise MachineError(
            f"stages.{quantized[0]}.quantization needs bitsandbytes, which is not installed: "
            "pip install 'hfpipe[quantization]'. Or remove `quantization`."
        )
    options = recipe.model
    if options.id is None:
        return
    with clear_errors("model", options.id):
        config = AutoConfig.from_pretrained(
            options.id, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    _require_unquantized(recipe, config)
    with clear_errors("model", options.id):
        pickled, safe = (
            any(has_file(options.id, name, revision=options.revision) for name in names)
            for names in ((WEIGHTS_NAME, WEIGHTS_INDEX_NAME), (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
        )
    if pickled and not safe:
        raise RecipeError(pickles_only(options.id))
    if quantized:
        _require_linear(recipe, quantized[0], config)


def _require_unquantized(recipe: Recipe, config: Any) -> None:
    block = getattr(config, "quantization_config", None)
    for stage in recipe.stages if block is not None else ():
        if stage.adapter is not None and stage.quantized is None:
            continue
        method = block.get("quant_method", "") if isinstance(block, dict) else getattr(block, "quant_method", "")
        found = "quantizes it again" if stage.quantized else "trains all of its weights, which cannot be trained"
        remedy = "Remove `quantization`" if stage.quantized else "Add `lora: {r: 16}`"
        raise RecipeError(
            f"stages.{stage.name}: the base {recipe.model.id!r} is quantized already ({method}), and this stage "
            f"{found}. {remedy}, or start from the model in full precision."
        )


def _require_linear(recipe: Recipe, stage: str, config: Any) -> None:
    """bitsandbytes stores linear layers in few bits; the experts of a mixture, for one, are none to transformers."""
    model = shapes_of(ModelRef(recipe.model.id or "", recipe.model, revision=recipe.model.revision))
    ends = {id(end.weight): end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end}
    layers = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    linear = sum(weight.numel() for weight in layers if id(weight) not in ends)
    whole = model.num_parameters() - sum(weight.numel() for weight in ends.values())
    if linear < LEAST_LINEAR * whole:
        raise RecipeError(
            f"stages.{stage}.quantization: bitsandbytes stores linear layers in few bits, and {linear / whole:.0%} of "
            f"the weights of {recipe.model.id!r} ({config.model_type}) are in one, the embeddings aside. The rest "
            "would take the memory that it takes now. Remove `quantization`, or take another model."
        )


def shapes_of(ref: ModelRef) -> Any:
    """The model of a `ModelRef` without its weights: on torch's meta device, where nothing takes memory."""
    with clear_errors("model", ref.path):
        config = AutoConfig.from_pretrained(
            ref.path, revision=ref.revision or "main", trust_remote_code=ref.options.trust_remote_code
        )
    with torch.device("meta"):
        return AUTO_CLASSES[task_of(ref)].from_config(config, trust_remote_code=ref.options.trust_remote_code)
