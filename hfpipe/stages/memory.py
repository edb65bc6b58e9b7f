"""Will it fit? Predicts the peak memory of a stage on one rank, and ranks what would make it smaller."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from hfpipe.core import ranks
from hfpipe.core.files import GIB
from hfpipe.core.upstream import undivided
from hfpipe.model.adapter import add_adapter
from hfpipe.model.fake_quantized import fake_quantize
from hfpipe.model.head import backbone_of, head_of
from hfpipe.model.linear_loss import PIECE, LinearLoss
from hfpipe.model.load import AUTO_CLASSES, compute_dtype, weights_dtype
from hfpipe.model.memory import Device, Memory, QuantizedLinear, TiledHead, quantize, trace, weight_bytes
from hfpipe.model.parameters import freeze
from hfpipe.model.spread import is_offloaded, layers_of, ranks_of_a_copy
from hfpipe.model.tokenizer import make_room
from hfpipe.recipe import Qat, Recipe, Stage
from hfpipe.stages.arguments import stage_arguments
from hfpipe.stages.pretrain import masked_loss
from hfpipe.stages.sharding import SPREADING, plan_of_launch
from hfpipe.stages.trainer import divide_batch
from hfpipe.stages.translation import Loss as TranslationLoss

CONTEXT = 0.6 * GIB  # of a GPU's memory, taken by CUDA and its libraries
CACHED = 0.05  # of what torch allocates on a GPU, lost in the blocks of its allocator
LIBRARIES = 30 * 2**20  # on a CPU, what is loaded at the first step only
DEFAULT_LENGTH = 1024
MASKED_SHARE = 0.15


@dataclass(frozen=True)
class Setting:
    """All that the peak memory of a training depends on, beside the model's config.

    Args:
        kind: "causal", "masked", "sft", "classification" or "translation".
        device: "cpu" or "cuda".
        rows: Rows of a micro-batch on one rank.
        accumulation: Micro-batches of a step.
        tokens: Tokens of the longest row.
        targets: Of the longest target of a translation.
        dtype: Of the weights as they are loaded.
        autocast: Precision of Trainer's autocast; None without.
        optim: Trainer's name of the optimizer.
        checkpointing: Arguments of activation checkpointing; None without.
        attention: transformers' name of the attention implementation; None for its default.
        adapter: PEFT's `type` and fields; None where the weights themselves are trained.
        train_only: Patterns of the weights that are trained; None for all.
        freeze: Patterns of the weights that are not.
        bits: 4 or 8 of a quantized base; None.
        compute: Dtype in which quantized layers compute.
        ranks: Processes that train; with hybrid sharding those that hold one copy of the weights.
        sharding: "none", "zero1", "zero2", "zero3" or "fsdp".
        offloaded: Whether the parts of weights that are spread wait in the machine's memory, with what trains them.
        vocabulary: Rows that the embeddings grow to; None.
        packed: Whether several examples of `sft` share a row, which takes a mask.
        plain_loss: Whether a causal model's loss is plain cross-entropy, without label smoothing or `loss_type`.
        parent: Dtype of a frozen copy of the parent, which is asked; None without.
        rounded: Whether that copy is in 4 bits.
        drawn: Dtype of a copy of the parent's weights, towards which those that are trained are drawn; None without.
        forms: Forms of a row: 2 where each may have a swapped one beside it.
        pairs: Whether a row is a pair of texts, whose probabilities are compared with those of the parent.
        beside: Of a stage of pairs, the parent's own texts for each side of one.
    """

    kind: str
    device: str = "cpu"
    rows: int = 8
    accumulation: int = 1
    tokens: int = DEFAULT_LENGTH
    targets: int = 0
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    optim: str = "adamw_torch_fused"
    checkpointing: dict[str, Any] | None = None
    attention: str | None = None
    adapter: dict[str, Any] | None = None
    train_only: list[str] | None = None
    freeze: list[str] | None = None
    bits: int | None = None
    compute: torch.dtype | None = None
    ranks: int = 1
    sharding: str = "none"
    offloaded: bool = False
    vocabulary: int | None = None
    packed: bool = False
    plain_loss: bool = True
    parent: torch.dtype | None = None
    rounded: bool = False
    drawn: torch.dtype | None = None
    forms: int = 1
    pairs: bool = False
    beside: float = 0.0
    qat: Qat | None = None

    @property
    def has_linear_loss(self) -> bool:
        """True where `hfpipe.model.linear_loss` takes the place of logits, but for heads that it does not know."""
        return self.device == "cpu" and self.dtype == torch.float32 and self.plain_loss


def setting_of(
    recipe: Recipe, stage: Stage, *, tokens: int, targets: int = 0, vocabulary: int | None = None
) -> Setting:
    """The setting of a stage on this machine.

    Args:
        recipe: The recipe.
        stage: The stage.
        tokens: Tokens of the longest row (or source).
        targets: Tokens of the longest target, of a translation.
        vocabulary: Tokens that the embeddings must have rows for.
    """
    rows, accumulation = divide_batch(stage)
    arguments = stage_arguments(stage, Path("."), recipe.seed, 10)
    half = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    block = stage.quantized
    given = block.bnb_4bit_compute_dtype if block else None
    kind = stage.kind if stage.kind in _STEPS else stage.task  # a kind without a step of its own is like its task
    full = stage.adapter is None  # an adapter is switched off to ask the parent
    return Setting(
        kind=kind,
        device="cuda" if torch.cuda.is_available() else "cpu",
        rows=rows,
        accumulation=accumulation,
        tokens=tokens,
        targets=targets,
        dtype=weights_dtype(recipe.model, frozen=stage.adapter is not None),
        autocast=half,
        optim=str(getattr(arguments.optim, "value", arguments.optim)),
        checkpointing=dict(arguments.activation_checkpointing_kwargs or {})
        if arguments.activation_checkpointing
        else None,
        attention=recipe.model.attn_implementation,
        adapter=stage.adapter,
        train_only=stage.train_only,
        freeze=stage.freeze,
        bits=None if block is None else 8 if block.type == "int8" else 4,
        compute=None if block is None else getattr(torch, given) if given else compute_dtype(),
        ranks=ranks_of_a_copy() if plan_of_launch(stage) == "fsdp" else ranks.ranks(),
        sharding=plan_of_launch(stage),
        offloaded=is_offloaded(),
        vocabulary=vocabulary,
        packed=kind == "sft" and bool(stage.training.get("packing")),
        plain_loss=not arguments.label_smoothing_factor and getattr(arguments, "loss_type", "nll") == "nll",
        parent=weights_dtype(recipe.model, frozen=True) if full and stage.kept.kl else None,
        rounded=bool(full and stage.kept.kl and stage.kept.kl.parent),
        drawn=weights_dtype(recipe.model, frozen=False) if full and stage.kept.l2 else None,
        forms=2 if getattr(stage, "counterfactual", None) else 1,
        pairs=stage.PAIRS,
        beside=stage.kept.replay.share / (1 - stage.kept.replay.share) if stage.PAIRS and stage.kept.replay else 0.0,
        qat=stage.fake_quantized,
    )


def copies(config: Any, setting: Setting) -> list[int]:
    """Bytes of each copy of its parent that a stage holds beside its model.

    Args:
        config: transformers' config of the model.
        setting: How it is trained.
    """
    found = [] if setting.parent is None else [weight_bytes(_parent(config, setting))]
    if setting.drawn is not None:
        weights = [weight.numel() for weight in _model(config, setting).parameters() if weight.requires_grad]
        found.append(sum(weights) * setting.drawn.itemsize)
    return found


def _parent(config: Any, setting: Setting) -> Any:
    """The frozen copy of the parent, on the meta device."""
    plain = Setting(setting.kind, dtype=setting.parent or setting.dtype, vocabulary=setting.vocabulary)
    return _model(config, replace(plain, bits=4 if setting.rounded else None, attention=setting.attention))


@undivided()
def predict(config: Any, setting: Setting) -> Memory:
    """The peak memory of one rank, by parts, without what the process holds before the model is loaded.

    Args:
        config: transformers' config of the model.
        setting: How it is trained.

    Raises:
        Exception: The model cannot be run on shapes alone; any that it raises.
    """
    model = _model(config, setting)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    # Packed rows have a mask, however many there are.
    masked = setting.packed or (setting.kind == "causal" and not setting.pairs)
    padded = masked or setting.pairs or (setting.kind != "masked" and setting.rows > 1)
    device = Device(setting.device, setting.autocast, padded)
    if setting.adapter is not None and setting.checkpointing is not None:
        model.enable_input_require_grads()
    step = (_pairs if setting.pairs else _STEPS[setting.kind])(setting)
    found = trace(
        model,
        step,
        device,
        vocabulary=vocabulary,
        checkpointing=setting.checkpointing,
        accumulate=setting.accumulation > 1,
        share=MASKED_SHARE if setting.kind == "masked" else 1.0,
    )
    held = copies(config, setting)
    found = replace(found, weights=found.weights + sum(held))
    states, host, moment = _optimizer_bytes(setting, trained)
    gradients = sum(weight.nbytes for weight in trained)
    moments = [
        replace(found, optimizer=states),
        Memory(found.weights, gradients, states, temporary=moment, framework=found.framework),
    ]
    if setting.ranks > 1:
        whole = _scales(model) + (_scales(_parent(config, setting)) if setting.rounded else 0)
        moments = [_spread(one, setting, gradients, model, whole) for one in moments]
        if setting.sharding in SPREADING and setting.bits == 4:
            moments.append(_quantizing(config, setting))
    peak = max(moments, key=lambda one: one.total)
    if setting.device == "cuda":
        return replace(peak, framework=0, host=host)
    return replace(peak, framework=peak.framework + LIBRARIES, host=host)


def predicted(config: Any, setting: Setting, held: int) -> tuple[Memory | None, str]:
    """Returns the peak memory, or None and the reason why the model cannot be run on shapes alone.

    Args:
        config: transformers' config of the model.
        setting: How it is trained.
        held: Bytes that the process holds before the model is loaded.
    """
    try:
        found = predict(config, setting)
        return replace(found, framework=found.framework + held), ""
    except Exception as error:  # any model's code may ask for the values of a tensor
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def _model(config: Any, setting: Setting) -> Any:
    """The model as it is trained, on the meta device."""
    task = {"sft": "causal", "translation": "seq2seq"}.get(setting.kind, setting.kind)
    options = {"attn_implementation": setting.attention} if setting.attention in ("eager", "sdpa") else {}
    with undivided(), torch.device("meta"):
        # A copy: embeddings that grow write their size into it.
        model = AUTO_CLASSES[task].from_config(copy.deepcopy(config), dtype=setting.dtype, **options)
        make_room(model, setting.vocabulary)
        fake_quantize(model, setting.qat)
        if setting.bits:
            quantize(model, setting.bits, setting.compute, keep=("score", "classifier"))
        if setting.adapter is not None:
            word = {"classification": "SEQ_CLS", "translation": "SEQ_2_SEQ_LM"}.get(setting.kind)
            fields = {key: value for key, value in setting.adapter.items() if key != "init_lora_weights"}
            model = add_adapter(model, fields | ({"task_type": word} if word else {}), 0)
    freeze(model, setting.train_only, setting.freeze)
    model.train()
    if setting.kind in ("causal", "sft"):
        model.config.use_cache = False
    return model


def _ids(setting: Setting, tokens: int | None = None) -> torch.Tensor:
    return torch.zeros(setting.rows * setting.forms, tokens or setting.tokens, dtype=torch.long, device="meta")


def _causal(setting: Setting) -> Any:
    ids = _ids(setting)
    if setting.has_linear_loss:
        return _linear({"input_ids": ids, "position_ids": ids, "labels": ids})
    if setting.device == "cuda" and setting.plain_loss:
        return _tiled(setting, {"input_ids": ids, "position_ids": ids})
    return lambda model: model(input_ids=ids, position_ids=ids, labels=ids, num_items_in_batch=1).loss


def _linear(batch: dict[str, torch.Tensor]) -> Any:
    """The loss of `hfpipe.model.linear_loss`, with the logits of a piece, which torch does not show."""

    def step(model: Any) -> torch.Tensor:
        head = model.get_output_embeddings()
        rows = min(PIECE, batch["labels"].numel())
        logits = torch.empty(rows, head.weight.shape[0], device="meta")
        gradient = torch.empty_like(head.weight) if head.weight.requires_grad else None
        loss = LinearLoss(head)(model, batch)
        del logits, gradient
        return loss

    return step


def _masked(setting: Setting) -> Any:
    ids = _ids(setting)
    return lambda model: masked_loss(model(input_ids=ids, attention_mask=ids), ids)


def _sft(setting: Setting) -> Any:
    ids = _ids(setting)
    batch = {"input_ids": ids, "attention_mask": ids}
    return _linear(batch | {"labels": ids}) if setting.has_linear_loss else _tiled(setting, batch)


def _tiled(setting: Setting, batch: dict[str, torch.Tensor]) -> Any:
    """The loss of TRL's fused head: hidden states in tiles, on a CPU of every position."""

    def step(model: Any) -> torch.Tensor:
        hidden = backbone_of(model)(**batch, use_cache=False).last_hidden_state[:, :-1]
        head = head_of(model).weight
        return TiledHead.apply(hidden.reshape(-1, hidden.shape[-1]), head, setting.device, setting.autocast).sum()

    return step


