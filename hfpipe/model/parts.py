"""Weights that are spread over the ranks, written as one set of safetensors and compared with it, tensor by tensor.

No rank ever holds more than its part and one tensor. The files are those of `save_pretrained`: its names, its limit of
a file's size, its index; https://huggingface.co/docs/safetensors/index#format has their format.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_local_safetensors_metadata
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hfpipe.core import ranks
from hfpipe.core.files import write_json
from hfpipe.core.upstream import gathered_by_deepspeed, left_out_of_checkpoints, save_code_of, shape_of

FILE_BYTES = 5_000_000_000  # of tensors in a file; one larger tensor has a file of its own
_WORDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Tensors = dict[str, torch.Tensor]


def write_parts(model: Any, folder: Path) -> None:
    """Writes a spread model so that `from_pretrained` loads it; every rank has to call this.

    Args:
        model: A `PreTrainedModel` whose weights are spread over the ranks.
        folder: Where the main process writes.
    """
    files = _files_of(model)
    if ranks.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        _write_configs(model, folder)
    gathered = _gathered(model)
    for number, tensors in enumerate(files, start=1):
        file = (folder / _name(number, len(files))).open("wb") if ranks.is_main() else None
        if file is not None:
            file.write(_header(tensors))
        left = set(tensors)
        while left:
            found = next(gathered)
            left -= found.keys()
            for tensor in found.values() if file is not None else ():
                file.write(tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().data)  # type: ignore[union-attr]
        if file is not None:
            file.close()
    if ranks.is_main() and len(files) > 1:
        places = {name: _name(number, len(files)) for number, one in enumerate(files, start=1) for name in one}
        total = sum(tensor.numel() * tensor.element_size() for one in files for tensor in one.values())
        parameters = sum(shape_of(part).numel() for part in model.parameters())
        facts = {"total_parameters": parameters, "total_size": total}
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": facts, "weight_map": places})


def verify_parts(model: Any, folder: Path) -> None:
    """Compares the files of a model with the weights that were trained, to the bit; every rank has to call this.

    Raises:
        RuntimeError: A tensor is missing, unexpected, not finite, or not the trained one.
    """
    weights = get_local_safetensors_metadata(folder).weight_map if ranks.is_main() else {}
    seen = set()
    for tensors in _gathered(model):
        for name, trained in tensors.items() if ranks.is_main() else ():
            if name not in weights:
                raise RuntimeError(f"{folder}: the model lacks tensor {name}")
            with safe_open(folder / weights[name], framework="pt") as file:
                saved = file.get_tensor(name)
            if saved.dtype != trained.dtype or not torch.equal(saved, trained.cpu()):
                raise RuntimeError(f"{folder}: tensor {name} is not what was trained")
            if saved.is_floating_point() and not torch.isfinite(saved).all():
                raise RuntimeError(f"{folder}: tensor {name} is not finite")
            seen.add(name)
    if more := weights.keys() - seen:
        raise RuntimeError(f"{folder}: the model has other tensors {sorted(more)}")


def _saved(model: Any) -> Tensors:
    """Returns the tensors of a model that are saved, each part as it lies here; one of several names stands once."""
    tied, left_out = model.all_tied_weights_keys, left_out_of_checkpoints(model)
    state = model.state_dict(keep_vars=True).items()
    return {name: part for name, part in state if name not in tied and name not in left_out}


@torch.no_grad()
def _gathered(model: Any) -> Iterator[Tensors]:
    """Yields the tensors of the files in their order, gathered from the ranks one parameter at a time."""
    for name, part in _saved(model).items():
        whole = part.full_tensor() if isinstance(part, DTensor) else gathered_by_deepspeed(part)
        yield revert_weight_conversion(model, {name: whole.detach()})


def _files_of(model: Any) -> list[Tensors]:
    """Returns the tensors of each file by name, without memory.

    Raises:
        RuntimeError: transformers makes tensors of several parameters when it saves this model.
    """
    shapes = {
        name: torch.empty(shape_of(part), dtype=part.dtype, device="meta") for name, part in _saved(model).items()
    }
    files: list[Tensors] = [{}]
    size = 0
    for name, shape in shapes.items():
        for saved, tensor in revert_weight_conversion(model, {name: shape}).items():
            files[-1][saved] = tensor
            size += tensor.numel() * tensor.element_size()
        if size >= FILE_BYTES:
            files, size = [*files, {}], 0
    files = [one for one in files if one]
    if {name for one in files for name in one} != revert_weight_conversion(model, shapes).keys():
        raise RuntimeError(f"{type(model).__name__} is saved by tensors of several parameters, which is not known here")
    return files


def _name(number: int, count: int) -> str:
    stem = SAFE_WEIGHTS_NAME.removesuffix(".safetensors")
    return SAFE_WEIGHTS_NAME if count == 1 else f"{stem}-{number:05}-of-{count:05}.safetensors"


def _header(tensors: Tensors) -> bytes:
    """Returns the beginning of a safetensors file: the length of a JSON table of what follows, and the table."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": _WORDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_configs(model: Any, folder: Path) -> None:
    """Writes what `save_pretrained` writes beside the weights."""
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    save_code_of(model, folder)
