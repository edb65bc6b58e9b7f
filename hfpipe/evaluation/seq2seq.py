"""Asks an encoder-decoder model the rows of source + target; called by answers.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hfpipe.core.errors import RecipeError
from hfpipe.data.tokenize import IGNORED
from hfpipe.evaluation.generation import MOST_GENERATED, as_decoded, decode, stop_tokens
from hfpipe.evaluation.likelihood import Likelihood, by_length
from hfpipe.model.seq2seq import (
    EncodedPair,
    decoder_input,
    encode_cut,
    encode_pairs,
    most_tokens,
    padded,
    set_languages,
    target_marks,
)
from hfpipe.model.spread import device_of, sources_read
from hfpipe.recipe import Suite

Rows = list[dict[str, Any]]
Answers = list[dict[str, Any] | None]
TEXT_LENGTH = 1024  # tokens of a text, a source or a target that are scored, unless the suite says otherwise


def likelihoods_of(
    suite: Suite, pairs: Sequence[tuple[str, str]], model: Any, tokenizer: Any, batch_size: int
) -> tuple[list[EncodedPair], list[Likelihood]]:
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
    """Generates the model's answer to each row's source, and returns it with the row's target."""
    set_languages(tokenizer, suite.data)
    options = dict(suite.generation)
    if "max_new_tokens" not in options and "max_length" not in options:
        # Of all rows, not of this rank's: what is generated must not depend on the number of ranks.
        longest = max(len(ids) for ids in tokenizer(text_target=[row["target"] for row in rows])["input_ids"])
        options["max_new_tokens"] = int(min(longest + 4, MOST_GENERATED, most_tokens(model) - 1))
    sources = [row["source"] for row in mine]
    said = generate_targets(model, sources, tokenizer, suite.batch_size, _limit(suite, model), options)
    marks = {one for part in target_marks(tokenizer) for one in part}
    right = tokenizer(text_target=[row["target"] for row in mine])["input_ids"] if mine else []
    return [
        {"prediction": text, "reference": as_decoded(row["target"], _without_marks(ids, marks), tokenizer)}
        for text, row, ids in zip(said, mine, right, strict=True)
    ]


def _limit(suite: Suite, model: Any) -> int:
    return int(min(suite.max_length or TEXT_LENGTH, most_tokens(model)))


@torch.no_grad()
def target_likelihoods(
    model: Any, pairs: Sequence[EncodedPair], pad_token_id: int, batch_size: int
) -> list[Likelihood]:
    """The likelihood of the text of each target, given its source.

    Args:
        model: The model in evaluation mode.
        pairs: Encoded rows.
        pad_token_id: Fills the right side of shorter sources.
        batch_size: Rows of a forward pass.

    Raises:
        RecipeError: The model gives no finite numbers.
    """
    found = [Likelihood(0.0, True)] * len(pairs)
    for indices in by_length([len(pair.input_ids) + len(pair.labels) for pair in pairs], batch_size):
        rows = [pairs[index] for index in indices]
        ids, mask = padded([row.input_ids for row in rows], pad_token_id)
        labels, _ = padded([row.labels for row in rows], IGNORED)
        where, _ = padded([row.scored.astype(int).tolist() for row in rows], 0)
        ids, mask, labels, where = (tensor.to(device_of(model)) for tensor in (ids, mask, labels, where.bool()))
        shifted = decoder_input(model, labels)
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=shifted, use_cache=False).logits
        chosen, row_of = logits[where].float(), where.nonzero()[:, 0]
        losses = torch.nn.functional.cross_entropy(chosen, labels[where], reduction="none")
        if not torch.isfinite(losses).all():
            raise RecipeError(
                "the model's likelihoods are not finite numbers, so nothing can be scored: its training has diverged, "
                "or its weights overflow in their dtype. Lower learning_rate, or set `model.dtype` to float32 or "
                "bfloat16."
            )
        totals = torch.zeros(len(rows), dtype=torch.float64, device=losses.device).index_add_(
            0, row_of, losses.double()
        )
        missed = torch.bincount(row_of[chosen.argmax(-1) != labels[where]], minlength=len(rows))
        for index, total, misses in zip(indices, totals.tolist(), missed.tolist(), strict=True):
            found[index] = Likelihood(total / math.log(2), not misses)
    return found


@torch.no_grad()
def generate_targets(
    model: Any, sources: Sequence[str], tokenizer: Any, batch_size: int, max_length: int, options: dict[str, Any]
) -> list[str]:
    """Generates an encoder-decoder model's answer to each source, without sampling unless the options ask for it.

    What the options do not say is the model's own generation_config.json (beams, forbidden words). A language code
    before or behind the target is given, as `target_marks` has it.

    Args:
        model: The model in evaluation mode.
        sources: Texts to read.
        tokenizer: The model's tokenizer, its languages set.
        batch_size: Sources of a batch.
        max_length: Tokens to keep of a source.
        options: Fields of transformers' GenerationConfig.
    """
    before, behind = target_marks(tokenizer)
    stops = list(dict.fromkeys([behind[0], *stop_tokens(model, tokenizer, options)]))
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": stops, "pad_token_id": tokenizer.pad_token_id}
    start = model.config.decoder_start_token_id
    marks = {*before, *behind, *stops, tokenizer.pad_token_id, tokenizer.bos_token_id, start}
    if before:
        settings["forced_bos_token_id"] = before[0]
    elif len(behind) > 1:  # mBART's first tokenizer: `text </s> de_DE`, turned round to begin the decoder
        settings["decoder_start_token_id"] = behind[1]
    encoded, _ = encode_cut(tokenizer, "text", sources, max_length)
    encoded = [ids or [behind[0]] for ids in encoded]
    answers = [""] * len(sources)
    for indices in by_length([len(ids) for ids in encoded], batch_size):
        ids, mask = padded([encoded[index] for index in indices], tokenizer.pad_token_id)
        inputs = {"input_ids": ids.to(device_of(model)), "attention_mask": mask.to(device_of(model))}
        output = model.generate(**sources_read(model, inputs), **{**settings, **options})
        for index, said in zip(indices, output.tolist(), strict=True):
            answers[index] = decode(_without_marks(said, marks), tokenizer)
    return answers


def _without_marks(ids: list[int], marks: set[int]) -> list[int]:
    """Tokens of a target without those that begin and end it."""
    inner = [place for place, one in enumerate(ids) if one not in marks]
    return ids[inner[0] : inner[-1] + 1] if inner else []
