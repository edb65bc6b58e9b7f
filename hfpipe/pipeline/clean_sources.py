"""`hfpipe prepare --engine datatrove`: cleans the sources of pretraining by datatrove, on this machine or on SLURM.

The cleaned text of a stage lies in the run folder, where `hfpipe run` finds it. Started again after a kill, it goes on:
datatrove marks each task that is done, and runs the others.
"""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hfpipe.core import display
from hfpipe.core.errors import MachineError, RecipeError
from hfpipe.core.files import read_json, write_json
from hfpipe.data.cleaning.cleaned import DONE, cleaned_sources, folder_of, is_cleaned
from hfpipe.data.dedup import cleaning_of
from hfpipe.evaluation.suites import suite_rows
from hfpipe.hub.pins import pin_recipe
from hfpipe.pipeline.context import quiet_libraries
from hfpipe.pipeline.requirements import require_start
from hfpipe.recipe import Recipe, Source, Stage
from hfpipe.recipe.document import read_value
from hfpipe.recipe.faults import did_you_mean, listed

PLAN = "plan.json"  # the tasks that each source began with


def clean_sources(recipe: Recipe, tasks: int | None, workers: int | None, slurm: Sequence[str] | None) -> bool:
    """Cleans the sources of every pretrain stage that ask for it.

    Args:
        recipe: The recipe.
        tasks: Tasks that share the work, of a stage that begins; None for as many as workers.
        workers: Tasks that run at a time; None for as many as cores.
        slurm: Arguments of datatrove's SlurmPipelineExecutor, each `key=value`; None for this machine.

    Returns:
        True if all are cleaned; False where SLURM has the work now.

    Raises:
        UserError: With what to do.
    """
    quiet_libraries()
    stages = [stage for stage in recipe.stages if stage.kind == "pretrain" and cleaned_sources(stage)]
    _require(recipe, stages, tasks, workers)
    require_start(recipe)
    words = None if slurm is None else _slurm_words(slurm)
    folder = recipe.run_folder
    recipe = pin_recipe(recipe, folder)
    stages = [stage for stage in recipe.stages if stage.kind == "pretrain" and cleaned_sources(stage)]
    for stage in stages:
        if is_cleaned(folder, stage, recipe.evaluate):
            place = folder_of(folder, stage, recipe.evaluate)
            display.say(f"{stage.name}: cleaned already, in {place}; to clean anew, delete that folder")
        else:
            _clean(recipe, stage, folder, tasks, workers, words)
    return all(is_cleaned(folder, stage, recipe.evaluate) for stage in stages)


def _require(recipe: Recipe, stages: Sequence[Stage], tasks: int | None, workers: int | None) -> None:
    """Refuses what datatrove cannot do, before anything is read."""
    if find_spec("datatrove") is None:
        raise MachineError("--engine datatrove needs datatrove, which is not installed here: pip install datatrove.")
    from hfpipe.data.cleaning.datatrove_steps import MOST_TASKS

    if not stages:
        raise RecipeError(
            f"{recipe.name}: no source of a pretrain stage has `deduplicate` or `decontaminate`, so --engine datatrove "
            "has nothing to clean. Sources of other stages are cleaned when they are tokenized: leave --engine out."
        )
    for name, value, most in (("--tasks", tasks, MOST_TASKS), ("--workers", workers, None)):
        if value is not None and (value < 1 or (most is not None and value > most)):
            raise RecipeError(f"{name} {value} is not allowed: give 1 or more{f', at most {most:,}' if most else ''}.")
    for stage in stages:
        asked = [source for source in stage.data if source.deduplicate is not None]
        if len({source.near for source in asked}) > 1:
            told = "; ".join(f"{source.title}: {cleaning_of(source)}" for source in asked)
            raise RecipeError(
                f"stages.{stage.name}.data: with --engine datatrove, the sources of a stage are compared in one pass, "
                f"and these ask for different ones ({told}). Give them the same `deduplicate`, or leave --engine out."
            )


def _slurm_words(given: Sequence[str]) -> dict[str, Any]:
    """The arguments of datatrove's executor for SLURM, checked against its signature."""
    from datatrove.executor import SlurmPipelineExecutor

    ours = ("pipeline", "tasks", "logging_dir", "depends", "workers", "job_name")
    known = {name: one for name, one in inspect.signature(SlurmPipelineExecutor).parameters.items() if name not in ours}
    words = {}
    for one in given:
        name, equals, text = one.partition("=")
        if not equals or name not in known:
            raise RecipeError(
                f"--slurm {one}: allowed is key=value with the keys {listed([*known])}.{did_you_mean(name, known)}"
            )
        words[name] = read_value(text)
    needed = [name for name, one in known.items() if one.default is one.empty and name not in words]
    if needed:
        raise RecipeError(f"--slurm needs {listed(needed)} too, such as `--slurm partition=cpu time=24:00:00`.")
    return words


