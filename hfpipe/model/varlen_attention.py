"""Attention over packed rows (B, L), document by document.

With packed rows transformers' default, scaled dot product attention, takes a mask (B, 1, L, L): no flash kernel runs,
and the products between documents are computed and thrown away. Its own flash attention keeps documents apart in a
batch of one row only (`_is_packed_sequence` in transformers' modeling_flash_attention_utils.py). torch's
variable-length kernel (`torch.nn.attention.varlen`) takes the ends of documents instead of a mask. It needs no package,
and a GPU of compute capability 8.0 in half precision. On a CPU each document is a call of its own, which takes a half
to a third of the time of the mask (`benchmarks/step.py --only packed`).

It is chosen where a model gives the same log-probabilities with it as without, and keeps documents apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from hfpipe.core.upstream import attention_of, takes_flash_attention
from hfpipe.data.stream.packing import isolation_leak, packed_sample
from hfpipe.model.load import compute_dtype
from hfpipe.model.spread import device_of

NAME = "varlen"
TOLERANCES = {torch.bfloat16: 0.25, torch.float16: 0.25, torch.float32: 1e-3}  # nats
HALF = (torch.bfloat16, torch.float16)

_ends: Any = WeakTensorKeyDictionary()  # of the position ids of a batch, which all layers share


def use_varlen_attention(model: Any) -> bool:
    """Lets a causal model compute attention document by document, if its device and its kind allow it.

    Args:
        model: The model, on its device, before an adapter is put on it.

    Returns:
        True if the model does so now; False if its attention is as before.
    """
    device, dtype = device_of(model).type, compute_dtype()
    if attention_of(model) != "sdpa" or not takes_flash_attention(model):
        return False
    if device != "cpu" and dtype != torch.bfloat16:
        return False
    with torch.autocast(device, dtype, enabled=dtype in HALF):
        return switch_attention(model)


@torch.no_grad()
def switch_attention(model: Any) -> bool:
    """Switches a model over to `varlen_attention`, and back where that changes what it computes.

    Args:
        model: A causal model; called in the autocast that it will be trained in.

    Returns:
        True if it computes the same within `TOLERANCES`, and was switched.
    """
    was_training = model.training
    model.eval()
    batch = {key: value.to(device_of(model)) for key, value in packed_sample(model).items()}
    before = model(**batch, use_cache=False).logits.float().log_softmax(-1)
    AttentionInterface.register(NAME, varlen_attention)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    try:
        model.set_attn_implementation(NAME)
        after = model(**batch, use_cache=False).logits.float().log_softmax(-1)
        tolerance = TOLERANCES[_precision(model.dtype, device_of(model))]
        same = float((before - after).abs().max()) <= tolerance and isolation_leak(model) <= tolerance
    except (RuntimeError, ValueError):  # of a kernel that does not take this head or this GPU
        same = False
    if not same:
        model.set_attn_implementation("sdpa")
    model.train(was_training)
    return same


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Computes causal attention within documents; a function of transformers' `AttentionInterface`.

    Args:
        module: The attention layer.
        query: (B, H, L, D).
        key: (B, K, M, D), H being a multiple of K.
        value: (B, K, M, D).
        attention_mask: (B, M) False where a token is padding; None without padding.
        scaling: Of the products.
        dropout: Share of the weights that are dropped.
        position_ids: (B, L) or (1, L), 0 where a document begins.
        sliding_window: Tokens that a token sees, itself included; None for all before it.

    Returns:
        (B, L, H, D), and None for the weights.
    """
    rows, _heads, length, size = query.shape
    whole = attention_mask is None and position_ids is not None and key.shape[2] == length > 1
    on_cpu, lower = query.device.type == "cpu", _precision(query.dtype, query.device)
    if not whole or dropout or not (on_cpu or (lower in HALF and value.shape[3] == size)):
        mask = _mask(query, key, attention_mask, position_ids if whole else None, sliding_window)
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)
    assert position_ids is not None
    ends = _ends.get(position_ids)
    if ends is None:
        ends = _ends[position_ids] = _document_ends(position_ids, rows)
    q, k, v = (side.transpose(1, 2).flatten(0, 1).to(lower) for side in (query, key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    grouped = query.shape[1] != key.shape[1]
    kernel: Any = each_document if on_cpu else varlen_attn
    out = kernel(q, k, v, ends, ends, length, length, scale=scaling, window_size=window, enable_gqa=grouped)
    return out.view(rows, length, *out.shape[1:]), None


def each_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    _: torch.Tensor,
    *longest: int,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """Computes what `varlen_attn` does by a call a document; (N, H, D), with its arguments."""
    lengths, parts = ends.diff().tolist(), []
    for sides in zip(*(side.split(lengths) for side in (query, key, value)), strict=True):
        q, k, v = (side[None].transpose(1, 2) for side in sides)  # (1, H, length of the document, D)
        narrow = 0 <= window_size[0] < q.shape[2] - 1
        mask = _mask(q, k, None, None, window_size[0] + 1) if narrow else None
        out = scaled_dot_product_attention(q, k, v, mask, is_causal=not narrow, scale=scale, enable_gqa=enable_gqa)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def _precision(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns what attention is computed in: autocast's precision, or that of the tensors."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def _document_ends(position_ids: torch.Tensor, rows: int) -> torch.Tensor:
    """Returns the places (N + 1,) at which documents end among the tokens of all rows, 0 the first."""
    begins = (position_ids == 0).expand(rows, -1).clone()
    begins[:, 0] = True
    places = begins.flatten().nonzero()[:, 0]
    return torch.cat([places, places.new_tensor([begins.numel()])]).int()


def _mask(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    sliding_window: int | None,
) -> torch.Tensor | None:
    """Returns where a query sees a key, (B, 1, L, M), for what the kernel does not compute; None for everywhere."""
    length, total = query.shape[2], key.shape[2]
    if length == 1 and attention_mask is None and total <= (sliding_window or total):
        return None  # one token after all others, as in generation
    at = torch.arange(total, device=query.device)
    distance = at[total - length :, None] - at[None]  # (L, M)
    seen = (distance >= 0) if sliding_window is None else (distance >= 0) & (distance < sliding_window)
    seen = seen.expand(query.shape[0], 1, -1, -1)
    if position_ids is not None:
        document = (position_ids == 0).cumsum(1)
        seen = seen & (document[:, None, :, None] == document[:, None, None, :])
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None, :].bool() | (distance == 0)  # a row of none is NaN
    return seen
