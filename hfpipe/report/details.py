"""Sections beside the scores: data, choice of checkpoint, confusion, limits, overlap, shift, merge, cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfpipe.core.files import gibibytes, read_json, read_jsonl
from hfpipe.core.run_layout import predictions_of
from hfpipe.recipe import Recipe
from hfpipe.report.layout import Cell, Number, Section, Table
from hfpipe.scores.wording import between, number, percent

MOST_CLASSES = 30  # of a confusion matrix that a person still reads
LONGEST_NAME = 40
LONGEST_TEXT = 300  # characters of a text that is shown

_BLODGETT = "Blodgett et al. (2021, aclanthology.org/2021.acl-long.81)"
_CROWS = (
    "CrowS-Pairs (Nangia et al. 2020): pairs of English sentences about groups in the United States, among which "
    f"{_BLODGETT} found many that are no valid contrast; a score near one half does not show that a model is free of "
    "bias."
)
_STEREOSET = (
    "StereoSet (Nadeem et al. 2021): English, written by crowd workers in the United States, about gender, profession, "
    f"race and religion; {_BLODGETT} found many of its pairs to be no valid contrast."
)
_BBQ = (
    "BBQ (Parrish et al. 2022): English questions by template about biases attested in the United States; answers are "
    "chosen by likelihood here, so a weak model's score says more about chance than about bias: read it beside the "
    "accuracy."
)
_SWAP = (
    "Counterfactual swaps test only the words that the recipe lists, in the sentences of its own data; a swap may make "
    "a sentence odd or change what is true, so look at the rows that flip (predictions/*.jsonl)."
)
# By metric of bias: the benchmark and what its scores cannot tell.
LIMITS = {
    **dict.fromkeys(("accuracy_ambiguous", "accuracy_disambiguated", "bias_ambiguous", "bias_disambiguated"), _BBQ),
    **dict.fromkeys(("icat", "lms", "ss"), _STEREOSET),
    **dict.fromkeys(("likelihood_difference", "stereotype_score"), _CROWS),
    "flip_rate": _SWAP,
}


def detail_sections(folder: Path, recipe: Recipe) -> list[Section | None]:
    """The sections of a run folder, None for each that the run has no file for."""
    return [
        _data_section(folder, recipe),
        _kept_section(folder, recipe),
        _selection_section(folder, recipe),
        *_confusion_sections(folder, recipe),
        limits_section(recipe),
        _overlap_section(folder),
        _shift_section(folder),
        _merge_section(folder, recipe),
        cost_section(stage_costs(folder, recipe)),
    ]


def _data_section(folder: Path, recipe: Recipe) -> Section | None:
    """Rows, epochs and shares of each source of each stage, its rows left out or repaired, and the cost of packing."""
    rows, waste = [], []
    for stage in recipe.stages:
        data = read_json(folder / "stages" / stage.name / "done.json").get("data", {})
        for name, facts in data.get("sources", {}).items():
            path = name.partition(": ")[2] + (" (replayed)" if facts.get("replayed") else "")
            trained = _trained_on(facts)
            counts = [f"{facts['rows']:,}", "" if trained is None else f"{trained:,}"]
            counts.append(f"{facts['epochs']:,}" if "epochs" in facts else "")
            share = percent(facts["token_share"]) if "token_share" in facts else ""
            rows.append([path, stage.name, *counts, share])
            rows[-1] += [_tallied(facts, kind) for kind in ("dirty", "mended", "removed")]
        if "cut_share" in data:
            cut, padding = percent(data["cut_share"]), percent(data["padding_share"])
            waste.append(f"{stage.name}: {cut} of the documents go on in another row, {padding} padding.")
    counted = map(Number, ("rows read", "documents trained on", "epochs", "share of tokens"))
    head = ["source", "stage", *counted, "left out", "cut or repaired", "removed"]
    return Section("Data", Table(head, rows), waste) if rows else None


def _trained_on(facts: Mapping[str, Any]) -> int | None:
    """The documents of a source that were trained on, one that was read in two epochs twice; None if unknown."""
    if "documents" in facts or "epochs" not in facts:
        return facts.get("documents")
    return round((facts["rows"] - sum(facts.get("dirty", {}).values()) - facts.get("untrained", 0)) * facts["epochs"])


def _kept_section(folder: Path, recipe: Recipe) -> Section | None:
    """The texts that each stage's parent made of itself, and some of them to read."""
    rows, notes = [], []
    for stage in recipe.stages:
        for name in ("texts", "chats"):
            if not (facts := read_json(folder / "stages" / stage.name / "keep" / f"{name}.json")).get("texts"):
                continue
            shares = [percent(facts[key]) for key in ("duplicates", "repeats", "ended")]
            rows.append([stage.name, name, f"{facts['texts']:,}", f"{facts['tokens']:,}", *shares])
            for text in facts["shown"]:
                shown = " ".join(text.split())
                cut = f"{shown[:LONGEST_TEXT]}…" if len(shown) > LONGEST_TEXT else shown
                notes.append(f"{stage.name}, one of the {name}: {cut}")
    note = (
        "Made by the stage's parent from the beginning of a text alone (arXiv 2505.13811), and mixed in so that what "
        "it can do stays. Repeats are the 4-word sequences that stand in the same text before; a text that did not end "
        "was cut when it was long enough."
    )
    counted = map(Number, ("texts", "tokens", "duplicates", "repeats", "ended"))
    head = ["stage", "kind", *counted]
    return Section("The parent's own texts", Table(head, rows), [note, *notes]) if rows else None


