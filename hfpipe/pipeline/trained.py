"""Finds the model that a name stands for: a stage of a run folder, a folder of a model or an adapter, or a Hub id.

Everything here is known before weights are loaded, so that a command refuses at once what it cannot do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.utils.peft_utils import find_adapter_config_file

from hfpipe.core import ranks
from hfpipe.core.errors import RecipeError
from hfpipe.core.files import read_json
from hfpipe.core.run_layout import MERGED, MODEL, model_of, require_whole
from hfpipe.core.run_state import require_whole_state
from hfpipe.data.prompts import Asking
from hfpipe.model.load import ModelRef, task_of
from hfpipe.model.load_errors import clear_errors
from hfpipe.model.tokenizer import load_tokenizer
from hfpipe.pipeline.finished import finished_stage, require_merged, writing_stage
from hfpipe.recipe import Model, Recipe, Stage, load_recipe
from hfpipe.report.usage import lineage
from hfpipe.scores.scorecard import BASE


def model_named(name: str, options: Model, stage: str | None = None) -> ModelRef:
    """The model that a name stands for: a finished stage of a run folder, on its base as it was trained, or itself.

    Args:
        name: Run folder, folder of a model or an adapter, or Hub id.
        options: How it is loaded; the words for one base alone hold for no other model.
        stage: Of a run folder; its last finished stage when absent.

    Raises:
        RecipeError: There is no such stage.
        MachineError: The files of the model are damaged.
    """
    folder = Path(name)
    if not (folder / "recipe.yaml").is_file():
        if stage is not None:
            raise RecipeError(f"--stage {stage}: {name} is not a run folder, so it has no stages. Leave it out.")
        ranks.on_main(partial(require_whole, folder))
        ref = ModelRef(_fetched(name), options)
        changed = ref.is_adapter or name == options.id  # another model has a config of its own
        return ref if changed else replace(ref, options=options.model_copy(update={"config": None}))
    require_whole_state(folder)
    chosen = finished_stage(folder, load_recipe(folder / "recipe.yaml"), stage)
    place = model_of(folder / "stages" / chosen.name)
    ranks.on_main(partial(require_whole, place))
    return ModelRef(str(place), options, quantization=chosen.quantized, qat=chosen.fake_quantized)


def tokenizer_named(ref: ModelRef) -> Any:
    """The tokenizer of a model; that of the base where an adapter comes without one."""
    own = not ref.is_adapter or any(Path(ref.path).glob("tokenizer*"))
    place = ref if own else ref.base
    trust = ref.options.trust_remote_code
    return load_tokenizer(place.path, revision=place.revision, trust_remote_code=trust, task=task_of(ref))


def _fetched(name: str) -> str:
    """The folder in the cache of an adapter of the Hub, which is small; any other name as it is."""
    if Path(name).is_dir():
        return name
    with clear_errors("model", name), ranks.main_first():
        if find_adapter_config_file(name) is None:
            return name
        return snapshot_download(
            name, allow_patterns=["*.json", "*.jinja", "*.txt", "*.model", "adapter_model.safetensors"]
        )


@dataclass(frozen=True)
class Trained:
    """A trained stage that answers in text, before its weights are loaded.

    Args:
        folder: The run folder.
        recipe: The recipe that was run.
        stage: The stage.
        ref: Its model or adapter.
        tokenizer: The tokenizer that it was trained with.
        asking: How it was asked in training.
    """

    folder: Path
    recipe: Recipe
    stage: Stage
    ref: ModelRef
    tokenizer: Any
    asking: Asking

    @property
    def base(self) -> ModelRef:
        """The base model, or of a run from nothing the model that the stage started from; stored as it was trained on.

        Raises:
            RecipeError: There is none.
        """
        same: dict[str, Any] = {"quantization": self.stage.quantized, "vocabulary": len(self.tokenizer)}
        if self.recipe.model.id is not None:
            return ModelRef(self.recipe.model.id, self.recipe.model, revision=self.recipe.model.revision, **same)
        if self.ref.is_adapter:
            return replace(self.ref.base, **same)
        parent = self.recipe.parent_of(self.stage.name)
        if parent == BASE:
            raise RecipeError(
                f"--base: stage {self.stage.name} of {self.folder} started from fresh weights, so there is no model to "
                "set beside it. Leave --base out."
            )
        return replace(whole_model(self.folder, self.recipe, parent), **same)

    @property
    def is_on_base(self) -> bool:
        """True if the base is what an adapter lies on, so that it answers once the adapter is put off."""
        return self.ref.is_adapter and self.ref.base.path == self.base.path


def whole_model(folder: Path, recipe: Recipe, stage: str) -> ModelRef:
    """The whole model that a stage of a run hands on: of an adapter the merged one.

    Raises:
        RecipeError: It is not merged yet.
    """
    place = folder / "stages" / stage
    found = ModelRef(str(model_of(place) if stage != BASE else place / MODEL), recipe.model)
    if found.is_adapter:
        require_merged(folder, stage)
        found = replace(found, path=str(place / MERGED))
    return found


def open_trained(folder: Path, stage: str | None, command: str) -> Trained:
    """Finds a stage that answers in text; loads no weights.

    Args:
        folder: The run folder.
        stage: Which stage; the last finished one when None.
        command: The command that needs it, for messages.

    Raises:
        RecipeError: There is no such finished stage, or it gives no text: a classifier, or an encoder.
    """
    recipe = load_recipe(folder / "recipe.yaml")
    chosen = writing_stage(folder, recipe, stage, command)
    ref = model_named(str(folder), recipe.model, chosen.name)
    tokenizer = tokenizer_named(ref)
    return Trained(
        folder,
        recipe,
        chosen,
        replace(ref, vocabulary=len(tokenizer)),
        tokenizer,
        asking_of(folder, recipe, chosen, tokenizer),
    )


def asking_of(folder: Path, recipe: Recipe, stage: Stage, tokenizer: Any) -> Asking:
    """The way in which a stage was asked while it trained, or the stage before it that was asked something.

    A model that never was fine-tuned is asked by its chat template where it has one, and else by the plain text.
    """
    asked = [one for one in lineage(recipe, stage.name) if one.kind == "sft"]
    if not asked:
        return Asking("messages" if tokenizer.chat_template else "text")
    source = asked[-1].data[0]
    facts: dict[str, dict[str, Any]] = (
        read_json(folder / "stages" / asked[-1].name / "done.json").get("data", {}).get("sources", {})
    )
    known = next((found.get("format") for found in facts.values()), None)
    if known is None:  # a run of an earlier version
        named = {**(source.template or {}), **(source.columns if isinstance(source.columns, dict) else {})}
        plain = "prompt" in named or not tokenizer.chat_template
        known = source.format or ("prompt_completion" if plain else "messages")
    return Asking(known, source)
