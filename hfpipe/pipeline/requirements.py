"""The requirements of a run, in the order of asking: asked once by `run` before it begins, and once by `check`.

`require_start` asks what can be known before a model or a row is loaded, `require_training` the rest. What is refused
here costs nothing; a chain of hours must not end at its third stage over what its first rows say.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hfpipe.core import ranks
from hfpipe.core.run_lock import require_output
from hfpipe.core.run_state import require_whole_state
from hfpipe.data.cleaning.contamination import require_no_overlap
from hfpipe.data.dedup import require_cleaning
from hfpipe.evaluation.suites import suite_metrics
from hfpipe.hub import check_access
from hfpipe.model.adapter import require_adapters
from hfpipe.model.base import require_loadable, require_task
from hfpipe.model.fake_quantized import require_fake_quantization
from hfpipe.model.load import device
from hfpipe.model.tokenizer import require_room
from hfpipe.recipe import Recipe
from hfpipe.stages import REQUIREMENTS
from hfpipe.stages.arguments import require_arguments
from hfpipe.stages.compatibility import Sample, require_fitting, require_rows
from hfpipe.stages.fit import Fit, fit_of
from hfpipe.stages.pretrain import require_isolation
from hfpipe.stages.samples import require_samples
from hfpipe.stages.sharding import require_combinations
from hfpipe.stages.trainer import divide_batch
from hfpipe.stages.trial import require_trainer


@dataclass(frozen=True)
class Loaded:
    """The data and models that the requirements of the training are judged by.

    Args:
        recipe: The recipe.
        tokenizer: The run's tokenizer.
        added: Ids of the tokens that the base knows nothing of.
        model: The base; its shapes are enough.
        task: What the base is for, a key of `AUTO_CLASSES`.
        suites: The rows of every suite.
    """

    recipe: Recipe
    tokenizer: Any
    added: tuple[int, ...]
    model: Any
    task: str
    suites: Mapping[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Answers:
    """Facts learned while the requirements were asked.

    Args:
        hub: A line for each repository that is pushed to.
        samples: The first rows of every source, by stage and place.
        overlap: What suites and training data share, see `require_no_overlap`.
        fits: The predicted memory of every stage; nothing is refused over it yet, see `require_memory`.
    """

    hub: list[str]
    samples: dict[tuple[str, int], Sample]
    overlap: list[dict[str, Any]]
    fits: list[Fit]


def require_start(recipe: Recipe) -> None:
    """Refuses what can be refused before a model or a row is loaded.

    Raises:
        UserError: With what to do.
    """
    ranks.on_main(partial(require_output, recipe.run_folder))
    ranks.on_main(partial(require_whole_state, recipe.run_folder))
    require_combinations(recipe)
    require_cleaning(recipe)
    for suite in recipe.evaluate.values():
        suite_metrics(suite)
    ranks.on_main(partial(require_loadable, recipe))
    require_fake_quantization(recipe, device())


def require_training(loaded: Loaded, folder: Path | None = None) -> Answers:
    """Refuses what a stage, a suite or the push would refuse later.

    Args:
        loaded: Recipe, base and suites.
        folder: The run folder, where the overlap that was found is kept; None for nowhere.

    Raises:
        UserError: With what to do.
    """
    recipe, tokenizer, model = loaded.recipe, loaded.tokenizer, loaded.model
    require_task(recipe, loaded.task)
    require_room(tokenizer, model.get_input_embeddings().num_embeddings, recipe.model.id or "the model")
    require_arguments(recipe, tokenizer)
    ranks.on_main(partial(require_samples, recipe, tokenizer))
    for stage in recipe.stages:
        if stage.kind in REQUIREMENTS:
            REQUIREMENTS[stage.kind](stage)
        divide_batch(stage)
    shapes = require_adapters(recipe, model.config, loaded.added)
    for stage in recipe.stages:
        require_trainer(recipe, stage, shapes.get(stage.name) or copy.deepcopy(model), tokenizer)
    require_isolation(recipe, model)
    hub = ranks.on_main(partial(check_access, recipe))
    samples = ranks.on_main(partial(require_rows, recipe, tokenizer))
    ranks.on_main(partial(require_fitting, recipe, tokenizer, loaded.suites, model, loaded.task))
    overlap = require_no_overlap(recipe, loaded.suites, folder)
    fits = [fit_of(recipe, stage, model, tokenizer, samples) for stage in recipe.stages]
    return Answers(hub, samples, overlap, fits)
