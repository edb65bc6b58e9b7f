"""What a suite asks of a model: the likelihood of given tokens, and generated answers. Batched by length."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hfpipe.core.errors import RecipeError
from hfpipe.data.tokenize import Encoded


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of indices, the longest first, so that rows of like length share a batch."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@dataclass(frozen=True)
class Likelihood:
    """What a model gives the targets of a row.

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
    for indices in by_length([len(row.input_ids) for row in rows], batch_size):
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
        ids, mask, scored = (tensor.to(model.device) for tensor in (ids, mask, scored))
        # The last token is a target only: a row may be one longer than the model's context.
        logits = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=False).logits
        logits = logits[:, 1 - longest :]  # (B, L-1, V); the tokens that a prompt adapter puts in front have some too
        where, targets = scored[:, 1:], ids[:, 1:]
        # Only the targets' rows of the logits go to float32: the whole of them would be the largest tensor by far.
        chosen = logits[where].float()
        losses = torch.nn.functional.cross_entropy(chosen, targets[where], reduction="none")
        require_finite(losses)
        row_of = where.nonzero()[:, 0]
        totals = torch.zeros(len(indices), dtype=torch.float64, device=losses.device)
        totals.index_add_(0, row_of, losses.double())
        missed = torch.zeros(len(indices), dtype=torch.long, device=losses.device)
        missed.index_add_(0, row_of, (chosen.argmax(-1) != targets[where]).long())
        for place, index in enumerate(indices):
            found[index] = Likelihood(float(totals[place]) / math.log(2), not missed[place])
    return found


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[str], tokenizer: Any, batch_size: int, chat: bool, options: dict[str, Any]
) -> list[str]:
    """Answers to prompts, greedy unless the options say otherwise.

    Args:
        model: A causal language model in evaluation mode.
        prompts: Texts to continue.
        tokenizer: The model's tokenizer.
        batch_size: Prompts of a batch.
        chat: Whether a chat template has written the special tokens already.
        options: Fields of transformers' GenerationConfig.
    """
    encoded = tokenizer(list(prompts), add_special_tokens=not chat)["input_ids"]
    empty = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    encoded = [ids or empty for ids in encoded]
    answers = [""] * len(prompts)
    for indices in by_length([len(ids) for ids in encoded], batch_size):
        longest = max(len(encoded[index]) for index in indices)
        ids = torch.full((len(indices), longest), tokenizer.pad_token_id)
        mask = torch.zeros((len(indices), longest), dtype=torch.long)
        for place, index in enumerate(indices):  # on the left, so that every answer begins at the same place
            ids[place, longest - len(encoded[index]) :] = torch.as_tensor(encoded[index])
            mask[place, longest - len(encoded[index]) :] = 1
        settings = {
            "do_sample": False,
            "max_new_tokens": 32,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **options,
        }
        output = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **settings)
        texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        for index, answer in zip(indices, texts, strict=True):
            answers[index] = answer
    return answers
