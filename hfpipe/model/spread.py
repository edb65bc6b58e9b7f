"""Weights that are spread over the ranks before they are read, for models that are larger than a device.

transformers builds the model without memory (`distributed_config`), has PyTorch's FSDP2 divide every tensor by its
rows, and then reads of each file the rows of this rank alone. So no rank ever holds more than its part and the layer
that it computes. What comes on top of such a model, an adapter, lies whole on every rank; see `average_gradients`.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import disable_fsdp_ram_efficient_loading, enable_fsdp_ram_efficient_loading, parse_flag_from_env
from peft import set_peft_model_state_dict
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.distributed import DistributedConfig
from transformers.modeling_outputs import BaseModelOutput

from hfpipe.core import ranks
from hfpipe.core.upstream import (
    computed_weights_divided,
    divide_one_by_one,
    draw_weights,
    files_read_by_rows,
    gather_shared_weights_once,
    layer_classes,
    leave_training_to_accelerate,
    override,
    shared_weights_divided_together,
    state_its_rounding,
    take_fsdp_away,
    whole_weight,
)
from hfpipe.model.shards import give_back_memory, hold_no_free_memory

RELOADED = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # accelerate's way: the first rank reads all, and the others nothing


def launched() -> bool:
    """Returns True if this launch has several ranks and spreads weights over them, by FSDP2 or by ZeRO-3."""
    return launched_by_fsdp() or _asks_for("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")


def launched_by_fsdp() -> bool:
    """Returns True if this launch has several ranks and asks for FSDP2."""
    return _asks_for("ACCELERATE_USE_FSDP", "FSDP_VERSION", "2")


def _asks_for(flag: str, kind: str, wanted: str) -> bool:
    return parse_flag_from_env(flag) and os.environ.get(kind) == wanted and ranks.ranks() > 1


def ranks_of_a_copy() -> int:
    """Ranks that together hold all weights: every one, or with hybrid sharding those of one copy of several."""
    return ranks.ranks() // copies()


def copies() -> int:
    """Copies of the weights that the ranks of this launch hold together: with hybrid sharding more than one."""
    return int(os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE") or 1) if launched_by_fsdp() else 1


def is_offloaded() -> bool:
    """Returns True if this launch keeps the parts of weights that are spread in the memory of the machine."""
    return launched_by_fsdp() and parse_flag_from_env("FSDP_OFFLOAD_PARAMS")


def device_of(model: Any) -> torch.device:
    """Returns the device that a model computes on, which its weights come to with CPU offload."""
    spread = is_offloaded() and any(isinstance(module, FSDPModule) for module in model.modules())
    return ranks.state().device if spread else model.device


def layers_of(shapes: Any) -> list[torch.nn.Module]:
    """Returns the layers of a model, each of which is gathered alone: those that it names, or all in its lists.

    Args:
        shapes: The model; its shapes are enough.
    """
    classes = set(layer_classes(shapes))
    named = [module for module in shapes.modules() if type(module).__name__ in classes]
    lists = [module for module in shapes.modules() if isinstance(module, torch.nn.ModuleList)]
    return named or [layer for one in lists for layer in one]


def plan_for(shapes: Any, *, frozen: bool) -> DistributedConfig:
    """Returns the division of a model over all ranks of this launch.

    Each layer is gathered alone, and so are embeddings that the input alone reads where all weights are trained.
    transformers adds what a model itself names (`_fsdp_plan`), as Llama its embeddings, and its last norm with its
    head. What remains is gathered with the whole model, and stays so for a pass.

    Args:
        shapes: The model; its shapes are enough.
        frozen: Whether its weights stay as they are.
    """
    names = {module: name for name, module in shapes.named_modules()}
    layers = [names[layer] for layer in layers_of(shapes)]
    embeddings, head = shapes.get_input_embeddings(), shapes.get_output_embeddings()
    tied = getattr(shapes.config.get_text_config(), "tie_word_embeddings", False)
    if not (frozen or tied or head is None or shapes.config.is_encoder_decoder):
        layers.append(names[embeddings])
    return DistributedConfig(
        fsdp_size=ranks_of_a_copy(),
        dp_replicate_size=copies(),
        fsdp_plan=dict.fromkeys((re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in layers), "free_full_weight"),
        fsdp_cpu_offload=is_offloaded(),
    )


@contextmanager
def each_rank_reads() -> Iterator[None]:
    """Lets every rank read its own part while a model is loaded, whatever the launch says of reading on the first.

    The parts of a model that was used before are let go first.
    """
    gc.collect()  # they may hang in cycles
    if ranks.state().device.type == "cpu":
        hold_no_free_memory()
        give_back_memory()
    given = parse_flag_from_env(RELOADED)
    disable_fsdp_ram_efficient_loading()
    try:
        with files_read_by_rows(), computed_weights_divided(), shared_weights_divided_together():
            yield
    finally:
        if given:
            enable_fsdp_ram_efficient_loading()


@torch.no_grad()
def draw_fresh(model: Any, modules: Collection[str], state: torch.Tensor) -> None:
    """Gives modules whose weights no file holds the first weights that they have on one rank.

    transformers draws the part of each rank by itself, which makes other weights of them.

    Args:
        model: A spread model.
        modules: Names of modules, in the order of the model.
        state: Of torch's generator on the CPU, before the model was loaded.
    """
    torch.set_rng_state(state)
    for name in modules:
        module = model.get_submodule(name)
        parts = {key: part for key, part in module.named_parameters(recurse=False) if isinstance(part, DTensor)}
        for key, part in parts.items():
            whole = torch.empty(part.shape, dtype=part.dtype, device=part.device)
            module.register_parameter(key, torch.nn.Parameter(whole))
        draw_weights(model, module)
        for key, part in parts.items():
            _put(part, module.get_parameter(key).data)
            module.register_parameter(key, part)


def _put(part: DTensor, whole: torch.Tensor) -> None:
    """Gives a part what it has of a tensor that is the same on every rank."""
    own = distribute_tensor(whole, part.device_mesh, part.placements, src_data_rank=None)
    part.to_local().copy_(own.to_local())


def part_of(whole: torch.Tensor, like: DTensor) -> torch.nn.Parameter:
    """Returns what this rank has of a tensor that is the same on every rank, divided as another one is.

    Args:
        whole: The tensor.
        like: One of its shape and type; it may be without memory.
    """
    place = "cpu" if is_offloaded() else whole.device
    own = torch.empty(like.to_local().shape, dtype=whole.dtype, device=place)
    divided: Any = {"run_check": False, "shape": like.shape, "stride": like.stride()}
    part = DTensor.from_local(own, like.device_mesh, like.placements, **divided)
    _put(part, whole)
    return torch.nn.Parameter(part, requires_grad=like.requires_grad)


def _ends(model: Any) -> list[torch.nn.Module]:
    """Returns the embeddings of a model, and its head where it has one of their size."""
    return [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]


def differs_at_its_ends(one: Any, other: Any) -> bool:
    """Returns True if two models of one class have other shapes in their embeddings and head alone."""
    ends = {id(weight) for end in _ends(one) for weight in end.parameters(recurse=False)}
    ends |= {id(bias) for bias in one.buffers(recurse=False)}
    shapes = {name: tensor.shape for name, tensor in (*other.named_parameters(), *other.named_buffers())}
    tensors = (*one.named_parameters(), *one.named_buffers())
    return all(id(tensor) in ends or tensor.shape == shapes.get(name) for name, tensor in tensors)


@torch.no_grad()
def take_ends(shapes: Any, model: Any) -> None:
    """Gives a model without memory the embeddings and the head of a spread one, whole; every rank has to call this."""
    wholes: dict[int, torch.nn.Parameter] = {}  # by the part: a tied head is the embeddings again
    for whole, parted in zip(_ends(shapes), _ends(model), strict=True):
        for key, part in parted.named_parameters(recurse=False):
            if id(part) not in wholes:
                wholes[id(part)] = torch.nn.Parameter(cast(DTensor, part).full_tensor().cpu())
            whole.register_parameter(key, wholes[id(part)])
    for key, bias in model.named_buffers(recurse=False):  # Marian's and mBART's, of their head; not divided
        shapes.register_buffer(key, bias.cpu())


@torch.no_grad()
def give_ends(model: Any, shapes: Any) -> None:
    """Gives a spread model the embeddings and the head of one that has those alone; see `take_ends`."""
    for parted, whole in zip(_ends(model), _ends(shapes), strict=True):
        for key, part in parted.named_parameters(recurse=False):
            _put(cast(DTensor, part), whole.get_parameter(key).data.to(part.device))
    for key, bias in model.named_buffers(recurse=False):
        bias.copy_(shapes.get_buffer(key))


def is_spread(model: Any) -> bool:
    """Returns True if weights of a model are spread over the ranks."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def end_reading(model: Any) -> None:
    """Makes a model that was just read in parts ready for a pass, or for accelerate to train.

    All is divided again behind a pass, the head too: an optimizer that is made then has to find the parts.
    """
    gather_shared_weights_once(model)
    model.set_reshard_after_forward(True)
    leave_training_to_accelerate(model)


