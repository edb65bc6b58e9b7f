"""Merging: an adapter becomes part of the weights of its base, verified by loading the result again."""

from __future__ import annotations

import dataclasses
import functools
import gc
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

from hfpipe.core.errors import BudgetExceeded, RecipeError
from hfpipe.core.files import require_disk, whole_folder
from hfpipe.model.adapter import TOLERANCE, ProbeText, difference, divergence, probe, require_equal
from hfpipe.model.load import (
    ModelRef,
    config_of,
    device,
    device_with_room,
    head_fields,
    is_quantized,
    load_model,
    put_adapter,
    read_adapter,
)
from hfpipe.model.quantized import (
    CPU,
    LINEAR,
    Layers,
    dequantized,
    load_whole,
    quantized_layers,
    work_out_in_passes,
    write_quantized,
)
from hfpipe.model.shards import bytes_of, give_back_memory, save_changed
from hfpipe.recipe.rules.adapters import is_mergeable_type

FULL, DEQUANTIZED = "in full precision", "dequantized"  # what an adapter is merged into
QUANTIZED = "quantized"  # folder of the quantized base, for the time of the merge
NO_LOSS = 1e-5  # nats per token that come of the order of sums


@dataclasses.dataclass(frozen=True)
class Merged:
    """The result of a merge.

    Args:
        base: What the adapter was merged into: `FULL` or `DEQUANTIZED`.
        costs: What each of these would lose against the adapter on its own base, in nats per token; empty where there
            is no choice.
        loss: What the merged model, loaded again, loses against the adapter as it was trained, in nats per token.
        difference: Largest difference of log-probabilities to the same adapter before the merge, in nats.
        dtype: Precision of the merged weights.
    """

    base: str
    costs: dict[str, float]
    loss: float
    difference: float
    dtype: str


def merge_adapter(
    adapter: ModelRef,
    tokenizer: Any,
    folder: Path,
    texts: Sequence[ProbeText],
    max_loss: float,
    dtype: str | None = None,
) -> Merged:
    """Merges an adapter into the base that changes it least and verifies the result by loading it again.

    An adapter of a quantized base has learned to work on rounded weights, so it is compared, as it was trained, with
    itself on the base in full precision and on the dequantized weights. Merging back into 4 bits is not
    tried: it rounds the adapter away.

    The weights of the base are read in the precision they are stored in, which maps the files into memory without a
    copy. Rounded weights are worked out, and merged by PEFT, one layer at a time: what a merge holds of its own does
    not grow with the model. See `quantized` for the base that the adapter was trained on.

    Args:
        adapter: The adapter's folder.
        tokenizer: Goes beside the weights, with its chat template.
        folder: Where the merged model is written, in one piece.
        texts: Held-out texts for the comparison.
        max_loss: Nats per token that may be lost.
        dtype: Precision of the merged weights by torch's name; that of the base's files when None.

    Raises:
        BudgetExceeded: The best merge loses more than `max_loss`.
        MachineError: There is no room for the merged model on the disk.
        RecipeError: PEFT cannot merge this kind of adapter, or not on this model.
        RuntimeError: The merged model is not the adapter's.
    """
    _require_mergeable(adapter.path)
    full = dataclasses.replace(_as_stored(adapter, dtype), quantization=None)
    came_quantized = is_quantized(config_of(full.base))
    bases: dict[str, Layers] = {} if came_quantized else {FULL: {}}
    trained, costs = None, {}
    with whole_folder(folder) as beside:
        size = bytes_of(load_whole(full.base, head_fields(adapter), beside))
        require_disk(beside, size, "merging: the merged model")
        if adapter.quantization is not None or came_quantized:
            model, bases[DEQUANTIZED] = _as_trained(adapter, full, beside)
            trained = probe(model, tokenizer, texts)
            del model
        place = device_with_room(size)
        before = {
            name: probe(_on_base(full, layers, place, beside), tokenizer, texts) for name, layers in bases.items()
        }
        if trained is None:
            trained = before[FULL]
        else:
            costs = {name: divergence(trained, found) for name, found in before.items()}
        chosen = min(costs, key=costs.__getitem__) if costs else FULL
        if costs:
            _require_within(costs[chosen], max_loss, adapter, costs)
        written = _write_merged(_on_base(full, {}, CPU, beside), bases[chosen], adapter.path, beside)
        tokenizer.save_pretrained(beside)
        shutil.rmtree(beside / QUANTIZED, ignore_errors=True)
        after = probe(load_model(dataclasses.replace(full, path=str(beside)), place=place), tokenizer, texts)
        loss = divergence(trained, after)
        _require_within(loss, max(max_loss, NO_LOSS), adapter, {chosen: loss})
        if written == torch.float32:
            found = require_equal(before[chosen], after, written, "the merged model")
        else:  # the sum of base and adapter is rounded to half precision, which the loss says
            found = difference(before[chosen], after)
    return Merged(chosen, costs, loss, found, str(written).removeprefix("torch."))


def _require_mergeable(path: str) -> None:
    kind = str(read_adapter(path).get("peft_type")).lower()
    if not is_mergeable_type(kind):
        raise RecipeError(
            f"the adapter in {path} is of type {kind}, which PEFT cannot merge into the weights. It works beside its "
            "base: `hfpipe push RUN` sends it as it is. To have a merged model, train a `lora:`."
        )


