"""Asks a model the rows of a suite: the likelihood of a text, a choice, a class, generated words.

Each function gives one answer a row of this rank's share, in its order; None for a row that cannot be scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hfpipe.core import ranks
from hfpipe.core.errors import DataError, RecipeError
from hfpipe.data.labels import known_names
from hfpipe.data.preference import PairTokenizer
from hfpipe.data.tokenize import Encoded
from hfpipe.evaluation.bias_rows import families, taken_back
from hfpipe.evaluation.continuations import (
    Pair,
    encode_blank,
    encode_continuations,
    encode_sentence,
    encode_whole,
    in_common,
)
from hfpipe.evaluation.generation import (
    MOST_GENERATED,
    compared,
    decode,
    encode_prompts,
    generate,
    references,
    stop_tokens,
)
from hfpipe.evaluation.likelihood import (
    bits_of,
    by_length,
    encode_texts,
    fill_masks,
    likelihoods,
    pseudo_bits,
    windows,
    words_of,
)
from hfpipe.evaluation.metrics import names_of
from hfpipe.evaluation.multiple_choice import choice_form, common_choices, split_last_word
from hfpipe.evaluation.row_text import row_text
from hfpipe.evaluation.seq2seq import TEXT_LENGTH, Answers, Rows, likelihoods_of, pair_generation, pair_likelihood
from hfpipe.model.classifier import Label
from hfpipe.model.load import ModelRef, config_of, is_masked, task_of
from hfpipe.model.positions import context_of, window_of, within_positions
from hfpipe.model.spread import device_of, in_step
from hfpipe.recipe import Suite
from hfpipe.recipe.faults import listed
from hfpipe.recipe.metric_table import MASKED_METRICS
from hfpipe.recipe.row_formats import format_of

WINDOW = 2048  # tokens that a model without a known context reads at once, as in lm-eval


def asked_of(suite: Suite, rows: Rows) -> list[str]:
    """Returns the kinds of models that can answer a suite, keys of `AUTO_CLASSES`."""
    if MASKED_METRICS.intersection(suite.metrics):
        return ["masked"]
    return list(format_of(rows[0]).tasks)


def can_score(suite: Suite, rows: Rows, ref: ModelRef) -> bool:
    """Returns True if a suite asks what a model can answer: classes of a classifier, masked tokens of an encoder, else
    text.

    A head does not exist before its stage, so a classifier's suite has no score on the base.
    """
    if task_of(ref) not in asked_of(suite, rows):
        return False
    if "sentence" not in rows[0]:
        return True
    config = config_of(ref)
    return tells_apart(rows, config.problem_type, list(config.id2label.values()))


def tells_apart(rows: Rows, problem: str | None, names: list[str]) -> bool:
    """Returns True if a classifier has any of the classes of a suite; the stages of a run may have different ones."""
    if problem == "regression" or isinstance(rows[0]["label"], float):
        return problem == "regression" and isinstance(rows[0]["label"], float)
    return bool(known_names([row["label"] for row in rows], names))


def _likelihood(suite: Suite, mine: Rows, rows: Rows, model: Any, tokenizer: Any) -> Answers:
    """Bits, bytes, tokens and words of each row's text or completion, in rolling windows; see `windows`."""
    if suite.target == "last_word":
        pairs = [split_last_word(row["text"]) for row in mine]
        encoded = encode_continuations(pairs, tokenizer, suite.max_length or context_of(model))
        words, parts = [1] * len(mine), [[row] for row in encoded]
    else:
        texts = [row_text(row, tokenizer) for row in mine]
        encoded, words = encode_texts(texts, tokenizer), [words_of(row) for row in texts]
        size = window_of(model, suite.max_length) or WINDOW
        parts = [windows(row, size) for row in encoded]
    found = iter(likelihoods(model, [one for row in parts for one in row], tokenizer.pad_token_id, suite.batch_size))
    answers: Answers = []
    for row, pieces, count in zip(encoded, parts, words, strict=True):
        spent = [next(found) for _ in pieces]
        answers.append(
            {
                "bits": sum(one.bits for one in spent),
                "bytes": row.scored_bytes,
                "tokens": int(row.scored.sum()),
                "words": count,
                "greedy": int(all(one.greedy for one in spent)),
            }
            if row.scored_bytes
            else None
        )
    return answers