def _classification(setting: Setting) -> Any:
    ids = _ids(setting)
    return lambda model: model(input_ids=ids, attention_mask=ids).logits.float().sum()


def _translation(setting: Setting) -> Any:
    ids, said = _ids(setting), _ids(setting, setting.targets or setting.tokens)
    loss = TranslationLoss(0.0)
    return lambda model: loss(model(input_ids=ids, attention_mask=ids, decoder_input_ids=said), said, 1)


def _pairs(setting: Setting) -> Any:
    """DPOTrainer's loss: twice the rows through the tiled head, and once more with the adapter off."""
    ids = _ids(replace(setting, rows=math.ceil(2 * setting.rows * (1 + setting.beside))))

    def log_probabilities(model: Any) -> torch.Tensor:
        hidden = backbone_of(model)(input_ids=ids, attention_mask=ids, use_cache=False).last_hidden_state[:, :-1]
        head = head_of(model).weight
        return TiledHead.apply(hidden.reshape(-1, hidden.shape[-1]), head, setting.device, setting.autocast)

    def step(model: Any) -> torch.Tensor:
        found = log_probabilities(model)
        if setting.adapter is not None:
            with torch.no_grad(), model.disable_adapter():
                log_probabilities(model)
        return found.sum()

    return step


_STEPS = {
    "causal": _causal,
    "masked": _masked,
    "sft": _sft,
    "classification": _classification,
    "translation": _translation,
}


