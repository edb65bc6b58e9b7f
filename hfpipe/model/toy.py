"""A small copy of a model with fresh weights, to measure what follows from an architecture and not from its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hfpipe.core.machine import machine_error
from hfpipe.core.upstream import attention_of

MOST_WEIGHTS = 300_000_000  # of a copy: 1.2 GB in float32, made in about three seconds
LAYERS, WIDTH, TOKENS = 1, 64, 64
LARGER = 4  # times the fresh weights, which attend to nothing much
_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff")  # and names that end so
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@torch.no_grad()
def small_copy(model: Any) -> Any:
    """Returns a model of the same architecture, whose attention is as wide and whose layers are few.

    Args:
        model: A causal model of transformers; its shapes are enough.

    Returns:
        The copy, on the CPU in float32, with larger weights than fresh ones; None where the architecture cannot be cut
        so, the copy would be large, or its attention runs on a GPU alone.
    """
    config = copy.deepcopy(model.config)
    words: dict[str, Any] = {"attn_implementation": attention_of(model), "dtype": torch.float32}
    try:
        if attention_of(model) not in ("eager", "sdpa"):
            return None
        _cut(config.get_text_config())
        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(config, **words)
        if shapes.num_parameters() > MOST_WEIGHTS:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            toy = AutoModelForCausalLM.from_config(config, **words).eval()
            for weight in toy.parameters():
                weight.mul_(LARGER if weight.dim() > 1 else 1)
            toy(input_ids=torch.zeros(1, 2, dtype=torch.long))
            return toy
    except Exception as error:  # whatever a class of transformers raises over its fields
        if machine_error(error) is not None:
            raise
        return None


def _cut(config: Any) -> None:
    """Cuts a config to its first layers, one of each type among them, and to narrow layers between attention."""
    whole = config.num_hidden_layers
    types = getattr(config, "layer_types", None) or []
    layers = min(whole, max([LAYERS, *(types.index(kind) + 1 for kind in set(types))]))
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(config, name, value[:layers])
        elif isinstance(value, int) and name.endswith(_WIDTHS):
            setattr(config, name, min(value, WIDTH))
    config.num_hidden_layers, config.vocab_size = layers, TOKENS
    for name in _TOKENS:
        if hasattr(config, name):
            setattr(config, name, None if name == "pad_token_id" else 0)
