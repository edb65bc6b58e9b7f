"""Loads tokenizers and models: a base of the Hub, a stage's folder, an adapter on its base, in 4 bits where asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_torch_bf16_gpu_available

from hfpipe import ranks
from hfpipe.errors import MachineError, RecipeError
from hfpipe.recipe import Model, Quantization

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class ModelRef:
    """Where a model lies and how it is to be loaded.

    Args:
        path: A Hub id or a folder; a folder with an adapter_config.json is an adapter.
        options: The recipe's model block: dtype, attention, `trust_remote_code`.
        revision: Commit or branch of a Hub id.
        quantization: How the weights (of an adapter: its base's) are stored.
    """

    path: str
    options: Model
    revision: str | None = None
    quantization: Quantization | None = None

    @property
    def is_adapter(self) -> bool:
        return (Path(self.path) / ADAPTER_CONFIG).is_file()


def device() -> torch.device:
    """The accelerator of this rank, or the CPU."""
    return ranks.state().device


def compute_dtype() -> torch.dtype:
    """bfloat16 where the hardware computes in it, else float32."""
    return torch.bfloat16 if device().type == "cuda" and is_torch_bf16_gpu_available() else torch.float32


def weights_dtype(options: Model, *, frozen: bool) -> torch.dtype:
    """Precision of the weights: the recipe's, or bfloat16 on a GPU for weights that are not trained.

    Weights that are trained stay in float32 (Trainer's autocast computes in bfloat16): updates of a small learning rate
    vanish in bfloat16.
    """
    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    return compute_dtype() if frozen else torch.float32


def quantization_config(block: Quantization) -> BitsAndBytesConfig:
    """bitsandbytes' own configuration, with the compute dtype of this hardware where the recipe is silent."""
    if block.type == "int8":
        return BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=block.llm_int8_threshold,
            llm_int8_skip_modules=block.llm_int8_skip_modules,
        )
    dtype = block.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=block.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=getattr(torch, dtype) if dtype else compute_dtype(),
        bnb_4bit_quant_storage=block.bnb_4bit_quant_storage,
    )


@contextmanager
def clear_errors(what: str, path: str) -> Iterator[None]:
    """Turns the libraries' loading errors into one paragraph with the remedy."""
    try:
        yield
    except GatedRepoError as error:
        raise MachineError(
            f"{what} {path!r} is gated. Accept its conditions on its page of the Hub, then log in: `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise RecipeError(_not_found(what, path)) from error
    except OfflineModeIsEnabled as error:
        raise MachineError(f"{what} {path!r} is not in the cache and offline mode is on (HF_HUB_OFFLINE).") from error
    except ImportError as error:
        if "bitsandbytes" in str(error):
            raise MachineError("quantization needs bitsandbytes: pip install 'hfpipe[quantization]'.") from error
        raise
    except OSError as error:  # transformers wraps all of the above, and a missing file, in an OSError
        cause = error.__cause__ or error.__context__
        if isinstance(cause, GatedRepoError):
            raise MachineError(
                f"{what} {path!r} is gated. Accept its conditions on its page of the Hub, then log in: `hf auth login`."
            ) from error
        if isinstance(cause, RepositoryNotFoundError) or "is not a valid model identifier" in str(error):
            raise RecipeError(_not_found(what, path)) from error
        first_line = str(error).strip().split("\n")[0]
        raise MachineError(
            f"{what} {path!r} cannot be loaded: {first_line} Check the name, the network and the disk; "
            "a model that is in the cache loads without a network."
        ) from error


def _not_found(what: str, path: str) -> str:
    return (
        f"{what} {path!r} was found neither as a folder nor on the Hub. Check the spelling; a private one needs "
        "`hf auth login` with an account that may read it."
    )


def load_tokenizer(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Loads a fast tokenizer and makes sure that it has an EOS and a padding token.

    Raises:
        RecipeError: It does not exist, is not a fast tokenizer, or has no EOS token.
    """
    with clear_errors("tokenizer", path):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    if not tokenizer.is_fast:
        raise RecipeError(f"tokenizer {path!r} has no fast (Rust) form, which hfpipe needs for offsets and speed.")
    if tokenizer.eos_token is None:
        raise RecipeError(f"tokenizer {path!r} has no EOS token; set one in its tokenizer_config.json.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(ref: ModelRef, *, frozen: bool = True) -> Any:
    """Loads the model a `ModelRef` names; an adapter comes on its own base.

    Args:
        ref: Where and how.
        frozen: Whether its weights stay as they are (evaluation, or the base of an adapter), which decides their dtype.

    Returns:
        A `PreTrainedModel` or `PeftModel` in evaluation mode, on this rank's device.
    """
    if ref.is_adapter:
        config = json.loads((Path(ref.path) / ADAPTER_CONFIG).read_text())
        base = ModelRef(
            config["base_model_name_or_path"],
            ref.options,
            revision=config.get("revision"),
            quantization=ref.quantization,
        )
        return PeftModel.from_pretrained(load_model(base), ref.path).eval()
    options: dict[str, Any] = {}
    if ref.quantization:
        options["quantization_config"] = quantization_config(ref.quantization)
        options["device_map"] = {"": device()}
    if ref.options.attn_implementation:
        options["attn_implementation"] = ref.options.attn_implementation
    with clear_errors("model", ref.path):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            ref.path,
            revision=ref.revision or "main",
            dtype=weights_dtype(ref.options, frozen=frozen),
            trust_remote_code=ref.options.trust_remote_code,
            use_safetensors=True,
            **options,
        )
    if not ref.quantization:
        torch.nn.Module.to(model, device())
    return model.eval()