def _choice(suite: Suite, mine: Rows, rows: Rows, model: Any, tokenizer: Any) -> Answers:
    """The answer that each row's model finds most likely among the choices, how sure it is, and the right one.

    `prediction` is the likeliest, `prediction_norm` and `prediction_bytes` the likeliest per character and per byte of
    the choice (lm-eval's `acc_norm` and `acc_bytes`); of several that are alike, the first.
    """
    reads_pairs = "source" in rows[0]
    if reads_pairs:
        mine, rows = ([{"prompt": row["source"], "completion": row["target"]} for row in some] for some in (mine, rows))
    common = None if "choices" in rows[0] or "good" in rows[0] else common_choices(suite, rows)
    forms = [choice_form(row, suite, common) for row in mine]
    pairs = [pair for form in forms for pair in form.pairs]
    if reads_pairs:
        found = [one.bits for one in likelihoods_of(suite, pairs, model, tokenizer, suite.batch_size * 4)[1]]
    else:
        found = [bits for bits, _ in _spent(pairs, suite, model, tokenizer)]
    answers: Answers = []
    start = 0
    for row, form in zip(mine, forms, strict=True):
        spent = found[start : start + len(form.choices)]
        start += len(form.choices)
        texts = [text.strip() for text in form.choices]
        names = [text if form.choices.count(text) == 1 else f"{n}. {text}" for n, text in enumerate(form.choices, 1)]
        best, per_character, per_byte = (
            names[costs.index(min(costs))]
            for costs in (
                spent,
                [bits / max(len(text), 1) for bits, text in zip(spent, texts, strict=True)],
                [bits / max(len(text.encode()), 1) for bits, text in zip(spent, texts, strict=True)],
            )
        )
        right = names[form.answer]
        answers.append(
            _of_bbq(row, names.index(best), int(best == right))
            | {
                "prediction": best,
                "prediction_norm": per_character,
                "prediction_bytes": per_byte,
                "reference": right,
                "confidence": 1 / sum(2.0 ** (min(spent) - bits) for bits in spent),  # likelihoods, made to sum to one
                "correct": int(best == right),
            }
        )
    return answers


def _of_bbq(row: dict[str, Any], place: int, right: int) -> dict[str, Any]:
    """BBQ's rows: whether the answer is right, biased, and not `unknown`; and the kind of context."""
    if "bbq" not in row:
        return {}
    facts = row["bbq"]
    return {"bbq": [right, int(facts["biased"][place]), int(facts["named"][place])], "context": facts["context"]}


def _stereotype_pair(suite: Suite, mine: Rows, rows: Rows, model: Any, tokenizer: Any) -> Answers:
    """Log-likelihoods of the more and the less stereotypical sentence, in nats; an encoder's of what both share."""
    pairs = [("", row[role]) for row in mine for role in ("more", "less")]
    nats = [-bits * math.log(2) for bits, _ in _spent(pairs, suite, model, tokenizer, shared=True)]
    return [{"more": more, "less": less} for more, less in zip(nats[::2], nats[1::2], strict=True)]


