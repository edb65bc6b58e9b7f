"""Distribution shift of a run: each stage's training data beside the general text and beside the suites of its task.

Two sets of texts are compared by their token frequencies, by a classifier that tries to tell them apart, and by the
bits per byte of the base.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from hfpipe.core import ranks
from hfpipe.core.files import load_json, write_json
from hfpipe.data.mixture import mixture
from hfpipe.data.sources.batches import rows_of
from hfpipe.data.sources.load import load_rows
from hfpipe.data.tokenize import encode
from hfpipe.evaluation.likelihood import bits_of
from hfpipe.evaluation.metrics import load_metric
from hfpipe.model.load import ModelRef, load_to_score, task_of
from hfpipe.model.positions import within_positions
from hfpipe.model.spread import in_step, launched
from hfpipe.recipe import Recipe, Shift, Source, Stage, hash_of
from hfpipe.recipe.row_formats import text_of

MODEL_ROWS, MODEL_TOKENS, MODEL_BATCH = 100, 256, 8  # what the base is asked about: enough for two digits
TOLD_APART, FAR = 0.7, 0.9  # of the classifier's AUC


def measure_shift(
    recipe: Recipe, folder: Path, suites: Mapping[str, list[dict[str, Any]]], base: ModelRef, tokenizer: Any, key: str
) -> None:
    """Writes shift.json of a run folder, unless it is there for the same base and data.

    Every rank has to call this, and to wait behind it.

    Args:
        recipe: The recipe; `shift` says how many rows are looked at.
        folder: The run folder.
        suites: The rows of every suite.
        base: The base model.
        tokenizer: The run's tokenizer.
        key: Hash of the base.
    """
    path = folder / "shift.json"
    if recipe.shift is False or not recipe.evaluate:
        return
    count = (recipe.shift if isinstance(recipe.shift, Shift) else Shift.model_validate({})).rows
    data = [(stage.name, stage.kind, stage.data, getattr(stage, "replay", None)) for stage in recipe.stages]
    digest = hash_of([key, recipe.seed, count, data, {name: suite.data for name, suite in recipe.evaluate.items()}])
    if ranks.from_main(ranks.is_main() and path.exists() and load_json(path)["hash"] == digest):
        return
    samples = _samples(recipe, suites, count) if ranks.is_main() else {}
    ranks.wait()
    bits: dict[str, dict[str, float]] = {}
    if task_of(base) == "causal" and (ranks.is_main() or launched()):  # no other kind of model has a likelihood of text
        model = load_to_score(base)
        with in_step(model):
            bits = {name: _bits_per_byte(texts, model, tokenizer) for name, texts in samples.items()}
    if ranks.is_main():
        write_json(path, {"hash": digest, "pairs": _pairs(recipe, suites, samples, bits, tokenizer)})


def _samples(recipe: Recipe, suites: Mapping[str, list[dict[str, Any]]], count: int) -> dict[str, list[str]]:
    """Returns texts of every stage's data and of every suite, by `stage NAME` and `suite NAME`."""
    samples = {f"stage {stage.name}": stage_sample(recipe, stage, count) for stage in recipe.stages}
    for name, rows in suites.items():
        drawn = random.Random(recipe.seed).sample(rows, min(count, len(rows)))
        samples[f"suite {name}"] = [text for row in drawn if (text := text_of(row)[:CHARACTERS]).strip()]
    return {name: texts for name, texts in samples.items() if texts}


def _pairs(
    recipe: Recipe,
    suites: Mapping[str, list[dict[str, Any]]],
    samples: Mapping[str, list[str]],
    bits: Mapping[str, dict[str, float]],
    tokenizer: Any,
) -> list[dict[str, Any]]:
    """Compares the data of every stage with every suite that is about it."""
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
    return pairs


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
    limit = within_positions(model, MODEL_TOKENS)
    encoded = [row for row in encode(rows, tokenizer, max_length=limit, append_eos=False) if row.scored_bytes]
    bits = bits_of(model, encoded, tokenizer.pad_token_id, MODEL_BATCH)
    result = load_metric("bits_per_byte").compute(predictions=bits, references=[row.scored_bytes for row in encoded])
    return {"value": result["bits_per_byte"], "low": result["low"], "high": result["high"]}


