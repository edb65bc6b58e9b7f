"""The dial: a stage at strengths between its parent (0) and itself (1), the best inside the budgets, and its adapter.

What was scored is in the stage's dial.json and is not scored again; the best is written to the stage's `dial/`, as
plain PEFT or a plain model. The rule is in docs/price.md.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from hfpipe.core import ranks
from hfpipe.core.errors import RecipeError
from hfpipe.core.files import hashes_of, read_json, whole_folder, write_json, write_jsonl
from hfpipe.core.run_layout import DIAL, MODEL, STRENGTH, damage_of, predictions_at, require_whole, strength_of
from hfpipe.evaluation.answers import can_score
from hfpipe.evaluation.suites import score_suite
from hfpipe.model.interpolate import open_dial
from hfpipe.pipeline.context import (
    Run,
    merged_model,
    open_run,
    probe_texts,
    quiet_libraries,
    score_key,
    score_stage,
    with_paired,
)
from hfpipe.pipeline.finished import finished_stage, finished_stages
from hfpipe.recipe import load_recipe
from hfpipe.report import write_reports
from hfpipe.scores.scorecard import BASE, Change, Paired, Score, judge_budget, of_lineage, score_of
from hfpipe.scores.tradeoff import Point, estimate_of, kept_keys, kept_suites, point, scales_of
from hfpipe.scores.wording import describe, loss_words, share_words, with_interval

STRENGTHS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def dial_run(folder: Path, stage: str | None, strengths: Sequence[float]) -> None:
    """Dials a stage of a run, and prints what was found.

    Args:
        folder: The run folder.
        stage: Which stage; the last finished one when None.
        strengths: From 0 to 1; both ends are always there.

    Raises:
        RecipeError: There is no such finished stage, nothing is scored, or the stage has no strengths between.
    """
    recipe = load_recipe(folder / "recipe.yaml")
    name = finished_stage(folder, recipe, stage).name
    finished = list(finished_stages(folder, recipe))
    if not recipe.evaluate:
        raise RecipeError(f"{folder}: the recipe has no suites, so none is better than another. Add `evaluate:`.")
    quiet_libraries()
    ranks.on_main(partial(require_whole, folder / "stages" / name / MODEL))
    run = open_run(recipe.model_copy(update={"output_dir": str(folder)}), folder)
    if not run.is_done(name):
        raise RecipeError(f"{folder}: stage {name!r} was trained by another recipe. Run the recipe again first.")
    earlier: list[Score] = []
    for one in [BASE, *finished[: finished.index(name)]]:
        earlier += score_handed_on(run, one, earlier)
    own = with_paired(run, earlier, run.stage_folder(name) / "predictions", score_stage(run, name))
    found = dial_stage(run, earlier, name, own, strengths)
    if strength_of(run.stage_folder(name)) is not None:  # what the run goes on with is what lies in `dial/`
        _hand_on(run, name, found["best"], exceeded(run, earlier, name, own))
    if ranks.is_main():
        for line in lines_of(found):
            ranks.say(line, "result")
        if found["best"] is not None:
            ranks.say(f"written to {run.stage_folder(name) / DIAL}")
        if (folder / "scorecard.json").exists():  # not in a run that stopped in its first stage
            write_reports(folder)
    ranks.wait()


def score_handed_on(run: Run, name: str, earlier: list[Score]) -> list[Score]:
    """The scores of what a stage hands on: its own, or those at the strength it was dialled to."""
    strength = strength_of(run.stage_folder(name))
    if strength is not None:
        points = read_json(run.stage_folder(name) / "dial.json")["points"]
        return [score_of(row) for one in points if one["strength"] == strength for row in one["scores"]]
    return with_paired(run, earlier, run.stage_folder(name) / "predictions", score_stage(run, name))


def settle(run: Run, earlier: list[Score], name: str, own: list[Score]) -> list[Score]:
    """The scores of what a stage hands on, after it was dialled down where a budget is exceeded and says `dial`.

    Args:
        run: The run.
        earlier: The scores of all stages before.
        name: The stage, which is trained.
        own: Its scores at full strength.

    Returns:
        `own`, or the scores at the best strength inside the budgets; `own` too where no strength is inside.
    """
    over = exceeded(run, earlier, name, own)
    best = None
    if over and all(run.recipe.evaluate[change.after.suite].budget_action == "dial" for change in over):
        ranks.say(f"  {name}: over the budget of {suites_of(over)}, so it is dialled down")
        found = dial_stage(run, earlier, name, own, STRENGTHS)
        best = found["best"]
        for line in lines_of(found):
            ranks.say(f"  {line}")
    _hand_on(run, name, best, over)
    if best is None:
        return own
    ranks.say(f"  {name}: goes on at strength {best:g}")
    return [score_of(row) for one in found["points"] if one["strength"] == best for row in one["scores"]]


def exceeded(run: Run, earlier: list[Score], name: str, own: list[Score]) -> list[Change]:
    """The changes of a stage that exceed their budget."""
    line = of_lineage([*earlier, *own], run.recipe.lineage(name))
    return [
        change for suite, block in run.recipe.evaluate.items() for change in judge_budget(line, name, suite, block).over
    ]


def suites_of(changes: Sequence[Change]) -> str:
    return ", ".join(dict.fromkeys(change.after.suite for change in changes))


def _hand_on(run: Run, name: str, strength: float | None, over: list[Change]) -> None:
    """Records at which strength a stage is handed on, before anything is made of it."""
    folder = run.stage_folder(name)
    if strength != strength_of(folder):
        ranks.wait()
        if ranks.is_main():
            shutil.rmtree(folder / "merged", ignore_errors=True)
            (folder / "merge.json").unlink(missing_ok=True)
            done = read_json(folder / "done.json")
            done.pop("dialled", None)
            if strength is not None:
                done["dialled"] = {"strength": strength, "over_budget": suites_of(over)}
            write_json(folder / "done.json", done)
        ranks.wait()
    run.hash_stages()


def dial_stage(
    run: Run, earlier: list[Score], name: str, own: list[Score], strengths: Sequence[float]
) -> dict[str, Any]:
    """Scores a stage at several strengths and writes dial.json, and the best to `dial/`.

    Args:
        run: The run.
        earlier: The scores of all stages before.
        name: The stage.
        own: Its scores at full strength.
        strengths: Strengths to score besides 0 and 1; those of an earlier dial stay.

    Returns:
        What dial.json holds.
    """
    sweep = _Sweep(run, earlier, name, own)
    points = [sweep.scored(strength) for strength in sorted({0.0, 1.0, *strengths, *sweep.known})]
    start = [dataclasses.replace(score, stage=sweep.parent) for score in points[0]["scores"]]
    end = points[-1]["scores"]
    line = of_lineage(earlier, run.recipe.lineage(name))
    suites = run.recipe.evaluate
    declared = kept_keys(suites, start, [end]) if kept_suites(suites) else set()
    for one in points:
        where = point(suites, line, start, one["scores"], scales_of([*start, *end]), declared)
        one |= _facts(where)
    kept = [suite for suite in kept_suites(run.recipe.evaluate) if any(score.suite == suite for score in end)]
    if not kept:
        for one in points:  # nothing is declared as kept: the mean over all that was scored
            one["inside"] = None
    found: dict[str, Any] = {"hash": run.hashes[name], "stage": name, "parent": sweep.parent, "kept": kept}
    found |= {"method": sweep.method, "best": best_of(points), "points": points}
    found["verdict"] = verdict(found)
    if found["best"] is not None:
        sweep.write(found["best"])
    plain = [one | {"scores": [dataclasses.asdict(score) for score in one["scores"]]} for one in points]
    if ranks.is_main():
        write_json(run.stage_folder(name) / "dial.json", found | {"points": plain})
    ranks.wait()
    return found | {"points": plain}


def _facts(where: Point) -> dict[str, Any]:
    facts: dict[str, Any] = {"over": [f"{change.after.suite} {change.after.metric}" for change in where.over]}
    for key, estimate in (("gain", where.gain), ("forgetting", where.forgetting)):
        facts[key] = estimate.value if estimate else None
        facts[f"{key}_stderr"] = estimate.stderr if estimate else None
        facts[f"{key}_interval"] = estimate.interval if estimate else None
    return facts | {"inside": not where.over}


def best_of(points: Sequence[dict[str, Any]]) -> float | None:
    """The strength above 0 with the most gain of those inside the budgets, the smaller of equals; None where none is.

    Where every suite is to be kept there is no gain to compare, and the largest strength inside the budgets is taken.
    """
    inside = [one for one in points if one["strength"] > 0 and not one["over"]]
    if not inside:
        return None
    if all(one["gain"] is None for one in inside):
        return inside[-1]["strength"]
    return max(inside, key=lambda one: (one["gain"], -one["strength"]))["strength"]


def verdict(found: dict[str, Any]) -> str:
    """Returns the dial's verdict, in a sentence or two."""
    best, kept = found["best"], found["kept"]
    points = {one["strength"]: one for one in found["points"]}
    if best is None:
        smallest = min(strength for strength in points if strength > 0)
        return f"No strength is inside the budgets, not even {smallest:g}: {', '.join(points[smallest]['over'])}."
    told = f"Strength {best:g}"
    if not kept:
        told += " gains most; no suite has a budget, so nothing is declared as to be kept, and this is the best overall"
    elif points[best]["gain"] is None:
        told += " is the largest inside the budgets; every suite has one, so there is no gain to compare"
    else:
        told += " gains most inside the budgets"
    gain, loss = (estimate_of(points[best], key) for key in ("gain", "forgetting"))
    if gain is not None:
        told += f": gain {with_interval(*share_words(gain))}"
    if loss is not None:
        told += f", forgetting {with_interval(*loss_words(loss))}"
    if gain is not None and not gain.beyond_noise:
        told += ". The gain is within the noise"
    equal = [s for s, one in points.items() if 0 < s < best and not one["over"] and _no_less(one, points[best])]
    if gain is not None and gain.beyond_noise and equal:
        told += f". From {equal[0]:g} on the gain is within one standard error of that"
    return f"{told}."


