"""Sample answers before and after, side by side: a few rows that became better, worse, or stayed as they were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfpipe.core.files import read_jsonl
from hfpipe.core.run_layout import predictions_of
from hfpipe.recipe import Recipe
from hfpipe.report.layout import SampleAnswer, Section, Table, shortened
from hfpipe.scores.scorecard import BASE, Score

STEPS = 8  # of the samples while a stage trained
EACH = 2  # rows of each sort and suite
SORTS = ("better", "worse", "the same")


def sample_section(folder: Path, recipe: Recipe, scores: Sequence[Score]) -> Section | None:
    """The samples of every suite with answers, from the first model in the line of the last stage that was asked to it.

    The same run gives the same rows: those that changed most, and the first that stayed.
    """
    if not scores:
        return None
    better = {score.key: score.higher_is_better for score in scores}
    line = recipe.lineage(scores[-1].stage)
    found: list[SampleAnswer] = []
    for suite in recipe.evaluate:
        files = {stage: predictions_of(folder / "stages" / stage) / f"{suite}.jsonl" for stage in line}
        there = [stage for stage, file in files.items() if file.exists()]
        if len(there) > 1:
            before, after = (read_jsonl(files[stage]) for stage in (there[0], there[-1]))
            titles = [stage if stage == BASE else f"after {stage}" for stage in (there[0], there[-1])]
            found += pick_samples(suite, titles, before, after, better)
    return Section("Samples", samples=found) if found else None


def training_samples(folder: Path, recipe: Recipe) -> list[Section]:
    """The answers of each stage with `samples` while it trained: a row for a step, a column for a prompt."""
    sections = []
    for stage in recipe.stages:
        path = folder / "stages" / stage.name / "samples.jsonl"
        rows = read_jsonl(path) if path.exists() else []
        prompts = list(dict.fromkeys(row["prompt"] for row in rows))
        steps = list(dict.fromkeys(row["step"] for row in rows))
        spread = sorted({steps[place * (len(steps) - 1) // (STEPS - 1)] for place in range(STEPS)}) if steps else []
        answers = {(row["step"], row["prompt"]): row["answer"] for row in rows}
        table = Table(
            ["step", *(shortened(prompt) for prompt in prompts)],
            [[f"{step:,}", *(shortened(answers.get((step, prompt), "")) for prompt in prompts)] for step in spread],
        )
        if rows:
            sections.append(Section(f"Samples while {stage.name} trained", table))
    return sections


def _answered(records: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {record["row"]: record for record in records if _answer(record) is not None}


def _answer(record: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the answer of a row with its reference: the generated text if there is one, else the choice."""
    for need in ("generation", "choice", "number"):
        if "prediction" in record.get(need, {}):
            return record[need]
    return None


def pick_samples(
    suite: str,
    titles: Sequence[str],
    earlier: Iterable[dict[str, Any]],
    later: Iterable[dict[str, Any]],
    better: Mapping[tuple[str, str], bool],
) -> list[SampleAnswer]:
    """A few rows of a suite as two models answered them; none where no answer can be shown.

    Args:
        suite: The suite.
        titles: Those of the two models.
        earlier: The records of one of them, as `predictions` holds them.
        later: Those of the other.
        better: By suite and metric, True where a higher score is a better one.
    """
    before, after = _answered(earlier), _answered(later)
    both = [row for row in after if row in before]
    need = next((need for need in ("generation", "choice", "number") if both and need in after[both[0]]), "")
    metrics = [name for name in (after[both[0]]["values"] if both else ()) if _judges(name, need, after[both[0]])]
    if not metrics:
        return []
    metric = metrics[0]

    def gain(row: int) -> float:
        change = after[row]["values"][metric] - before[row]["values"][metric]
        return change if better.get((suite, metric), True) else -change

    known = [row for row in both if metric in after[row]["values"] and metric in before[row]["values"]]
    order = sorted(known, key=lambda row: (-abs(gain(row)), row))
    sorts = dict(zip(SORTS, (lambda x: x > 0, lambda x: x < 0, lambda x: x == 0), strict=True))
    chosen = [(sort, row) for sort, test in sorts.items() for row in [r for r in order if test(gain(r))][:EACH]]
    return [_sample(suite, titles, sort, metric, before[row], after[row]) for sort, row in chosen]


def _judges(metric: str, need: str, record: dict[str, Any]) -> bool:
    """Returns True if a metric scores the answer that is shown, and not the likelihood of the right one."""
    likelihood = ("bits_per_byte", "perplexity", "bits_per_token")
    choice = need == "generation" and "choice" in record and metric == "accuracy"
    return metric not in likelihood and not choice


def _sample(
    suite: str, titles: Sequence[str], sort: str, metric: str, before: dict[str, Any], after: dict[str, Any]
) -> SampleAnswer:
    old, new = _answer(before) or {}, _answer(after) or {}
    texts = [("asked", str(after["asked"]))] if after.get("asked") else []
    texts += [("right", _words(new["reference"])), (titles[0], _words(old["prediction"]))]
    texts += [(titles[1], _words(new["prediction"]))]
    values = (before["values"][metric], after["values"][metric])
    return SampleAnswer(suite, str(after.get("id", after["row"])), sort, metric, values, texts)


def _words(answer: Any) -> str:
    return ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
