"""`hfpipe prepare`: reads, cleans and tokenizes the data of a recipe, without a GPU and without a model's weights."""

from __future__ import annotations

from hfpipe.core import ranks
from hfpipe.model.base import shapes_of
from hfpipe.model.load import task_of
from hfpipe.pipeline.context import open_ranks, open_run, quiet_libraries
from hfpipe.pipeline.requirements import Loaded, require_start, require_training
from hfpipe.pipeline.reuse import take_up
from hfpipe.recipe import Recipe, Sft
from hfpipe.stages import ROWS, StageRun
from hfpipe.stages.cost import CostMeter
from hfpipe.stages.sft_rows import is_streamed


def prepare_recipe(recipe: Recipe) -> None:
    """Makes the tokens of every stage of a recipe but those of pretraining, which `hfpipe run` finds then.

    Raises:
        UserError: As `run_recipe`, as far as data is concerned.
    """
    quiet_libraries()
    open_ranks(recipe)
    folder = recipe.run_folder
    ranks.say(f"{recipe.name}: the data of {len(recipe.stages)} stages")
    require_start(recipe)
    run = open_run(recipe, folder)
    recipe, base = run.recipe, run.base
    model = shapes_of(base.ref)
    require_training(Loaded(recipe, base.tokenizer, base.added, model, task_of(base.ref), run.rows), folder)
    for stage in recipe.stages:
        if stage.kind not in ROWS or (isinstance(stage, Sft) and is_streamed(stage)):
            streamed = "" if stage.kind not in ROWS else " with a streamed source and max_steps"
            ranks.say(f"{stage.name}: a {stage.kind} stage{streamed} is read and tokenized while it trains")
            continue
        place, version = run.stage_folder(stage.name), run.versions[stage.name]
        for line in ranks.on_main(lambda place=place, version=version: take_up(place, version)):  # type: ignore[misc]
            ranks.say(f"{stage.name}: {line}")
        ranks.say(f"{stage.name}:")
        prepared = StageRun(
            recipe=recipe,
            stage=stage,
            parent=base.ref,
            parent_hash=run.hashes[recipe.parent_of(stage.name)],
            continued=None,
            tokenizer=base.tokenizer,
            added_tokens=base.added,
            folder=place,
            hash=version.hash,
            trajectory=version.trajectory,
            probe_texts=[],
            rows=run.rows,
            cost=CostMeter(place, run.hashes[stage.name], recipe.energy),
        )
        ROWS[stage.kind](prepared, model)
