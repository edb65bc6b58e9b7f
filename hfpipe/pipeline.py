"""A recipe from beginning to end: base, stages, suites, budgets, merge, report, push. Run again, it continues."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from hfpipe import ranks
from hfpipe.answers import can_score
from hfpipe.cost import CostMeter
from hfpipe.environment import environment
from hfpipe.errors import BudgetExceeded
from hfpipe.evaluation import paired_errors, score_suite, suite_metrics, suite_rows
from hfpipe.files import write_json, write_jsonl, write_text
from hfpipe.model.adapter import merge_adapter
from hfpipe.model.base import PreparedBase, prepare_base
from hfpipe.model.load import ModelRef, load_model
from hfpipe.overlap import require_no_overlap
from hfpipe.recipe import Merge, Recipe, dump_recipe, hash_of
from hfpipe.report import write_reports
from hfpipe.report.markdown import closing_lines
from hfpipe.scores import BASE, Score, over_budget, stages_of, write_scorecard
from hfpipe.shift import measure_shift
from hfpipe.stages import STAGES, StageRun

PROBE_TEXTS = 4


def quiet_libraries() -> None:
    """Leaves the terminal to hfpipe: the libraries report errors only, and draw no bars."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for name in ("bitsandbytes", "peft", "accelerate", "torch.distributed", "huggingface_hub", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


@dataclasses.dataclass
class Run:
    """A recipe under way, with its folder and everything loaded once."""

    recipe: Recipe
    folder: Path
    base: PreparedBase
    rows: dict[str, list[dict[str, Any]]]
    hashes: dict[str, str]

    def stage_folder(self, name: str) -> Path:
        return self.folder / "stages" / name

    def is_done(self, name: str) -> bool:
        """Whether a stage is trained as the recipe has it now."""
        return _read(self.stage_folder(name) / "done.json").get("hash") == self.hashes[name]

    def predictions(self, stage: str, suite: str) -> Path:
        """Where what a stage's model gave for each row of a suite is kept."""
        return self.stage_folder(stage) / "predictions" / f"{suite}.jsonl"

    def trained(self, name: str) -> ModelRef:
        """The model that a finished stage left, or the base; an adapter comes on the base it was trained on."""
        if name == BASE:
            return self.base.ref
        stage = next(stage for stage in self.recipe.stages if stage.name == name)
        return ModelRef(str(self.stage_folder(name) / "model"), self.recipe.model, quantization=stage.quantized)


def output_folder(recipe: Recipe) -> Path:
    return Path(recipe.output_dir or f"runs/{recipe.name}")


def run_recipe(recipe: Recipe) -> Path:
    """Runs a recipe, or what is left of it.

    Returns:
        The run folder.

    Raises:
        UserError: With the exit code of its family; what was finished stays, and the same command continues.
    """
    quiet_libraries()
    ranks.state()
    folder = output_folder(recipe)
    ranks.say(f"{recipe.name}: {len(recipe.stages)} stages, into {folder}")
    run = open_run(recipe, folder)
    if not all(run.is_done(stage.name) for stage in recipe.stages):
        require_no_overlap(recipe, run.rows, folder)
    scores = _score(run, BASE)
    measure_shift(recipe, folder, run.rows, run.base.ref, run.base.tokenizer, run.base.hash)
    ranks.wait()
    for number, stage in enumerate(recipe.stages):
        _train(run, stage.name, parent=stage.parent or (recipe.stages[number - 1].name if number else BASE))
        scores += _paired(run, scores, stage.name, _score(run, stage.name))
        if ranks.is_main():
            write_scorecard(scores, folder / "scorecard.json")
            write_reports(folder)
        _check_budgets(recipe, scores, stage.name)
    if recipe.merge:
        last = next(stage.name for stage in reversed(recipe.stages) if stage.adapter is not None)
        merged(run, last)
    if ranks.is_main():
        write_reports(folder)
        for line in closing_lines(folder):
            ranks.say(line)
    if recipe.push is not None:
        if ranks.is_main():
            from hfpipe.hub import push

            push(folder)
        ranks.wait()
    return folder


def open_run(recipe: Recipe, folder: Path) -> Run:
    """Prepares the base, reads the suites, and records what is run and on what."""
    for suite in recipe.evaluate.values():
        suite_metrics(suite)  # an unknown metric is refused before anything is made
    base = prepare_base(recipe, folder / "stages" / BASE)
    hashes = {BASE: base.hash}
    for number, stage in enumerate(recipe.stages):
        parent = stage.parent or (recipe.stages[number - 1].name if number else BASE)
        seen = [hashes[parent], recipe.seed, stage]
        if getattr(stage, "replay", None) is not None:
            seen.append(hashes[stage.replay.stage])  # type: ignore[union-attr]
        hashes[stage.name] = hash_of(seen)
    if ranks.is_main():
        resolved = recipe.model_copy(update={"model": recipe.model.model_copy(update=base.pinned)})
        write_text(folder / "recipe.yaml", dump_recipe(resolved))
        write_json(folder / "environment.json", environment(base.ref))
    with ranks.state().main_process_first():
        rows = {name: suite_rows(suite, recipe.seed) for name, suite in recipe.evaluate.items()}
    return Run(recipe, folder, base, rows, hashes)


