"""Merging: an adapter becomes part of the weights of its base, verified by loading the result again."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from hfpipe.errors import BudgetExceeded, RecipeError
from hfpipe.files import whole_folder
from hfpipe.model.adapter import TOLERANCE, ProbeText, difference, divergence, probe, require_equal
from hfpipe.model.load import ADAPTER_CONFIG, ModelRef, clear_errors, head_of, load_model
from hfpipe.model.shards import save_changed
from hfpipe.recipe.adapters import is_mergeable_type

FULL, DEQUANTIZED = "in full precision", "made whole from its quantized weights"  # what an adapter is merged into
ROUNDED = "rounded"  # folder of a base made whole, for the time of the merge
LINEAR = (torch.nn.Linear, Conv1D)
NO_LOSS = 1e-5  # nats per token that come of the order of sums


@dataclasses.dataclass(frozen=True)
class Merged:
    """What a merge came to.

    Args:
        base: What the adapter was merged into: `FULL` or `DEQUANTIZED`.
        costs: What each of these would lose against the adapter on its own base, in nats per token; empty where there
            is no choice.
        loss: What the merged model, loaded again, loses against the adapter as it was trained, in nats per token.
        difference: Largest difference of log-probabilities to the same adapter before the merge, in nats.
        dtype: Precision of the merged weights, that of the base.
    """

    base: str
    costs: dict[str, float]
    loss: float
    difference: float
    dtype: str


def merge_adapter(
    adapter: ModelRef, tokenizer: Any, folder: Path, texts: Sequence[ProbeText], max_loss: float
) -> Merged:
    """Merges an adapter into the base that changes it least and verifies the result by loading it again.

    An adapter of a quantized base has learned to work on rounded weights, so it is compared, as it was trained, with
    itself on the base in full precision and on the rounded weights made whole again. Merging back into 4 bits is not
    tried: it rounds the adapter away.

    The weights of the base are read in the precision they are stored in, which maps the files into memory without a
    copy, and PEFT merges one layer at a time into the new files: what a merge holds of its own does not grow with the
    model.

    Args:
        adapter: The adapter's folder.
        tokenizer: Goes beside the weights, with its chat template.
        folder: Where the merged model is written, in one piece.
        texts: Held-out texts for the comparison.
        max_loss: Nats per token that may be lost.

    Raises:
        BudgetExceeded: The best merge loses more than `max_loss`.
        RecipeError: PEFT cannot merge this kind of adapter, or not on this model.
        RuntimeError: The merged model is not the adapter's.
    """
    kind = json.loads((Path(adapter.path) / ADAPTER_CONFIG).read_text())["peft_type"].lower()
    if not is_mergeable_type(kind):
        raise RecipeError(
            f"the adapter in {adapter.path} is of type {kind}, which PEFT cannot merge into the weights. It works "
            "beside its base: `hfpipe push RUN` sends it as it is. To have a merged model, train a `lora:`."
        )
    stored = _as_stored(adapter)
    full = dataclasses.replace(stored, quantization=None)
    bases = {} if _is_quantized(stored.base) else {FULL: full.base}
    costs = {}
    with whole_folder(folder) as beside:
        if adapter.quantization is not None or not bases:
            trained = probe(load_model(adapter), tokenizer, texts)
            bases[DEQUANTIZED] = _write_rounded(stored, beside / ROUNDED)
        before = {name: probe(load_model(full, base=base), tokenizer, texts) for name, base in bases.items()}
        if DEQUANTIZED not in bases:
            trained = before[FULL]
        else:
            costs = {name: divergence(trained, found) for name, found in before.items()}
        chosen = min(costs, key=costs.__getitem__) if costs else FULL
        if costs:
            _require_within(costs[chosen], max_loss, adapter, costs)
        dtype = _write_merged(load_model(full, base=bases[chosen]), adapter.path, beside)
        tokenizer.save_pretrained(beside)
        shutil.rmtree(beside / ROUNDED, ignore_errors=True)
        after = probe(load_model(dataclasses.replace(full, path=str(beside))), tokenizer, texts)
        loss = divergence(trained, after)
        _require_within(loss, max(max_loss, NO_LOSS), adapter, {chosen: loss})
        if dtype == torch.float32:
            found = require_equal(before[chosen], after, dtype, "the merged model")
        else:  # the sum of base and adapter is rounded to half precision, which the loss says
            found = difference(before[chosen], after)
    return Merged(chosen, costs, loss, found, str(dtype).removeprefix("torch."))


def _write_merged(model: PeftModel, path: str, folder: Path) -> torch.dtype:
    """Writes the merged model of an adapter on its base; PEFT merges layer by layer while the files are written.

    Args:
        model: The adapter on its base. It is used up.
        path: The adapter's folder, for messages.
        folder: Where to.

    Returns:
        The precision of the weights.

    Raises:
        RecipeError: PEFT cannot merge this kind of adapter.
    """
    try:
        layers = _take_off(model)
        whole = model.merge_and_unload(safe_merge=True)  # what is left: embeddings, heads, modules to save
        changed = {
            f"{name}.{own}": functools.partial(_merge, layer, own)
            for name, layer in layers.items()
            for own, _ in layer.get_base_layer().named_parameters()
        }
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


def _merge(layer: BaseTunerLayer, own: str) -> torch.Tensor:
    """A weight of the layer below an adapter's, merged; the model lets it go."""
    if not layer.merged:
        layer.merge(safe_merge=True)
    parameter = layer.get_base_layer().get_parameter(own)
    tensor, parameter.data = parameter.data, parameter.new_empty(0)
    return tensor