def _tallied(facts: Mapping[str, Any], kind: str) -> str:
    """Counts by reason, and the rows that were met first."""
    counts = ", ".join(f"{count:,} {why}" for why, count in facts.get(kind, {}).items()) or "none"
    ids = facts.get(f"{kind}_ids")
    return f"{counts} ({', '.join(ids)})" if ids else counts


def _selection_section(folder: Path, recipe: Recipe) -> Section | None:
    """Returns the checkpoint that early stopping chose for each stage."""
    rows = []
    for stage in recipe.stages:
        if chosen := read_json(folder / "stages" / stage.name / "done.json").get("early_stopping"):
            ended = "stopped early" if chosen["stopped_early"] else "to its end"
            score = [number(chosen["value"], chosen["metric"]), str(len(chosen["evaluations"]))]
            by = f"{chosen['suite']} {chosen['metric']}"
            rows.append([stage.name, f"step {chosen['step']}", by, *score, ended])
    head = ["stage", "checkpoint", "chosen by", Number("score then"), Number("evaluations"), "training"]
    note = (
        "The best of several scores flatters: what a checkpoint was chosen by is no longer a held-out measure of it. "
        "Read the quality of the model off another suite."
    )
    return Section("Choice of the checkpoint", Table(head, rows), [note]) if rows else None


def _confusion_sections(folder: Path, recipe: Recipe) -> list[Section]:
    """One matrix for each suite of classes, after the last stage that was scored on it."""
    sections = []
    for suite in recipe.evaluate:
        files = {one.name: predictions_of(folder / "stages" / one.name) / f"{suite}.jsonl" for one in recipe.stages}
        there = [stage for stage, file in files.items() if file.exists()]
        pairs = _class_pairs(files[there[-1]]) if there else []
        names = sorted({name for pair in pairs for name in pair})
        if 2 <= len(names) <= MOST_CLASSES:
            sections.append(Section(f"Confusion: {suite} after {there[-1]}", _confusion(pairs, names)))
    return sections


def _class_pairs(file: Path) -> list[tuple[str, str]]:
    """The right class and the predicted one of each row that has one of each."""
    records = [record.get("choice", {}) for record in read_jsonl(file)]
    pairs = [(record.get("reference"), record.get("prediction")) for record in records]
    return [(right, said) for right, said in pairs if isinstance(right, str) and isinstance(said, str)]