def _optimizer_bytes(setting: Setting, trained: list[torch.Tensor]) -> tuple[int, int, int]:
    """Bytes of an optimizer's states, of those that may lie in the machine's memory, and of its step for a moment."""
    name, total = setting.optim, sum(weight.nbytes for weight in trained)
    largest = max((weight.numel() for weight in trained), default=0) * 4
    if "8bit" in name:  # bitsandbytes leaves small tensors in float32
        each = 1 if "lion" in name or "rmsprop" in name else 2
        states = sum(weight.numel() * each * (1 if weight.numel() >= 4096 else 4) for weight in trained)
    elif "adafactor" in name:
        states = sum(4 * (sum(weight.shape) if weight.dim() > 1 else weight.numel()) for weight in trained)
        return states, 0, 3 * largest
    elif name.startswith("sgd"):
        states = 0
    else:
        states = total * (1 if any(one in name for one in ("lion", "rmsprop", "adagrad")) else 2)
    if "paged" in name and setting.device == "cuda":
        return 0, states, 0
    fused = "fused" in name or "bit" in name or "bnb" in name
    return states, 0, 0 if fused else total if setting.device == "cuda" else 2 * largest


def _spread(memory: Memory, setting: Setting, gradients: int, model: Any, scales: int) -> Memory:
    """The share of one rank of a memory that was predicted for one process.

    Args:
        memory: Of one process.
        setting: Its ranks and sharding.
        gradients: Bytes of all gradients.
        model: As it is trained, on the meta device.
        scales: Bytes of the scales of 4-bit weights, which every rank has.
    """
    if setting.sharding == "none":  # DDP keeps the gradients in buckets beside them
        return replace(memory, gradients=memory.gradients + gradients)
    beside = setting.adapter is not None and setting.sharding == "fsdp"  # an adapter lies whole on each rank
    count, trained = setting.ranks, 1 if beside else setting.ranks
    share = {"optimizer": memory.optimizer // trained}
    if setting.sharding in ("zero2", *SPREADING):
        share["gradients"] = memory.gradients // trained
    if setting.sharding in SPREADING:
        whole = scales + (gradients if beside else 0)
        waits = setting.offloaded and setting.device != "cpu"
        weights = whole + (0 if waits else (memory.weights - whole) // count)
        if setting.parent is not None:
            weights += head_of(model).weight.numel() * setting.parent.itemsize  # gathered too
        share |= {"weights": weights, "temporary": memory.temporary + 2 * _unit(model, setting)}
        if waits and not beside:
            share |= {"gradients": 0, "optimizer": 0}
    return replace(memory, **share)


def _scales(model: Any) -> int:
    """Bytes of the scales of 4-bit weights."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return sum(layer.stored_bytes - layer.weight.numel() // 2 for layer in layers)


def _quantizing(config: Any, setting: Setting) -> Memory:
    """The memory of one rank while a base that it has read its part of is quantized, one weight after another."""
    model = _model(config, replace(setting, adapter=None, train_only=None, freeze=None))
    layers = [module.weight.numel() for module in model.modules() if isinstance(module, QuantizedLinear)]
    largest = max(layers, default=0)
    rest = sum(weight.numel() for weight in model.parameters()) * setting.dtype.itemsize // setting.ranks
    waits = setting.offloaded and setting.device != "cpu"
    # bitsandbytes quantizes by a kernel on a GPU, and on a CPU by steps that make float32 tensors.
    moment = largest * (2 * setting.dtype.itemsize + (16 if setting.device == "cpu" else 0))
    return Memory(weights=_scales(model) + (0 if waits else rest), temporary=moment)


def _unit(model: Any, setting: Setting) -> int:
    """Bytes of the largest layer, or of what lies outside of the layers, in the precision that it is gathered in."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = layers_of(inner)
    within = {module for layer in found for module in layer.modules() if module is not layer}
    layers = [weight_bytes(layer) for layer in found if layer not in within]  # mBART names the attention in them too
    rest = weight_bytes(inner) - sum(layers)
    largest = max([*layers, rest])
    if setting.autocast is None or setting.bits:  # packed numbers are not cast
        return largest
    return largest * setting.autocast.itemsize // setting.dtype.itemsize


def available(device: str) -> tuple[int, str]:
    """Bytes that the peak memory of one rank may take on this machine, and where."""
    if device == "cuda":
        return round((torch.cuda.mem_get_info()[1] - CONTEXT) / (1 + CACHED)), "GPU"
    here = (
        ranks.state().num_processes
        if os.environ.get("LOCAL_WORLD_SIZE") is None
        else int(os.environ["LOCAL_WORLD_SIZE"])
    )
    return psutil.virtual_memory().total // here, "machine"


def out_of_memory(error: BaseException) -> bool:
    """Returns True if an error says that there is no more memory, on a GPU or in the machine."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
