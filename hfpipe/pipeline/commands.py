"""Commands on what a run left: score a model again, merge an adapter."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.utils.peft_utils import find_adapter_config_file

from hfpipe.core import ranks
from hfpipe.core.errors import RecipeError
from hfpipe.core.files import write_json
from hfpipe.core.run_layout import model_of, require_whole
from hfpipe.core.run_state import require_whole_state
from hfpipe.evaluation.answers import can_score
from hfpipe.evaluation.suites import Scored, compare_rows, score_suite, suite_rows
from hfpipe.model.load import ADAPTER_CONFIG, ModelRef, clear_errors, load_model, load_tokenizer, task_of
from hfpipe.model.tokenizer import require_room
from hfpipe.pipeline.context import merged, open_run, quiet_libraries
from hfpipe.recipe import Recipe, load_recipe
from hfpipe.scores.scorecard import Change
from hfpipe.scores.wording import change_words, describe


def evaluate_model(
    name: str, recipe: Recipe, output: str | None, against: str | None = None, stage: str | None = None
) -> None:
    """Scores a model, an adapter or a stage of a run folder on a recipe's suites, and prints the scores.

    Args:
        name: Hub id, folder, or run folder.
        recipe: Whose suites are scored.
        output: A JSON file for the scores; None for none.
        against: Another model, scored on the same rows first; the differences are printed, with their paired errors.
        stage: Of a run folder; its last finished stage when absent.

    Raises:
        RecipeError: The recipe has no suite, or the run has no such trained stage.
    """
    if not recipe.evaluate:
        raise RecipeError("the recipe has no suites: add an `evaluate:` block.")
    quiet_libraries()
    labels = {model: Path(model).name for model in (name, against) if model is not None}
    if stage is not None:
        labels[name] = f"{labels[name]}/{stage}"
    if against is not None and (against == name or labels[against] == labels[name]):
        if against == name:
            raise RecipeError(f"--against names the model itself ({name}). Name another one.")
        labels = {model: model for model in labels}
    rows = {suite: suite_rows(block, recipe.seed) for suite, block in recipe.evaluate.items()}
    other = _evaluate(against, labels[against], recipe, rows) if against is not None else {}
    found = _evaluate(name, labels[name], recipe, rows, stage)
    scores = [score for scored in other.values() for score in scored.scores]
    for suite, scored in found.items():
        compared = against is not None and suite in other
        differences = compare_rows(recipe.evaluate[suite], other[suite].records, scored.records) if compared else {}
        for number_of, score in enumerate(scored.scores):
            if against is not None and score.metric in differences:
                score = replace(score, paired={labels[against]: differences[score.metric]})
            scores.append(score)
            if compared:
                change = Change(other[suite].scores[number_of], score)
                ranks.say(f"difference {change_words(change)}")
    if output and ranks.is_main():
        write_json(Path(output), [asdict(score) for score in scores])


def _evaluate(
    name: str, label: str, recipe: Recipe, rows: dict[str, list[dict[str, Any]]], stage: str | None = None
) -> dict[str, Scored]:
    """Scores one model on all suites and prints the scores."""
    ref = _model_of(name, recipe, stage)
    tokenizer = load_tokenizer(ref.path, trust_remote_code=recipe.model.trust_remote_code, task=task_of(ref))
    model = load_model(replace(ref, vocabulary=len(tokenizer)))
    require_room(tokenizer, model.get_input_embeddings().num_embeddings, ref.path)
    found = {}
    first, second = (max(map(len, names)) for names in ([label], recipe.evaluate))
    for suite_name, suite in recipe.evaluate.items():
        if not can_score(suite, rows[suite_name], ref):
            ranks.say(
                f"{label:{first}}  {suite_name:{second}}  not scored: its answers need another head than this model has"
            )
            continue
        found[suite_name] = score_suite(suite_name, suite, rows[suite_name], model, tokenizer, label)
        for score in found[suite_name].scores:
            ranks.say(f"{label:{first}}  {suite_name:{second}}  {describe(score)}")
    if not found:
        raise RecipeError(f"no suite of the recipe asks what {name} can answer: it is a {task_of(ref)} model.")
    return found


def _model_of(name: str, recipe: Recipe, stage: str | None) -> ModelRef:
    """The model a name stands for: a finished stage of a run folder, on its base as it was trained, or itself."""
    folder = Path(name)
    if not (folder / "recipe.yaml").is_file():
        if stage is not None:
            raise RecipeError(f"--stage {stage}: {name} is not a run folder, so it has no stages. Leave it out.")
        ranks.on_main(partial(require_whole, folder))
        ref = ModelRef(_fetched(name), recipe.model)
        changed = ref.is_adapter or name == recipe.model.id  # another model has a config of its own
        return ref if changed else replace(ref, options=recipe.model.model_copy(update={"config": None}))
    _require_one_run(folder)
    require_whole_state(folder)
    every = load_recipe(folder / "recipe.yaml").stages
    finished = {one.name: one for one in every if (folder / "stages" / one.name / "done.json").exists()}
    if not finished:
        raise RecipeError(f"{name} has no finished stage yet; run its recipe first.")
    if stage is not None and stage not in finished:
        raise RecipeError(f"--stage {stage}: {name} has no such finished stage; it has {', '.join(finished)}.")
    chosen = finished[stage or list(finished)[-1]]
    ranks.on_main(partial(require_whole, model_of(folder / "stages" / chosen.name)))
    return ModelRef(str(model_of(folder / "stages" / chosen.name)), recipe.model, quantization=chosen.quantized)


def _require_one_run(folder: Path) -> None:
    """Refuses the folder of a run that was repeated, which has a model for each repeat."""
    recipe = load_recipe(folder / "recipe.yaml")
    if recipe.seeds or recipe.cross_validation:
        repeats = sorted(place.parent.name for place in folder.glob("*/recipe.yaml"))
        named = f"{folder / repeats[0]}" if repeats else "one of them"
        raise RecipeError(
            f"{folder} holds {len(repeats)} repeats ({', '.join(repeats)}), each a run of its own. Name one: {named}."
        )


def _fetched(name: str) -> str:
    """The folder in the cache of an adapter of the Hub, which is small; any other name as it is."""
    if Path(name).is_dir():
        return name
    with clear_errors("model", name), ranks.state().main_process_first():
        if find_adapter_config_file(name) is None:
            return name
        return snapshot_download(
            name, allow_patterns=["*.json", "*.jinja", "*.txt", "*.model", "adapter_model.safetensors"]
        )


def merge_run(folder: Path, stage: str | None) -> str:
    """Merges an adapter of a run into its base and verifies the result.

    Args:
        folder: The run folder.
        stage: Which stage's adapter; None for the last one.

    Returns:
        Where the merged model lies.

    Raises:
        RecipeError: There is no such adapter.
    """
    recipe = load_recipe(folder / "recipe.yaml")
    _require_one_run(folder)
    adapters = [
        other.name
        for other in recipe.stages
        if other.adapter is not None and (folder / "stages" / other.name / "done.json").exists()
    ]
    if not adapters or (stage is not None and stage not in adapters):
        there = f"finished adapters: {', '.join(adapters)}" if adapters else "the run has no finished adapter"
        raise RecipeError(f"{folder}: nothing to merge{f' in stage {stage!r}' if stage else ''}; {there}.")
    name = stage or adapters[-1]
    require_whole(model_of(folder / "stages" / name))
    _require_base(folder, ModelRef(str(model_of(folder / "stages" / name)), recipe.model))
    quiet_libraries()
    with_place = recipe.model_copy(update={"output_dir": str(folder)})
    return merged(open_run(with_place, folder), name).path


def _require_base(folder: Path, adapter: ModelRef) -> None:
    """Refuses to merge an adapter whose base was a folder that is not there now."""
    base = adapter.base.path
    if not Path(base).is_dir() and (Path(base).is_absolute() or base.startswith(".") or base.count("/") > 1):
        raise RecipeError(
            f"the adapter in {adapter.path} was trained on the base {base}, and there is no such folder now. Put it "
            f"back; or, if it was moved, write its new place into {ADAPTER_CONFIG} of the adapter "
            f"(base_model_name_or_path) and, if it is the model that the run began with, into "
            f"{folder / 'recipe.yaml'} (model.id)."
        )
