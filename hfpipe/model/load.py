"""Loads models: a base of the Hub, a stage's folder, an adapter on its base, in 4 bits where asked."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)
from transformers.integrations import unset_hf_deepspeed_config
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from hfpipe.core import display, ranks
from hfpipe.core.downloads import Download
from hfpipe.core.errors import RecipeError
from hfpipe.core.files import load_json
from hfpipe.core.run_layout import ADAPTER_CONFIG
from hfpipe.core.upstream import adapters_of_whole_layers, copied_whole
from hfpipe.model.classifier import HEAD_MODULES, SUFFIX, read_head
from hfpipe.model.fake_quantized import fake_quantize
from hfpipe.model.load_errors import clear_errors, pickles_only, require_token_ids
from hfpipe.model.parameters import freeze_tables
from hfpipe.model.spread import (
    differs_at_its_ends,
    draw_fresh,
    each_rank_reads,
    end_reading,
    give_ends,
    launched,
    make_trained_whole,
    plan_for,
    take_ends,
)
from hfpipe.model.spread_quantized import is_spread_in, quantize_spread
from hfpipe.model.tokenizer import make_room
from hfpipe.recipe import Model, Qat, Quantization
from hfpipe.recipe.annotations import explain, fits
from hfpipe.recipe.passthrough import check_config
from hfpipe.recipe.raw import Block
from hfpipe.recipe.signatures import peft_fields

# What a model can be for, and the class that loads it for that.
AUTO_CLASSES: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "classification": AutoModelForSequenceClassification,
}
# Options of `from_pretrained` that are no fields of a config.
_PASSED = {
    "attn_implementation",
    "config",
    "device_map",
    "distributed_config",
    "dtype",
    "ignore_mismatched_sizes",
    "quantization_config",
}
# PEFT's words; it has none for masked models.
ADAPTER_TASKS = {"CAUSAL_LM": "causal", "SEQ_CLS": "classification", "SEQ_2_SEQ_LM": "seq2seq"}


@dataclass(frozen=True)
class ModelRef:
    """The place of a model, and how it is to be loaded.

    Args:
        path: A Hub id or a folder; a folder with an adapter_config.json is an adapter.
        options: The recipe's model block: dtype, attention, `trust_remote_code`.
        revision: Commit or branch of a Hub id.
        quantization: How the weights (of an adapter: its base's) are stored.
        vocabulary: Tokens that the embeddings must have rows for; they grow where they have fewer.
        qat: The quantization that it was trained for (of an adapter: with its base), which rounds in each pass.
    """

    path: str
    options: Model
    revision: str | None = None
    quantization: Quantization | None = None
    vocabulary: int | None = None
    qat: Qat | None = None

    @property
    def is_adapter(self) -> bool:
        return (Path(self.path) / ADAPTER_CONFIG).is_file()

    @property
    def base(self) -> ModelRef:
        """The model that an adapter belongs to; one of the same run is found where the run folder lies now."""
        config = read_adapter(self.path)
        named = Path(config["base_model_name_or_path"])
        here = Path(self.path).absolute().parent.parent.parent.joinpath(*named.parts[-3:])  # stages/<stage>/model
        moved = named.is_absolute() and not named.exists() and here.is_dir()
        path = str(here) if moved else config["base_model_name_or_path"]
        return replace(self, path=path, revision=config.get("revision"))


def device() -> torch.device:
    """The accelerator of this rank, or the CPU."""
    return ranks.state().device


def device_with_room(size: int) -> torch.device:
    """This rank's device if a model of `size` bytes fits into what is free of its memory, else the CPU."""
    place = device()
    fits = place.type != "cuda" or has_room(size, free_memory(place))
    return place if fits else torch.device("cpu")


def free_memory(place: torch.device) -> int:
    """Bytes that are free on a GPU, or in the memory of this machine."""
    if place.type != "cuda":
        return psutil.virtual_memory().available
    gc.collect()  # what was used before may hang in cycles
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(place)[0]


def has_room(size: int, free: int) -> bool:
    """Returns True if a model of `size` bytes may go where `free` bytes are, and leave some to compute in."""
    return size + size // 10 + 2**28 <= free


def compute_dtype() -> torch.dtype:
    """bfloat16 on a GPU that computes in it, float16 on an older one, float32 on a CPU.

    T4 and V100 take bfloat16 and emulate it, several times slower than float16.
    """
    if device().type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def weights_dtype(options: Model, *, frozen: bool) -> torch.dtype:
    """Precision of the weights: the recipe's, or that of the GPU for weights that are not trained.

    Weights that are trained stay in float32 (Trainer's autocast computes in half precision): updates of a small
    learning rate vanish in bfloat16.
    """
    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    return compute_dtype() if frozen else torch.float32


def quantization_config(block: Quantization, task: str) -> BitsAndBytesConfig:
    """bitsandbytes' own configuration, with the compute dtype of this hardware where the recipe is silent."""
    skipped = block.llm_int8_skip_modules
    if task == "classification" and skipped is None:
        skipped = HEAD_MODULES  # a head is trained, and new: it stays in full precision
    if block.type == "int8":
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=block.llm_int8_threshold, llm_int8_skip_modules=skipped
        )
    dtype = block.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=block.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=getattr(torch, dtype) if dtype else compute_dtype(),
        bnb_4bit_quant_storage=block.bnb_4bit_quant_storage,
        llm_int8_skip_modules=skipped,
    )