def _as_trained(adapter: ModelRef, full: ModelRef, folder: Path) -> tuple[PeftModel, Layers]:
    """The adapter on the quantized base that it was trained on, and its quantized layers, by name.

    A GPU that trained the adapter has room for it. Elsewhere the base is mapped from files, its own or those of
    `write_quantized`.
    """
    base, head = adapter.base, head_fields(adapter)
    if adapter.quantization is not None and device().type == "cpu":
        base = write_quantized(base, full.base, folder / QUANTIZED, head)
    model = load_model(base, head=head)
    layers = quantized_layers(model)
    return put_adapter(model, adapter), layers


def _on_base(adapter: ModelRef, layers: Layers, place: torch.device, folder: Path) -> PeftModel:
    """The adapter on its base in the precision of its files, with the rounded weights of layers that are given.

    See `load_whole` and `work_out_in_passes`. The models before it are let go.
    """
    gc.collect()
    give_back_memory()
    model = put_adapter(load_whole(adapter.base, head_fields(adapter), folder), adapter)
    torch.nn.Module.to(model, place)
    work_out_in_passes(model, layers)
    return model


def _write_merged(model: PeftModel, layers: Layers, path: str, folder: Path) -> torch.dtype:
    """Writes the merged model of an adapter on its base; PEFT merges layer by layer while the files are written.

    Args:
        model: The adapter on its base. It is used up.
        layers: The layers whose rounded weights take the place of the base's.
        path: The adapter's folder, for messages.
        folder: Where to.

    Returns:
        The precision of the weights.

    Raises:
        RecipeError: PEFT cannot merge this kind of adapter.
    """
    try:
        adapted = _take_off(model)
        whole = model.merge_and_unload(safe_merge=True)  # what is left: embeddings, heads, modules to save
        changed: dict[str, Callable[[], torch.Tensor]] = {
            f"{name}.weight": functools.partial(dequantized, layer, whole.get_parameter(f"{name}.weight"))
            for name, layer in layers.items()
        }
        for name, layer in adapted.items():
            for own, _ in layer.get_base_layer().named_parameters():
                changed[f"{name}.{own}"] = functools.partial(_merge, layer, own, layers.get(name))
        save_changed(whole, folder, changed)
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise RecipeError(f"peft cannot merge the adapter in {path}: {error}") from error
    return whole.dtype


def _take_off(model: PeftModel) -> dict[str, BaseTunerLayer]:
    """Takes the adapter off the linear layers that share no weight, and returns its layers by the names of theirs.

    Each still holds the layer that it was on, and merges into it when it is told to. Modules to save are put into their
    places: PEFT does so with LoRA only where they have parts of their own (RoBERTa's head), and never with LN tuning.
    The others, whose merge changes what the model shares (tied embeddings), are left to PEFT.
    """
    whole = model.get_base_model()
    holders = Counter(tensor.data_ptr() for tensor in whole.state_dict().values())
    modules = list(whole.named_modules())
    wrappers = tuple(f"{name}." for name, module in modules if isinstance(module, AuxiliaryTrainingWrapper))
    layers = {}
    for name, layer in modules:
        if isinstance(layer, ModulesToSaveWrapper):
            whole.set_submodule(name, layer.unload_and_optionally_merge_module(True, True, None))
        if not isinstance(layer, BaseTunerLayer) or name.startswith(wrappers):
            continue
        base = layer.get_base_layer()
        if type(base) in LINEAR and all(holders[parameter.data_ptr()] == 1 for parameter in base.parameters()):
            whole.set_submodule(name, base)
            layers[name] = layer
    return layers


def _merge(layer: BaseTunerLayer, own: str, rounded: Any = None) -> torch.Tensor:
    """A weight of the layer below an adapter's, merged; the model lets it go.

    Args:
        layer: The adapter's layer.
        own: The name of the weight in the layer below.
        rounded: The quantized layer that the adapter is merged into, dequantized, instead of the layer below.
    """
    below = layer.get_base_layer()
    if not layer.merged:
        if rounded is not None:
            weight = below.get_parameter("weight")
            weight.data = dequantized(rounded, weight)
        try:
            layer.merge(safe_merge=True)
        except RuntimeError as error:  # that a layer has no place for what the adapter holds
            raise ValueError(str(error)) from error
    parameter = below.get_parameter(own)
    tensor, parameter.data = parameter.data, parameter.new_empty(0)
    return tensor


def _as_stored(adapter: ModelRef, dtype: str | None = None) -> ModelRef:
    """The adapter with its base in a precision; in that of its files where neither that nor the recipe names one."""
    base = adapter.base
    if dtype is None and base.options.dtype != "auto":
        return adapter
    if dtype is None:
        found = config_of(base).dtype
        dtype = str(found if found in TOLERANCE else torch.float32).removeprefix("torch.")
    named = base.options.model_copy(update={"dtype": dtype})
    return dataclasses.replace(adapter, options=named)


def _require_within(loss: float, limit: float, adapter: ModelRef, costs: dict[str, float]) -> None:
    if not loss <= limit:
        told = ", ".join(f"{cost:.3g} into the base {name}" for name, cost in costs.items())
        raise BudgetExceeded(
            f"the merge of {adapter.path} would lose more than merge.max_loss, {limit:g} nats per token on held-out "
            f"texts: {told}. Nothing was written, and the adapter stays. Use the adapter on its own base, train "
            "without `quantization`, or raise merge.max_loss."
        )
