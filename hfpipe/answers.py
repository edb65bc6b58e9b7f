"""What a model answers to the rows of a suite: the likelihood of a text, a choice, a class, generated words.

Each function gives one answer a row of this rank's share, in its order; None for a row that cannot be scored.
"""

from __future__ import annotations

from typing import Any

from hfpipe import ranks
from hfpipe.data.choices import choice_form, common_choices, split_last_word
from hfpipe.data.continuations import encode_continuations
from hfpipe.data.encode import encode, prompt_and_completion
from hfpipe.errors import DataError, RecipeError
from hfpipe.metrics.matches import names_of
from hfpipe.model.classifier import classify
from hfpipe.model.load import ModelRef, task_of
from hfpipe.model.masked import fill_masks
from hfpipe.model.scoring import context_of, generate, likelihoods, within_positions
from hfpipe.recipe import Suite
from hfpipe.recipe.faults import listed
from hfpipe.recipe.metric_names import MASKED_METRICS

Rows = list[dict[str, Any]]
Answers = list[dict[str, Any] | None]
TEXT_LENGTH = 1024  # tokens of a text that are scored, unless the suite says otherwise


def can_score(suite: Suite, rows: Rows, ref: ModelRef) -> bool:
    """Whether a suite asks what a model can answer: classes of a classifier, masked tokens of an encoder, else text.

    A head does not exist before its stage, so a classifier's suite has no score on the base.
    """
    asked = "classification" if "sentence" in rows[0] else "causal"
    if MASKED_METRICS.intersection(suite.metrics):
        asked = "masked"
    return task_of(ref) == asked


def _likelihood(suite: Suite, mine: Rows, rows: Rows, model: Any, tokenizer: Any) -> Answers:
    """Bits, bytes and tokens of each row's text or completion."""
    if suite.target == "last_word":
        pairs = [split_last_word(row["text"]) for row in mine]
        encoded = encode_continuations(pairs, tokenizer, suite.max_length or context_of(model))
        words = [1] * len(mine)
    else:
        limit = within_positions(model, suite.max_length or TEXT_LENGTH)
        encoded = encode(mine, tokenizer, max_length=limit, append_eos=False)
        words = [len((row.get("text") or row.get("completion") or "").split()) for row in mine]
    found = likelihoods(model, encoded, tokenizer.pad_token_id, suite.batch_size)
    return [
        {
            "bits": one.bits,
            "bytes": row.scored_bytes,
            "tokens": int(row.scored.sum()),
            "words": count,
            "greedy": int(one.greedy),
        }
        if row.scored_bytes
        else None
        for one, row, count in zip(found, encoded, words, strict=True)
    ]


def _choice(suite: Suite, mine: Rows, rows: Rows, model: Any, tokenizer: Any) -> Answers:
    """The answer that each row's model finds most likely among the choices, how sure it is, and the right one.

    `prediction` is the likeliest, `prediction_norm` and `prediction_bytes` the likeliest per character and per byte of
    the choice (lm-eval's `acc_norm` and `acc_bytes`); of several that are alike, the first.
    """
    common = None if "choices" in rows[0] or "good" in rows[0] else common_choices(suite, rows)
    forms = [choice_form(row, suite, common) for row in mine]
    pairs = [pair for form in forms for pair in form.pairs]
    limit = suite.max_length or context_of(model)
    encoded = encode_continuations(pairs, tokenizer, limit)
    found = likelihoods(model, encoded, tokenizer.pad_token_id, suite.batch_size * 4)
    answers: Answers = []
    start = 0
    for form in forms:
        spent = [one.bits for one in found[start : start + len(form.choices)]]
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
            {
                "prediction": best,
                "prediction_norm": per_character,
                "prediction_bytes": per_byte,
                "reference": right,
                "confidence": 1 / sum(2.0 ** (min(spent) - bits) for bits in spent),  # likelihoods, made to sum to one
                "correct": int(best == right),
            }
        )
    return answers


def _classes(suite: Suite, mine: Rows, rows: Rows, model: Any, tokenizer: Any) -> Answers:
    """The class, classes or number that a classifier's head gives each row, how sure it is, and what is right."""
    said = classify(
        model, [row["sentence"] for row in mine], tokenizer, suite.max_length or TEXT_LENGTH, suite.batch_size
    )
    if model.config.problem_type != "regression":
        known = [str(name) for name in model.config.id2label.values()]
        right = {name for row in rows for name in names_of(row["label"])}
        if strange := sorted(right.difference(known)):
            raise DataError(
                f"the right answers {listed(strange)} are not among the classes of the model, {listed(known)}."
            )
    return [
        {"prediction": answer, "reference": row["label"], "confidence": sure, "correct": int(answer == row["label"])}
        for (answer, sure), row in zip(said, mine, strict=True)
    ]


def _generation(suite: Suite, mine: Rows, rows: Rows, model: Any, tokenizer: Any) -> Answers:
    """What the model says after each row's prompt, and what is right."""
    if "text" in rows[0]:
        raise RecipeError("a metric on generated answers needs rows with `prompt` and `completion`, or `messages`.")
    chat = "messages" in rows[0]
    prompts = [prompt_and_completion(row, tokenizer)[0] for row in mine]
    everyone = [row["messages"][-1]["content"] if chat else row["completion"] for row in rows]
    right = everyone[ranks.rank() :: ranks.ranks()]
    options = dict(suite.generation)
    if "max_new_tokens" not in options and "max_length" not in options:
        # Of all rows, not of this rank's: what is generated must not depend on the number of ranks.
        longest = max(len(ids) for ids in tokenizer(everyone)["input_ids"])
        options["max_new_tokens"] = min(longest + 4, 512)
    answers = generate(model, prompts, tokenizer, suite.batch_size, chat, options)
    return [{"prediction": said, "reference": text} for said, text in zip(answers, right, strict=True)]


def _masked(suite: Suite, mine: Rows, rows: Rows, model: Any, tokenizer: Any) -> Answers:
    """What an encoder says to the masked tokens of each row's text."""
    if "text" not in rows[0]:
        raise RecipeError(f"the metrics {', '.join(suite.metrics)} mask tokens of a text: their suite needs `text`.")
    numbers = range(ranks.rank(), len(rows), ranks.ranks())
    texts = [row["text"] for row in mine]
    return fill_masks(model, texts, numbers, tokenizer, suite.max_length or TEXT_LENGTH, suite.batch_size)


ANSWERS = {
    "likelihood": _likelihood,
    "choice": _choice,
    "number": _classes,
    "generation": _generation,
    "masked": _masked,
}


def answers_of(need: str, suite: Suite, rows: Rows, model: Any, tokenizer: Any) -> Answers:
    """What a model answers to all rows of a suite; each is asked on one rank.

    Args:
        need: What the metric needs, a key of `ANSWERS`.
        suite: The suite.
        rows: All its rows, the same on every rank.
        model: A model in evaluation mode, on every rank.
        tokenizer: The model's tokenizer.

    Returns:
        One answer a row, on every rank; None for a row that cannot be scored.
    """
    answer = _classes if "sentence" in rows[0] else ANSWERS[need]
    mine = rows[ranks.rank() :: ranks.ranks()]
    answers: Answers = [None] * len(rows)
    for rank, share in enumerate(ranks.gather(answer(suite, mine, rows, model, tokenizer))):
        answers[rank :: ranks.ranks()] = share
    return answers
