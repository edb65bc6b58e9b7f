"""The stages of a run that are trained, found without torch: a command refuses a wrong word before anything heavy."""

from __future__ import annotations

from pathlib import Path

from hfpipe.core.errors import RecipeError
from hfpipe.core.run_layout import ADAPTER_CONFIG, MERGED, MODEL, model_of
from hfpipe.recipe import Recipe, Source, Stage
from hfpipe.recipe.faults import did_you_mean, listed

_GIVES = {
    "classification": "gives classes",
    "masked": "fills in masked tokens",
    "seq2seq": "reads a source text and writes its target, which has no chat template",
}


def finished_stages(folder: Path, recipe: Recipe) -> dict[str, Stage]:
    """The stages of a run that are trained to their end, by name, in the order of the recipe."""
    return {one.name: one for one in recipe.stages if (folder / "stages" / one.name / "done.json").exists()}


def finished_stage(folder: Path, recipe: Recipe, stage: str | None) -> Stage:
    """A stage of a run that is trained to its end; the last of them when none is named.

    Raises:
        RecipeError: The run was repeated, or has no such stage, or it is not trained yet.
    """
    require_one_run(folder, recipe)
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


def require_one_run(folder: Path, recipe: Recipe) -> None:
    """Refuses the folder of a run that was repeated, which has a model for each repeat."""
    if recipe.seeds or recipe.cross_validation:
        repeats = sorted(place.parent.name for place in folder.glob("*/recipe.yaml"))
        named = f"{folder / repeats[0]}" if repeats else "one of them"
        raise RecipeError(
            f"{folder} holds {len(repeats)} repeats ({', '.join(repeats)}), each a run of its own. Name one: {named}."
        )


def writing_stage(folder: Path, recipe: Recipe, stage: str | None, command: str) -> Stage:
    """A finished stage that answers in text; the last finished one when none is named.

    Raises:
        RecipeError: There is no such finished stage, or it gives no text: a classifier, or an encoder.
    """
    chosen = finished_stage(folder, recipe, stage)
    if chosen.task == "causal":
        return chosen
    others = [name for name, one in finished_stages(folder, recipe).items() if one.task == "causal"]
    instead = f" Name another stage: --stage {others[-1]}." if others else ""
    readme = folder / "stages" / chosen.name / MODEL / "README.md"
    raise RecipeError(
        f"hfpipe {command} needs a model that writes text, and stage {chosen.name} of {folder} {_GIVES[chosen.task]}. "
        f"The code that asks it is in {readme}.{instead}"
    )


def finished_adapter(folder: Path, recipe: Recipe, stage: str | None) -> str:
    """The name of a finished stage that is an adapter; of the last one when none is named.

    Raises:
        RecipeError: There is none.
    """
    require_one_run(folder, recipe)
    adapters = [name for name, other in finished_stages(folder, recipe).items() if other.adapter is not None]
    if not adapters or (stage is not None and stage not in adapters):
        there = f"finished adapters: {', '.join(adapters)}" if adapters else "the run has no finished adapter"
        meant = did_you_mean(stage, adapters) if stage else ""
        raise RecipeError(f"{folder}: nothing to merge{f' in stage {stage!r}' if stage else ''}; {there}.{meant}")
    return stage or adapters[-1]


def require_merged(folder: Path, stage: str) -> None:
    """Refuses a stage that is an adapter and is not merged.

    Raises:
        RecipeError: It is not merged yet.
    """
    place = folder / "stages" / stage
    if (model_of(place) / ADAPTER_CONFIG).is_file() and not (place / MERGED).is_dir():
        raise RecipeError(
            f"stage {stage} of {folder} is an adapter. Merge it first: hfpipe merge {folder} --stage {stage}"
        )


def require_sources(recipe: Recipe) -> None:
    """Refuses files of a recipe that are not there; those of stages that are trained already are not asked for.

    Raises:
        RecipeError: One is not there.
    """
    from hfpipe.data.sources.files import file_groups, local_path  # imports datasets

    done = finished_stages(recipe.run_folder, recipe)
    sources = [source for stage in recipe.stages if stage.name not in done for source in stage.data]
    for source in [*sources, *(suite.data for suite in recipe.evaluate.values() if suite.lm_eval is None)]:
        if not Path(local_path(source)).is_dir():  # the files of a folder are looked for when it is read
            file_groups(source)


def require_prompts(path: str) -> None:
    """Refuses a file of prompts that is not there.

    Raises:
        RecipeError: It is not there.
    """
    from hfpipe.data.sources.files import file_groups  # imports datasets, which no other command here needs

    file_groups(Source.model_validate({"path": path}))