@torch.no_grad()
def hand_to_deepspeed(model: Any, config: Any) -> None:
    """Has DeepSpeed's ZeRO-3 divide a spread model before it is trained, one weight at a time; on every rank.

    No rank ever holds more than its part and one weight. What an adapter has added stays whole: DeepSpeed divides it
    when it begins to train.

    Args:
        model: A spread model, with an adapter or without; it is no longer spread after that.
        config: transformers' `HfTrainerDeepSpeedConfig`, once the trainer's arguments are in it.
    """
    halved = None if config.dtype() == torch.float32 else config.dtype()  # as DeepSpeed itself does of a whole model
    places: dict[DTensor, list[tuple[torch.nn.Module, str]]] = {}  # a tied weight has two
    for module in model.modules():
        for key, part in module.named_parameters(recurse=False):
            if isinstance(part, DTensor):
                places.setdefault(part, []).append((module, key))
            elif halved and part.is_floating_point():
                part.data = part.data.to(halved)

    def whole() -> Iterator[torch.nn.Parameter]:
        while places:
            part = next(iter(places))
            names = places.pop(part)
            gathered, (module, key) = part.full_tensor(), names[0]
            packed = key == "weight" and getattr(module, "quant_state", None) is not None
            if halved and part.is_floating_point() and not packed:
                gathered = gathered.to(halved)
            weight = torch.nn.Parameter(gathered, requires_grad=part.requires_grad)
            for module, key in names:
                module.register_parameter(key, weight)
            if packed:
                state_its_rounding(module)
                weight = module.get_parameter(key)
            del part, gathered
            yield weight

    take_fsdp_away(model)  # which holds all parts to its end, in objects that hold each other
    gc.collect()
    divide_one_by_one(whole(), config.config)
    # By it `save_pretrained` waits for all ranks, and one rank alone calls that.
    vars(model.config).pop("distributed_config", None)