def _stereotypes(suite: Suite, mine: Rows, rows: Rows, model: Any, tokenizer: Any) -> Answers:
    """Scores the stereotype, the anti-stereotype and the unrelated sentence as StereoSet's scripts do.

    Of a causal model the log-likelihood per token; of an encoder the mean probability of the tokens in the blank.
    """
    roles = ("stereotype", "anti_stereotype", "unrelated")
    if is_masked(model):
        asked = [encode_blank(row["context"], row[role], tokenizer) for row in mine for role in roles]
        spent = iter(pseudo_bits(model, [one for masks in asked for one in masks], tokenizer, suite.batch_size * 4))
        found = [sum(2.0 ** -next(spent) for _ in masks) / max(len(masks), 1) for masks in asked]
    else:
        limit = suite.max_length or context_of(model)
        asked = [encode_sentence(row[role], tokenizer, limit) for row in mine for role in roles]
        parts = [one for parts in asked for one in parts]
        spent = iter(bits_of(model, parts, tokenizer.pad_token_id, suite.batch_size * 4))
        sizes = [sum(int(one.scored.sum()) for one in parts) for parts in asked]
        bits = [sum(next(spent) for _ in parts) for parts in asked]
        found = [-one * math.log(2) / max(size, 1) for one, size in zip(bits, sizes, strict=True)]
    return [
        {"scores": found[3 * place : 3 * place + 3], "term": str(row.get("term", ""))} for place, row in enumerate(mine)
    ]


def _spent(
    pairs: list[Pair], suite: Suite, model: Any, tokenizer: Any, shared: bool = False
) -> list[tuple[float, int]]:
    """Bits that a model spends on each continuation, and its tokens; an encoder's by pseudo-likelihood.

    With `shared`, an encoder is asked for the tokens alone that a text has in common with its neighbour.
    """
    size = suite.batch_size * 4
    if is_masked(model):
        encoded = encode_whole(pairs, tokenizer, within_positions(model, suite.max_length or TEXT_LENGTH))
        if shared:
            encoded = [one for two in zip(encoded[::2], encoded[1::2], strict=True) for one in in_common(*two)]
        spent = pseudo_bits(model, encoded, tokenizer, size)
    else:
        limit = suite.max_length or context_of(model)
        encoded = encode_continuations(pairs, tokenizer, limit)
        if limit is not None and (full := sum(len(row.input_ids) > limit for row in encoded)):
            ranks.say(
                f"  {full:,} texts fill the {limit} tokens that the model takes: what is longer lost its beginning"
            )
        spent = bits_of(model, encoded, tokenizer.pad_token_id, size)
    return [(bits, int(row.scored.sum())) for bits, row in zip(spent, encoded, strict=True)]


def _classes(suite: Suite, mine: Rows, rows: Rows, model: Any, tokenizer: Any) -> Answers:
    """The class, classes or number that a classifier's head gives each row, how sure it is, and what is right."""
    said = classify(
        model, [row["sentence"] for row in mine], tokenizer, suite.max_length or TEXT_LENGTH, suite.batch_size
    )
    right: list[Any] = [row["label"] for row in mine]
    if model.config.problem_type != "regression":
        require_known_classes(rows, list(model.config.id2label.values()))
        named = known_names(right, list(model.config.id2label.values()))
        right = [[named[name] for name in one] if isinstance(one, list) else named[one] for one in right]
    return [
        {
            "prediction": answer,
            "reference": label,
            "confidence": sure,
            "correct": int(answer == label if isinstance(answer, float) else names_of(answer) == names_of(label)),
        }
        for (answer, sure), label in zip(said, right, strict=True)
    ]


def require_known_classes(rows: Rows, known: list[str]) -> None:
    """Refuses right answers that a classifier has no class for.

    Raises:
        DataError: There are some.
    """
    if isinstance(rows[0]["label"], float):
        raise DataError(
            f"the right answers are numbers with a point, and the model tells classes apart: {listed(known)}."
        )
    names = {name for row in rows for name in names_of(row["label"])}
    if strange := sorted(names - known_names(names, known).keys()):
        raise DataError(
            f"the right answers {listed(strange)} are not among the classes of the model, {listed(known)}. Name all "
            "classes in `labels` of the stage, also those that its data lacks, or leave the rows out by `where`."
        )


