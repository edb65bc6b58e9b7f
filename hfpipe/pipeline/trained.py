"""Finds the model that a name stands for: a stage of a run folder, a folder of a model or an adapter, or a Hub id.

Everything here is known before weights are loaded, so that a command refuses at once what it cannot do.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.utils.peft_utils import find_adapter_config_file

from hfpipe.core import ranks
from hfpipe.core.errors import RecipeError
from hfpipe.core.run_layout import model_of, require_whole
from hfpipe.core.run_state import require_whole_state
from hfpipe.model.load import ModelRef, clear_errors, load_tokenizer, task_of
from hfpipe.recipe import Model, Recipe, Stage, load_recipe
from hfpipe.recipe.faults import did_you_mean, listed


def finished_stages(folder: Path, recipe: Recipe) -> dict[str, Stage]:
    """The stages of a run that are trained to their end, by name, in the order of the recipe."""
    return {one.name: one for one in recipe.stages if (folder / "stages" / one.name / "done.json").exists()}


def finished_stage(folder: Path, recipe: Recipe, stage: str | None) -> Stage:
    """A stage of a run that is trained to its end; the last of them when none is named.

    Raises:
        RecipeError: The run was repeated, or has no such stage, or it is not trained yet.
    """
    require_one_run(folder)
    finished, every = finished_stages(folder, recipe), [one.name for one in recipe.stages]
    if stage is not None and stage not in every:
        text = f"--stage {stage}: {folder} has no such stage; it has {listed(every)}."
        raise RecipeError(text + did_you_mean(stage, every))
    if not finished:
        raise RecipeError(
            f"{folder} has no finished stage yet. Train it first: hfpipe run {folder / 'recipe.yaml'} continues where "
            "it stopped."
        )
    if stage is not None and stage not in finished:
        raise RecipeError(
            f"--stage {stage}: {folder} has not finished that stage; it has finished {listed(finished)}. Train the "
            f"rest first: hfpipe run {folder / 'recipe.yaml'}"
        )
    return finished[stage or list(finished)[-1]]


def require_one_run(folder: Path) -> None:
    """Refuses the folder of a run that was repeated, which has a model for each repeat."""
    recipe = load_recipe(folder / "recipe.yaml")
    if recipe.seeds or recipe.cross_validation:
        repeats = sorted(place.parent.name for place in folder.glob("*/recipe.yaml"))
        named = f"{folder / repeats[0]}" if repeats else "one of them"
        raise RecipeError(
            f"{folder} holds {len(repeats)} repeats ({', '.join(repeats)}), each a run of its own. Name one: {named}."
        )


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
    return ModelRef(str(place), options, quantization=chosen.quantized)


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