def _train(run: Run, name: str, parent: str) -> None:
    """Trains a stage unless it is done; a folder of another version of the stage is moved aside, not overwritten."""
    stage = next(stage for stage in run.recipe.stages if stage.name == name)
    folder = run.stage_folder(name)
    if run.is_done(name):
        ranks.say(f"{name}: done before, skipped")
        return
    ranks.wait()
    if ranks.is_main():
        _move_aside(folder, run.hashes[name])
        write_json(folder / "stage.json", {"hash": run.hashes[name]})
    ranks.wait()
    parent_ref = merged(run, parent) if run.trained(parent).is_adapter else run.trained(parent)
    how = f"{stage.quantized.type} {stage.method}" if stage.quantized else stage.method
    ranks.say(f"{name}: {stage.kind} ({how}) from {parent}")
    with CostMeter(folder, run.hashes[name], run.recipe.energy) as cost:
        facts = STAGES[stage.kind](
            StageRun(
                recipe=run.recipe,
                stage=stage,
                parent=dataclasses.replace(parent_ref, quantization=stage.quantized),
                tokenizer=run.base.tokenizer,
                folder=folder,
                hash=run.hashes[name],
                probe_texts=_probe_texts(run),
                cost=cost,
            )
        )
    if ranks.is_main():
        write_json(folder / "done.json", {"hash": run.hashes[name], "parent": parent, **facts})
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
        (folder / "README.md").unlink(missing_ok=True)  # TRL's card of a checkpoint; ours is written for the push
    ranks.wait()


def _score(run: Run, name: str) -> list[Score]:
    """Scores every suite on what a stage left; what was scored before on the same model is read, not computed."""
    path = run.stage_folder(name) / "scores.json"
    known = _read(path)
    scores: list[Score] = []
    model = None
    for suite_name, suite in run.recipe.evaluate.items():
        key = hash_of([run.hashes[name], suite])
        if known.get(suite_name, {}).get("hash") == key:
            scores += [Score(**row) for row in known[suite_name]["scores"]]
            continue
        if not can_score(run.rows[suite_name], run.trained(name)):
            ranks.say(f"  {name}: {suite_name} not scored: its answers need another head than this model has")
            continue
        if model is None:
            model = load_model(run.trained(name))
        found = score_suite(suite_name, suite, run.rows[suite_name], model, run.base.tokenizer, name)
        for score in found.scores:
            ranks.say(f"  {name}: {suite_name} {score.metric} {score.value:.4f} ± {score.stderr:.4f} (n={score.n})")
        scores += found.scores
        known[suite_name] = {"hash": key, "scores": [dataclasses.asdict(score) for score in found.scores]}
        if ranks.is_main():
            write_jsonl(run.predictions(name, suite_name), found.records)
            write_json(path, known)
    return scores


def _paired(run: Run, earlier: list[Score], now: str, scores: list[Score]) -> list[Score]:
    """The scores of a stage with the noise of their differences to those of every earlier stage, row by row."""
    errors: dict[tuple[str, str], dict[str, float]] = {}
    if ranks.is_main():
        for stage in stages_of(earlier):
            for name, suite in run.recipe.evaluate.items():
                files = run.predictions(stage, name), run.predictions(now, name)
                if all(file.exists() for file in files):
                    before, after = ([json.loads(line) for line in file.open(encoding="utf-8")] for file in files)
                    for metric, error in paired_errors(suite, before, after).items():
                        errors.setdefault((name, metric), {})[stage] = error
    errors = ranks.from_main(errors)
    return [dataclasses.replace(score, paired=errors.get(score.key, {})) for score in scores]


def _check_budgets(recipe: Recipe, scores: list[Score], stage: str) -> None:
    for name, suite in recipe.evaluate.items():
        if suite.budget is None:
            continue
        for change in over_budget(scores, stage, name, suite.budget):
            raise BudgetExceeded(
                f"stage {stage} lost {-change.relative:.1%} of {name} {change.after.metric} "
                f"({change.before.value:.4f} after {change.before.stage}, {change.after.value:.4f} now), more than the "
                f"budget of {suite.budget:.1%}. Nothing was merged or pushed; the model stays in the run folder. "
                "Replay earlier data (replay:), lower learning_rate, train fewer steps, or raise the budget, and run "
                "again."
            )


def merged(run: Run, name: str) -> ModelRef:
    """The merged model of an adapter stage, made and verified if it is not there yet."""
    folder = run.stage_folder(name) / "merged"
    if not ranks.from_main(folder.exists()):
        if ranks.is_main():
            block = run.recipe.merge if isinstance(run.recipe.merge, Merge) else Merge.model_validate({})
            found = merge_adapter(
                run.trained(name), run.base.tokenizer, folder, _probe_texts(run, PROBE_TEXTS * 8), block.max_loss
            )
            write_json(run.stage_folder(name) / "merge.json", dataclasses.asdict(found))
            ranks.say(f"{name}: merged and verified (largest difference {found.difference:.1e} nats)")
            for base, cost in found.costs.items():
                chosen = " (chosen)" if base == found.base else ""
                ranks.say(f"  into the base {base}: {cost:.2g} nats per token lost{chosen}")
        ranks.wait()
    return ModelRef(str(folder), run.recipe.model)


def _probe_texts(run: Run, each: int = PROBE_TEXTS) -> list[str]:
    """A few texts of the suites, on which two forms of one model are compared."""
    texts = []
    for rows in run.rows.values():
        for row in rows[:each]:
            texts.append(
                row.get("text") or row.get("sentence") or str(row.get("prompt", "")) + str(row.get("completion", ""))
            )
    return [text[:400] for text in texts if text][: 2 * each] or ["The quick brown fox jumps."]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _move_aside(folder: Path, new_hash: str) -> None:
    """Keeps the work of an earlier version of a stage under another name."""
    old = _read(folder / "stage.json").get("hash")
    if old is not None and old != new_hash:
        aside = folder.with_name(f"{folder.name}.{old[:8]}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
        ranks.say(f"{folder.name}: the recipe has changed; the earlier work is now in {aside}")