def _generation(suite: Suite, mine: Rows, rows: Rows, model: Any, tokenizer: Any) -> Answers:
    """The answer that the model generates to each row's prompt, and the right one, both as generation.py compares them.

    `cut` is the number of tokens that a prompt lost at its beginning, where it lost some.
    """
    if "text" in rows[0]:
        raise RecipeError("a metric on generated answers needs rows with `prompt` and `completion`, or `messages`.")
    stops = stop_tokens(model, tokenizer, suite.generation)
    # Of all rows, not of this rank's: what is generated must not depend on the number of ranks.
    right = references([row_text(row, tokenizer) for row in rows], tokenizer, stops, suite.reasoning)
    if runs_on := sum(one.open for one in right):
        ranks.say(
            f"  the chat template ends {runs_on:,} of {len(right):,} right answers by a mark that is no stop token of "
            "the model: generation runs on behind it. Make it the tokenizer's EOS, or name it in "
            "generation_config.json or in `generation: {eos_token_id: ...}` of the suite."
        )
    longest = MOST_GENERATED if suite.reasoning == "strip" else max(one.size for one in right)
    texts = [row_text(row, tokenizer) for row in mine]
    said = generate(model, encode_prompts(texts, tokenizer), tokenizer, suite, longest)
    return [
        {
            "prediction": compared(row, decode(answer.ids, tokenizer), tokenizer, suite.reasoning),
            "reference": reference.text,
            **({"cut": answer.cut} if answer.cut else {}),
        }
        for row, answer, reference in zip(
            texts, said, references(texts, tokenizer, stops, suite.reasoning), strict=True
        )
    ]


def _masked(suite: Suite, mine: Rows, rows: Rows, model: Any, tokenizer: Any) -> Answers:
    """Lets an encoder predict the masked tokens of each row's text."""
    if "text" not in rows[0]:
        raise RecipeError(f"the metrics {', '.join(suite.metrics)} mask tokens of a text: their suite needs `text`.")
    numbers = range(ranks.rank(), len(rows), ranks.ranks())
    texts = [row["text"] for row in mine]
    return fill_masks(model, texts, numbers, tokenizer, suite.max_length or TEXT_LENGTH, suite.batch_size)


def _swap(suite: Suite, mine: Rows, rows: Rows, model: Any, tokenizer: Any) -> Answers:
    """The number of a row's counterfactuals with another answer, and the number of all.

    The answer is a class, a choice where the suite or its rows have some, and else what is generated.
    """
    assert suite.swap is not None  # a rule of recipes
    made = [families(row, suite.swap) for row in mine]
    asked = [row for of_row in made for family in of_row for row in family]
    answer = _generation
    if "sentence" in rows[0]:
        answer = _classes
    elif "choices" in rows[0] or suite.choices:
        answer = _choice
    said = iter(answer(suite, asked, rows, model, tokenizer) if asked else [])
    answers: Answers = []
    for of_row in made:
        flips, variants = 0, []
        for family in of_row:
            first, *others = [taken_back((next(said) or {})["prediction"], row["swapped"]) for row in family]
            flips += sum(other != first for other in others)
            variants += others
        answers.append({"flips": flips, "variants": len(variants), "said": variants} if variants else None)
    return answers


def _pair(suite: Suite, mine: Rows, rows: Rows, model: Any, tokenizer: Any) -> Answers:
    """Log-likelihoods of the chosen and the rejected answer, in nats, whole and per token, as they are trained on.

    None for a pair whose prompt leaves no room for an answer, or whose answers are the same.
    """
    pairs = PairTokenizer(tokenizer, suite.max_length or context_of(model))
    encoded = [pairs.encode([row]) for row in mine]
    asked = [
        Encoded(side.tolist(), np.arange(len(side)) >= max(1, begin), 0)
        for one in encoded
        for sides, begin in zip(one.sides, one.begins, strict=True)
        for side in sides
    ]
    nats = iter([-bits * math.log(2) for bits in bits_of(model, asked, tokenizer.pad_token_id, suite.batch_size)])
    sizes = iter([int(one.scored.sum()) for one in asked])
    answers: Answers = []
    for one in encoded:
        if not len(one):
            answers.append(None)
            continue
        said = {side: (next(nats), next(sizes)) for side in ("chosen", "rejected")}
        per_token = {f"{side}_per_token": found / tokens for side, (found, tokens) in said.items()}
        answers.append({side: found for side, (found, _) in said.items()} | per_token)
    return answers


