"""A recipe from beginning to end: base, stages, suites, budgets, merge, report, push. Run again, it continues."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hfpipe.core import display, peers, ranks, signals
from hfpipe.core.errors import BudgetExceeded, MachineError, UserError
from hfpipe.core.files import hashes_of, write_json
from hfpipe.core.run_layout import MODEL
from hfpipe.evaluation.shift import measure_shift
from hfpipe.hub import push
from hfpipe.hub.checkpoints import PushCheckpoints
from hfpipe.model.base import shapes_of
from hfpipe.model.load import ModelRef, config_of, device, free_memory, task_of
from hfpipe.model.memory import Memory
from hfpipe.model.shards import give_back_memory
from hfpipe.pipeline.context import (
    Run,
    merged_model,
    open_ranks,
    open_run,
    probe_texts,
    quiet_libraries,
    score_stage,
    show_scores,
    with_paired,
)
from hfpipe.pipeline.dial import settle
from hfpipe.pipeline.first_rows import FEW, flaws_of
from hfpipe.pipeline.requirements import Loaded, require_start, require_training
from hfpipe.pipeline.reuse import forget_checkpoints, take_up
from hfpipe.recipe import Recipe, Stage
from hfpipe.recipe.push_plan import pushed_stage
from hfpipe.report import write_reports
from hfpipe.report.content import closing_lines
from hfpipe.report.cures import next_cure
from hfpipe.scores.scorecard import BASE, Score, judge_budget, of_lineage, write_scorecard
from hfpipe.scores.wording import change_words
from hfpipe.stages import STAGES, StageRun
from hfpipe.stages.compatibility import Sample
from hfpipe.stages.cost import CostMeter
from hfpipe.stages.fit import Fit, fitted, require_memory, smaller
from hfpipe.stages.memory import Setting, out_of_memory, predicted, setting_of


def run_recipe(recipe: Recipe, *, closing: bool = True) -> Path:
    """Runs a recipe, or what is left of it.

    Args:
        recipe: The recipe.
        closing: Whether the last lines say what was gained and what comes next; not where something else follows.

    Returns:
        The run folder.

    Raises:
        UserError: With the exit code of its family; what was finished stays, and the same command continues.
    """
    quiet_libraries()
    open_ranks(recipe)
    folder = recipe.run_folder
    stages = f"{len(recipe.stages)} stage{'s' if len(recipe.stages) > 1 else ''}"
    ranks.say(f"{recipe.name}: {stages}, into {folder}")
    require_start(recipe)
    ranks.require_shared(folder)
    if any(folder.glob("stages/*/checkpoint-*/manifest.json")) or any(folder.glob("stages/*/done.json")):
        peers.keep()
    run = open_run(recipe, folder)
    recipe = run.recipe  # with the commit of every data set
    if not all(run.is_done(stage.name) for stage in recipe.stages):
        run = _checked(run)
        recipe = run.recipe
    scores = score_stage(run, BASE)
    show_scores(scores, BASE)
    measure_shift(recipe, folder, run.rows, run.base.ref, run.base.tokenizer, run.base.hash)
    ranks.wait()
    dialling = any(suite.budget_action == "dial" for suite in recipe.evaluate.values())
    lost: dict[str, str] = {}  # of the stages that are over a budget; what does not start from them goes on
    for stage in recipe.stages:
        if bad := [name for name in recipe.lineage(stage.name) if name in lost]:
            ranks.say(f"{stage.name}: not trained, as {bad[0]} is over a budget")
            continue
        _train(run, stage.name, recipe.parent_of(stage.name))
        own = with_paired(run, scores, run.stage_folder(stage.name) / "predictions", score_stage(run, stage.name))
        scores += settle(run, scores, stage.name, own) if dialling else own
        show_scores(of_lineage(scores, recipe.lineage(stage.name)), stage.name)
        if ranks.is_main():
            write_scorecard(scores, folder / "scorecard.json")
            write_reports(folder)
        if told := _over_budget(recipe, scores, stage.name):
            lost[stage.name] = told
    if lost:
        raise BudgetExceeded(
            f"{'; '.join(lost.values())}. Nothing was merged or pushed; what was trained stays in the run folder. "
            f"{' '.join(next_cure(folder, recipe, scores, stage) for stage in recipe.stages if stage.name in lost)} Or "
            "train fewer steps, or raise the budget, and run again."
        )
    for name in _to_merge(recipe):
        merged_model(run, name)
    if ranks.is_main():
        write_reports(folder)
        for line in closing_lines(folder) if closing else ():
            ranks.say(line, "result")
    if recipe.push is not None and ranks.is_main():  # the others do not wait: an upload may take longer than they can
        try:
            push(folder)
        except UserError as error:
            raise MachineError(f"The run is trained and whole in {folder}, but not pushed. {error}") from error
    return folder


def _checked(run: Run) -> Run:
    """Returns the run with stages that fit into this machine, once all that can be known before training holds."""
    base = run.base
    loaded = Loaded(run.recipe, base.tokenizer, base.added, shapes_of(base.ref), task_of(base.ref), run.rows)
    with display.doing("trying the rows, and what fits into this machine"):
        answers = require_training(loaded, run.folder)
    for line in answers.hub:
        ranks.say(f"push: {line}")
    if ranks.is_main():
        _warn(run.recipe, answers.samples, base.tokenizer)
    return _made_to_fit(run, answers.fits)


def _warn(recipe: Recipe, samples: Mapping[tuple[str, int], Sample], tokenizer: Any) -> None:
    """Tells of flaws that many of the first rows of a source have; `hfpipe check` tells of all."""
    for stage in recipe.stages:
        length = stage.training.get("max_length") or 1024
        for place, source in enumerate(stage.data):
            for flaw in flaws_of(samples[stage.name, place].rows, stage, tokenizer, length, source):
                if flaw.share >= FEW:
                    told = f"{stage.name}: {source.title}: {flaw.share:.0%} of the first rows {flaw.what}"
                    ranks.say(told, "warning")


def _made_to_fit(run: Run, fits: list[Fit]) -> Run:
    """Returns the run with stages that fit into this machine.

    Raises:
        MachineError: One does not, and the recipe does not say `fit: auto`, or that finds no way.
    """
    if run.recipe.fit != "auto":
        require_memory(run.recipe, fits)
    stages = []
    for fit in fits:
        if fit.chosen:
            ranks.say(f"{fit.stage.name}: {fit.chosen}")
        stage, told = fitted(run.recipe, fit)
        stages.append(stage)
        for line in told:
            ranks.say(f"{stage.name}: made to fit by {line}")
    if stages == run.recipe.stages:
        return run
    fitting = dataclasses.replace(
        run, recipe=run.recipe.model_copy(update={"stages": stages}), hashes={BASE: run.base.hash}, versions={}
    )
    fitting.hash_stages()
    fitting.record()
    return fitting


def _to_merge(recipe: Recipe) -> list[str]:
    """The stages whose adapter is merged at the end: the last one, and the one that is pushed merged."""
    names = [next(s.name for s in reversed(recipe.stages) if s.adapter is not None)] if recipe.merge else []
    if recipe.push is not None and recipe.push.what in ("merged", "both"):
        names.append(pushed_stage(recipe, recipe.push))
    return list(dict.fromkeys(names))


def _train(run: Run, name: str, parent: str) -> None:
    """Trains a stage unless it is done; see `reuse` for what becomes of another version of it."""
    stage = next(stage for stage in run.recipe.stages if stage.name == name)
    folder, version = run.stage_folder(name), run.versions[name]
    for line in ranks.on_main(lambda: take_up(folder, version)):
        ranks.say(f"{name}: {line}")
    if run.is_done(name):
        ranks.say(f"{name}: done before, skipped")
        return
    start = run.handed_on(parent)
    continued = start if stage.parent_adapter == "continue" else None
    if start.is_adapter:
        start = start.base if continued is not None else merged_model(run, parent)
    how = f"{stage.quantized.type} {stage.method}" if stage.quantized else stage.method
    if ranks.is_main():
        display.event("stage", name=name, kind=stage.kind, method=how, parent=parent)
    ranks.say(f"{name}: {stage.kind} ({how}) from {parent}{', its adapter trained further' if continued else ''}")
    while True:
        try:
            facts = _train_once(run, stage, start, continued)
            break
        except Exception as error:
            if not out_of_memory(error):
                raise
            stage = _smaller_stage(run, stage, error)
        free_memory(device())
        give_back_memory()
    if ranks.is_main():
        files = hashes_of(folder / MODEL)
        write_json(folder / "done.json", {"hash": run.hashes[name], "parent": parent, **facts, "files": files})
        forget_checkpoints(folder, version)
        (folder / "README.md").unlink(missing_ok=True)  # TRL's card of a checkpoint; ours is written for the push
    ranks.wait()
    peers.keep()
    signals.heed()


def _train_once(run: Run, stage: Stage, start: ModelRef, continued: ModelRef | None) -> dict[str, Any]:
    """Trains a stage from its last checkpoint, or from the start; returns the facts for done.json."""
    folder, version = run.stage_folder(stage.name), run.versions[stage.name]
    pushing = run.recipe.push is not None and run.recipe.push.checkpoints == "every_save"
    # Here and not once the trainer is there: transformers' arguments, which a setting is read from, reset accelerate.
    setting = setting_of(run.recipe, stage, vocabulary=start.vocabulary, tokens=1)
    with CostMeter(folder, version.hash, run.recipe.energy, partial(_memory, config_of(start), setting)) as cost:
        return STAGES[stage.kind](
            StageRun(
                recipe=run.recipe,
                stage=stage,
                parent=dataclasses.replace(start, quantization=stage.quantized, qat=stage.fake_quantized),
                parent_hash=run.hashes[run.recipe.parent_of(stage.name)],
                continued=continued,
                tokenizer=run.base.tokenizer,
                added_tokens=run.base.added,
                folder=folder,
                hash=version.hash,
                trajectory=version.trajectory,
                probe_texts=probe_texts(run),
                rows=run.rows,
                cost=cost,
                callbacks=(PushCheckpoints(run.folder, run.recipe, stage, (start.path, start.revision)),)
                if pushing
                else (),
            )
        )


def _memory(config: Any, setting: Setting, longest: tuple[int, int], held: int) -> Memory | None:
    """Predicts the peak memory of a stage for the rows that it has, see `CostMeter`."""
    memory, unknown = predicted(config, dataclasses.replace(setting, tokens=longest[0], targets=longest[1]), held)
    if memory is None:
        ranks.say(f"  no prediction of the peak memory: {unknown}")
    return memory


def _smaller_stage(run: Run, stage: Stage, error: Exception) -> Stage:
    """Returns a stage that ran out of memory as it is tried again: the same steps, in smaller pieces.

    Raises:
        MachineError: The recipe does not say `fit: auto`, or there is nothing left to try, or there are several ranks,
            of which the others wait for this one.
    """
    setting = setting_of(run.recipe, stage, tokens=1)
    change = smaller(stage, setting.rows, setting.accumulation, checkpointing=setting.checkpointing is not None)
    out = f"stage {stage.name} ran out of memory while it trained"
    if change is None or run.recipe.fit != "auto" or ranks.ranks() > 1:
        first = "" if change is None else f"Next would be {change[1]}, with the same result: `fit: auto` does it. "
        raise MachineError(
            f"{out}, with {setting.rows} rows at once. {first}`hfpipe check` lists what makes it smaller. What was "
            "trained up to the last checkpoint stays: the same command continues from there."
        ) from error
    ranks.say(f"  {out}: it goes on from its last checkpoint, {change[1]}")
    return change[0]


def _over_budget(recipe: Recipe, scores: list[Score], stage: str) -> str | None:
    """Tells in words what a stage lost above a budget; None where it is inside all of them."""
    line = of_lineage(scores, recipe.lineage(stage))
    for name, suite in recipe.evaluate.items():
        judged = judge_budget(line, stage, name, suite)
        for change in judged.undecided:
            ranks.say(
                f"  {stage}: {change_words(change)}; too few rows to tell it from the budget of {suite.budget:.1%}"
            )
        for change in judged.over:
            dialled = ", at every strength that was tried" if suite.budget_action == "dial" else ""
            return (
                f"stage {stage} lost {change.loss} {name} {change.after.metric} ({change.before.value:.4f} after "
                f"{change.before.stage}, {change.after.value:.4f} now), more than the budget of {suite.budget:.1%}"
                f"{dialled}"
            )
    return None