def _no_less(one: dict[str, Any], best: dict[str, Any]) -> bool:
    """Returns True if a strength gains as much as the best one within the standard error of the best one's gain."""
    return one["gain"] is not None and best["gain"] - one["gain"] <= best["gain_stderr"]


def lines_of(found: dict[str, Any]) -> list[str]:
    """A dial as lines of text: a strength each, and the verdict."""
    cells = [
        (
            with_interval(*share_words(estimate_of(one, "gain"))),
            with_interval(*loss_words(estimate_of(one, "forgetting"))),
        )
        for one in found["points"]
    ]
    first, second = (max(map(len, side)) for side in zip(("gain", "forgetting"), *cells, strict=True))
    lines = [f"{'strength':>8}  {'gain':>{first}}  {'forgetting':>{second}}"]
    for one, (gain, forgetting) in zip(found["points"], cells, strict=True):
        shown = f"{gain:>{first}}  {forgetting:>{second}}"
        over = f"  over the budget of {', '.join(one['over'])}" if one["over"] else ""
        best = "  best" if one["strength"] == found["best"] else ""
        lines.append(f"{one['strength']:>8g}  {shown}{over}{best}")
    return [*lines, found["verdict"]]


class _Sweep:
    """Scores a stage at one strength after another; loads it when the first score is missing."""

    def __init__(self, run: Run, earlier: list[Score], name: str, own: list[Score]) -> None:
        self.run, self.earlier, self.name, self.own = run, earlier, name, own
        stages = {stage.name: stage for stage in run.recipe.stages}
        self.parent = run.recipe.parent_of(name)
        adapter = name
        while stages[adapter].parent_adapter == "continue":  # one adapter, which lies on what its first stage came from
            adapter, self.parent = self.parent, run.recipe.parent_of(self.parent)
        self.trained = run.trained(name)
        self.method = "adapter" if self.trained.is_adapter else "weights"
        self.path = run.stage_folder(name) / "dial.json"
        known = ranks.from_main(read_json(self.path))
        self.known = {}
        if known.get("hash") == run.hashes[name]:
            self.known = {one["strength"]: one for one in known["points"]}
        self._dial: Any = None

    def dial(self) -> Any:
        if self._dial is None:
            start = self.run.handed_on(self.parent)
            if start.is_adapter and not self.trained.is_adapter:
                start = merged_model(self.run, self.parent)
            self._dial = open_dial(self.trained, start, self.run.base.tokenizer, probe_texts(self.run))
        return self._dial

    def scored(self, strength: float) -> dict[str, Any]:
        """The scores at a strength, with the noise of their differences to those of every earlier stage."""
        run, folder = self.run, predictions_at(self.run.stage_folder(self.name), strength)
        known = self.known.get(strength, {"keys": {}, "scores": []})
        keys: dict[str, str] = {}
        scores: list[Score] = []
        for suite, block in run.recipe.evaluate.items():
            if not can_score(block, run.rows[suite], self.trained):
                continue
            keys[suite] = score_key(run.hashes[self.name], strength, suite=block)
            ready = self._at_the_ends(strength, suite)
            if not ready and known["keys"].get(suite) == keys[suite]:
                ready = [score_of(row) for row in known["scores"] if row["suite"] == suite]
            if not ready:
                model = self.dial().at(strength)
                found = score_suite(suite, block, run.rows[suite], model, run.base.tokenizer, self.name)
                if ranks.is_main():
                    write_jsonl(folder / f"{suite}.jsonl", found.records)
                ranks.wait()
                ready = with_paired(run, self.earlier, folder, found.scores, **self._instead_of_the_parent(suite))
                ranks.say(f"  {self.name} at {strength:g}: {suite} " + ", ".join(map(describe, ready)))
                self._keep(strength, suite, keys[suite], ready)
            scores += ready
        return {"strength": strength, "keys": keys, "scores": scores}

    def _at_the_ends(self, strength: float, suite: str) -> list[Score]:
        """The scores of the parent at 0 and of the stage at 1, which are known."""
        if strength == 1:
            own = [score for score in self.own if score.suite == suite]
            if own and (other := self._instead_of_the_parent(suite)):
                folder = self.run.stage_folder(self.name) / "predictions"
                own = with_paired(self.run, self.earlier, folder, own, **other)
            return own
        if strength == 0:
            start = [score for score in self.earlier if score.suite == suite and score.stage == self.parent]
            return [
                dataclasses.replace(
                    score, stage=self.name, paired={**score.paired, self.parent: Paired(0.0, 1.0, 0.0, 0.0)}
                )
                for score in start
            ]
        return []

    def _instead_of_the_parent(self, suite: str) -> dict[str, Path]:
        """Strength 0's scores under the parent's name, for a suite that the parent could not be scored on."""
        if any(score.suite == suite and score.stage == self.parent for score in self.earlier):
            return {}
        return {self.parent: predictions_at(self.run.stage_folder(self.name), 0)}

    def _keep(self, strength: float, suite: str, key: str, scores: list[Score]) -> None:
        """Writes what is known so far, so that a dial that is interrupted goes on where it was."""
        one = self.known.setdefault(strength, {"strength": strength, "keys": {}, "scores": []})
        one["keys"][suite] = key
        one["scores"] = [row for row in one["scores"] if row["suite"] != suite]
        one["scores"] += [dataclasses.asdict(score) for score in scores]
        if ranks.is_main():
            points = [self.known[at] for at in sorted(self.known)]
            write_json(self.path, {"hash": self.run.hashes[self.name], "stage": self.name, "points": points})

    def write(self, strength: float) -> None:
        """Writes the model at a strength to `dial/`, unless it is there."""
        folder = self.run.stage_folder(self.name) / DIAL
        facts = {"stage": self.name, "strength": strength, "hash": self.run.hashes[self.name]}
        known = ranks.on_main(lambda: read_json(folder / STRENGTH) if damage_of(folder) is None else {})
        if known | facts == known:
            return
        dial = self.dial()  # on every rank, as a parent that is an adapter may have to be merged
        with whole_folder(folder) if ranks.is_main() else nullcontext(folder) as beside:
            dial.save(beside, strength)
            if ranks.is_main():
                write_json(beside / STRENGTH, facts | {"files": hashes_of(beside)})
        ranks.wait()
