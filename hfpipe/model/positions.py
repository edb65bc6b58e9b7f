"""Context length: how many tokens a model reads at once, and which architectures end there."""

from __future__ import annotations

from typing import Any

import torch


def context_of(model: Any) -> int | None:
    """Tokens that a model takes at once, by its config; None where that does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


# What models call the table of their positions: BERT and its kin, GPT-2 and OpenAI GPT, OPT and BioGPT and BART.
POSITIONS = ("position_embeddings", "wpe", "positions_embed", "embed_positions")


def learned_positions(model: Any) -> int | None:
    """Returns the most tokens that a model takes where its positions are a table; None where they are computed."""
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Embedding) or name.rpartition(".")[2] not in POSITIONS:
            continue
        offset = getattr(module, "offset", None)  # rows before the first position
        if not isinstance(offset, int):
            # RoBERTa counts from the padding token's id on.
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
        return module.num_embeddings - offset
    return None


def within_positions(model: Any, max_length: int) -> int:
    """`max_length`, or the number of learned positions where they are fewer."""
    return min(max_length, learned_positions(model) or max_length)


def window_of(model: Any, max_length: int | None = None) -> int | None:
    """Tokens that a model reads at once: its context, or `max_length` where that is shorter; None where none is known.

    Tokens that a prompt adapter puts in front take their part of it.
    """
    limits = [limit for limit in (context_of(model), learned_positions(model)) if limit is not None]
    if not limits:
        return max_length
    adapters = getattr(model, "peft_config", None) or {}
    virtual = sum(getattr(config, "num_virtual_tokens", None) or 0 for config in adapters.values())
    return min(limits) - virtual if max_length is None else min(max_length, min(limits) - virtual)
