"""Merging: an adapter becomes part of the weights of its base, verified by loading the result again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from hfpipe.errors import BudgetExceeded, RecipeError
from hfpipe.files import whole_folder
from hfpipe.model.adapter import TOLERANCE, ProbeText, divergence, probe, require_equal
from hfpipe.model.load import ModelRef, clear_errors, load_model

FULL, DEQUANTIZED = "in full precision", "made whole from its quantized weights"  # what an adapter is merged into
SHARD_SIZE = "5GB"
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
    copy, and PEFT replaces them layer by layer: what a merge holds at its peak is less than the merged model.

    Args:
        adapter: The adapter's folder.
        tokenizer: Goes beside the weights, with its chat template.
        folder: Where the merged model is written, in one piece.
        texts: Held-out texts for the comparison.
        max_loss: Nats per token that may be lost.

    Raises:
        BudgetExceeded: The best merge loses more than `max_loss`.
        RecipeError: PEFT cannot merge this kind of adapter.
        RuntimeError: The merged model is not the adapter's.
    """
    stored = _as_stored(adapter)
    full = dataclasses.replace(stored, quantization=None)
    candidates = {FULL: (full, False)}
    if adapter.quantization is not None:
        trained = probe(load_model(adapter), tokenizer, texts)
        candidates[DEQUANTIZED] = (stored, True)
    before = {
        base: probe(load_model(ref, dequantize=dequantize), tokenizer, texts)
        for base, (ref, dequantize) in candidates.items()
    }
    costs = {}
    if adapter.quantization is None:
        trained = before[FULL]
    else:
        costs = {base: divergence(trained, found) for base, found in before.items()}
    base = min(costs, key=costs.__getitem__) if costs else FULL
    if costs:
        _require_within(costs[base], max_loss, adapter, costs)
    ref, dequantize = candidates[base]
    model = load_model(ref, dequantize=dequantize)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise RecipeError(f"peft cannot merge the adapter in {adapter.path}: {error}") from error
    with whole_folder(folder) as beside:
        merged.save_pretrained(beside, max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(beside)
        dtype = merged.dtype
        del model, merged
        after = probe(load_model(dataclasses.replace(full, path=str(beside))), tokenizer, texts)
        found = require_equal(before[base], after, dtype, "the merged model")
        loss = divergence(trained, after)
        _require_within(loss, max(max_loss, NO_LOSS), adapter, {base: loss})
    return Merged(base, costs, loss, found, str(dtype).removeprefix("torch."))


def _as_stored(adapter: ModelRef) -> ModelRef:
    """The adapter with its base in the precision of its files, unless the recipe names another."""
    base = adapter.base
    if base.options.dtype != "auto":
        return adapter
    with clear_errors("model", base.path):
        config = AutoConfig.from_pretrained(
            base.path, revision=base.revision or "main", trust_remote_code=base.options.trust_remote_code
        )
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