def gather_head(model: Any, head: torch.nn.Module) -> None:
    """Makes the head of a spread model whole on each rank until its next pass, or until its gradient is there.

    Args:
        model: A causal model after its pass; of one that is spread every rank has to call this.
        head: Its head.
    """
    for module in _around(model, head):
        module.unshard()


@torch.no_grad()
def state_of_whole_ends(model: Any) -> dict[str, Any]:
    """Returns the state of a spread model with its embeddings and head whole; every rank has to call this."""
    state = model.state_dict(keep_vars=True)
    ends = {id(weight) for end in _ends(model) for weight in end.parameters()}
    whole = {name: one.full_tensor() for name, one in state.items() if id(one) in ends and isinstance(one, DTensor)}
    return {name: whole.get(name, one.detach()) for name, one in state.items()}


@contextmanager
def gathered_head(model: Any, head: torch.nn.Module) -> Iterator[None]:
    """Makes the head of a spread model whole on each rank inside the block; see `gather_head`."""
    gather_head(model, head)
    yield
    for module in _around(model, head):
        module.reshard()


def _around(model: Any, part: torch.nn.Module) -> list[FSDPModule]:
    """Returns the modules that FSDP2 gathers the weights of a part of a model with."""
    weights = {id(weight) for weight in part.parameters()}
    divided = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return [one for one in divided if any(id(weight) in weights for weight in cast(Any, one).parameters())]


@contextmanager
def in_step(model: Any) -> Iterator[None]:
    """Lets each rank make as many passes through a model as it has to, inside the block; every rank has to call this.

    All ranks take part in a pass through a spread model. So a rank says before each of its passes that it makes one,
    and one that is done makes passes of one token until no rank says so. A pass that is given what the encoder has read
    gathers no layer of the encoder: while any rank reads a source, those that go on with theirs read one token.

    Args:
        model: A model, spread or not. Passes begin at the whole model; see `sources_read`.
    """
    root: Any = next((module for module in model.modules() if isinstance(module, FSDPModule)), None)
    if root is None:
        yield
        return
    vars(root).pop("generate", None)  # Trainer's, which gathers the model before the first pass, where no rank says so
    passes = _Passes(root, device_of(model))
    hooks = [
        root.register_forward_pre_hook(passes.before, with_kwargs=True, prepend=True),
        root.register_forward_hook(passes.behind),
    ]
    try:
        yield
        passes.wait_for_others()
    finally:
        for hook in hooks:
            hook.remove()


