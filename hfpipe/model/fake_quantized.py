"""Quantization-aware training by torchao: each pass rounds weights and activations as the quantization will.

The weights themselves stay in full precision, and are saved so: what learns to bear the rounding is trained and scored
with it, and quantized when it is used. See docs/adapters.md.
Source: https://github.com/pytorch/ao/tree/main/torchao/quantization/qat.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from hfpipe.core.errors import MachineError, RecipeError
from hfpipe.recipe import Qat, Recipe

INTEGERS = ("int4", "int8")


def quantization_of(block: Qat) -> Any:
    """Returns torchao's config of the quantization that a stage trains for."""
    from torchao.prototype import mx_formats
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        PerGroup,
    )

    if block.weights == "float8":
        return Float8DynamicActivationFloat8WeightConfig()
    if block.weights == "nvfp4":
        return mx_formats.NVFP4DynamicActivationNVFP4WeightConfig()
    if block.weights == "mxfp4":
        four = torch.float4_e2m1fn_x2
        return mx_formats.MXDynamicActivationMXWeightConfig(activation_dtype=four, weight_dtype=four)
    whole, groups = getattr(torch, block.weights), PerGroup(block.group_size)
    if block.activations is None:
        return IntxWeightOnlyConfig(weight_dtype=whole, granularity=groups)
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=whole, weight_granularity=groups)


def fake_quantize(model: Any, block: Qat | None) -> None:
    """Lets the linear layers of a model round, in each pass.

    Args:
        model: A model without an adapter; shapes are enough.
        block: What a stage says of it; nothing is done for None.

    Raises:
        RecipeError: A layer is not as wide as whole groups, or the model has no layer of a name.
    """
    if block is None:
        return
    wanted = block.target_modules
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if isinstance(wanted, list):
        chosen = {name for name in layers if name.rpartition(".")[2] in wanted}
        if missing := sorted(set(wanted) - {name.rpartition(".")[2] for name in chosen}):
            names = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise RecipeError(f"qat.target_modules: no linear layer is named {missing[0]}. They are named {names}.")
    else:
        head = model.get_output_embeddings()
        chosen = {name for name, module in layers.items() if wanted == "all" or module is not head}
    for name in sorted(chosen) if block.weights in INTEGERS else ():
        if layers[name].in_features % block.group_size:
            raise RecipeError(
                f"qat.group_size is {block.group_size}, and the layer {name} reads {layers[name].in_features} numbers, "
                "which are no whole groups. Write a divisor of that."
            )
    _prepare(model, block, chosen)


def _prepare(model: nn.Module, block: Qat, chosen: Collection[str]) -> None:
    """Puts layers that round in the place of the linear layers of these names."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    config = QATConfig(quantization_of(block), step="prepare")
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and name in chosen)


def is_fake_quantized(module: Any) -> bool:
    """Returns True if a module rounds in each pass."""
    return isinstance(module, nn.Linear) and type(module).__module__.startswith("torchao.")


def require_fake_quantization(recipe: Recipe, place: torch.device) -> None:
    """Refuses a rounding that this machine cannot compute, tried on one small layer.

    Args:
        recipe: The recipe.
        place: Where its models are trained.

    Raises:
        MachineError: It cannot, or torchao is not installed.
    """
    for stage in recipe.stages:
        block = stage.fake_quantized
        if block is None:
            continue
        if importlib.util.find_spec("torchao") is None:
            raise MachineError(
                f"stages.{stage.name}.qat needs torchao, which is not installed: pip install 'hfpipe[qat]'. Or remove "
                "`qat`."
            )
        width = block.group_size * max(1, 256 // block.group_size)
        dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
        layer = nn.Sequential(nn.Linear(width, width, device=place, dtype=dtype))
        _prepare(layer, block, {"0"})
        try:
            with torch.enable_grad():
                layer(torch.ones(16, width, device=place, dtype=dtype)).sum().backward()
        except Exception as error:  # whatever a kernel raises
            said = " ".join(str(error).split())[:200].rstrip(".")
            raise MachineError(
                f"stages.{stage.name}.qat: torchao cannot round to {block.weights} on this machine ({place.type}): "
                f"{said}. Take a GPU that can, or `weights: int4`."
            ) from error
