"""Distribution shift of a run: each stage's training data beside the general text and beside the suites of its task."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfpipe.core import ranks
from hfpipe.core.files import write_json
from hfpipe.data.mixture import mixture
from hfpipe.data.shift import CHARACTERS, domain_auc, sample_texts, token_divergence
from hfpipe.data.sources.formats import text_of
from hfpipe.data.tokenize import encode
from hfpipe.metrics import load_metric
from hfpipe.model.load import ModelRef, load_model, task_of
from hfpipe.model.scoring import bits_of
from hfpipe.recipe import Recipe, Shift, Stage, hash_of

MODEL_ROWS, MODEL_TOKENS, MODEL_BATCH = 100, 256, 8  # what the base is asked about: enough for two digits
TOLD_APART, FAR = 0.7, 0.9  # of the classifier's AUC


def measure_shift(
    recipe: Recipe, folder: Path, suites: Mapping[str, list[dict[str, Any]]], base: ModelRef, tokenizer: Any, key: str
) -> None:
    """Writes shift.json of a run folder, unless it is there for the same base and data; `wait` behind it.

    Args:
        recipe: The recipe; `shift` says how many rows are looked at.
        folder: The run folder.
        suites: The rows of every suite.
        base: The base model.
        tokenizer: The run's tokenizer.
        key: Hash of the base.
    """
    path = folder / "shift.json"
    if recipe.shift is False or not recipe.evaluate or not ranks.is_main():
        return
    count = (recipe.shift if isinstance(recipe.shift, Shift) else Shift.model_validate({})).rows
    data = [(stage.name, stage.kind, stage.data, getattr(stage, "replay", None)) for stage in recipe.stages]
    digest = hash_of([key, recipe.seed, count, data, {name: suite.data for name, suite in recipe.evaluate.items()}])
    if path.exists() and json.loads(path.read_text())["hash"] == digest:
        return
    samples = {f"stage {stage.name}": stage_sample(recipe, stage, count) for stage in recipe.stages}
    for name, rows in suites.items():
        drawn = random.Random(recipe.seed).sample(rows, min(count, len(rows)))
        samples[f"suite {name}"] = [text for row in drawn if (text := text_of(row)[:CHARACTERS]).strip()]
    samples = {name: texts for name, texts in samples.items() if texts}
    bits: dict[str, dict[str, float]] = {}
    if task_of(base) == "causal":  # no other kind of model has a likelihood of text
        model = load_model(base)
        bits = {name: _bits_per_byte(texts, model, tokenizer) for name, texts in samples.items()}
    pairs = []
    for stage in recipe.stages:
        for name in recipe.evaluate:
            one, other = f"stage {stage.name}", f"suite {name}"
            about = _about(recipe, stage, name, suites[name])
            if about is None or one not in samples or other not in samples:
                continue
            divergence, floor = token_divergence(samples[one], samples[other], tokenizer)
            pair = {"stage": stage.name, "suite": name, "about": about, "jsd": divergence, "jsd_noise": floor}
            pair["auc"] = domain_auc(samples[one], samples[other], recipe.seed)
            pair |= {
                "bits_per_byte": [bits[one], bits[other]] if bits else None,
                "rows": [len(samples[one]), len(samples[other])],
            }
            pairs.append({**pair, "reading": reading(pair)})
    write_json(path, {"hash": digest, "pairs": pairs})


def stage_sample(recipe: Recipe, stage: Stage, count: int) -> list[str]:
    """Texts of what a stage trains on: its sources by their weights, and what it replays."""
    texts = []
    for part in mixture(recipe, stage):
        texts += sample_texts(part.source, max(1, round(count * part.share)), recipe.seed)
    random.Random(recipe.seed).shuffle(texts)  # the halves of the noise floor are of the whole mixture
    return texts


def _about(recipe: Recipe, stage: Stage, suite: str, rows: Sequence[dict[str, Any]]) -> str | None:
    """`general`: text that must not be forgotten. `task`: what the stage trains for. None: another stage's task."""
    if recipe.evaluate[suite].budget is not None or "text" in rows[0]:
        return "general"
    return "task" if stage.kind != "pretrain" else None


def _bits_per_byte(texts: Sequence[str], model: Any, tokenizer: Any) -> dict[str, float]:
    rows = [{"text": text} for text in texts[:MODEL_ROWS]]
    encoded = [row for row in encode(rows, tokenizer, max_length=MODEL_TOKENS, append_eos=False) if row.scored_bytes]
    bits = bits_of(model, encoded, tokenizer.pad_token_id, MODEL_BATCH)
    result = load_metric("bits_per_byte").compute(predictions=bits, references=[row.scored_bytes for row in encoded])
    return {"value": result["bits_per_byte"], "low": result["low"], "high": result["high"]}


def reading(pair: Mapping[str, Any]) -> str:
    """What the numbers of a pair say, and what they advise, in plain words."""
    auc, beyond = pair["auc"], pair["jsd"] > pair["jsd_noise"]
    if auc is None:
        text = "Too few rows for a classifier to say anything."
    elif auc["low"] <= 0.5 and not beyond:
        text = "No shift beyond the noise: neither a classifier nor the token frequencies tell them apart."
    elif auc["value"] < TOLD_APART:
        text = "Close: a classifier hardly tells them apart."
    else:
        text = "Far apart: " if auc["value"] >= FAR else "Different: "
        text += "a classifier tells them apart."
    near = auc is None or auc["value"] < TOLD_APART
    if pair["about"] == "general":
        if not near:
            text += " Expect forgetting: replay more (`replay:`, or a source of general text), or lower learning_rate."
        if pair["bits_per_byte"]:
            text += _harder_or_easier(*pair["bits_per_byte"])
    elif not near:
        text += " The score shows how training carries over to other data: add training data that is like the suite."
    else:
        text += " The score speaks for data like the training data."
    return text


def _harder_or_easier(trained: Mapping[str, float], held_out: Mapping[str, float]) -> str:
    """What the base's bits per byte on the two sides say, where the intervals do not meet."""
    if trained["low"] > held_out["high"]:
        return " The base finds the training data harder than this text: there is much to learn, so give it data."
    if trained["high"] < held_out["low"]:
        return " The base finds the training data easier than this text: few steps at a low rate may do."
    return ""