class _Passes:
    """Agrees with all other ranks on the kind of each pass through a spread model.

    Args:
        root: The model; FSDP2 has divided it.
        device: Where it computes.
    """

    NONE, GOES_ON, READS = range(3)  # the kinds; by the second a decoder goes on with what its encoder has read

    def __init__(self, root: Any, device: torch.device) -> None:
        self.root = root
        self.kind = torch.zeros(1, device=device)
        self.token = torch.zeros((1, 1), dtype=torch.long, device=device)
        self.read: torch.Tensor | None = None  # (1, 1, D) what an encoder has said of some token
        self.stands_in = False

    def before(self, _: Any, words: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Makes passes of one token before a pass of this rank, as long as others make such as come before it."""
        if not self.stands_in:
            kind = self.READS if named.get("encoder_outputs") is None else self.GOES_ON
            while (agreed := self._agreed(kind)) > kind:
                self._stand_in(agreed)

    def behind(self, _: Any, words: tuple[Any, ...], output: Any) -> None:
        """Keeps what an encoder says of a token; every rank takes part in a pass that reads before one that goes on."""
        if (read := getattr(output, "encoder_last_hidden_state", None)) is not None:
            self.read = read[:1, :1].clone()

    def wait_for_others(self) -> None:
        """Makes passes of one token until no rank makes any."""
        while agreed := self._agreed(self.NONE):
            self._stand_in(agreed)

    def _agreed(self, kind: int) -> int:
        self.kind.fill_(kind)
        torch.distributed.all_reduce(self.kind, op=torch.distributed.ReduceOp.MAX)
        return int(self.kind)

    @torch.no_grad()
    def _stand_in(self, kind: int) -> None:
        goes_on = kind == self.GOES_ON
        inputs: dict[str, Any] = (
            {"encoder_outputs": BaseModelOutput(self.read)} if goes_on else {"input_ids": self.token}
        )
        if self.root.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = self.token
        self.stands_in = True
        self.root(**inputs)
        self.stands_in = False


def sources_read(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Returns what a spread encoder-decoder model is given to generate: its inputs, and what its encoder says of them.

    Given the inputs alone, `generate` calls the encoder by itself, and FSDP2 gathers weights in a pass of the whole
    model. Other models get their inputs as they are.

    Args:
        model: The model, spread or not.
        inputs: `input_ids` and `attention_mask` (B, L) of sources.
    """
    if not is_spread(model):
        return inputs
    start = torch.zeros_like(inputs["input_ids"][:, :1])
    output = model(**inputs, decoder_input_ids=start, use_cache=False)
    return inputs | {"encoder_outputs": BaseModelOutput(output.encoder_last_hidden_state)}


def make_trained_whole(model: Any, saved: Path | None = None) -> None:
    """Makes the modules that an adapter trains in full (PEFT's `modules_to_save`) whole on every rank.

    Embeddings of which an adapter trains rows are gathered where it reads them. With CPU offload what an adapter has
    added goes to the device that computes.

    Args:
        model: A model with an adapter; of one that is not spread nothing is changed.
        saved: The folder of an adapter that was just put on the model, whose tensors go into those modules.
    """
    if not is_spread(model):
        return
    for name, copies in list(model.named_modules()):
        if name.endswith(".modules_to_save"):
            for module in copies.modules():
                for key, part in list(module.named_parameters(recurse=False)):
                    if isinstance(part, DTensor):
                        whole = torch.nn.Parameter(part.full_tensor(), requires_grad=part.requires_grad)
                        module.register_parameter(key, whole)
        if isinstance(copies, TrainableTokensLayer):
            override(copies, get_merged_weights=partial(_with_rows, copies, copies.get_merged_weights))
    if is_offloaded():
        for added in model.parameters():
            if not isinstance(added, DTensor):
                added.data = added.data.to(ranks.state().device)
    if saved is not None:
        set_peft_model_state_dict(model, load_file(saved / "adapter_model.safetensors"))


def _with_rows(layer: Any, merged: Callable[..., torch.Tensor], adapters: Sequence[str]) -> torch.Tensor:
    """Returns embeddings with the rows that an adapter trains; PEFT reads the others past the call that gathers them.

    Args:
        layer: PEFT's.
        merged: Its own function.
        adapters: Names of the adapters.
    """
    with whole_weight(layer.get_base_layer(), ranks.state().device):  # with CPU offload the part lies elsewhere
        return merged(adapters)


def average_gradients(model: Any) -> None:
    """Gives the weights that were added to a spread model, and lie whole on every rank, the mean of all gradients.

    FSDP2 averages the gradients of what it has divided alone.
    """
    count = ranks.ranks()

    def average(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        # A sum, since gloo has no mean. Once averaged, what is added to it later is averaged by the next call.
        torch.distributed.all_reduce(parameter.grad.div_(count))

    for parameter in model.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            parameter.register_post_accumulate_grad_hook(average)