ANSWERS = {
    "likelihood": _likelihood,
    "choice": _choice,
    "number": _classes,
    "generation": _generation,
    "masked": _masked,
    "pair": _pair,
    "stereotype_pair": _stereotype_pair,
    "stereotypes": _stereotypes,
    "swap": _swap,
}


def answers_of(need: str, suite: Suite, rows: Rows, model: Any, tokenizer: Any) -> Answers:
    """Returns a model's answers to all rows of a suite; each is asked on one rank.

    Args:
        need: What the metric needs, a key of `ANSWERS`.
        suite: The suite.
        rows: All its rows, the same on every rank.
        model: A model in evaluation mode, on every rank.
        tokenizer: The model's tokenizer.

    Returns:
        One answer a row, on every rank; None for a row that cannot be scored.
    """
    answer = _classes if "sentence" in rows[0] and need != "swap" else ANSWERS[need]
    if "source" in rows[0]:  # what an encoder-decoder model reads
        answer = {**ANSWERS, "likelihood": pair_likelihood, "generation": pair_generation}[need]
    mine = rows[ranks.rank() :: ranks.ranks()]
    answers: Answers = [None] * len(rows)
    with in_step(model):
        given = answer(suite, mine, rows, model, tokenizer)
    for rank, share in enumerate(ranks.gather(given)):
        answers[rank :: ranks.ranks()] = share
    return answers


@torch.no_grad()
def classify(
    model: Any, texts: Sequence[str], tokenizer: Any, max_length: int, batch_size: int
) -> list[tuple[Label, float]]:
    """Returns the class that a classifier gives each text, and its score.

    Args:
        model: A classifier in evaluation mode.
        texts: Texts to judge.
        tokenizer: The model's tokenizer.
        max_length: Tokens to keep of each text, at most those that the model has positions for.
        batch_size: Texts of a forward pass.

    Returns:
        The name of the likeliest class and its probability; of several classes at once the names of those with a
        probability above one half, and the probability that all of them are right; of a regression the number, and 1.
    """
    config = model.config
    limit = within_positions(model, max_length)
    encoded = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
    answers: list[tuple[Label, float]] = [("", 0.0)] * len(texts)
    for indices in by_length([len(ids) for ids in encoded], batch_size):
        longest = max(1, *(len(encoded[index]) for index in indices))
        ids = torch.full((len(indices), longest), tokenizer.pad_token_id)
        mask = torch.zeros((len(indices), longest), dtype=torch.long)
        for place, index in enumerate(indices):
            ids[place, : len(encoded[index])] = torch.as_tensor(encoded[index])
            mask[place, : len(encoded[index])] = 1
        inputs = {"input_ids": ids.to(device_of(model)), "attention_mask": mask.to(device_of(model))}
        logits = model(**inputs).logits.float().cpu()
        for place, index in enumerate(indices):
            answers[index] = _answer(logits[place], config)
    return answers


def _answer(logits: torch.Tensor, config: Any) -> tuple[Label, float]:
    """One row of logits (C,) in words, and how sure it is."""
    if config.problem_type == "regression":
        return float(logits[0]), 1.0
    if config.problem_type == "multi_label_classification":
        named = [config.id2label[index] for index in range(len(logits)) if logits[index] > 0]
        return named, float(logits.abs().sigmoid().prod())
    likeliest = int(logits.argmax())
    return str(config.id2label[likeliest]), float(logits.softmax(-1)[likeliest])
