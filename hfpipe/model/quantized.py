"""Quantized bases that need not fit into memory: quantized and dequantized layer by layer.

transformers quantizes a model while it loads it, and holds all of it in memory of its own. Of a model whose files are
quantized it holds nothing: it maps them. So a base is quantized here one layer at a time, by transformers' and
bitsandbytes' own code and with its options, into such files, and is then loaded as any other.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from hfpipe.core.files import require_disk
from hfpipe.core.upstream import (
    declare_dequantized,
    forget_quantizer_conversions,
    left_out_of_checkpoints,
    save_code_of,
)
from hfpipe.model.load import ModelRef, load_model, quantization_config, task_of, weights_dtype
from hfpipe.model.shards import bytes_of, give_back_memory

Layers = Mapping[str, torch.nn.Module]  # bitsandbytes' layers, by their names in a model
LINEAR = (torch.nn.Linear, Conv1D)
CPU = torch.device("cpu")


def quantized_layers(model: Any) -> dict[str, Any]:
    """The layers of a model without an adapter that bitsandbytes quantizes, by name."""
    try:
        import bitsandbytes
    except ImportError:
        return {}
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def dequantized(layer: Any, like: torch.Tensor) -> torch.Tensor:
    """The weight of a quantized layer as it is rounded, in the shape, the precision and the place of another tensor."""
    weight = dequantize_module_weight(layer).detach()
    return (weight.T if layer.source_cls is Conv1D else weight).to(like.device, like.dtype)


def write_quantized(base: ModelRef, stored: ModelRef, folder: Path, head: dict[str, Any] | None) -> ModelRef:
    """Writes the quantized base of an adapter into files, as loading it would have it in memory.

    What a load draws afresh is left out: loading the files draws it in the same way.

    Args:
        base: The base that the adapter was trained on.
        stored: The same without `quantization` and in the precision of its files, which are mapped and not copied.
        folder: Where to: a file for each tensor, so that none is held once it is written.
        head: See `load_model`.

    Returns:
        The written base. Loaded, it is `base` to the bit.

    Raises:
        MachineError: There is no room on the disk for these files and the merged model beside them.
    """
    assert base.quantization is not None
    as_it_came = replace(stored, vocabulary=None)  # it grows when the files are loaded
    whole, fresh = load_model(as_it_came, head=head, with_new_modules=True, place=CPU)
    config = quantization_config(base.quantization, "classification" if head is not None else task_of(stored))
    quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=False)
    with torch.device("meta"):  # which layers are quantized is for transformers to say, as it does when it loads
        shapes = type(whole)(copy.deepcopy(whole.config))
        quantizer.preprocess_model(shapes, device_map=None)
    packed = {f"{name}.weight" for name in quantized_layers(shapes)}
    dtype, tensors = weights_dtype(base.options, frozen=True), _held(whole, fresh)

    def written(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        cast = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return _quantized(quantizer, shapes, name, cast) if name in packed else {name: cast}

    most = sum(tensor.numel() * (1 if name in packed else dtype.itemsize) for name, tensor in tensors.items())
    require_disk(folder.parent, most + bytes_of(whole), "merging: the quantized base and the merged model")
    folder.mkdir()
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        file = f"model-{number:05}.safetensors"
        save_file(written(name, tensor), folder / file, {"format": "pt"})
        with safe_open(folder / file, framework="pt") as saved:
            weight_map.update(dict.fromkeys(saved.keys(), file))
        give_back_memory()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    whole.config.quantization_config = config
    whole.config.save_pretrained(folder)
    save_code_of(whole, folder)
    return ModelRef(str(folder), base.options, vocabulary=base.vocabulary)


def _held(model: Any, fresh: Sequence[str]) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint of a model holds, one that has several names under the first of them.

    Args:
        model: A `PreTrainedModel`.
        fresh: Modules that a load draws afresh. It works out what `save_pretrained` leaves out, too.
    """
    held: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in fresh and name not in left_out_of_checkpoints(model):
            held.setdefault(tensor.data_ptr() or id(tensor), (name, tensor))
    return dict(held.values())


def _quantized(quantizer: Any, shapes: Any, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the tensors that a checkpoint holds of a quantized layer, without its bias.

    Args:
        quantizer: transformers', of bitsandbytes.
        shapes: The model on the meta device with its layers prepared by the quantizer; this one loses its weight.
        name: The weight's.
        weight: In the precision that the base is loaded in.
    """
    layer = shapes.get_submodule(name.removesuffix(".weight"))
    operation = quantizer.get_quantize_ops()
    layer.weight = operation.convert({name: weight}, model=shapes, full_layer_name=name)[name]
    state = layer.state_dict(prefix=name.removesuffix("weight"))
    del layer.weight  # which knows the layer again: neither would be let go
    return {key: tensor.contiguous() for key, tensor in state.items() if not tensor.is_meta}


def load_whole(stored: ModelRef, head: dict[str, Any] | None, folder: Path) -> Any:
    """Loads a base in the precision of its files, which are mapped into memory, without quantized layers.

    Args:
        stored: The base, with its precision in `options`. If its files are quantized, the weights of those layers are
            zero, mapped from files that hold nothing: `dequantized` works out what they stand for.
        head: See `load_model`.
        folder: A folder on the disk of the run, for those.

    Returns:
        A `PreTrainedModel` on the CPU.
    """
    model = load_model(stored, head=head, place=CPU)
    if getattr(model, "hf_quantizer", None) is None:
        return model
    forget_quantizer_conversions(model)
    layers, dtype = quantized_layers(model), getattr(torch, stored.options.dtype)
    if not layers:  # of another kind than bitsandbytes'
        return model.dequantize(dtype)
    for name, layer in layers.items():
        sides = (layer.out_features, layer.in_features)
        with torch.device("meta"):
            whole = Conv1D(*sides) if layer.source_cls is Conv1D else torch.nn.Linear(*sides[::-1])
        zeros = _nothing(folder, whole.weight.shape, dtype)
        whole.weight, whole.bias = torch.nn.Parameter(zeros, requires_grad=False), layer.bias
        model.set_submodule(name, whole)
    for parameter in model.parameters():  # transformers has left some in the precision of the files
        parameter.data = parameter.data.to(dtype)
    declare_dequantized(model)
    return model


def _nothing(folder: Path, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take no room: mapped from a file of which only the length is written, and which has no name left."""
    file = folder / ".nothing"
    file.touch()
    os.truncate(file, shape.numel() * dtype.itemsize)
    zeros = torch.from_file(str(file), shared=False, size=shape.numel(), dtype=dtype).view(shape)
    file.unlink()
    return zeros


def work_out_in_passes(model: PeftModel, layers: Layers) -> None:
    """Dequantizes each layer during its own forward pass only.

    Args:
        model: An adapter on `load_whole`'s base.
        layers: The quantized layers.
    """
    modules = dict(model.get_base_model().named_modules())
    for name, layer in layers.items():
        outer = modules[name]
        inner = outer.get_base_layer() if isinstance(outer, BaseTunerLayer) else outer
        if isinstance(inner, LINEAR):  # else it is one of the modules to save, whose weight is not the base's
            _work_out(outer, inner.get_parameter("weight"), layer)


def _work_out(module: torch.nn.Module, parameter: torch.nn.Parameter, layer: Any) -> None:
    """Has a parameter take the weight of a quantized layer when a module's pass begins, and let it go at its end."""
    given = parameter.data

    def begin(*_: Any) -> None:
        parameter.data = dequantized(layer, given)

    def end(*_: Any) -> None:
        parameter.data = given

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end, always_call=True)
