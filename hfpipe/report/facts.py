"""Facts of a run beside its scores, as sections that report and model card share: data, confusion, overlap, cost."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfpipe.core.run_layout import predictions_of
from hfpipe.recipe import Recipe
from hfpipe.report.layout import Section
from hfpipe.report.limits import limits_of


def fact_sections(folder: Path, recipe: Recipe) -> list[Section]:
    """The sections of a run folder; without those that the run has no file for."""
    cost = cost_section(stage_costs(folder, recipe))
    data = data_section(folder, recipe)
    found = (overlap_section(folder), shift_section(folder), merge_section(folder, recipe), cost)
    sections = [data, selection_section(folder, recipe), *confusion_sections(folder, recipe)]
    sections += [limits_section(recipe), *found]
    return [section for section in sections if section]


def data_section(folder: Path, recipe: Recipe) -> Section | None:
    """What each stage read of its sources: rows, epochs, shares, what was left out or mended, and packing."""
    columns = ["stage", "source", "#rows read", "#documents trained on", "#epochs", "#share of the tokens"]
    rows = [[*columns, "left out", "cut or mended", "removed"]]
    waste = []
    for stage in recipe.stages:
        done = folder / "stages" / stage.name / "done.json"
        data = json.loads(done.read_text()).get("data", {}) if done.exists() else {}
        for name, facts in data.get("sources", {}).items():
            path = name.partition(": ")[2] + (" (replayed)" if facts.get("replayed") else "")
            cells = [stage.name, path, f"#{facts['rows']:,}"]
            cells += [f"#{facts[key]:,}" if key in facts else "#" for key in ("documents", "epochs")]
            cells.append(f"#{facts['token_share']:.1%}" if "token_share" in facts else "#")
            rows.append([*cells, *(_tallied(facts, kind) for kind in ("dirty", "mended", "removed"))])
        if "cut_share" in data:
            cut, padding = data["cut_share"], data["padding_share"]
            waste.append(f"{stage.name}: {cut:.1%} of the documents go on in another row, {padding:.1%} padding")
    return Section("Data", rows, [f"{'; '.join(waste)}."] if waste else []) if len(rows) > 1 else None


def _tallied(facts: Mapping[str, Any], kind: str) -> str:
    """Counts by reason, and the rows that were met first."""
    counts = ", ".join(f"{count:,} {why}" for why, count in facts.get(kind, {}).items()) or "none"
    ids = facts.get(f"{kind}_ids")
    return f"{counts} ({', '.join(ids)})" if ids else counts


def selection_section(folder: Path, recipe: Recipe) -> Section | None:
    """Which checkpoint early stopping chose for each stage."""
    rows = [["stage", "chosen by", "checkpoint", "#score then", "#evaluations", "training"]]
    for stage in recipe.stages:
        path = folder / "stages" / stage.name / "done.json"
        chosen = json.loads(path.read_text()).get("early_stopping") if path.exists() else None
        if chosen:
            ended = "stopped early" if chosen["stopped_early"] else "to its end"
            counts = [f"#{chosen['value']:.4f}", f"#{len(chosen['evaluations'])}"]
            rows.append([stage.name, f"{chosen['suite']} {chosen['metric']}", f"step {chosen['step']}", *counts, ended])
    note = (
        "The best of several scores flatters: what a checkpoint was chosen by is no longer a held-out measure of it. "
        "Read the quality of the model off another suite."
    )
    return Section("Choice of the checkpoint", rows, [note]) if len(rows) > 1 else None


def limits_section(recipe: Recipe) -> Section | None:
    """What the suites that measure bias cannot tell."""
    rows = [["suite", "metrics", "benchmark and its limits"]]
    for name, suite in recipe.evaluate.items():
        for limits in dict.fromkeys(filter(None, map(limits_of, suite.metrics))):
            rows.append([name, ", ".join(m for m in suite.metrics if limits_of(m) == limits), limits])
    return Section("What the bias scores cannot tell", rows) if len(rows) > 1 else None


def overlap_section(folder: Path) -> Section | None:
    """What the suites share with the training data."""
    path = folder / "overlap.json"
    pairs = json.loads(path.read_text())["pairs"] if path.exists() else []
    if not pairs:
        return None
    rows = [["stage", "source", "#rows looked at", "suite", "#rows", "#exact", "#half or more", "#any", "which"]]
    for pair in pairs:
        counts = [f"#{pair[key]:,}" for key in ("rows", "exact", "partly", "touched")]
        rows.append([pair["stage"], pair["source"], f"#{pair['looked_at']:,}", pair["suite"], *counts])
        rows[-1].append("; ".join(pair["which"]))
    note = (
        "Rows of a suite that stand in the training data as a whole, by half or more of their 13-word sequences in one "
        "document, or by any one sequence (Brown et al. 2020), without case, punctuation, and what more than ten "
        "training rows share."
    )
    return Section("Overlap of suites and training data", rows, [note])


def shift_section(folder: Path) -> Section | None:
    """How far each stage's training data lies from the general text and from the suites of its task."""
    path = folder / "shift.json"
    pairs = json.loads(path.read_text())["pairs"] if path.exists() else []
    if not pairs:
        return None
    rows = [["stage", "suite", "#classifier's AUC", "#JSD (noise)", "#base's bits per byte", "#rows", "reading"]]
    for pair in pairs:
        auc = pair["auc"]
        shown = f"{auc['value']:.2f} ({auc['low']:.2f} to {auc['high']:.2f})" if auc else ""
        bits = " / ".join(f"{side['value']:.2f}" for side in pair["bits_per_byte"] or ())
        counts = " / ".join(f"{count:,}" for count in pair["rows"])
        divergence = f"{pair['jsd']:.3f} ({pair['jsd_noise']:.3f})"
        suite = f"{pair['suite']} ({pair['about']})"
        rows.append([pair["stage"], suite, f"#{shown}", f"#{divergence}", f"#{bits}", f"#{counts}", pair["reading"]])
    note = (
        "Training data / suite, on a sample of each (of a stream, its first rows). AUC: how often a classifier on "
        "hashed character n-grams ranks a pair of unseen texts right, 0.5 is chance, with its 95 % interval. JSD: "
        "Jensen-Shannon divergence of the token frequencies, base 2; the noise is that of a sample from its other half."
    )
    return Section("Distribution shift", rows, [note])