def _write_rounded(adapter: ModelRef, folder: Path) -> ModelRef:
    """Writes the base of a quantized adapter with its weights as they are rounded, made whole again."""
    import bitsandbytes

    base, head = dataclasses.replace(adapter.base, quantization=None), head_of(adapter)
    rounded_base = dataclasses.replace(base, path=str(folder), revision=None)
    quantized = load_model(adapter.base, head=head)
    if _is_quantized(base):  # there are no files in full precision to map
        quantized.dequantize(quantized.dtype).save_pretrained(folder, save_original_format=False)
        return rounded_base
    whole = load_model(base, head=head)

    def rounded(name: str) -> torch.Tensor:
        weight = dequantize_module_weight(quantized.get_submodule(name))
        return weight.T if isinstance(whole.get_submodule(name), Conv1D) else weight

    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    names = [name for name, module in quantized.named_modules() if isinstance(module, kinds)]
    save_changed(whole, folder, {f"{name}.weight": functools.partial(rounded, name) for name in names})
    return rounded_base


def _config_of(base: ModelRef) -> Any:
    with clear_errors("model", base.path):
        return AutoConfig.from_pretrained(
            base.path, revision=base.revision or "main", trust_remote_code=base.options.trust_remote_code
        )


def _is_quantized(base: ModelRef) -> bool:
    """Whether the files of a base are in few bits already."""
    return getattr(_config_of(base), "quantization_config", None) is not None


def _as_stored(adapter: ModelRef) -> ModelRef:
    """The adapter with its base in the precision of its files, unless the recipe names another."""
    base = adapter.base
    if base.options.dtype != "auto":
        return adapter
    config = _config_of(base)
    dtype = config.dtype if config.dtype in TOLERANCE else torch.float32
    named = base.options.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    return dataclasses.replace(adapter, options=named)


def _require_within(loss: float, limit: float, adapter: ModelRef, costs: dict[str, float]) -> None:
    if not loss <= limit:
        told = ", ".join(f"{cost:.3g} into the base {name}" for name, cost in costs.items())
        raise BudgetExceeded(
            f"the merge of {adapter.path} would lose more than merge.max_loss, {limit:g} nats per token on held-out "
            f"texts: {told}. Nothing was written, and the adapter stays. Use the adapter on its own base, train "
            "without `quantization`, or raise merge.max_loss."
        )
