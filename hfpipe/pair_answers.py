"""What an encoder-decoder model answers to rows of source + target; see answers.py, which asks it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hfpipe.model.scoring import Likelihood
from hfpipe.model.seq2seq import (
    Pair,
    encode_pairs,
    generate_targets,
    most_tokens,
    set_languages,
    target_likelihoods,
)
from hfpipe.recipe import Suite

Rows = list[dict[str, Any]]
Answers = list[dict[str, Any] | None]
TEXT_LENGTH = 1024  # tokens of a text, a source or a target that are scored, unless the suite says otherwise
MOST_GENERATED = 512


def likelihoods_of(
    suite: Suite, pairs: Sequence[tuple[str, str]], model: Any, tokenizer: Any, batch_size: int
) -> tuple[list[Pair], list[Likelihood]]:
    """Tokens and likelihood of targets, each given its source."""
    set_languages(tokenizer, suite.data)
    limit = _limit(suite, model)
    encoded = encode_pairs(tokenizer, [source for source, _ in pairs], [target for _, target in pairs], limit, limit)
    return encoded, target_likelihoods(model, encoded, tokenizer.pad_token_id, batch_size)


def pair_likelihood(suite: Suite, mine: Rows, rows: Rows, model: Any, tokenizer: Any) -> Answers:
    """Bits, bytes and tokens of each row's target; the marks around it (EOS, a language code) are not counted."""
    pairs = [(row["source"], row["target"]) for row in mine]
    answers: Answers = []
    for (_, text), pair, one in zip(
        pairs, *likelihoods_of(suite, pairs, model, tokenizer, suite.batch_size), strict=True
    ):
        if pair.cut:  # without offsets, which not all of these tokenizers have, what is left of a text is its tokens'
            text = tokenizer.decode(np.asarray(pair.labels)[pair.scored].tolist())
        counts = {"bytes": len(text.encode()), "tokens": int(pair.scored.sum()), "words": len(text.split())}
        answers.append({"bits": one.bits, **counts, "greedy": int(one.greedy)} if counts["tokens"] else None)
    return answers


def pair_generation(suite: Suite, mine: Rows, rows: Rows, model: Any, tokenizer: Any) -> Answers:
    """What the model says to each row's source, and the row's target."""
    set_languages(tokenizer, suite.data)
    options = dict(suite.generation)
    if "max_new_tokens" not in options and "max_length" not in options:
        # Of all rows, not of this rank's: what is generated must not depend on the number of ranks.
        longest = max(len(ids) for ids in tokenizer(text_target=[row["target"] for row in rows])["input_ids"])
        options["max_new_tokens"] = int(min(longest + 4, MOST_GENERATED, most_tokens(model) - 1))
    sources = [row["source"] for row in mine]
    said = generate_targets(model, sources, tokenizer, suite.batch_size, _limit(suite, model), options)
    return [{"prediction": text, "reference": row["target"]} for text, row in zip(said, mine, strict=True)]


def _limit(suite: Suite, model: Any) -> int:
    return int(min(suite.max_length or TEXT_LENGTH, most_tokens(model)))
