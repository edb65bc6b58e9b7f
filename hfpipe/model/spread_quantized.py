"""Bases in 4 bits that are spread over the ranks, for models that no device holds.

bitsandbytes quantizes whole weights, and its blocks of numbers do not end where the part of a rank ends. So each rank
first reads its part in the precision of the base (see `spread`). Then one weight after another is gathered, quantized
by transformers' and bitsandbytes' own code on every rank, and each rank keeps its part of the packed numbers: it never
holds more than its part and one weight. The scales of a weight (`quant_state`) lie whole on every rank.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

from hfpipe.core import ranks
from hfpipe.core.upstream import gathered_together, take_fsdp_away
from hfpipe.model.shards import give_back_memory
from hfpipe.model.spread import is_offloaded, part_of

Places = dict[DTensor, list[tuple[str, str]]]  # modules that have a weight, and its name in each


def is_spread_in(config: BitsAndBytesConfig) -> bool:
    """Returns True if weights that are quantized so can be spread: integers can not, PyTorch takes them for trained."""
    return bool(config.load_in_4bit) and config.bnb_4bit_quant_storage.is_floating_point


@torch.no_grad()
def quantize_spread(model: Any, config: BitsAndBytesConfig) -> None:
    """Quantizes a spread model, one weight at a time, and spreads it again; every rank has to call this.

    Each weight is to the bit that of a model that is quantized while it is read whole.

    Args:
        model: A spread model, as it was read.
        config: How; see `is_spread_in`.
    """
    import bitsandbytes

    quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=False)
    units, parts = gathered_together(model), _parts(model)
    take_fsdp_away(model)
    gc.collect()  # it held all parts to its end, in objects that hold each other
    quantizer.preprocess_model(model, device_map=None)  # which layers are quantized is for transformers to say
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)}
    empty = {f"{name}.weight": layer.weight for name, layer in layers.items()}
    _divide(model, parts, units, empty)
    while parts:
        part: Any = next(iter(parts))
        places = parts.pop(part)
        name = ".".join(places[0])
        if name in empty:
            part = _quantized(quantizer, model, name, part, empty.pop(name))
        for module, key in places:
            model.get_submodule(module).register_parameter(key, part)
        del part
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    give_back_memory()


def _quantized(quantizer: Any, model: Any, name: str, part: Any, empty: Any) -> Any:
    """Returns this rank's part of a weight in 4 bits; its layer keeps the scales.

    Args:
        quantizer: transformers', of bitsandbytes.
        model: As `_divide` left it.
        name: The weight's.
        part: This rank's part as it was read.
        empty: bitsandbytes' parameter without memory, which has the options.
    """
    layer, divided = model.get_submodule(name.removesuffix(".weight")), model.get_parameter(name)
    layer.weight = empty
    gathered = part.to(ranks.state().device).full_tensor()
    whole = quantizer.get_quantize_ops().convert({name: gathered}, model=model, full_layer_name=name)[name]
    own: Any = part_of(whole.data, divided)
    own.compress_statistics, own.quant_type = whole.compress_statistics, whole.quant_type  # which PEFT asks for
    return own


def _parts(model: Any) -> Places:
    """Returns the parts of all weights of a model."""
    places: Places = {}
    for name, module in model.named_modules():
        for key, part in module.named_parameters(recurse=False):
            places.setdefault(part, []).append((name, key))
    return places


def _divide(model: Any, parts: Places, units: list[list[str]], empty: dict[str, Any]) -> None:
    """Has FSDP2 divide a model without memory, in the shapes that its weights will have.

    Args:
        model: The model; its weights are replaced.
        parts: Those that it had.
        units: Names of the modules that are gathered at once; see `gathered_together`.
        empty: The weights that will be quantized, in the shapes that they had, by their names.
    """
    from bitsandbytes.functional import quantize_4bit

    for part, places in parts.items():
        shape = torch.empty(part.shape, dtype=part.dtype, device="meta")
        given = empty.get(".".join(places[0]))
        if given is not None:
            shape, _ = quantize_4bit(shape, quant_type=given.quant_type, quant_storage=given.quant_storage)
        for module, key in places:  # a tied weight may be in two units: it is tied again behind it
            weight = torch.nn.Parameter(shape, requires_grad=part.requires_grad and given is None)
            model.get_submodule(module).register_parameter(key, weight)
    mesh = next(iter(parts)).device_mesh
    policy = CPUOffloadPolicy() if is_offloaded() else OffloadPolicy()
    for names in reversed(units):  # a module comes before those in it
        modules = [model.get_submodule(name) for name in names]
        fully_shard(modules if len(modules) > 1 else modules[0], mesh=mesh, offload_policy=policy)
