"""The one place that reaches into the inside of a library, because no public function does what is needed.

Each function says what is missing and where that is discussed upstream. `TRIED` has the versions that all of this was
tried on; pyproject.toml allows no later major ones. tests/core/test_upstream.py fails when a library has changed what
is used here, or no longer needs it. Libraries are imported by the functions, since some commands need none of them.

Two more places depend on what a library does not document, and are tested there too: `data/sources/sharded_files.py`
and `line_files.py` subclass the example iterables of `datasets`, which alone can resume within a file, and
`model/memory.py` uses torch's dispatch mode, which torch's notes on extending it name by its private module.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partialmethod
from pathlib import Path
from typing import Any, cast

TRIED = {  # the lowest and the highest version
    "accelerate": ("1.15.0", "1.15.0"),
    "codecarbon": ("3.3.0", "3.3.2"),
    "datasets": ("5.2.0", "5.2.0"),
    "huggingface_hub": ("2.0.0", "2.4.0"),
    "peft": ("0.21.2", "0.21.2"),
    "sacrebleu": ("2.5.0", "2.6.0"),
    "torch": ("2.13.0", "2.13.0"),
    "transformers": ("5.23.0", "5.23.0"),
}


def override(thing: Any, **methods: Callable[..., Any]) -> None:
    """Replaces methods of one object of a library, as a subclass would.

    Trainer, Seq2SeqTrainer and SFTTrainer would each need a subclass with the same methods, and the accelerator is made
    by the trainer. A method that the library has renamed would be replaced without effect. No issue found.

    Raises:
        AttributeError: The object has no such method.
    """
    for name, method in methods.items():
        if not callable(getattr(thing, name)):
            raise AttributeError(f"{type(thing).__name__}.{name} is no method")
        setattr(thing, name, method)


# datasets


def end_streams_at_the_first_fault() -> None:
    """Lets `datasets` read and open a file of a stream once, and not twenty times in silence.

    It repeats after some faults and not after others, and no argument says how often: its maintainers name these
    variables (https://github.com/huggingface/datasets/issues/6172).
    """
    import datasets.config

    datasets.config.STREAMING_READ_MAX_RETRIES = 1
    datasets.config.STREAMING_OPEN_MAX_RETRIES = 1


@contextmanager
def count_no_load() -> Iterator[None]:
    """Keeps `datasets` from asking a server to count a load, inside the block.

    It counts files of this machine too, under the name of their builder, and waits for the answer: five seconds where
    no name server answers. Its variable for that is read once, at its import; no issue found.
    """
    import datasets.config

    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before


def builder_names() -> Collection[str]:
    """Returns the names that `load_dataset` takes for its own builders, such as json; no issue found."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return _PACKAGED_DATASETS_MODULES.keys()


def examples_of(stream: Any) -> Any:
    """Returns the example iterable of a stream.

    It alone can be shared by parts of files and resume in one: `IterableDataset` has shards of whole files, and finds
    its place by reading all that stands before it (https://github.com/huggingface/datasets/pull/6658).
    """
    return stream._ex_iterable


def with_examples(stream: Any, examples: Any) -> Any:
    """Returns a stream of other examples, with the metadata of `stream`; see `examples_of`."""
    from datasets import IterableDataset

    return IterableDataset(
        ex_iterable=examples,
        info=stream.info.copy(),
        split=stream.split,
        formatting=stream._formatting,
        token_per_repo_id=stream._token_per_repo_id,
    )


def file_builder_of(examples: Any) -> Any:
    """Returns the builder that reads the files of an example iterable as `load_dataset` made it; None for any other.

    See `examples_of`.
    """
    from datasets.iterable_dataset import ArrowExamplesIterable

    made = type(examples) is ArrowExamplesIterable
    return getattr(examples.generate_tables_fn, "__self__", None) if made else None


def tables_of(builder: Any) -> Callable[..., Iterator[tuple[Any, Any]]]:
    """Returns the function of a builder that reads files into tables; it has no public one; no issue found."""
    return builder._generate_tables


# transformers, and PEFT on its models


def mask_whole_words_in_linear_time(collator: Any) -> None:
    """Lets `DataCollatorForLanguageModeling` mask whole words in time and memory of one row's length.

    It compares every two tokens of a row: 0.3 s for one of 8,192, and 64 MB
    (https://github.com/huggingface/transformers/pull/39485 brought that).
    """
    import numpy as np

    def whole_word_mask(word_ids: Any, mask: Any) -> Any:
        """Returns all tokens (1, L) of the words of which a token is chosen.

        Args:
            word_ids: (1, L) number of each token's word, from 1 on; -1 of a special token.
            mask: (1, L) the chosen tokens.
        """
        chosen = np.asarray(mask)[0]
        return np.isin(word_ids, word_ids[0, chosen & (word_ids[0] != -1)])

    override(collator, _whole_word_mask=whole_word_mask)


def attention_of(model: Any) -> str:
    """Returns the name of the attention that a model was loaded with, which `config.attn_implementation` is not.

    No issue found.
    """
    return str(model.config._attn_implementation)


def layer_classes(model: Any) -> Collection[str]:
    """Returns the names of the classes of a model's layers, which FSDP gathers one at a time; no issue found."""
    return model._no_split_modules or ()


def draw_weights(model: Any, module: Any) -> None:
    """Draws the first weights of one module of a model.

    `initialize_weights` does so of all modules that no file held, and takes no module. No issue found.
    """
    model._init_weights(module)


@contextmanager
def files_read_by_rows() -> Iterator[None]:
    """Has `from_pretrained` read the rows of a tensor that it takes, and no more, into memory of their own.

    It maps files, whose pages around those rows count as the process' own; on Windows it reads. No issue found.
    """
    from transformers import modeling_utils

    library: Any = modeling_utils
    mapped = library.safe_open
    library.safe_open = lambda *names, **options: mapped(*names, **{**options, "backend": "pread"})
    try:
        yield
    finally:
        library.safe_open = mapped


@contextmanager
def computed_weights_divided() -> Iterator[None]:
    """Lets `from_pretrained` give a divided module weights that it works out, inside the block.

    No file holds the sinusoidal positions of Marian and Pegasus. transformers copies the whole table into the part of
    this rank, which fails. No issue found.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor
    from transformers import initialization

    library: Any = initialization
    copy = library.copy_

    def copied(tensor: Any, other: Any) -> Any:
        if isinstance(tensor, DTensor) and not isinstance(other, DTensor):
            whole = other.to(tensor.device)
            other = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
        return copy(tensor, other)

    library.copy_ = copied
    try:
        yield
    finally:
        library.copy_ = copy


@contextmanager
def shared_weights_divided_together() -> Iterator[None]:
    """Has `from_pretrained` divide weights that modules share with the rest of a model, inside the block.

    By its own plan it divides the embeddings of an encoder and of a decoder each for itself, which are one weight once
    they are read. No issue found.
    """
    from transformers.distributed import mixin

    library: Any = mixin
    divide = library.apply_fully_sharded_data_parallelism

    def divided(model: Any, mesh: Any, fsdp_plan: dict[str, str], ep_plan: dict[str, str]) -> Any:
        shared = [name for pair in model.all_tied_weights_keys.items() for name in pair]
        alone = {
            module: style
            for module, style in fsdp_plan.items()
            if not any(name.startswith(f"{module}.") for name in shared)
        }
        return divide(model, mesh, alone, ep_plan)

    library.apply_fully_sharded_data_parallelism = divided
    try:
        yield
    finally:
        library.apply_fully_sharded_data_parallelism = divide


def gather_shared_weights_once(model: Any) -> None:
    """Has FSDP2 take a weight that several modules share for one, in a model that was just read in parts.

    transformers ties weights once they are read, which FSDP2 has divided as several by then. It would gather each; and
    where their rows do not divide by the ranks it pads each for itself, so that all but one of them stay what they were
    before the first step. No issue found.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        for group in module._get_fsdp_state()._fsdp_param_groups if isinstance(module, FSDPModule) else ():
            places: dict[Any, Any] = {}  # by the weight
            kept = []
            for one in group.fsdp_params:
                place = one._module_info
                first = places.setdefault(getattr(place.module, place.param_name), place)
                if first is place:
                    kept.append(one)
                else:
                    first.shared_modules.append(place.module)
                    first.shared_param_names.append(place.param_name)
            group.fsdp_params = kept


@contextmanager
def without_hooks(module: Any) -> Iterator[None]:
    """Has a module, and those below it, be called without hooks inside the block.

    By FSDP2's every rank takes part in each call, and a call outside of a pass is taken for the beginning of one.
    `forward` passes the hooks of a module by, but an adapter's layer calls the layer below it. No public function
    takes hooks off for a time. No issue found.
    """
    kept = [(each, each._forward_pre_hooks, each._forward_hooks) for each in module.modules()]
    for each, _, _ in kept:
        each._forward_pre_hooks, each._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for each, before, behind in kept:
            each._forward_pre_hooks, each._forward_hooks = before, behind


def leave_training_to_accelerate(model: Any) -> None:
    """Takes the marks from a model that was loaded in parts by which the libraries treat it as such. No issue found.

    By the first Trainer leaves accelerate's FSDP2 aside and refuses to save an optimizer, and so to continue a
    training. By the second `generate` waits for the same call on every rank, which has as many of its own. By the
    third, which says that tensors are not divided among one rank, PEFT gathers the whole base to save an adapter.
    """
    model._is_distributed_loading_by_transformers = model._is_fsdp_managed_module = False
    model._tp_size = None


@contextmanager
def adapters_of_whole_layers() -> Iterator[None]:
    """Has PEFT make an adapter for the whole of a layer whose weights are spread over ranks, inside the block.

    It takes the part of this rank for the layer, as tensor parallelism would have it, where the mesh of the ranks has
    another dimension beside that of FSDP, as that of hybrid sharding does. And what starts from the weight of its layer
    (PiSSA, OLoRA, MiCA, DoRA, rows of embeddings) fails at a part of it. No issue found. Every rank has to make it:
    ranks may take a weight apart in different ways (by the signs, say), so what the first has made is given to all.
    """
    import torch
    from peft.tuners import tuners_utils
    from peft.tuners.lora import layer as layers
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from torch.distributed.tensor import DTensor, distribute_tensor

    @torch.no_grad()
    def updated(layer: Any, update: Callable[..., None], *words: Any, config: Any = None, **more: Any) -> None:
        base, part = layer.get_base_layer(), layer.get_base_layer().weight
        reads = isinstance(getattr(config, "init_lora_weights", "rows"), str)
        reads = reads or layer.resolve_lora_variant(config=config) is not None
        if not (reads and isinstance(part, DTensor)):
            update(layer, *words, config=config, **more)
            return
        with whole_weight(base):
            update(layer, *words, config=config, **more)
            for name, made in layer.named_parameters():
                if not name.startswith("base_layer."):
                    torch.distributed.broadcast(made.data, src=0)
            if getattr(base, "quant_state", None) is None:
                left = distribute_tensor(base.weight.data, part.device_mesh, part.placements)
                part.to_local().copy_(left.to_local())

    library: Any = tuners_utils
    kinds: tuple[Any, ...] = layers.LoraLayer, layers.Embedding, TrainableTokensLayer
    before, updates = library._torch_supports_distributed, [kind.update_layer for kind in kinds]
    library._torch_supports_distributed = False
    for kind, update in zip(kinds, updates, strict=True):
        kind.update_layer = partialmethod(updated, update)
    try:
        yield
    finally:
        library._torch_supports_distributed = before
        for kind, update in zip(kinds, updates, strict=True):
            kind.update_layer = update


@contextmanager
def whole_weight(layer: Any, place: Any = None) -> Iterator[None]:
    """Gives a layer whose weight is spread over ranks the whole of it inside the block; every rank has to call this.

    What reads weights outside of a pass, as PEFT does, finds the part of this rank there; see `state_its_rounding`.

    Args:
        layer: The layer; one whose weight is whole stays as it is.
        place: A device, if not that of the part.
    """
    import torch
    from torch.distributed.tensor import DTensor

    part = layer.weight
    if not isinstance(part, DTensor):
        yield
        return
    whole = part.full_tensor().to(place or part.device)
    layer.weight = torch.nn.Parameter(whole, requires_grad=part.requires_grad)
    try:
        if getattr(layer, "quant_state", None) is not None:
            state_its_rounding(layer)
        yield
    finally:
        layer.weight = part


def state_its_rounding(layer: Any) -> None:
    """Tells a 4-bit weight, which FSDP2 or another has made a plain one, how it is rounded, which its layer knows.

    bitsandbytes does so in a pass of the layer, and PEFT reads weights outside of one. No issue found.
    """
    from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

    fix_4bit_weight_quant_state_from_module(layer)


def takes_flash_attention(model: Any) -> bool:
    """Returns True if a model's layers hand position ids and masks on to flash kernels; no issue found."""
    return bool(model._supports_flash_attn)


@contextmanager
def undivided() -> Iterator[None]:
    """Keeps ZeRO-3 from dividing a model that one rank builds inside the block, and from its linear layers.

    transformers divides every model that is built as long as a trainer under ZeRO-3 lives, by calls in which all ranks
    have to take part. It has a function that ends this, and none that tells what was there. And DeepSpeed replaces
    torch's function of a linear layer for good, by one that fails on shapes alone. No issue found.
    """
    from torch.nn import functional
    from transformers.integrations import deepspeed as integration

    library, torch_functions = cast(Any, integration), cast(Any, functional)
    zero3 = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    before, linear = library._hf_deepspeed_config_weak_ref, functional.linear
    library.unset_hf_deepspeed_config()
    if zero3 is not None:
        torch_functions.linear = getattr(zero3.InsertPostInitMethodToModuleSubClasses, "linear_bk", linear)
    try:
        yield
    finally:
        library._hf_deepspeed_config_weak_ref, torch_functions.linear = before, linear


def left_out_of_checkpoints(model: Any) -> Collection[str]:
    """Returns the names of tensors that `save_pretrained` works out again at a load; no issue found."""
    return model._keys_to_ignore_on_save or ()


def save_code_of(model: Any, folder: Path) -> None:
    """Writes the Python files of a model whose code came with it, as `save_pretrained` does, without the weights.

    No public function writes the one without the other. No issue found.
    """
    from transformers.dynamic_module_utils import custom_object_save

    if model._auto_class is not None:
        custom_object_save(model, folder, config=model.config)


def forget_quantizer_conversions(model: Any) -> None:
    """Lets a model be saved whose quantized layers were replaced.

    `save_pretrained` undoes what was done to the weights when they were loaded, which the quantizer's part cannot be
    (https://github.com/huggingface/transformers/pull/44983 mends it for three other quantizers than bitsandbytes).
    """
    model._weight_conversions = [
        each
        for each in model._weight_conversions or ()
        if not any(getattr(operation, "hf_quantizer", None) for operation in getattr(each, "operations", ()))
    ]


def declare_dequantized(model: Any) -> None:
    """Says of a model whose quantized layers were replaced that it has none.

    PEFT asks for these flags, and would not merge IA3; `remove_quantization_config` leaves them. No issue found.
    """
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False


def loss_sums(trainer: Any) -> dict[str, float]:
    """Returns the sums of losses that Trainer makes its means of: not logged yet, the step of the last log, and logged.

    Its checkpoints lack them, so that the first mean after a resume is of fewer steps than others. No issue found.
    """
    since, before = trainer._globalstep_last_logged, trainer._total_loss_scalar
    return {"sum": float(trainer._tr_loss), "since": since, "before": before}


def set_loss_sums(trainer: Any, sums: dict[str, Any]) -> None:
    """Gives a trainer that continues from a checkpoint the sums back; see `loss_sums`."""
    trainer._tr_loss += sums["sum"]
    trainer._globalstep_last_logged, trainer._total_loss_scalar = sums["since"], sums["before"]
    trainer._initial_global_step = 0


def read_checkpoint_by(trainer: Any, weights: Callable[[], None], rest: Callable[[], None]) -> None:
    """Replaces how a trainer reads weights, and optimizer and schedule, of a checkpoint.

    It reads what the same plan has saved alone; no public function stands between. No issue found.
    """
    override(trainer, _load_from_checkpoint=lambda *_, **__: weights())
    override(trainer, _load_optimizer_and_scheduler=lambda checkpoint: rest() if checkpoint else None)


def part_shared_embeddings(model: Any) -> None:
    """Gives an encoder and a decoder a module each for the embeddings that they share, with one weight.

    `resize_token_embeddings` leaves them one module under two names, of which PEFT wraps the first alone. No issue
    found; of another model whose size changes then: https://github.com/huggingface/transformers/issues/32852.
    """
    import copy

    embeddings = model.get_input_embeddings()
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is embeddings]
    for name in names[1:]:
        model.set_submodule(name, copy.deepcopy(embeddings, {id(embeddings.weight): embeddings.weight}))


