"""A run under way: its folder, its base, its suites' rows, and what its finished stages left: models and scores."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import get_local_safetensors_metadata

from hfpipe.core import display, ranks
from hfpipe.core.downloads import Download
from hfpipe.core.files import GIB, hashes_of, read_json, read_jsonl, write_json, write_jsonl, write_text
from hfpipe.core.http import limit_waiting
from hfpipe.core.run_layout import MODEL, damage_of, model_of, predictions_of, strength_of
from hfpipe.core.upstream import show_downloads
from hfpipe.data.cleaning.cleaned import is_cleaned, key_of
from hfpipe.data.mixture import mixture
from hfpipe.evaluation.answers import can_score
from hfpipe.evaluation.metrics import needs_of
from hfpipe.evaluation.suites import compare_rows, score_suite, suite_metrics, suite_rows
from hfpipe.hub.pins import pin_recipe
from hfpipe.model.adapter import ProbeText
from hfpipe.model.base import PreparedBase, prepare_base
from hfpipe.model.load import ModelRef, device, free_memory, has_room, load_to_score, weights_dtype
from hfpipe.model.merge import merge_adapter
from hfpipe.model.spread import launched, ranks_of_a_copy
from hfpipe.pipeline.environment import environment
from hfpipe.pipeline.reuse import Version, bound_to_length, identity
from hfpipe.recipe import Merge, Recipe, Suite, dump_recipe, hash_of
from hfpipe.recipe.row_formats import texts_of
from hfpipe.scores.scorecard import BASE, Paired, Score, last_change, score_of, stages_of
from hfpipe.scores.wording import change_words, describe, interval, number, with_interval
from hfpipe.stages.pretrain import require_isolation

PROBE_TEXTS = 4
ROUNDED = 0.01  # of a score: a merge that changes it by more has lost some of what was learned
DDP_TIMEOUT = 1800  # seconds, Trainer's own


def quiet_libraries() -> None:
    """Leaves the terminal to hfpipe: libraries report errors only, draw no bars, and wait for no Hub for ever."""
    import datasets
    import transformers

    limit_waiting()
    show_downloads(Download)
    if display.is_verbose():
        return
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for name in ("bitsandbytes", "peft", "accelerate", "torch.distributed", "huggingface_hub", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


def open_ranks(recipe: Recipe) -> None:
    """Lets the ranks of this launch find each other, with the patience that a recipe has.

    Raises:
        MachineError: The launch has several ranks, and this process sees itself alone.
    """
    patience = [stage.training.get("ddp_timeout") or DDP_TIMEOUT for stage in recipe.stages]
    ranks.open_group(max(patience), recipe.lost_rank_seconds)


@dataclasses.dataclass
class Run:
    """A recipe under way, with its folder and everything loaded once."""

    recipe: Recipe
    folder: Path
    base: PreparedBase
    rows: dict[str, list[dict[str, Any]]]
    hashes: dict[str, str]
    versions: dict[str, Version] = dataclasses.field(default_factory=dict)

    def stage_folder(self, name: str) -> Path:
        return self.folder / "stages" / name

    def is_done(self, name: str) -> bool:
        """Returns True if a stage is trained as the recipe has it now."""
        return read_json(self.stage_folder(name) / "done.json").get("hash") == self.hashes[name]

    def trained(self, name: str) -> ModelRef:
        """The model that a stage trained, or the base; an adapter comes on the base it was trained on."""
        if name == BASE:
            return self.base.ref
        stage = next(stage for stage in self.recipe.stages if stage.name == name)
        folder, tokens = self.stage_folder(name) / MODEL, len(self.base.tokenizer)
        stored: dict[str, Any] = {"quantization": stage.quantized, "qat": stage.fake_quantized}
        return ModelRef(str(folder), self.recipe.model, vocabulary=tokens, **stored)

    def handed_on(self, name: str) -> ModelRef:
        """The model that a stage hands on: what it trained, or that at the strength it was dialled to."""
        trained = self.trained(name)
        return trained if name == BASE else dataclasses.replace(trained, path=str(model_of(self.stage_folder(name))))

    def record(self) -> None:
        """Writes recipe.yaml: what is run, with the commits of the model and of every data set."""
        if ranks.is_main():
            resolved = self.recipe.model_copy(update={"model": self.recipe.model.model_copy(update=self.base.pinned)})
            write_text(self.folder / "recipe.yaml", dump_recipe(resolved))

    def hash_stages(self) -> None:
        """Works out the version of every stage, from what it is and from what its parent hands on."""
        for stage in self.recipe.stages:
            parent = self.recipe.parent_of(stage.name)
            seen: list[Any] = [self.hashes[parent], self.recipe.seed]
            if getattr(stage, "replay", None) is not None:
                seen.append(self.hashes[stage.replay.stage])  # type: ignore[union-attr]
            if any(part.source.decontaminate for part in mixture(self.recipe, stage)):
                seen.append({name: suite.data for name, suite in self.recipe.evaluate.items()})
            if is_cleaned(self.folder, stage, self.recipe.evaluate):
                seen.append({"cleaned": key_of(stage, self.recipe.evaluate)})
            if stage.early_stopping is not None:
                seen.append(_without_budget(self.recipe.evaluate[stage.early_stopping.suite]))
            if (strength := strength_of(self.stage_folder(parent))) is not None:
                seen.append(strength)
            self.hashes[stage.name] = hash_of([*seen, identity(stage)])
            any_length = hash_of([*seen, identity(stage, with_length=False), "any length"])
            self.versions[stage.name] = Version(self.hashes[stage.name], any_length, bound_to_length(stage))


def open_run(recipe: Recipe, folder: Path) -> Run:
    """Prepares the base, reads the suites, and records what is run and on what."""
    recipe = pin_recipe(recipe, folder)
    for suite in recipe.evaluate.values():
        suite_metrics(suite)  # an unknown metric is refused before anything is loaded
    with display.doing("preparing the base"):
        base = prepare_base(recipe, folder / "stages" / BASE)
    if ranks.is_main():
        write_json(folder / "environment.json", environment(base.ref, recipe.evaluate))
    rows = {name: ranks.on_main(partial(suite_rows, suite)) for name, suite in recipe.evaluate.items()}
    run = Run(recipe, folder, base, rows, {BASE: base.hash})
    run.record()
    run.hash_stages()
    return run


def score_key(*what: Any, suite: Suite) -> str:
    """Says which model was scored on which suite; what the budget allows does not change a score."""
    return hash_of([*what, _without_budget(suite)])


def _without_budget(suite: Suite) -> Suite:
    return suite.model_copy(update={"budget": None, "budget_action": "fail", "every": None})


def score_stage(run: Run, name: str) -> list[Score]:
    """Scores every suite on what a stage trained; what was scored before on the same model is read, not computed."""
    path = run.stage_folder(name) / "scores.json"
    known = read_json(path)
    scores: list[Score] = []
    model = None
    for suite_name, suite in run.recipe.evaluate.items():
        key = score_key(run.hashes[name], suite=suite)
        scored = known.get(suite_name, {})
        if scored.get("hash") == key and all(row["suite"] == suite_name for row in scored["scores"]):
            scores += [score_of(row) for row in scored["scores"]]
            continue
        if not can_score(suite, run.rows[suite_name], run.trained(name)):
            ranks.say(f"  {name}: {suite_name} not scored: its answers need another head than this model has")
            continue
        if model is None:
            model = load_to_score(run.trained(name))
            if name == BASE:
                require_isolation(run.recipe, model)
        found = score_suite(suite_name, suite, run.rows[suite_name], model, run.base.tokenizer, name)
        for score in found.scores:
            if ranks.is_main():
                display.scored(f"  {name}: {suite_name} {describe(score)}", dataclasses.asdict(score))
        scores += found.scores
        known[suite_name] = {"hash": key, "scores": [dataclasses.asdict(score) for score in found.scores]}
        if ranks.is_main():
            write_jsonl(run.stage_folder(name) / "predictions" / f"{suite_name}.jsonl", found.records)
            write_json(path, known)
    return scores


def show_scores(scores: list[Score], stage: str) -> None:
    """Shows what a stage did to each score, where there is a terminal.

    Args:
        scores: Those of the stage's lineage (`of_lineage`).
        stage: The stage.
    """
    rows: list[tuple[str, ...]] = []
    marks = []
    for score in (score for score in scores if score.stage == stage):
        change = last_change(scores, stage, score.key)
        told = None if change is None else change_words(change)
        arrow = {"better": "▲ ", "worse": "▼ "}.get(told.mark, "") if told is not None else ""
        size = "" if told is None else told.note or with_interval(told.size, told.interval)
        before = "" if change is None else number(change.before.value, score.metric)
        now = with_interval(number(score.value, score.metric), interval(score))
        rows.append((score.suite, f"{score.metric} {score.arrow}", before, now, arrow + size))
        marks.append("" if told is None else told.mark)
    head = ["suite", "metric", "before", "now", "change"]
    if not any(row[2] for row in rows):  # nothing is there to compare with
        head, rows = ["suite", "metric", "score"], [(row[0], row[1], row[3]) for row in rows]
    if ranks.is_main():
        display.table(stage, head, rows, marks)


def with_paired(run: Run, earlier: list[Score], now: Path, scores: list[Score], **others: Path) -> list[Score]:
    """Adds to scores their differences from those of every earlier stage on the same rows.

    Args:
        run: The run.
        earlier: The scores of the earlier stages.
        now: The folder of what the scored model gave for each row.
        scores: Its scores.
        others: More such folders by name.
    """
    differences: dict[tuple[str, str], dict[str, Paired]] = {}
    if ranks.is_main():
        folders = {stage: predictions_of(run.stage_folder(stage)) for stage in stages_of(earlier)} | others
        for stage, other in folders.items():
            for name in dict.fromkeys(score.suite for score in scores):
                suite = run.recipe.evaluate[name]
                files = [folder / f"{name}.jsonl" for folder in (other, now)]
                if all(file.exists() for file in files):
                    before, after = (read_jsonl(file) for file in files)
                    for metric, difference in compare_rows(suite, before, after).items():
                        differences.setdefault((name, metric), {})[stage] = difference
    differences = ranks.from_main(differences)
    return [dataclasses.replace(score, paired=differences.get(score.key, {})) for score in scores]


def merged_model(run: Run, name: str) -> ModelRef:
    """The merged model of an adapter stage, made and verified if it is not there yet, or in another precision."""
    folder, told = run.stage_folder(name) / "merged", run.stage_folder(name) / "merge.json"
    block = run.recipe.merge if isinstance(run.recipe.merge, Merge) else Merge.model_validate({})
    dtype = None if is_parent(run.recipe, name) else block.dtype

    def is_there() -> bool:
        made = folder.exists() and told.exists() and damage_of(folder) is None
        return made and dtype in (None, read_json(told).get("dtype"))

    if not ranks.on_main(is_there):
        if ranks.is_main():
            with display.doing(f"merging {name}, and verifying the merge"):
                found = merge_adapter(
                    run.handed_on(name),
                    run.base.tokenizer,
                    folder,
                    probe_texts(run, PROBE_TEXTS * 8),
                    block.max_loss,
                    dtype,
                )
            write_json(told, dataclasses.asdict(found) | {"files": hashes_of(folder)})
            ranks.say(f"{name}: merged and verified (largest difference {found.difference:.2g} nats)")
            for base, cost in found.costs.items():
                chosen = " (chosen)" if base == found.base else ""
                ranks.say(f"  into the base {base}: {cost:.2g} nats per token lost{chosen}")
        ranks.wait()
    # A run killed between merge and scoring must still score the merge.
    if ranks.from_main("suites" not in read_json(told) if ranks.is_main() else None):
        _score_merged(run, name, ModelRef(str(folder), run.recipe.model))
    return ModelRef(str(folder), run.recipe.model)


def is_parent(recipe: Recipe, name: str) -> bool:
    """Returns True if a later stage starts from a stage."""
    return any(recipe.parent_of(one.name) == name for one in recipe.stages)


def _score_merged(run: Run, name: str, merged: ModelRef) -> None:
    """Adds to merge.json what the merge cost on every suite that is scored by likelihood, which small changes move."""
    known = read_json(run.stage_folder(name) / "scores.json")
    if strength_of(run.stage_folder(name)) is not None:  # what was merged is not what was scored
        return
    model, found = None, []
    for suite_name, suite in run.recipe.evaluate.items():
        names = [metric for metric, one in suite_metrics(suite).items() if needs_of(one) == "likelihood"]
        before = {row["metric"]: row["value"] for row in known.get(suite_name, {}).get("scores", [])}
        if not names or not before.keys() >= set(names):
            continue
        model = model or _loaded_if_it_fits(merged)
        if model is None:
            break
        part = suite.model_copy(update={"metrics": names})
        for score in score_suite(suite_name, part, run.rows[suite_name], model, run.base.tokenizer, name).scores:
            row = {"suite": suite_name, "metric": score.metric, "adapter": before[score.metric], "merged": score.value}
            found.append(row)
            ranks.say(f"  {suite_name} {score.metric}: {row['adapter']:.4f} by the adapter, {score.value:.4f} merged")
    warn_of_rounding(run.stage_folder(name), found)
    if ranks.is_main():
        path = run.stage_folder(name) / "merge.json"
        write_json(path, read_json(path) | {"suites": found})


def warn_of_rounding(folder: Path, suites: Sequence[Mapping[str, Any]]) -> None:
    """Says what to do where the precision of the merged weights takes away a part of what the adapter learned."""
    dtype = read_json(folder / "merge.json").get("dtype") if ranks.is_main() else None
    lost = max((abs(one["merged"] / one["adapter"] - 1) for one in suites if one["adapter"]), default=0.0)
    if dtype not in (None, "float32") and lost > ROUNDED:
        again = f"hfpipe merge {folder.parent.parent} --stage {folder.name} --dtype float32"
        ranks.say(
            f"  warning: the merged weights are {dtype}, which rounds small changes away: up to {lost:.1%} of a score. "
            "The adapter itself loses nothing: use it unmerged, or keep the merged weights in float32, which takes "
            f"twice the space: `merge: {{dtype: float32}}`, or {again}",
            "warning",
        )


def _loaded_if_it_fits(merged: ModelRef) -> Any:
    """A merged model to be scored; None where it is larger than the 4-bit model that was trained, and finds no room."""
    weights = get_local_safetensors_metadata(merged.path)
    size = sum(weights.parameter_count.values()) * weights_dtype(merged.options, frozen=True).itemsize
    if all(ranks.gather(has_room(size // (ranks_of_a_copy() if launched() else 1), free_memory(device())))):
        return load_to_score(merged)
    ranks.say(
        f"  not scored: the merged model takes {size / GIB:.1f} GiB, which are not free in the memory of the "
        f"{'GPU' if device().type == 'cuda' else 'machine'}. On a larger one: hfpipe evaluate {merged.path} RECIPE"
    )
    return None


def probe_texts(run: Run, each: int = PROBE_TEXTS) -> list[ProbeText]:
    """A few texts of the suites, or pairs of source and target, on which two forms of one model are compared."""
    texts: list[ProbeText] = []
    for rows in run.rows.values():
        for row in rows[:each]:
            if "source" in row:
                texts.append((row["source"][:400], row["target"][:400]))
                continue
            if text := next(filter(None, texts_of(row)), ""):
                texts.append(text[:400])
    return texts[: 2 * each] or ["The quick brown fox jumps."]