def _clean(
    recipe: Recipe,
    stage: Stage,
    run_folder: Path,
    tasks: int | None,
    workers: int | None,
    slurm: Mapping[str, Any] | None,
) -> None:
    """Cleans the sources of a stage, or what is left of them to clean."""
    from hfpipe.data.cleaning.datatrove_steps import Piece, pieces_of, pipelines

    folder, sources = folder_of(run_folder, stage, recipe.evaluate), cleaned_sources(stage)
    workers = workers or (os.cpu_count() or 1 if slurm is None else -1)
    counts: list[int] = read_json(folder / PLAN).get("tasks", [])
    if not counts:
        wanted = _shared(sources, tasks or max(workers, 1))
        counts = [pieces_of(source, most) for source, most in zip(sources, wanted, strict=True)]
        write_json(folder / PLAN, {"tasks": counts, "sources": [source.title for source in sources]})
    elif tasks is not None and tasks != sum(counts):
        display.say(f"{stage.name}: goes on with the {sum(counts)} tasks that it began with")
    pieces = [
        Piece(source, place, number, count)
        for place, (source, count) in enumerate(zip(sources, counts, strict=True))
        for number in range(count)
    ]
    if any(source.decontaminate for source in sources):
        suites = folder / "work" / "suites"
        suites.parent.mkdir(parents=True, exist_ok=True)
        suites.write_bytes(pickle.dumps([row for suite in recipe.evaluate.values() for row in suite_rows(suite)]))
    told = ", ".join(f"{source.title} ({cleaning_of(source)})" for source in sources)
    display.say(f"{stage.name}: {told}; {len(pieces)} tasks of datatrove, into {folder}")
    chain = pipelines(pieces, folder, stage.max_dirty_share)
    if slurm is not None:
        _submit(chain, folder, f"{recipe.name}-{stage.name}", workers, slurm)
        return
    _run_here(chain, folder, workers)
    for source, facts in zip(sources, read_json(folder / DONE)["sources"], strict=True):
        removed = ", ".join(f"{count:,} ({why})" for why, count in facts["removed"].items()) or "nothing"
        display.say(f"  {source.title}: {facts['cleaned_rows']:,} rows cleaned, removed: {removed}")


def _shared(sources: Sequence[Source], tasks: int) -> list[int]:
    """Tasks of each source, at least one."""
    return [
        max(1, tasks * (place + 1) // len(sources) - tasks * place // len(sources)) for place in range(len(sources))
    ]


def _run_here(chain: Sequence[Any], folder: Path, workers: int) -> None:
    """Runs pipelines one after the other on this machine."""
    import multiprocess
    from datatrove.executor import LocalPipelineExecutor
    from loguru import logger

    from hfpipe.data.cleaning.datatrove_steps import QuietExecutor

    # datatrove's queue of tasks would be in a fork of this process, which has threads by now: such a fork may die.
    multiprocess.set_start_method("forkserver", force=True)
    multiprocess.set_forkserver_preload(["hfpipe.data.cleaning.datatrove_steps"])  # imported once for all tasks
    executor = LocalPipelineExecutor if display.is_verbose() else QuietExecutor
    for one in chain:
        if not display.is_verbose():
            logger.remove()
        with display.doing(one.name):
            logs = str(folder / "logs" / one.name)
            executor(one.steps, tasks=one.tasks, workers=min(workers, one.tasks), logging_dir=logs).run()


def _submit(chain: Sequence[Any], folder: Path, name: str, workers: int, words: Mapping[str, Any]) -> None:
    """Hands pipelines to SLURM, each to begin when the one before it has ended well."""
    from datatrove.executor import SlurmPipelineExecutor

    last = None
    for one in chain:
        last = SlurmPipelineExecutor(
            one.steps,
            tasks=one.tasks,
            workers=workers,
            job_name=f"{name}-{one.name}",
            logging_dir=str(folder / "logs" / one.name),
            depends=last,
            **words,
        )
    assert last is not None
    last.run()
    display.say(f"  SLURM has the work, up to job {last.job_id}; when it is done, `hfpipe run` finds the text")
