"""Context length: how many tokens a model reads at once, and which architectures end there."""

from __future__ import annotations

from typing import Any

import torch


def context_of(model: Any) -> int | None:
    """Tokens that a model takes at once, by its config; None where that does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def learned_positions(model: Any) -> int | None:
    """The most tokens that a model takes where its positions are learned; None where they are computed."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and name.endswith(("position_embeddings", "wpe")):
            # RoBERTa counts from the padding token's id on.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def within_positions(model: Any, max_length: int) -> int:
    """`max_length`, or the number of learned positions where they are fewer."""
    return min(max_length, learned_positions(model) or max_length)
