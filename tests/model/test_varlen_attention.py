"""Packed rows through the variable-length kernel are what they are through a mask; a loop stands for the kernel."""

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

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


def loop(query, key, value, ends, ends_k, longest, longest_k, *, scale, window_size, enable_gqa):  # type: ignore[no-untyped-def]
    """Attention of each document for itself, with the signature of torch's kernel."""
    assert query.dtype in (torch.bfloat16, torch.float16)
    assert ends.dtype == torch.int32
    assert ends is ends_k
    assert longest == longest_k >= int(ends.diff().max())
    parts = []
    for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        sides = [side[None, begin:end].transpose(1, 2) for side in (query, key, value)]
        at = torch.arange(end - begin)
        distance = at[:, None] - at[None]
        mask = (distance >= 0) & (distance <= (end if window_size[0] < 0 else window_size[0]))
        out = functional.scaled_dot_product_attention(*sides, mask, scale=scale, enable_gqa=enable_gqa)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def in_half() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("make", [llama, mistral])
def test_packed_rows_and_their_gradients_are_those_of_a_mask(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen_attention, "varlen_attn", loop)
    masked, model = make().train(), make()
    with in_half():
        assert varlen_attention.switch_attention(model)
    assert attention_of(model) == NAME
    assert NAME not in model.config.to_json_string()  # who loads the model gets their own attention
    model.train()
    batch = packed_sample(model)
    for one in (masked, model):
        with in_half():
            one(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    for (name, expected), found in zip(masked.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(expected.grad, found.grad, atol=2e-3), name


@pytest.mark.parametrize("make", [llama, mistral])
def test_what_the_kernel_does_not_take_is_computed_with_a_mask(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, with padding on either side, and in generation with a cache."""
    monkeypatch.setattr(varlen_attention, "varlen_attn", None)
    plain, model = make().eval(), make().eval()
    assert varlen_attention.switch_attention(model)
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


def test_a_kernel_that_computes_something_else_or_fails_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(query: Any, key: Any, value: Any, ends: Any, *given: Any, **named: Any) -> Any:
        ends = torch.tensor([0, len(query)], dtype=torch.int32)
        return loop(query, key, value, ends, ends, len(query), len(query), **named)

    def failing(*given: Any, **named: Any) -> Any:
        raise RuntimeError("no kernel for this head")

    for kernel in (leaking, failing):
        monkeypatch.setattr(varlen_attention, "varlen_attn", kernel)
        model = llama()
        model.get_output_embeddings().weight.data *= 100  # logits that differ by more than rounding
        with in_half():
            assert not varlen_attention.switch_attention(model)
        assert attention_of(model) == "sdpa"


def test_without_a_gpu_attention_stays_as_it_is() -> None:
    model = llama()
    assert not use_varlen_attention(model)
    assert attention_of(model) == "sdpa"