def read_adapter(folder: str | Path) -> dict[str, Any]:
    """Returns the adapter_config.json of a folder.

    Raises:
        RecipeError: It is no JSON, names no base, or a field has a value of another type than PEFT's config takes.
    """
    path = Path(folder) / ADAPTER_CONFIG
    try:
        config = load_json(path)
        base = config["base_model_name_or_path"]
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise RecipeError(
            f"{path} is damaged: it is no JSON that names a base. Put a copy of the file back."
        ) from error
    if not isinstance(base, str) or not base or "\0" in base:
        raise RecipeError(f"{path} is damaged: base_model_name_or_path is {base!r}. Write the folder or Hub id there.")
    fields = peft_fields(str(config.get("peft_type")).lower()) or {}
    for name, value in config.items():
        number = 0 if name == "lora_alpha" and isinstance(value, float) else value  # PiSSA's with rslora has a root
        if name in fields and not fits(number, fields[name].kinds):
            raise RecipeError(
                f"{path} is damaged: {name}: {explain(value, fields[name].kinds)} Correct it in that file."
            )
    return config


def task_of_type(model_type: str) -> str:
    """Returns the task that models of a type are pretrained for: a key of `AUTO_CLASSES`. BART is in both tables."""
    if model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "seq2seq"
    return "masked" if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "causal"


def config_of(ref: ModelRef) -> Any:
    """Returns transformers' config of a model that is not an adapter, with the recipe's changes to it.

    Raises:
        RecipeError: There is no such model, or its config has no such field.
    """
    changes = ref.options.config or {}
    with clear_errors("model", ref.path):
        config = AutoConfig.from_pretrained(
            ref.path, revision=ref.revision or "main", trust_remote_code=ref.options.trust_remote_code
        )
    model = Block(("model",), {"config": changes})
    for fault in check_config(model, config.model_type):
        raise RecipeError(f"{'.'.join(map(str, fault.steps))}: {fault.text}")
    for name, value in changes.items():
        key = "rope_parameters" if name == "rope_scaling" and hasattr(config, "rope_parameters") else name
        before = getattr(config, key, None)  # what a mapping does not say stays: rope_theta, for one
        setattr(config, key, before | value if isinstance(before, dict) and isinstance(value, dict) else value)
    if changes:
        with clear_errors("model", ref.path):
            config = type(config).from_dict(config.to_dict())  # which looks whether it fits together
    return config


def grows(ref: ModelRef) -> bool:
    """Returns True if the embeddings of a model that is not an adapter grow when it is loaded."""
    return (ref.vocabulary or 0) > config_of(ref).get_text_config().vocab_size


def is_quantized(config: Any) -> bool:
    """Returns True if the files of a model are quantized already."""
    return getattr(config, "quantization_config", None) is not None


def task_of(ref: ModelRef) -> str:
    """Returns the task that the model of a `ModelRef` was made for: a key of `AUTO_CLASSES`."""
    if ref.is_adapter:
        task = ADAPTER_TASKS.get(str(read_adapter(ref.path).get("task_type")))
        return task or task_of(ref.base)
    config = config_of(ref)
    names = config.architectures or []
    if any(name.endswith(SUFFIX) for name in names):
        return "classification"
    if any(name.endswith("ForCausalLM") or name.endswith("LMHeadModel") for name in names):
        return "causal"
    task = task_of_type(config.model_type)
    return "causal" if task == "seq2seq" and not config.is_encoder_decoder else task  # a decoder that hears sound


