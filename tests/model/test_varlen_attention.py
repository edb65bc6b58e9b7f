"""Packed rows computed document by document are what they are through a mask."""

from inspect import signature
from typing import Any

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from hfpipe.core.upstream import attention_of
from hfpipe.data.stream.packing import packed_sample
from hfpipe.model import varlen_attention
from hfpipe.model.varlen_attention import NAME, use_varlen_attention

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def mistral() -> Any:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("make", [llama, mistral])
def test_packed_rows_and_their_gradients_are_those_of_a_mask(make: Any, half: bool) -> None:
    masked, model = make().train(), make()
    assert use_varlen_attention(model)
    assert attention_of(model) == NAME
    assert NAME not in model.config.to_json_string()  # who loads the model gets their own attention
    model.train()
    batch = packed_sample(model)
    for one in (masked, model):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            one(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    for (name, expected), found in zip(masked.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(expected.grad, found.grad, atol=2e-3 if half else 1e-6), name


@pytest.mark.parametrize("make", [llama, mistral])
def test_padding_and_a_cache_are_computed_with_a_mask(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = make().eval(), make().eval()
    assert use_varlen_attention(model)
    monkeypatch.setattr(varlen_attention, "each_document", None)
    ids = torch.arange(40).reshape(2, 20) % 64
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    for padding in (mask, mask.flip(1)):
        places = {"input_ids": ids, "attention_mask": padding, "position_ids": (padding.cumsum(1) - 1).clamp(min=0)}
        with torch.no_grad():
            expected, found = (one(**places).logits[padding.bool()] for one in (plain, model))
        assert torch.allclose(expected, found, atol=1e-5)
    wanted = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(plain.generate(ids, **wanted), model.generate(ids, **wanted))


def test_generation_without_padding_is_that_of_the_stock_attention() -> None:
    plain, model = mistral().eval(), mistral().eval()  # a window of 7 tokens
    assert use_varlen_attention(model)
    ids = torch.arange(10).reshape(2, 5)
    wanted = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(plain.generate(ids, **wanted), model.generate(ids, **wanted))


def test_a_kernel_that_computes_something_else_or_fails_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = varlen_attention.each_document

    def leaking(query: Any, key: Any, value: Any, ends: Any, *given: Any, **named: Any) -> Any:
        return right(query, key, value, ends[[0, -1]], *given, **named)

    def failing(*given: Any, **named: Any) -> Any:
        raise RuntimeError("no kernel for this head")

    for kernel in (leaking, failing):
        monkeypatch.setattr(varlen_attention, "each_document", kernel)
        model = llama()
        model.get_output_embeddings().weight.data *= 100  # logits that differ by more than rounding
        assert not use_varlen_attention(model)
        assert attention_of(model) == "sdpa"


def test_the_kernel_of_torch_takes_the_arguments_that_it_is_called_with() -> None:
    """No GPU is here to call it."""
    taken = set(signature(varlen_attn).parameters)
    assert {"scale", "window_size", "enable_gqa"} <= taken
    signature(varlen_attn).bind(*"qkv", "ends", "ends", 8, 8, scale=None, window_size=(-1, 0), enable_gqa=False)