def _confusion(pairs: list[tuple[str, str]], names: list[str]) -> Table:
    counts = Counter(pairs)
    shown = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in names]
    rows = []
    for right, name in zip(names, shown, strict=True):
        row = [counts[right, predicted] for predicted in names]
        recall = percent(counts[right, right] / sum(row)) if sum(row) else ""
        rows.append([name, *(f"{count:,}" for count in row), f"{sum(row):,}", recall])
    return Table(["right \\ predicted", *map(Number, (*shown, "rows", "recall"))], rows, matrix=True)


def limits_section(recipe: Recipe) -> Section | None:
    """The known limits of the benchmarks of bias among the suites."""
    rows = []
    for name, suite in recipe.evaluate.items():
        for limits in dict.fromkeys(LIMITS[metric] for metric in suite.metrics if metric in LIMITS):
            rows.append([name, ", ".join(m for m in suite.metrics if LIMITS.get(m) == limits), limits])
    head = ["suite", "metrics", "benchmark and its limits"]
    return Section("What the bias scores cannot tell", Table(head, rows)) if rows else None


def _overlap_section(folder: Path) -> Section | None:
    """Rows of suites that are found in the training data."""
    rows = []
    for pair in read_json(folder / "overlap.json").get("pairs", []):
        keys = ("looked_at", "rows", "exact", "partly", "near", "touched")
        counts = [f"{pair[key]:,}" if key in pair else "" for key in keys]
        rows.append([pair["suite"], pair["stage"], pair["source"], *counts, "; ".join(pair["which"])])
    counted = map(Number, ("rows looked at", "rows of the suite", "exact", "half or more", "near", "any"))
    note = (
        "Rows of a suite that stand in the training data as a whole, by half or more of their words in one document, "
        "short ones within about a word (near), or by any run of 13 words (Brown et al. 2020), without case, "
        "punctuation, and what several rows of the suite share with more than ten training rows."
    )
    head = ["suite", "stage", "source", *counted, "which"]
    return Section("Overlap of suites and training data", Table(head, rows), [note]) if rows else None


def _shift_section(folder: Path) -> Section | None:
    """Returns the distance of each stage's training data from the general text and from the suites of its task."""
    rows, readings = [], []
    for pair in read_json(folder / "shift.json").get("pairs", []):
        auc = pair["auc"]
        shown = f"{auc['value']:.2f} ({between(*(f'{auc[end]:.2f}' for end in ('low', 'high')))})" if auc else ""
        bits = " / ".join(f"{side['value']:.2f}" for side in pair["bits_per_byte"] or ())
        counts = " / ".join(f"{count:,}" for count in pair["rows"])
        divergence = f"{pair['jsd']:.3f} ({pair['jsd_noise']:.3f})"
        rows.append([f"{pair['suite']} ({pair['about']})", pair["stage"], shown, divergence, bits, counts])
        readings.append(f"{pair['stage']} against {pair['suite']}: {pair['reading']}")
    note = (
        "Training data / suite, on a sample of each (of a stream, its first rows). AUC: how often a classifier on "
        "hashed character n-grams ranks a pair of unseen texts right, 0.5 is chance, with its 95 % interval. JSD: "
        "Jensen-Shannon divergence of the token frequencies, base 2; the noise is that of a sample from its other half."
    )
    counted = map(Number, ("classifier's AUC", "JSD (noise)", "base's bits per byte", "rows"))
    table = Table(["suite", "stage", *counted], rows)
    return Section("Distribution shift", table, [*readings, note]) if rows else None


