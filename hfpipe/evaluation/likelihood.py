"""The likelihood of given tokens under a causal model, in batches of rows of like length."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hfpipe.core import display
from hfpipe.core.errors import RecipeError
from hfpipe.data.tokenize import Encoded

BATCH_TOKENS = 1024  # tokens of a batch for each of its rows: longer rows go in smaller batches
LOGIT_ROWS = 1024  # rows of logits that are float32 at once


def by_length(lengths: Sequence[int], batch_size: int, most_tokens: int | None = None) -> Iterator[list[int]]:
    """Batches of indices, the longest first, so that rows of like length share a batch; tells how far they are.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch.
        most_tokens: Tokens of a batch with its padding, where that is bounded; one row may have more.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        size = batch_size
        if most_tokens is not None:
            size = max(1, min(batch_size, most_tokens // max(1, lengths[order[start]])))
        display.count(start, len(order))
        yield order[start : start + size]
        start += size


@dataclass(frozen=True)
class Likelihood:
    """The likelihood that a model gives the targets of a row.

    Args:
        bits: Bits that it spends on them, the negative logarithm of their probability.
        greedy: Whether each of them is the likeliest token at its place.
    """

    bits: float
    greedy: bool


def require_finite(losses: torch.Tensor) -> None:
    """Refuses to score a model that gives no numbers.

    Raises:
        RecipeError: A loss is infinite or NaN.
    """
    if not torch.isfinite(losses).all():
        raise RecipeError(
            "the model's likelihoods are not finite numbers, so nothing can be scored: its training has diverged, or "
            "its weights overflow in their dtype. Lower learning_rate, or set `model.dtype` to float32 or bfloat16."
        )


def bits_of(model: Any, rows: Sequence[Encoded], pad_token_id: int, batch_size: int) -> list[float]:
    """Bits that the model spends on the targets of each row; arguments as those of `likelihoods`."""
    return [found.bits for found in likelihoods(model, rows, pad_token_id, batch_size)]


@torch.no_grad()
def likelihoods(model: Any, rows: Sequence[Encoded], pad_token_id: int, batch_size: int) -> list[Likelihood]:
    """The likelihood of the targets of each row.

    Args:
        model: A causal language model in evaluation mode.
        rows: Encoded rows.
        pad_token_id: Fills the right side of shorter rows.
        batch_size: Rows of a forward pass.

    Raises:
        RecipeError: The model gives no finite numbers.
    """
    found = [Likelihood(0.0, True)] * len(rows)
    takes = inspect.signature((model.get_base_model() if hasattr(model, "get_base_model") else model).forward)
    for indices in by_length([len(row.input_ids) for row in rows], batch_size, batch_size * BATCH_TOKENS):
        longest = max(len(rows[index].input_ids) for index in indices)
        if longest < 2:
            continue
        ids = torch.full((len(indices), longest), pad_token_id)
        mask = torch.zeros((len(indices), longest), dtype=torch.long)
        scored = torch.zeros((len(indices), longest), dtype=torch.bool)
        for place, index in enumerate(indices):
            size = len(rows[index].input_ids)
            ids[place, :size] = torch.as_tensor(rows[index].input_ids)
            mask[place, :size] = 1
            scored[place, :size] = torch.from_numpy(rows[index].scored)
        if not scored[:, 1:].any():
            continue
        kept = longest - int(scored.any(0).nonzero()[0].clamp(min=1))  # positions from the first that has a target on
        ids, mask, scored = (tensor.to(model.device) for tensor in (ids, mask, scored))
        fewer = {"logits_to_keep": kept} if "logits_to_keep" in takes.parameters else {}
        # The last token is a target only: a row may be one longer than the model's context.
        logits = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=False, **fewer).logits
        logits = logits[:, -kept:]  # (B, kept, V); the tokens that a prompt adapter puts in front have some too
        places, targets = scored[:, -kept:].nonzero(), ids[:, -kept:]
        totals = torch.zeros(len(indices), dtype=torch.float64, device=logits.device)
        missed = torch.zeros(len(indices), dtype=torch.long, device=logits.device)
        # Part by part: all rows of the logits in float32 would be the largest tensor by far.
        for part in places.split(LOGIT_ROWS):
            row_of, right = part[:, 0], targets[part[:, 0], part[:, 1]]
            chosen = logits[row_of, part[:, 1]].float()
            losses = torch.nn.functional.cross_entropy(chosen, right, reduction="none")
            totals.index_add_(0, row_of, losses.double())
            missed.index_add_(0, row_of, (chosen.argmax(-1) != right).long())
        require_finite(totals)
        for index, total, misses in zip(indices, totals.tolist(), missed.tolist(), strict=True):
            found[index] = Likelihood(total / math.log(2), not misses)
    return found