def load_model(
    ref: ModelRef,
    *,
    frozen: bool = True,
    head: dict[str, Any] | None = None,
    with_new_modules: bool = False,
    place: torch.device | None = None,
    spread: bool = False,
) -> Any:
    """Loads the model a `ModelRef` names; an adapter comes on its own base.

    Args:
        ref: Where and how.
        frozen: Whether its weights stay as they are (evaluation, or the base of an adapter), which decides their dtype.
        head: Fields of the config that make a classification head; None for the model as it is.
        with_new_modules: Whether to return the names of the modules with fresh weights too.
        place: Where it goes instead of this rank's device; not with `quantization`.
        spread: Whether each rank reads its own part, where the launch spreads weights (of 4 bits those that are not
            stored in bytes); every rank has to call this.

    Returns:
        A `PreTrainedModel` or `PeftModel` in evaluation mode, on this rank's device; and the new modules where asked.
    """
    if ref.is_adapter:
        return put_adapter(load_model(ref.base, head=head_fields(ref), place=place, spread=spread), ref)
    unset_hf_deepspeed_config()  # of a stage that was trained before: it would divide this model, and generation wait
    task = "classification" if head is not None else task_of(ref)
    options = _options_of(ref, task, head, frozen=frozen)
    shapes = _shapes_to_spread(ref, task, options) if spread else None
    if shapes is None and (ref.quantization or place is not None):
        options["device_map"] = {"": place or device()}
    if shapes is None:
        model, new, _ = _read(ref, task, options)
        if task == "seq2seq" and not frozen:
            freeze_tables(model)
    else:
        model, new = _read_in_parts(ref, task, options, shapes, frozen=frozen)
    require_token_ids(model, ref.path)
    make_room(model, ref.vocabulary)
    _leave_packing(model)
    fake_quantize(model, ref.qat)
    if not ref.quantization and shapes is None:
        torch.nn.Module.to(model, place or device())
    model.eval()
    return (model, new) if with_new_modules else model


def _read(ref: ModelRef, task: str, options: dict[str, Any]) -> tuple[Any, list[str], torch.Tensor]:
    """Reads a model; also returns its modules that no file holds, and the state of torch's generator before that."""
    # A checkpoint may lack the head for masked tokens: a fresh one is the same on every rank and at every load.
    fixed = torch.random.fork_rng() if task == "masked" else nullcontext()
    with clear_errors("model", ref.path), fixed, display.doing(f"loading {ref.path}"):
        if task == "masked":
            torch.manual_seed(0)
        state = torch.get_rng_state()
        model, info = AUTO_CLASSES[task].from_pretrained(
            ref.path,
            revision=ref.revision or "main",
            trust_remote_code=ref.options.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            tqdm_class=Download,
            **options,
        )
    return model, _modules_of(info), state


def _read_in_parts(
    ref: ModelRef, task: str, options: dict[str, Any], shapes: tuple[Any, Any], *, frozen: bool
) -> tuple[Any, list[str]]:
    """Reads this rank's part of a model; every rank has to call this.

    Args:
        ref: Where and how.
        task: See `AUTO_CLASSES`.
        options: See `_options_of`.
        shapes: The model as it comes, and as its embeddings are to grow or None, both without memory.
        frozen: Whether its weights stay as they are.

    Returns:
        The model, and its modules that no file holds.
    """
    now, grown = shapes
    options = options | {"distributed_config": plan_for(now, frozen=frozen)}
    quantization = options.pop("quantization_config", None)
    with each_rank_reads():
        model, new, state = _read(ref, task, options)
    new = sorted({name for names in ranks.gather(new) for name in names})
    if grown is not None:
        take_ends(now, model)
        del model
        make_room(now, ref.vocabulary)
        config = {"config": grown.config, "ignore_mismatched_sizes": True}
        with each_rank_reads():
            model, _, _ = _read(ref, task, {key: options[key] for key in options if key in _PASSED} | config)
        give_ends(model, now)
    draw_fresh(model, [name for name, _ in model.named_modules() if name in new], state)
    if quantization is not None:
        quantize_spread(model, quantization)
    end_reading(model)
    return model, new


