"""Commands on what a run left: score a model again, merge an adapter."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from hfpipe import ranks
from hfpipe.errors import RecipeError
from hfpipe.evaluation import score_suite, suite_rows
from hfpipe.files import write_json
from hfpipe.model.load import ModelRef, load_model, load_tokenizer
from hfpipe.pipeline import merged, open_run, quiet_libraries
from hfpipe.recipe import Recipe, load_recipe
from hfpipe.report.markdown import number


def evaluate_model(name: str, recipe: Recipe, output: str | None) -> None:
    """Scores a model, an adapter or the last stage of a run folder on a recipe's suites, and prints the scores.

    Args:
        name: Hub id, folder, or run folder.
        recipe: Whose suites are scored.
        output: A JSON file for the scores; None for none.

    Raises:
        RecipeError: The recipe has no suite, or the run has no trained stage.
    """
    if not recipe.evaluate:
        raise RecipeError("the recipe has no suites: add an `evaluate:` block.")
    quiet_libraries()
    path = _model_of(name)
    ref = ModelRef(path, recipe.model)
    tokenizer = load_tokenizer(path, trust_remote_code=recipe.model.trust_remote_code)
    model = load_model(ref)
    scores = []
    for suite_name, suite in recipe.evaluate.items():
        for score in score_suite(suite_name, suite, suite_rows(suite, recipe.seed), model, tokenizer, Path(name).name):
            ranks.say(f"{suite_name:16} {score.metric:16} {number(score)}  (n={score.n})")
            scores.append(asdict(score))
    if output and ranks.is_main():
        write_json(Path(output), scores)


def _model_of(name: str) -> str:
    """The model a name stands for: the last finished stage of a run folder, else the name itself."""
    folder = Path(name)
    if not (folder / "recipe.yaml").is_file():
        return name
    for stage in reversed(load_recipe(folder / "recipe.yaml").stages):
        if (folder / "stages" / stage.name / "done.json").exists():
            return str(folder / "stages" / stage.name / "model")
    raise RecipeError(f"{name} has no finished stage yet; run its recipe first.")


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
    adapters = [
        other.name
        for other in recipe.stages
        if other.lora is not None and (folder / "stages" / other.name / "done.json").exists()
    ]
    if not adapters or (stage is not None and stage not in adapters):
        there = f"finished adapters: {', '.join(adapters)}" if adapters else "the run has no finished adapter"
        raise RecipeError(f"{folder}: nothing to merge{f' in stage {stage!r}' if stage else ''}; {there}.")
    quiet_libraries()
    with_place = recipe.model_copy(update={"output_dir": str(folder)})
    return merged(open_run(with_place, folder), stage or adapters[-1]).path