# torch


def default_store() -> Any:
    """Returns the store over which the ranks of the default process group met, which no public function gives.

    No issue found. A store of our own would need another port that is open between hosts.
    """
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


@contextmanager
def copied_whole(model: Any) -> Iterator[None]:
    """Lets modules of a model that FSDP2 has divided be copied, inside the block: as plain ones, whole on every rank.

    It refuses to copy a module that it divided on its own, such as a head. No issue found. Every rank has to copy them.
    """
    import copy
    from functools import partial

    import torch
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    def plain_copy(module: Any, memo: dict[int, Any]) -> Any:
        own: Any = next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
        plain, empty = own.__new__(own), vars(torch.nn.Module())
        vars(plain).update(vars(module))
        for name, nothing in empty.items():
            if "_hooks" in name:  # those of FSDP2 gather the module
                vars(plain)[name] = nothing
        for held in ("_parameters", "_buffers", "_modules"):
            vars(plain)[held] = dict(vars(module)[held])
        del vars(plain)["__deepcopy__"]
        for name, part in module.named_parameters(recurse=False):
            whole = part.full_tensor() if isinstance(part, DTensor) else part
            plain.register_parameter(name, torch.nn.Parameter(whole.detach().clone(), requires_grad=part.requires_grad))
        for name, inner in (*module.named_buffers(recurse=False), *module.named_children()):
            setattr(plain, name, copy.deepcopy(inner, memo))
        return plain

    divided = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in divided:
        vars(module)["__deepcopy__"] = partial(plain_copy, module)
    try:
        yield
    finally:
        for module in divided:
            del vars(module)["__deepcopy__"]