def _shapes(ref: ModelRef, task: str, options: dict[str, Any], size: int | None = None) -> Any:
    """Builds a model without memory for its weights, with embeddings of `size` rows if given."""
    config = copy.deepcopy(options["config"]) if "config" in options else config_of(ref)
    for name, value in options.items():
        if name not in _PASSED:  # a field of the config
            setattr(config, name, value)
    if size is not None:
        config.get_text_config().vocab_size = size
        if getattr(config, "share_encoder_decoder_embeddings", False):  # Marian's
            config.decoder_vocab_size = size
    with clear_errors("model", ref.path), torch.device("meta"):
        return AUTO_CLASSES[task].from_config(config, trust_remote_code=ref.options.trust_remote_code)


def _options_of(ref: ModelRef, task: str, head: dict[str, Any] | None, *, frozen: bool) -> dict[str, Any]:
    """Arguments of `from_pretrained` that the recipe, the head and the files of a model decide; see `load_model`."""
    options: dict[str, Any] = {"dtype": weights_dtype(ref.options, frozen=frozen)}
    if ref.options.dtype == "auto" and is_quantized(config_of(ref)):
        options["dtype"] = "auto"  # transformers leaves their weights in the precision of the files; and so the biases
    if head:
        options["ignore_mismatched_sizes"] = True
    if ref.options.config:
        options["config"] = config_of(ref)
        for name, value in (head or {}).items():
            setattr(options["config"], name, value)
    else:
        options |= head or {}
    if ref.quantization:
        options["quantization_config"] = quantization_config(ref.quantization, task)
    if ref.options.attn_implementation:
        options["attn_implementation"] = ref.options.attn_implementation
    return options


def load_to_score(ref: ModelRef) -> Any:
    """Loads a model to ask it rows, spread over the ranks where the launch does that; every rank has to call this."""
    return load_model(ref, spread=True)


def trains_rows(adapter: Mapping[str, Any]) -> bool:
    """Returns True if an adapter trains rows of embeddings or a head."""
    return bool(adapter.get("trainable_token_indices"))


def _shapes_to_spread(ref: ModelRef, task: str, options: dict[str, Any]) -> tuple[Any, Any] | None:
    """Returns the shapes of a model of which each rank of this launch can read its part, and None of any other.

    It can be read as it is or be quantized after that, and grow at its embeddings and head. The second of the shapes
    are those of the grown model; None where it does not grow.
    """
    if not launched() or ref.qat is not None or is_quantized(config_of(ref)):
        return None
    if "quantization_config" in options and not is_spread_in(options["quantization_config"]):
        return None
    shapes, size = _shapes(ref, task, options), ref.vocabulary or 0
    if size <= shapes.config.get_text_config().vocab_size:
        return shapes, None
    grown = _shapes(ref, task, options, size)
    return (shapes, grown) if differs_at_its_ends(shapes, grown) else None


def put_adapter(base: Any, adapter: ModelRef) -> PeftModel:
    """Puts a saved adapter on a model that is loaded, in evaluation mode; the model becomes part of it."""
    if not (Path(adapter.path) / "adapter_model.safetensors").is_file():
        raise RecipeError(pickles_only(adapter.path))
    with clear_errors("adapter", adapter.path), adapters_of_whole_layers(), copied_whole(base):
        adapted = PeftModel.from_pretrained(base, adapter.path, torch_device=str(base.device)).eval()
        make_trained_whole(adapted, Path(adapter.path))
    return adapted


def head_fields(adapter: ModelRef) -> dict[str, Any] | None:
    """The fields of a config that make the head which an adapter of a classifier was trained with; None of another."""
    is_classifier = read_adapter(adapter.path).get("task_type") == "SEQ_CLS"
    return read_head(Path(adapter.path)) if is_classifier else None


def _leave_packing(model: Any) -> None:
    """Keeps 4-bit layers from bitsandbytes' kernel for CPUs that compute in bfloat16 (AVX512-BF16).

    At the first evaluation it packs the weights (`_convert_weight_packed_for_cpu`), for good. Training after that gets
    no gradient through the layer, DoRA reads the packed numbers as weights, and layers whose sides are no multiples of
    32 and 64 fail. It is faster for one token at a time, and slower for more.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _modules_of(info: dict[str, Any]) -> list[str]:
    """The modules whose weights a checkpoint does not hold, or holds in another shape."""
    names = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    return sorted({name.rpartition(".")[0] for name in names})


def is_masked(model: Any) -> bool:
    """Returns True if a model, or the one below an adapter, fills in masks."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).__name__.endswith("ForMaskedLM")