def merge_section(folder: Path, recipe: Recipe) -> Section | None:
    """What the merge of each adapter cost."""
    rows = [["stage", "merged into the base", "#nats per token lost", "taken"]]
    notes = [
        "Mean Kullback-Leibler divergence of the merged model from the adapter on the base that it was trained on, on "
        "held-out texts of the suites."
    ]
    for stage in recipe.stages:
        path = folder / "stages" / stage.name / "merge.json"
        if not path.exists():
            continue
        merge = json.loads(path.read_text())
        for base, cost in (merge["costs"] or {merge["base"]: merge["loss"]}).items():
            rows.append([stage.name, base, f"#{cost:.3g}", "yes" if base == merge["base"] else "no"])
        notes += [
            f"{stage.name}, {one['suite']} {one['metric']}: {one['adapter']:.4f} by the adapter, {one['merged']:.4f} "
            "merged."
            for one in merge.get("suites", [])
        ]
    return Section("What merging cost", rows, notes) if len(rows) > 1 else None


def cost_section(totals: Mapping[str, dict[str, Any]]) -> Section | None:
    """What each stage cost, over all attempts at it, and the sum.

    Args:
        totals: The totals by stage, see `stage_costs`.
    """
    if not totals:
        return None
    hours = "GPU hours" if any(total["device"] != "CPU" for total in totals.values()) else "CPU process hours"
    rows = [["stage", "on", "#time", f"#{hours}", "#tokens", "#tokens/s", "#FLOPs", "#kWh", "#kg CO2", "#attempts"]]
    sums: dict[str, Any] = {}
    for key in ("seconds", "device_hours", "tokens", "flops", "kwh", "kg_co2", "attempts"):
        known = [total[key] for total in totals.values() if total[key] is not None]
        sums[key] = sum(known) if known else None
    named = [*totals.items(), *([("all stages", sums)] if len(totals) > 1 else [])]
    for name, total in named:
        cells = [_clock(total["seconds"]), *(_short(total.get(key)) for key in ("device_hours", "tokens"))]
        cells += [_short(total.get(key)) for key in ("tokens_per_second", "flops", "kwh", "kg_co2", "attempts")]
        device = f"{total['devices']} x {total['device']}" if "device" in total else ""
        rows.append([name, device, *(f"#{cell}" for cell in cells)])
    return Section("Cost", rows, _cost_notes(totals))