def gathered_together(model: Any) -> list[list[str]]:
    """Returns the names of the modules of a model that FSDP2 gathers and divides at once, those of the model first.

    A module does not tell with which others it was given to `fully_shard`. No issue found.
    """
    from torch.distributed.fsdp import FSDPModule

    units: dict[Any, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            units.setdefault(module._get_fsdp_state(), []).append(name)
    return list(units.values())


def take_fsdp_away(model: Any) -> None:
    """Takes from the modules of a model what FSDP2 made of them: their class and its hooks, which gather weights.

    Its parameters stay as they are, and are held by the model alone then. The modules can be divided again. Nothing
    undoes `fully_shard`. No issue found.
    """
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        for name, hooks in vars(module).items():
            if "_hooks" in name and isinstance(hooks, dict):
                for key, hook in list(hooks.items()):
                    if str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith("torch.distributed.fsdp"):
                        del hooks[key]
        for key in (STATE_KEY, REGISTRY_KEY):
            vars(module).pop(key, None)
        _module_state_mapping.pop(module, None)
        if isinstance(module, FSDPModule):
            plain: Any = next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
            module.__class__ = plain


# deepspeed


def divide_one_by_one(weights: Iterator[Any], config: dict[str, Any]) -> None:
    """Has ZeRO-3 divide weights among the ranks, each before the next is made; every rank has to call this.

    Its public form takes a module whose weights are all there. It asks that module for its parameters, and has divided
    one when it asks for the next. No issue found. What follows divides, by `deepspeed.initialize`, the rest.

    Args:
        weights: Parameters, whole and the same on every rank.
        config: DeepSpeed's.
    """
    import deepspeed
    import torch

    deepspeed.init_distributed()  # what reads the config asks it for the number of ranks
    module = torch.nn.Module()
    override(module, parameters=lambda recurse=True: weights)
    deepspeed.zero.Init(module=module, config_dict_or_path=config)


def shape_of(weight: Any) -> Any:
    """Returns the shape of a weight, which ZeRO-3 takes from one that it divides. No issue found."""
    return getattr(weight, "ds_shape", weight.shape)


def gathered_by_deepspeed(weight: Any) -> Any:
    """Returns a weight that ZeRO-3 has divided, whole, and any other as it is; every rank has to call this.

    No public function tells whether it has. No issue found.
    """
    if not hasattr(weight, "ds_id"):
        return weight
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()


# huggingface_hub


def left_out_of_commit(operations: Iterable[Any]) -> list[str]:
    """Returns the paths of added files that the next commit leaves out in silence, since a .gitignore names them.

    It has no argument against it (https://github.com/huggingface/huggingface_hub/pull/1868, and 1876, which took the
    argument away), and `preupload_lfs_files` tells of it in a private field only.
    """
    return [one.path_in_repo for one in operations if one._should_ignore]


def show_downloads(bar: type) -> None:
    """Has whatever is downloaded through an `HfApi` draw such a bar in place of huggingface_hub's own.

    `datasets` downloads files so, and has no argument for the bar; transformers has one. No issue found.

    Args:
        bar: A class as `tqdm_class` takes it.
    """
    from huggingface_hub import HfApi

    api: Any = HfApi
    if not isinstance(vars(api)["hf_hub_download"], partialmethod):
        api.hf_hub_download = partialmethod(api.hf_hub_download, tqdm_class=bar)


def list_served_model(place: str) -> None:
    """Has transformers' server list the model that it serves, the only one that it answers by.

    Its list is what the cache of the Hub holds (https://github.com/huggingface/transformers/pull/42146), an error where
    there is no cache, and clients that choose from the list find nothing that is answered.

    Args:
        place: The folder of the model, which is its name in the protocol.
    """
    from transformers.cli.serving.model_manager import ModelManager

    listed = [{"id": place, "object": "model", "created": round(Path(place).stat().st_mtime), "owned_by": "hfpipe"}]
    override(ModelManager, get_gen_models=staticmethod(lambda: listed))


# sacrebleu


def row_statistics(scorer: Any, predictions: Sequence[str], references: Sequence[str]) -> list[list[float]]:
    """Returns what a metric of sacrebleu counts in each row; no issue found.

    `corpus_score` gives the score of all rows alone, and a paired bootstrap over rows needs thousands of such scores.
    """
    return scorer._extract_corpus_statistics(predictions, [references])


def score_of_statistics(scorer: Any, sums: Sequence[float]) -> float:
    """Returns the score of rows whose statistics were summed; see `row_statistics`."""
    return float(scorer._compute_score_from_stats(list(sums)).score)


# codecarbon


@cache
def countries() -> dict[str, str]:
    """Returns names of the countries whose electricity codecarbon knows, by code; none where it is not installed.

    Its own reader of this file takes pandas and a second to import, which `check` does not have; no issue found.
    """
    package = importlib.util.find_spec("codecarbon")
    folder = next(iter(package.submodule_search_locations or ()), None) if package else None
    path = Path(folder or "", "data", "private_infra", "global_energy_mix.json")
    if not folder or not path.is_file():
        return {}
    mixes = json.loads(path.read_text(encoding="utf-8"))
    return {code: mix["country_name"] for code, mix in mixes.items() if mix.get("carbon_intensity") is not None}
