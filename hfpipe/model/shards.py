"""Models that need not fit into memory: saved as they are mapped, then changed weight by weight in the new files.

`save_pretrained` decides which files there are, which tensor lies in which, and under what name; of weights that are
mapped into memory it copies nothing. What is to be changed is worked out after that, one weight at a time, and written
over its place in the new files, so that the process never holds more of its own than one layer.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_local_safetensors_metadata
from safetensors import safe_open
from transformers.core_model_loading import revert_weight_conversion

SHARD_SIZE = "5GB"
LARGE = 2**15  # bytes
_M_MMAP_THRESHOLD = -3  # of malloc.h


def save_changed(model: Any, folder: Path, changed: Mapping[str, Callable[[], torch.Tensor]]) -> None:
    """Writes a model with some of its weights changed, in the precision that the model has.

    Args:
        model: A `PreTrainedModel`. It is used up: its own weights are not those that were written.
        folder: Where `save_pretrained` writes.
        changed: By the name of a parameter, what works out its new values.

    Raises:
        RuntimeError: New values have another shape than the parameter.
    """
    saved_as = _saved_names(model, changed)
    for name in changed.keys() - saved_as.keys():
        model.get_parameter(name).data = changed[name]()
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    weights = get_local_safetensors_metadata(folder)
    for name, saved in saved_as.items():
        file = weights.weight_map[saved]
        begin, _ = weights.files_metadata[file].tensors[saved].data_offsets
        _overwrite(folder / file, saved, begin, changed[name]())
        give_back_memory()


def bytes_of(model: Any) -> int:
    """Bytes of a model's parameters, one that has several names counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _saved_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Maps parameters to their names in the files, without those that transformers makes other tensors of (experts)."""
    given = {name: model.get_parameter(name) for name in names}
    reverted = revert_weight_conversion(model, dict(given))
    found = {(tensor.data_ptr(), tensor.shape): name for name, tensor in reverted.items()}
    places = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in given.items()}
    return {name: found[place] for name, place in places.items() if place in found}


def _overwrite(file: Path, name: str, begin: int, tensor: torch.Tensor) -> None:
    """Writes a tensor over another one of its shape (https://huggingface.co/docs/safetensors/index#format).

    Args:
        file: A safetensors file.
        name: The tensor that is there.
        begin: Where its bytes begin, counted from the end of the header.
        tensor: The new one.
    """
    with safe_open(file, framework="pt") as tensors:
        old = tensors.get_tensor(name)
    if old.shape != tensor.shape:
        raise RuntimeError(f"{file}: tensor {name} of shape {list(old.shape)} became one of {list(tensor.shape)}")
    data = tensor.detach().to("cpu", old.dtype).contiguous().view(-1).view(torch.uint8).numpy()
    with file.open("r+b") as whole:
        header = int.from_bytes(whole.read(8), "little")
        whole.seek(8 + header + begin)
        whole.write(data.data)


def give_back_memory() -> None:
    """Has glibc return what is free to the system: it does not fill the holes that torch's aligned blocks leave."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # musl has none
        trim(0)


def hold_no_free_memory() -> None:
    """Has glibc return every large block when it is freed, from now on.

    It keeps blocks of up to 32 MB for the next ones, and so all layers of a model that are gathered one by one.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if option is not None:
        option(_M_MMAP_THRESHOLD, LARGE)