def _cost_notes(totals: Mapping[str, dict[str, Any]]) -> list[str]:
    notes = [
        "Training only, from loading the model to saving it, summed over interrupted and resumed attempts; scoring the "
        "suites is not counted. FLOPs are 6 x parameters outside the embeddings x tokens with padding, as transformers "
        "counts them."
    ]
    last = list(totals.values())[-1]
    unmeasured = [name for name, total in totals.items() if total["measured"] < total["attempts"]]
    if any(total["measured"] for total in totals.values()):
        note = f"Energy of the whole machine by {last['energy_by']}, an estimate where it has no energy counters."
        note += f" CO2 by the electricity mix of {last['country']}." if last["country"] else " CO2 needs the recipe's"
        note += "" if last["country"] else " `energy: {country_iso_code: ...}`."
        if unmeasured:
            note += f" It is a lower bound: not every attempt at {', '.join(unmeasured)} was measured."
    elif last["energy_by"] == "codecarbon is not installed":
        note = "Energy was not measured: codecarbon is not installed (`pip install 'hfpipe[energy]'`)."
    else:
        note = f"Energy was not measured: {last['energy_by']}."
    return [*notes, note]


def stage_costs(folder: Path, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The totals of cost.json by stage, of the stages that have one."""
    files = {stage.name: folder / "stages" / stage.name / "cost.json" for stage in recipe.stages}
    return {name: json.loads(file.read_text())["total"] for name, file in files.items() if file.exists()}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _short(value: float | None) -> str:
    """Three digits of a large number or a small one, all digits of a count."""
    if value is None:
        return ""
    if value == 0 or (value == int(value) and value < 1e12):
        return f"{int(value):,}"
    if value >= 1e12 or value < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


MOST_CLASSES = 30  # of a table that a person still reads
LONGEST_NAME = 40


def confusion_sections(folder: Path, recipe: Recipe) -> list[Section]:
    """One table for each suite of classes, after the last stage that was scored on it."""
    sections = []
    for suite in recipe.evaluate:
        files = {one.name: predictions_of(folder / "stages" / one.name) / f"{suite}.jsonl" for one in recipe.stages}
        there = [stage for stage, file in files.items() if file.exists()]
        pairs = _pairs(files[there[-1]]) if there else []
        names = sorted({name for pair in pairs for name in pair})
        if 2 <= len(names) <= MOST_CLASSES:
            sections.append(_table(suite, there[-1], pairs, names))
    return sections


def _pairs(file: Path) -> list[tuple[str, str]]:
    """The right and the said class of each row that has one of each."""
    records = [json.loads(line).get("choice", {}) for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = [(record["reference"], record["prediction"]) for record in records if record]
    return [pair for pair in pairs if all(isinstance(side, str) for side in pair)]


def _table(suite: str, stage: str, pairs: list[tuple[str, str]], names: list[str]) -> Section:
    counts = Counter(pairs)
    rows = [["right \\ said", *(f"#{_cut(name)}" for name in names), "#rows", "#found"]]
    for right in names:
        row = [counts[right, said] for said in names]
        found = f"{counts[right, right] / sum(row):.1%}" if sum(row) else ""
        rows.append([_cut(right), *(f"#{count:,}" for count in row), f"#{sum(row):,}", f"#{found}"])
    return Section(f"Confusion: {suite} after {stage}", rows)


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
