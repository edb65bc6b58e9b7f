"""The LM head of a causal model apart from the rest: logits of chosen tokens, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from hfpipe.core.errors import RecipeError
from hfpipe.core.upstream import without_hooks
from hfpipe.model.adapter import TOLERANCE
from hfpipe.model.spread import device_of, gathered_head

LOGITS = 2**24  # of a chunk, on each of both sides
_PROBE = 16  # tokens on which the head is tried


class Scale:
    """The factor and the soft cap that a model applies to the logits of its head.

    Args:
        config: Its config.
    """

    def __init__(self, config: Any) -> None:
        text = config.get_text_config()
        factors = [getattr(text, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
        self._factor = next((factor for factor in factors if factor is not None), 1.0)
        divisor = getattr(text, "logits_scaling", None)
        if divisor is not None:
            self._factor = divisor if text.model_type == "hyperclovax" else 1 / divisor
        self._cap = getattr(text, "final_logit_softcapping", None)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits if self._factor == 1.0 else logits * self._factor
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap


def backbone_of(model: Any) -> Any:
    """Returns the part of a model, or of one with an adapter, that makes the hidden states."""
    return _base(model).base_model


def head_of(model: Any) -> Any:
    """Returns the LM head of a model, or of one with an adapter."""
    return _base(model).get_output_embeddings()


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def hidden_of(model: Any) -> Iterator[list[torch.Tensor]]:
    """Gives the last hidden states (B, L, H) of each forward pass of the block, as the head gets them."""
    seen: list[torch.Tensor] = []
    hook = backbone_of(model).register_forward_hook(lambda module, given, output: seen.append(output[0]))
    try:
        yield seen
    finally:
        hook.remove()


def hidden_by(model: Any, **words: torch.Tensor) -> torch.Tensor:
    """Returns the last hidden states (B, L, H) of a pass through a model without its head.

    Where FSDP2 has divided the weights, they are gathered as in any other pass, in which every rank has to take part.

    Args:
        model: A causal model, with its adapter.
        words: What it reads, as `forward` takes it.
    """
    # What gathers them is the whole model: as accelerate divides it with its adapter, as it is read in parts without.
    root: Any = next((module for module in model.modules() if isinstance(module, FSDPModule)), None)
    if root is None:
        return backbone_of(model)(**words, use_cache=False)[0]
    root.hidden_alone = lambda **given: backbone_of(model)(**given, use_cache=False)[0]
    register_fsdp_forward_method(root, "hidden_alone")
    try:
        return root.hidden_alone(**words)
    finally:
        del root.hidden_alone


def sum_in_chunks(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    one: torch.Tensor,
    other: torch.Tensor,
    vocabulary: int,
) -> torch.Tensor:
    """Returns the sum of a function of tokens, a chunk of them at a time, computed again in the backward pass.

    Args:
        function: Gives the sum over the tokens of a chunk from two sides' hidden states (C, H).
        one: (T, H).
        other: (T, H).
        vocabulary: Logits of a token.
    """
    size = max(1, LOGITS // vocabulary)
    total = one.new_zeros((), dtype=torch.float32)
    for begin in range(0, len(one), size):
        pair = one[begin : begin + size], other[begin : begin + size]
        total = total + checkpoint(function, *pair, use_reentrant=False)
    return total


@torch.no_grad()
def require_known_head(model: Any, word: str, instead: str) -> None:
    """Refuses a model whose logits are not those of its head on its last hidden states, scaled as its config says.

    Args:
        model: A causal model, with its adapter.
        word: The key of the recipe that needs it.
        instead: What to do, a sentence.

    Raises:
        RecipeError: They are not.
    """
    training = model.training
    model.eval()
    ids = torch.arange(_PROBE, device=device_of(model))[None] % model.config.get_text_config().vocab_size
    with hidden_of(model) as seen:
        logits = model(input_ids=ids, use_cache=False).logits
    head = head_of(model)
    with gathered_head(model, head), without_hooks(head):
        found = Scale(model.config)(head(seen[-1])).to(logits.dtype)
    model.train(training)
    difference = float((found.float().log_softmax(-1) - logits.float().log_softmax(-1)).abs().max())
    if not difference <= TOLERANCE.get(model.dtype, 0.25):
        raise RecipeError(
            f"{word}: {type(_base(model)).__name__} computes its logits in a way that is not known here (they differ "
            f"by {difference:.2g} nats from its head on its last hidden states). {instead}"
        )