def reading(pair: Mapping[str, Any]) -> str:
    """The numbers of a pair in plain words, and what they advise."""
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
        return text if near else text + _forgetting_expected(pair["bits_per_byte"])
    if near:
        return f"{text} The score speaks for data like the training data."
    return f"{text} The score shows how training carries over to other data: add training data that is like the suite."


def _forgetting_expected(bits: Sequence[Mapping[str, float]] | None) -> str:
    """Advice on forgetting where the training data is unlike the text that is to be kept.

    Data that a classifier tells apart is the rule in fine-tuning. How far training moves the model depends on how much
    of the data the base does not know yet: its bits per byte.
    """
    cure = "Keep more (`keep: self`, `replay:`, or a source of general text), or lower learning_rate."
    if bits is None:
        return f" It may be forgotten. {cure}"
    trained, held_out = bits
    if trained["low"] > held_out["high"]:
        return f" The base finds the training data harder than this text, so expect forgetting. {cure}"
    if trained["high"] < held_out["low"]:
        return " The base finds the training data easier than this text, so expect little forgetting."
    return " The base finds the training data about as hard as this text, so some may be forgotten."


CHARACTERS = 2000  # of each text that are looked at
FOLDS = 5
LEAST_ROWS = 20  # of each side: fewer say nothing
BOOTSTRAP = 200


def sample_texts(source: Source, count: int, seed: int) -> list[str]:
    """Texts of a source: drawn at random from a table, the first ones of a stream."""
    rows = load_rows(source)
    if isinstance(rows, Dataset):
        rows = rows.select(sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows)))))
    return [text for row in islice(rows_of(rows, source), count) if (text := text_of(row)[:CHARACTERS]).strip()]


def jensen_shannon(one: np.ndarray, other: np.ndarray) -> float:
    """Jensen-Shannon divergence (Lin 1991) of two vectors of counts, base 2: 0 where they are alike, 1 at most."""
    p, q = one / one.sum(), other / other.sum()
    middle = (p + q) / 2

    def bits(part: np.ndarray) -> float:
        seen = part > 0
        return float(np.sum(part[seen] * np.log2(part[seen] / middle[seen])))

    return max(0.0, (bits(p) + bits(q)) / 2)


def token_divergence(one: Sequence[str], other: Sequence[str], tokenizer: Any) -> tuple[float, float]:
    """Divergence of the token frequencies of two samples, and the noise floor.

    The floor is the larger divergence of a sample from itself: of its even from its odd texts. A half has twice the
    sampling noise of the whole, so a value above the floor is not noise.

    Args:
        one: Texts.
        other: Texts.
        tokenizer: The run's tokenizer.
    """
    size = len(tokenizer)

    def counts(texts: Sequence[str]) -> np.ndarray:
        encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return np.bincount(np.fromiter((token for ids in encoded for token in ids), np.int64), minlength=size)

    halves = [(counts(texts[::2]), counts(texts[1::2])) for texts in (one, other)]
    floor = max(jensen_shannon(even, odd) if even.sum() and odd.sum() else 1.0 for even, odd in halves)
    (even, odd), (other_even, other_odd) = halves
    return jensen_shannon(even + odd, other_even + other_odd), floor


def domain_auc(one: Sequence[str], other: Sequence[str], seed: int) -> dict[str, float] | None:
    """Returns the AUC of a linear classifier on hashed character n-grams between two samples, on texts it has not seen.

    Args:
        one: Texts.
        other: Texts.
        seed: Of the folds and the bootstrap.

    Returns:
        `value` (0.5: not at all, 1: always), `low` and `high` (95 %, by a bootstrap over the texts); None where a
        sample is too small.
    """
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    if min(len(one), len(other)) < LEAST_ROWS:
        return None
    # Characters within words, which serves languages that put no space between words too.
    vectorizer = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 4), n_features=2**18)
    features = vectorizer.transform([*one, *other])
    labels = np.repeat([0, 1], [len(one), len(other)])
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    classifier = LogisticRegression(C=10.0, class_weight="balanced", max_iter=200)
    scores = cross_val_predict(classifier, features, labels, cv=folds, method="decision_function")
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(BOOTSTRAP):
        drawn = np.concatenate(
            [generator.choice(np.flatnonzero(labels == side), (labels == side).sum()) for side in (0, 1)]
        )
        draws.append(roc_auc_score(labels[drawn], scores[drawn]))
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"value": float(roc_auc_score(labels, scores)), "low": float(low), "high": float(high)}
