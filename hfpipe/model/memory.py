"""Predicts the peak memory of training a model from its shapes alone: no weight is loaded and nothing is computed.

The model is built on torch's meta device, where a tensor has a shape and a dtype and takes no memory. A training step
runs there as it will run, the same modules and the same loss, under a mode that sees each tensor made and freed. So the
prediction follows from the code that trains, for any architecture: 0.4 s for a model of 1B parameters.

Four things depend on the device that will train, and meta tensors do not show them. They are stated here:
which kernel computes attention, what autocast casts, layers quantized by bitsandbytes, and TRL's tiled LM head.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
# glibc takes blocks up to about this size from its heap, which holds on to what is free below one in use (mallopt(3),
# M_TRIM_THRESHOLD). An aligned block as torch asks for leaves pieces beside it, where small ones settle that stay: what
# is free between them no longer fits a block of that size (https://sourceware.org/bugzilla/show_bug.cgi?id=14581).
HEAP = 2**26
HOLES = 0.11  # bytes lost so for each byte that a micro-batch takes: 0.04 to 0.2; see docs/benchmarks.md
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "temporary", "framework")
Step = Callable[[Any], torch.Tensor]  # a model's forward pass to its loss


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of training, by what they are for.

    Args:
        weights: Of the model and its adapter, buffers too.
        gradients: Of the trained weights, and the buckets in which several ranks exchange them.
        optimizer: The optimizer's states.
        activations: What the forward pass keeps for the backward pass.
        logits: Tensors as wide as the vocabulary.
        temporary: What one operation or one step of the optimizer needs for a moment.
        framework: What the process holds beside the training; on a CPU libraries and the holes of the heap too.
        host: Of the optimizer, what may leave the GPU for the machine's memory (paged optimizers); not in `total`.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    temporary: int = 0
    framework: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in PARTS)

    def parts(self) -> dict[str, int]:
        """The bytes by part, and their sum."""
        return {part: getattr(self, part) for part in PARTS} | {"total": self.total}


@dataclass(frozen=True)
class Device:
    """The facts of a device that decide how much memory a step takes.

    Args:
        kind: "cpu" or "cuda".
        autocast: Precision of Trainer's autocast (bf16, fp16); None without.
        padded: Whether rows of a batch differ in length, so that there is an attention mask.
    """

    kind: str = "cpu"
    autocast: torch.dtype | None = None
    padded: bool = True


_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


def _masks(indices: Any) -> list[torch.Tensor]:
    return [index for index in indices if index is not None and index.dtype == torch.bool]


class _Trace(TorchDispatchMode):
    """Counts the bytes of the tensors that live, by part, and keeps the counts of the moment with the most.

    Args:
        model: Its weights are not counted.
        vocabulary: Size of a logits tensor's last dimension.
        share: Share of True values in a boolean index, whose size a meta tensor does not know.
        answer: What a question about a tensor's values gets. The questions that models ask are whether a mask is all
            ones, and whether a batch is one document.
    """

    def __init__(self, model: Any, vocabulary: int, share: float, answer: bool) -> None:
        super().__init__()
        self.vocabulary, self.share, self.answer = vocabulary, share, answer
        self.live = dict.fromkeys(PARTS, 0)
        self.peak = dict(self.live)
        self._total = self._most = 0
        self.taken = 0  # bytes of all blocks below HEAP, however soon they were freed
        # What is there already is counted elsewhere, and a transposed weight is no tensor of its own.
        known = [*model.parameters(), *model.buffers()]
        self._storages = {id(tensor.untyped_storage()): (0, "weights") for tensor in known}
        self.part = "activations"  # of what is made next

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return self.answer
        masks = _masks(args[1]) if func in _INDEXED else []
        if masks and "put" in func.__name__:
            return args[0]
        if masks:
            size = math.ceil(self.share * masks[0].numel())
            out = args[0].new_empty(size, *args[0].shape[masks[0].dim() :])
        elif func is aten.nonzero.default:
            out = args[0].new_empty(math.ceil(self.share * args[0].numel()), args[0].dim(), dtype=torch.long)
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # torch keeps the object for as long as the storage lives
        if key in self._storages:
            return
        size = storage.nbytes()
        part = "logits" if tensor.dim() and tensor.shape[-1] == self.vocabulary else self.part
        self._storages[key] = (size, part)
        weakref.finalize(storage, self._drop, key)
        self.live[part] += size
        self._total += size
        self.taken += size if size < HEAP else 0
        if self._total > self._most:
            self._most, self.peak = self._total, dict(self.live)

    def _drop(self, key: int) -> None:
        size, part = self._storages.pop(key)
        self.live[part] -= size
        self._total -= size

    def keep(self, weight: torch.Tensor) -> None:
        """Counts the gradient of a weight as one, from now on; a hook of the weight."""
        if weight.grad is None:
            return
        key = id(weight.grad.untyped_storage())
        size, part = self._storages[key]
        self._storages[key] = (size, "gradients")
        self.live[part] -= size
        self.live["gradients"] += size


# Functions that autocast computes in low precision, and in float32 (torch/amp, autocast_mode.h).
_LOW = {"linear", "matmul", "__matmul__", "bmm", "baddbmm", "addmm", "addbmm", "mm", "conv1d", "conv2d", "einsum"}
_LOW |= {"scaled_dot_product_attention"}
_FULL = {"softmax", "log_softmax", "layer_norm", "group_norm", "rms_norm", "cross_entropy", "nll_loss", "mse_loss"}
_FULL |= {"exp", "log", "pow", "__pow__", "rsqrt", "cumsum", "prod", "norm", "cosine_similarity", "softplus"}


class _OnDevice(TorchFunctionMode):
    """Lets meta tensors go through the kernels and the casts of the device that will train."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self._cast: dict[int, torch.Tensor] | None = {}  # autocast casts a weight once in a forward pass

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if self.device.autocast is not None and (name in _LOW or name in _FULL):
            to = self._lowered if name in _LOW else _raised
            args, kwargs = tree_map_only(torch.Tensor, to, (args, kwargs))
        if name == "scaled_dot_product_attention":
            return _attention(self.device.kind, *args, **kwargs)
        if name in ("grouped_mm", "_grouped_mm"):  # of a mixture of experts: the shape of any expert's product
            return args[0] @ args[1][0]
        return func(*args, **kwargs)

    def _lowered(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if self._cast is None or not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(self.device.autocast)
        if id(tensor) not in self._cast:
            self._cast[id(tensor)] = tensor.to(self.device.autocast)
        return self._cast[id(tensor)]

    def end_forward(self) -> None:
        """Lets the cast weights go; a layer that is run again in the backward pass casts its own."""
        self._cast = None


def _raised(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _attention(
    kind: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch's choice among its kernels of scaled dot product attention, which a meta tensor does not make.

    Args:
        kind: "cpu" or "cuda".
        query: (B, H, L, D); the rest as in `torch.nn.functional.scaled_dot_product_attention`.
    """
    trained_mask = attn_mask is not None and attn_mask.requires_grad
    if query.dim() != 4 or (kind == "cpu" and (dropout_p > 0 or trained_mask)):
        return functional.scaled_dot_product_attention(  # the plain one, which keeps (B, H, L, L)
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -math.inf).to(query.dtype)
    if kind == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
    if enable_gqa:
        key, value = (side.repeat_interleave(query.shape[1] // side.shape[1], dim=1) for side in (key, value))
    if attn_mask is None and query.dtype != torch.float32 and query.shape[-1] == value.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    mask = None if attn_mask is None else attn_mask.expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, True, dropout_p, is_causal, scale=scale
    )[0]


class QuantizedLinear(torch.nn.Linear):
    """A linear layer as bitsandbytes has it: the weight is quantized, and dequantized for each pass.

    Args:
        layer: The layer that it takes the place of.
        bits: 4 or 8.
        dtype: In which it computes; None for that of its input.
    """

    def __init__(self, layer: torch.nn.Linear, bits: int, dtype: torch.dtype | None) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.bits, self.dtype = bits, dtype
        self.requires_grad_(False)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight and its scales: one float32 (with double quantization one byte) for 64 weights."""
        rows = self.out_features * 4
        return (
            self.weight.numel() // 2 + self.weight.numel() // 64 * 4 if self.bits == 4 else self.weight.numel() + rows
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = x.dtype
        if self.bits == 4 and self.dtype is not None:
            x = x.to(self.dtype)
        out = _Dequantized.apply(x, self.weight, self.bits)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.to(given).clone() if self.bits == 4 else out  # PEFT clones it


class _Dequantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bits: int) -> torch.Tensor:
        ctx.shape = weight.shape
        if bits == 8:
            ctx.save_for_backward(x)  # bitsandbytes keeps it, though nothing reads it
        return x @ torch.empty(weight.shape, dtype=x.dtype, device="meta").T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad @ torch.empty(ctx.shape, dtype=grad.dtype, device="meta"), None, None


def quantize(model: Any, bits: int, dtype: torch.dtype | None, keep: tuple[str, ...] = ()) -> None:
    """Puts a `QuantizedLinear` in the place of each linear layer that bitsandbytes would quantize.

    Args:
        model: On the meta device.
        bits: 4 or 8.
        dtype: Compute dtype of 4 bits.
        keep: Modules that stay as they are.
    """
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and module is not head and name.rpartition(".")[2] not in keep:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, QuantizedLinear(module, bits, dtype))


class TiledHead(torch.autograd.Function):
    """The memory of TRL's chunked LM head: logits of a tile of tokens at once, computed again in the backward pass.

    Source: trl/kernels/chunked_logprob.py of TRL 1.16, ChunkedLogProbFunction.
    """

    tokens, columns = 4096, 32768

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, kind: str, dtype: torch.dtype | None
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.kind, ctx.dtype = kind, dtype or hidden.dtype
        with _tile(hidden, weight, kind, ctx.dtype, 3):  # the tile in float32, less its maximum, its exponential
            return hidden.new_empty(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        for_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs[0] else None
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        with _tile(hidden, weight, ctx.kind, ctx.dtype, 7):
            pass
        return (
            for_hidden.to(hidden.dtype) if for_hidden is not None else None,
            for_weight.to(weight.dtype) if for_weight is not None else None,
            None,
            None,
        )


@contextmanager
def _tile(hidden: torch.Tensor, weight: torch.Tensor, kind: str, dtype: torch.dtype, copies: int) -> Iterator[None]:
    """Holds a tile of logits, the part of the weight it is made with, and without Triton the copies of the tile."""
    rows, columns = min(len(hidden), TiledHead.tokens), min(len(weight), TiledHead.columns)
    held = [torch.empty(rows, TiledHead.columns, dtype=dtype, device="meta")]
    if dtype != weight.dtype:
        held.append(torch.empty(columns, weight.shape[1], dtype=dtype, device="meta"))
    if kind == "cpu":
        held += [torch.empty(rows, columns, dtype=torch.float32, device="meta") for _ in range(copies)]
        held.append(torch.empty(rows, columns, dtype=torch.bool, device="meta"))  # where the target stands
    yield
    del held


def trace(
    model: Any,
    step: Step,
    device: Device,
    *,
    vocabulary: int,
    checkpointing: dict[str, Any] | None = None,
    accumulate: bool = False,
    share: float = 0.15,
) -> Memory:
    """Runs a training step on a model of the meta device, and counts what lives.

    Args:
        model: As it is trained, with its adapter, in training mode.
        step: Its forward pass to the loss.
        device: The device that will train it.
        vocabulary: Tokens of the vocabulary.
        checkpointing: Trainer's `activation_checkpointing_kwargs`; None where activations are kept.
        accumulate: Whether gradients of an earlier micro-batch are there.
        share: Share of the tokens that a boolean index picks (masked language modelling).

    Returns:
        Weights of the model; gradients, activations, logits and temporary bytes at the peak; as `framework`, what the
        C allocator keeps of freed memory.
    """
    seen = _Trace(model, vocabulary, share, answer=not device.padded)
    hooks = [w.register_post_accumulate_grad_hook(seen.keep) for w in model.parameters() if w.requires_grad]
    autocast = torch.is_autocast_enabled()
    torch.set_autocast_enabled(device.autocast is not None)  # PEFT asks; meta tensors are not cast by it
    try:
        for _ in range(1 + accumulate):
            seen.part = "activations"
            placed = _OnDevice(device)
            if checkpointing is not None:  # the autograd engine runs layers again outside of function modes
                again = {"use_reentrant": False, "context_fn": partial(_contexts, placed)}
                model.gradient_checkpointing_enable(checkpointing | again)
            with seen:
                with placed:
                    loss = step(model)
                placed.end_forward()
                seen.part = "temporary"
                loss.backward()
            del loss
    finally:
        torch.set_autocast_enabled(autocast)
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    waste = round(HOLES * seen.taken / (1 + accumulate)) if device.kind == "cpu" else 0
    return replace(Memory(**seen.peak), weights=weight_bytes(model), framework=waste)


def _contexts(placed: _OnDevice) -> tuple[Any, Any]:
    return nullcontext(), placed


def weight_bytes(model: Any) -> int:
    """Bytes of a model's weights and buffers as they are stored."""
    packed = {id(m.weight): m.stored_bytes for m in model.modules() if isinstance(m, QuantizedLinear)}
    weights = sum(packed.get(id(weight), weight.nbytes) for weight in model.parameters())
    return weights + sum(buffer.nbytes for buffer in model.buffers())


class PeakMeter:
    """Measures the peak memory of this process: the most that `held_memory` was since the meter was made.

    Only Linux tells the peak of a resident set; elsewhere it is the largest that was read.
    """

    def __init__(self) -> None:
        self.before = self._most = held_memory()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM

    def read(self) -> int:
        """Returns the peak in bytes since the meter was made."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        with suppress(OSError):
            if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
                return int(found[1]) * 1024
        self._most = max(self._most, held_memory())
        return self._most


def held_memory() -> int:
    """Returns the bytes that this process holds: on a GPU what torch allocated there, else its resident set."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