def _merge_section(folder: Path, recipe: Recipe) -> Section | None:
    """The divergence between each merged model and its adapter on the base."""
    rows, notes = [], []
    for stage in recipe.stages:
        if not (merge := read_json(folder / "stages" / stage.name / "merge.json")):
            continue
        for base, cost in (merge["costs"] or {merge["base"]: merge["loss"]}).items():
            rows.append([stage.name, base, f"{cost:.3g}", "yes" if base == merge["base"] else "no"])
        for one in merge.get("suites", []):
            adapter, merged = (number(one[side], one["metric"]) for side in ("adapter", "merged"))
            notes.append(f"{stage.name}, {one['suite']} {one['metric']}: {adapter} by the adapter, {merged} merged.")
    note = (
        "Mean Kullback-Leibler divergence of the merged model from the adapter on the base that it was trained on, on "
        "held-out texts of the suites."
    )
    head = ["stage", "merged into the base", Number("nats per token lost"), "taken"]
    return Section("What merging cost", Table(head, rows), [*notes, note]) if rows else None


def cost_section(totals: Mapping[str, dict[str, Any]]) -> Section | None:
    """Time, tokens, FLOPs and energy of each stage, summed over all attempts at it.

    Args:
        totals: The totals by stage, see `stage_costs`.
    """
    if not totals:
        return None
    unit = "GPU hours" if any(total.get("device", "CPU") != "CPU" for total in totals.values()) else "CPU process hours"
    summed = ("device_hours", "tokens", "flops", "kwh", "kg_co2", "attempts")
    sums: dict[str, Any] = {"tokens_per_second": None}
    for key in ("seconds", *summed):
        known = [total[key] for total in totals.values() if total.get(key) is not None]
        sums[key] = sum(known) if known else None
    rows = []
    for name, total in [*totals.items(), *([("all stages", sums)] if len(totals) > 1 else [])]:
        device = f"{total['devices']} x {total['device']}" if {"device", "devices"} <= total.keys() else ""
        shares = [percent(total[key]) if total.get(key) is not None else "" for key in ("mfu", "data_wait")]
        hours, tokens, *others = (_short(total.get(key)) for key in summed)
        rows.append([name, device, _clock(total["seconds"]), hours, tokens, _speed(total), *shares, *others])
        rows[-1] += [_gigabytes(total.get(key)) for key in ("peak_memory", "predicted_memory")]
    counted = ("time", unit, "tokens", "tokens/s", "MFU", "data wait", "FLOPs", "kWh", "kg CO2", "attempts")
    head = ["stage", "on", *map(Number, (*counted, "peak memory", "predicted"))]
    return Section("Cost", Table(head, rows), _cost_notes(totals))


def _speed(total: Mapping[str, Any]) -> str | Cell:
    """Tokens a second; below it those with padding, where there was some."""
    speed, padding = total.get("tokens_per_second"), total.get("padding_share")
    return Cell(_short(speed), f"{_short(speed / (1 - padding))} padded" if speed and padding else "")


def _cost_notes(totals: Mapping[str, dict[str, Any]]) -> list[str]:
    notes = [
        "Training only, from loading the model to saving it, summed over interrupted and resumed attempts; scoring the "
        "suites is not counted. FLOPs are 4 for each parameter and token and 2 more for each that is trained, the head "
        "included and the embeddings not. MFU is the share of the devices' peak in 16 bits that tokens without padding "
        "took. Data wait is the share of the training that steps waited for data. "
        "Peak memory is that of one rank, the one that took most, from loading the model to the last step: on a GPU "
        "what torch allocated, else the resident set of the process. Beside it stands what was predicted of the same "
        "for the longest rows."
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
    """The totals of cost.json and the share of padding by stage, of the stages that have them."""
    found = {}
    for stage in recipe.stages:
        place = folder / "stages" / stage.name
        if costs := read_json(place / "cost.json"):
            padding = read_json(place / "done.json").get("data", {}).get("padding_share")
            found[stage.name] = costs["total"] | {"padding_share": padding}
    return found


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _gigabytes(size: float | None) -> str:
    return f"{gibibytes(size)} GiB" if size else ""


def _short(value: float | None) -> str:
    """Three digits of a large number or a small one, all digits of a count."""
    if value is None:
        return ""
    if value == 0 or (value == int(value) and value < 1e12):
        return f"{int(value):,}"
    if value >= 1e12 or value < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"
