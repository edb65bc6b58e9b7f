"""The strength of what was trained: a model anywhere between its parent (0) and itself (1), in its weights.

W(s) = (1 - s) W_parent + s W_trained, for every weight (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903). Of an adapter
the same model is an adapter of the same kind again: the strength is folded into its own tensors, and plain PEFT loads
it. What an adapter holds besides (whole modules, biases, rows of an embedding) goes the straight line too.

Where the launch spreads weights over the ranks, each rank has its part of them, and every rank has to call all of this.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from hfpipe.core import ranks
from hfpipe.core.errors import RecipeError
from hfpipe.core.upstream import whole_weight
from hfpipe.model.adapter import ProbeText, probe, require_equal, verify_tensors
from hfpipe.model.classifier import read_head
from hfpipe.model.load import ModelRef, load_model, put_adapter, read_adapter, task_of
from hfpipe.model.load_errors import clear_errors
from hfpipe.model.parts import verify_parts, write_parts
from hfpipe.model.spread import is_spread

WEIGHTS = "adapter_model.safetensors"
# By PEFT's type (those of recipe/adapters.py): the tensors in which the change of the weights is linear, one factor of
# each product, so that scaling them scales it; those that stay; and those that multiply a weight, where 1 is no change.
SCALED = {
    "lora": ("lora_B", "lora_embedding_B"),
    "vera": ("vera_lambda_b",),
    "loha": ("hada_w1_a",),
    "lokr": ("lokr_w1", "lokr_w1_a"),
    "ia3": (),
}
KEPT = {
    "lora": ("lora_A", "lora_embedding_A"),
    "vera": ("vera_lambda_d", "vera_A", "vera_B"),
    "loha": ("hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "ia3": (),
}
MULTIPLIED = {"ia3": ("ia3_l",)}
MAGNITUDE, TOKENS = "lora_magnitude_vector", "trainable_tokens_delta"


def open_dial(
    trained: ModelRef, parent: ModelRef, tokenizer: Any, texts: Sequence[ProbeText]
) -> AdapterDial | WeightsDial:
    """Loads a trained stage so that its strength can be set.

    Args:
        trained: The stage's adapter or model.
        parent: What it started from, a whole model; an adapter knows its own.
        tokenizer: The run's tokenizer.
        texts: A few texts, on which a saved model is compared with the one that was saved.

    Raises:
        RecipeError: This kind of adapter has no strengths between.
    """
    if trained.is_adapter:
        return AdapterDial(trained, tokenizer, texts)
    return WeightsDial(trained, parent, tokenizer, texts)


class AdapterDial:
    """An adapter on its base, quantized or not."""

    how = "the adapter's own tensors, scaled"

    def __init__(self, trained: ModelRef, tokenizer: Any, texts: Sequence[ProbeText]) -> None:
        self.ref, self.tokenizer, self.texts = trained, tokenizer, texts
        self.config = read_adapter(trained.path)
        self.kind = str(self.config.get("peft_type")).lower()
        if self.kind not in SCALED:
            raise RecipeError(
                f"{trained.path}: an adapter of type {self.kind} cannot be saved at a strength between 0 and 1. "
                f"The types that can are {', '.join(SCALED)}; so can a full fine-tune."
            )
        head = read_head(Path(trained.path)) if task_of(trained) == "classification" else None
        loaded, new = load_model(trained.base, head=head, with_new_modules=True, spread=True)
        with clear_errors("adapter", trained.path):
            self.tensors = load_file(Path(trained.path) / WEIGHTS)
        self.parents = self._parents(loaded.state_dict(), new)
        self.model = put_adapter(loaded, trained)
        # The model's own tensors, which `at` writes to. PEFT's way of loading a state goes over all modules, at which
        # bitsandbytes packs its 4-bit weights anew: on a CPU the model is not the same afterwards.
        self.inside = get_peft_model_state_dict(self.model)
        if not new and self.config.get("bias", "none") == "none":  # else nothing takes the whole adapter away
            with self.model.disable_adapter():
                before = probe(self.model, tokenizer, texts)
            # A variant of LoRA that is not linear would be noticed by nobody otherwise.
            require_equal(before, probe(self.at(0.0), tokenizer, texts), loaded.dtype, f"{trained.path} at strength 0")

    def _parents(self, base: dict[str, torch.Tensor], new: list[str]) -> dict[str, torch.Tensor]:
        """Returns the base's tensor for every tensor that is not the adapter's alone; a new module is its own."""
        parents = {}
        own = {*SCALED[self.kind], *KEPT[self.kind], *MULTIPLIED.get(self.kind, ()), MAGNITUDE}
        for name, tensor in self.tensors.items():
            if own & set(name.split(".")):
                continue
            place = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if place.rpartition(".")[0] in new:
                parents[name] = tensor
            elif place.endswith(TOKENS):
                module = place.removesuffix(f".token_adapter.{TOKENS}").removesuffix(f".{TOKENS}")
                parents[name] = _whole(base[f"{module}.weight"])[self._rows(module)].to(tensor, copy=True).cpu()
            elif place not in base or base[place].shape != tensor.shape:
                raise RecipeError(
                    f"{self.ref.path}: the tensor {name} has no counterpart in the base, so there is no strength "
                    "between the two. This adapter cannot be dialled."
                )
            else:
                parents[name] = _whole(base[place]).to(tensor, copy=True).cpu()
        return parents

    def _rows(self, module: str) -> list[int]:
        """Returns the rows of an embedding that the adapter trains."""
        rows = self.config.get("trainable_token_indices") or self.config.get("token_indices")
        if isinstance(rows, dict):
            return next(value for name, value in rows.items() if module.endswith(name))
        return list(rows or ())

    def tensors_at(self, strength: float) -> dict[str, torch.Tensor]:
        """The tensors of the adapter that is this one at a strength."""
        found = {}
        for name, tensor in self.tensors.items():
            parts = set(name.split("."))
            if name in self.parents:
                found[name] = torch.lerp(self.parents[name].float(), tensor.float(), strength).to(tensor)
            elif parts & set(SCALED[self.kind]):
                found[name] = tensor * strength
            elif parts & set(MULTIPLIED.get(self.kind, ())):
                found[name] = torch.lerp(torch.ones_like(tensor), tensor, strength)
            else:
                found[name] = tensor
        if strength != 1:
            for name in self.tensors:
                if name.endswith(MAGNITUDE):
                    found |= self._dora(name, strength)
        return found

    @torch.no_grad()
    def _dora(self, name: str, strength: float) -> dict[str, torch.Tensor]:
        """The magnitude and B of one DoRA layer at a strength (DoRA: Liu et al. 2024, arXiv:2402.09353).

        DoRA is W' = D (W + cBA), with D = diag(m / |W + cBA|) over rows and c the scaling. The straight line from W
        to it is E (W + cB'A), with E = (1 - s) I + s D and B' = s D B / E: a DoRA again, whose magnitude is
        E |W + cB'A|.
        """
        place = name.removesuffix(f".{MAGNITUDE}")
        names = [f"{place}.lora_{side}.weight" for side in "AB"]
        if not all(other in self.tensors and self.tensors[other].ndim == 2 for other in names):
            raise RecipeError(f"{self.ref.path}: DoRA on {place} is not one of a linear layer, and cannot be dialled.")
        module: Any = self.model.get_submodule(place)
        with whole_weight(module.get_base_layer()):
            base = dequantize_module_weight(module.get_base_layer())
        weight = transpose(base, getattr(module, "fan_in_fan_out", False)).float().cpu()
        down, up = (self.tensors[other].float() for other in names)  # (r, in), (out, r)
        magnitude, scaling = self.tensors[name].float(), module.scaling["default"]
        ratio = magnitude / torch.linalg.norm(weight + scaling * up @ down, dim=1)  # D, (out,)
        line = (1 - strength) + strength * ratio  # E
        scaled = (strength * ratio / line)[:, None] * up
        new = line * torch.linalg.norm(weight + scaling * scaled @ down, dim=1)
        return {names[1]: scaled.to(self.tensors[names[1]]), name: new.to(self.tensors[name])}

    def at(self, strength: float) -> Any:
        """The model at a strength, until the next call."""
        with torch.no_grad():
            for name, tensor in self.tensors_at(strength).items():
                self.inside[name].copy_(tensor)
        return self.model

    def save(self, folder: Path, strength: float) -> None:
        """Writes the adapter at a strength into an empty folder of the main process, and compares the file with it."""
        tensors = self.tensors_at(strength)
        if ranks.is_main():
            for file in Path(self.ref.path).iterdir():
                if file.is_file() and file.name != WEIGHTS:  # its config, the tokenizer, the classes of a head
                    shutil.copyfile(file, folder / file.name)
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        if is_spread(self.model):
            ranks.on_main(partial(verify_tensors, folder, tensors))
        elif ranks.is_main():
            _verify(self.at(strength), replace(self.ref, path=str(folder)), self)


class WeightsDial:
    """A stage that trained all weights: parent and trained model in memory, beside the one that is scored."""

    how = "all weights, on the line from the parent to the trained model"

    def __init__(self, trained: ModelRef, parent: ModelRef, tokenizer: Any, texts: Sequence[ProbeText]) -> None:
        self.ref, self.tokenizer, self.texts = trained, tokenizer, texts
        head = read_head(Path(trained.path)) if task_of(trained) == "classification" else None
        started, new = load_model(parent, frozen=False, head=head, with_new_modules=True, spread=True)
        self.parent = {
            name: _part(tensor).cpu()
            for name, tensor in started.state_dict().items()
            if tensor.is_floating_point() and name.rpartition(".")[0] not in new
        }
        del started
        whole = load_model(trained, frozen=False, spread=True)
        self.trained = {name: _part(tensor).cpu() for name, tensor in whole.state_dict().items() if name in self.parent}
        del whole
        self.model = load_model(trained, spread=True)

    @torch.no_grad()
    def _set(self, model: Any, strength: float) -> Any:
        for name, tensor in model.state_dict().items():
            if name in self.trained:
                _part(tensor).copy_(torch.lerp(self.parent[name].float(), self.trained[name].float(), strength))
        return model

    def at(self, strength: float) -> Any:
        """The model at a strength, until the next call."""
        return self._set(self.model, strength)

    def save(self, folder: Path, strength: float) -> None:
        """Writes the model at a strength into an empty folder of the main process, and compares the files with it."""
        spread = is_spread(self.model)
        if not (spread or ranks.is_main()):
            return
        model = self._set(load_model(self.ref, frozen=False, spread=True), strength)
        if spread:
            write_parts(model, folder)
            verify_parts(model, folder)
        if ranks.is_main():
            self.tokenizer.save_pretrained(folder)
            if not spread:
                model.save_pretrained(folder)
                _verify(self.at(strength), replace(self.ref, path=str(folder)), self)


def _part(tensor: torch.Tensor) -> torch.Tensor:
    """Returns what this rank has of a tensor: all of one that is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns all of a tensor, gathered from the ranks if it is spread."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _verify(model: Any, saved: ModelRef, dial: AdapterDial | WeightsDial) -> None:
    """Compares what was saved with the model in memory, by loading it again."""
    before = probe(model, dial.tokenizer, dial.texts)
    require_equal(before, probe(load_model(saved), dial.tokenizer, dial.texts), model.dtype, "the dialled model")
