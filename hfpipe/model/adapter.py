"""Adapters: making, verifying by loading again, and merging."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import safe_open

from hfpipe.errors import RecipeError
from hfpipe.files import whole_folder
from hfpipe.model.classifier import is_classifier
from hfpipe.model.load import ModelRef, load_model

# Largest difference of log-probabilities that two ways of computing the same model may show, by precision.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


def lora_config(block: dict[str, Any]) -> LoraConfig:
    """PEFT's own configuration from the recipe's `lora:`, for a causal language model.

    Raises:
        RecipeError: PEFT refuses the values together.
    """
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **block})
    except (ValueError, TypeError) as error:
        raise RecipeError(f"lora: peft refuses it: {error}") from error


def verify_adapter(folder: Path) -> None:
    """Checks the files of a saved adapter: every tensor is finite and the adapter is not the identity.

    Raises:
        RuntimeError: A tensor is not finite, or every `lora_B` is zero although the stage trained.
    """
    b_seen = b_moved = False
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
            tensor = tensors.get_tensor(name)
            if not torch.isfinite(tensor).all():
                raise RuntimeError(f"{folder}: tensor {name} is not finite")
            if "lora_B" in name:
                b_seen = True
                b_moved = b_moved or bool(tensor.abs().max() > 0)
    if b_seen and not b_moved:
        raise RuntimeError(f"{folder}: every lora_B is zero: nothing was learned or the wrong weights were saved")


@torch.no_grad()
def probe(model: Any, tokenizer: Any, texts: list[str], max_length: int = 64) -> torch.Tensor:
    """Log-probabilities of the model over its vocabulary after each token of a few short texts, (N, V) in float32."""
    rows = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")["input_ids"].to(model.device)
        if not ids.numel():
            continue
        if is_classifier(model):  # (1, C), compared as they are: of one class the log-probability is always 0
            rows.append(model(input_ids=ids).logits.float().cpu())
        else:
            rows.append(model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1).cpu())
    return torch.cat(rows)


def difference(before: torch.Tensor, after: torch.Tensor) -> float:
    """Largest difference between two probes, in nats, over the tokens that either finds possible at all (p > 1e-4)."""
    possible = torch.maximum(before, after) > -9.2
    return float((before - after).abs()[possible].max())


def require_equal(before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype, what: str) -> float:
    """Raises a RuntimeError when two probes of what should be one model differ beyond the precision of `dtype`."""
    found = difference(before, after)
    if not found <= TOLERANCE.get(dtype, 0.25):
        raise RuntimeError(f"{what} differs from what was trained: log-probabilities by {found:.3g} nats")
    return found


def merge_adapter(adapter: ModelRef, tokenizer: Any, folder: Path, texts: list[str]) -> float:
    """Merges an adapter into its full-precision base and verifies the result by loading it again.

    Args:
        adapter: The adapter's folder.
        tokenizer: Goes beside the weights, with its chat template.
        folder: Where the merged model is written, in one piece.
        texts: A few held-out texts for the comparison.

    Returns:
        The largest difference of log-probabilities between the merged model and the adapter, in nats.

    Raises:
        RuntimeError: The merged model is not the adapter's.
    """
    full = dataclasses.replace(adapter, quantization=None)
    model = load_model(full)
    before = probe(model, tokenizer, texts)
    merged = model.merge_and_unload(safe_merge=True)
    with whole_folder(folder) as beside:
        merged.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        del model, merged
        again = load_model(dataclasses.replace(full, path=str(beside)))
        try:
            return require_equal(before, probe(again, tokenizer, texts), again.dtype, "the merged model")
        except RuntimeError:
            shutil.rmtree(beside)
            raise
