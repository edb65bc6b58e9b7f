"""How far two sets of texts lie from each other: token frequencies, and whether a classifier can tell them apart."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset

from hfpipe.data.sources.batches import rows_of
from hfpipe.data.sources.formats import text_of
from hfpipe.data.sources.load import load_rows
from hfpipe.recipe import Source

CHARACTERS = 2000  # of each text that are looked at
FOLDS = 5
LEAST_ROWS = 20  # of each side: fewer say nothing
BOOTSTRAP = 200


def sample_texts(source: Source, count: int, seed: int) -> list[str]:
    """Texts of a source: drawn at random from a table, the first ones of a stream."""
    rows = load_rows(source, seed=seed)
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
    """How well a linear classifier on hashed character n-grams tells two samples apart, on texts it has not seen.

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
