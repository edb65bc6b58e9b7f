"""Suites on a model: every rank scores its share of the rows, and the metrics see them all."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from itertools import islice
from typing import Any

from hfpipe import ranks
from hfpipe.data.encode import encode, prompt_and_completion
from hfpipe.data.source_errors import readable
from hfpipe.data.sources import load_rows
from hfpipe.errors import DataError, MachineError, RecipeError
from hfpipe.metrics import higher_is_better, load_metric, needs_of
from hfpipe.model.scoring import bits_of, generate
from hfpipe.recipe import Suite
from hfpipe.scores import Score

BOOTSTRAP_SAMPLES = 200


def suite_rows(suite: Suite, seed: int) -> list[dict[str, Any]]:
    """The rows of a suite that have content, in the order of the data.

    Raises:
        DataError: There is none.
    """
    rows = [
        row
        for row in readable(load_rows(suite.data, default_split="test", seed=seed), suite.data)
        if all(row[key] for key in row if key != "id")
    ]
    if not rows:
        raise DataError(f"the suite on {suite.data.path} has no row with content.")
    return rows


def score_suite(
    name: str, suite: Suite, rows: list[dict[str, Any]], model: Any, tokenizer: Any, stage: str
) -> list[Score]:
    """Scores one suite on a model.

    Args:
        name: The suite's name.
        suite: The suite.
        rows: All its rows, the same on every rank.
        model: A causal language model in evaluation mode, on every rank.
        tokenizer: The model's tokenizer.
        stage: What the scores are filed under.

    Returns:
        The scores, on every rank; each row was scored on one of them.
    """
    mine = rows[ranks.rank() :: ranks.ranks()]
    metrics = {metric: load_metric(metric) for metric in suite.metrics}
    answers: dict[str, tuple[list[Any], list[Any]]] = {}
    for need in dict.fromkeys(needs_of(metric) for metric in metrics.values()):
        found = ANSWERS[need](suite, mine, rows, model, tokenizer)
        gathered = [pair for share in ranks.gather(found) for pair in share]
        if not gathered:
            raise DataError(f"suite {name}: no row has a token to score; is max_length shorter than the prompts?")
        answers[need] = ([pair[0] for pair in gathered], [pair[1] for pair in gathered])
    scores = []
    for metric_name, metric in metrics.items():
        predictions, references = answers[needs_of(metric)]
        value, stderr = _compute(metric_name, metric, predictions, references)
        scores.append(
            Score(stage, name, metric_name, value, stderr, len(references), higher_is_better(metric_name, metric))
        )
    return scores


def _likelihood(
    suite: Suite, mine: list[dict[str, Any]], rows: list[dict[str, Any]], model: Any, tokenizer: Any
) -> list[tuple[float, int]]:
    """Bits and bytes of each row's text or completion."""
    encoded = encode(mine, tokenizer, max_length=suite.max_length, append_eos=False)
    encoded = [row for row in encoded if row.scored_bytes]
    bits = bits_of(model, encoded, tokenizer.pad_token_id, suite.batch_size)
    return list(zip(bits, (row.scored_bytes for row in encoded), strict=True))


def _choice(
    suite: Suite, mine: list[dict[str, Any]], rows: list[dict[str, Any]], model: Any, tokenizer: Any
) -> list[tuple[str, str]]:
    """The answer that each row's model finds most likely among the choices, and the right one."""
    if "prompt" not in rows[0]:
        raise RecipeError("the metric accuracy chooses among completions: its suite needs `prompt` and `completion`.")
    choices = suite.choices or sorted({row["completion"] for row in rows})
    unknown = next((row["completion"] for row in rows if row["completion"] not in choices), None)
    if unknown is not None:
        raise DataError(f"the right answer {unknown!r} is not among the choices {choices}: it could never be chosen.")
    if len(choices) < 2 or (suite.choices is None and len(choices) > 100):
        raise RecipeError(
            f"the metric accuracy found {len(choices)} different completions to choose from; it is meant for 2 to 100. "
            "Name them under `choices`, or use exact_match for free answers."
        )
    asked = [{"prompt": row["prompt"], "completion": choice} for row in mine for choice in choices]
    encoded = encode(asked, tokenizer, max_length=None, append_eos=False)
    bits = bits_of(model, encoded, tokenizer.pad_token_id, suite.batch_size * 4)
    chosen = []
    for number, row in enumerate(mine):
        own = bits[number * len(choices) : (number + 1) * len(choices)]
        chosen.append((choices[own.index(min(own))], row["completion"]))
    return chosen


def _generation(
    suite: Suite, mine: list[dict[str, Any]], rows: list[dict[str, Any]], model: Any, tokenizer: Any
) -> list[tuple[str, str]]:
    """What the model says after each row's prompt, and what is right."""
    if "text" in rows[0]:
        raise RecipeError("a metric on generated answers needs rows with `prompt` and `completion`, or `messages`.")
    chat = "messages" in rows[0]
    prompts = [prompt_and_completion(row, tokenizer)[0] for row in mine]
    right = [row["messages"][-1]["content"] if chat else row["completion"] for row in mine]
    options = dict(suite.generation)
    if "max_new_tokens" not in options and "max_length" not in options:
        longest = max((len(ids) for ids in tokenizer(right)["input_ids"]), default=1) if right else 1
        options["max_new_tokens"] = min(longest + 4, 512)
    answers = generate(model, prompts, tokenizer, suite.batch_size, chat, options)
    return list(zip(answers, right, strict=True))


ANSWERS = {"likelihood": _likelihood, "choice": _choice, "generation": _generation}


def _compute(name: str, metric: Any, predictions: Sequence[Any], references: Sequence[Any]) -> tuple[float, float]:
    """Value and standard error; a metric that does not give its own error gets it by the bootstrap over rows."""
    try:
        result = metric.compute(predictions=list(predictions), references=list(references))
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"metric {name!r} does not take generated texts and right answers (strings): {str(error)[:300]}"
        ) from error
    except ImportError as error:
        raise MachineError(f"metric {name!r}: {error}") from error
    value = _value(name, result)
    if "stderr" in result:
        return value, result["stderr"]
    generator = random.Random(0)
    values = []
    for _ in range(BOOTSTRAP_SAMPLES):
        drawn = generator.choices(range(len(references)), k=len(references))
        again = metric.compute(predictions=[predictions[i] for i in drawn], references=[references[i] for i in drawn])
        values.append(_value(name, again))
    return value, statistics.stdev(values)


def _value(name: str, result: dict[str, Any]) -> float:
    """The number a metric's result is about: under its own name, `score` (sacrebleu's modules), or the only one."""
    numbers = {key: value for key, value in result.items() if isinstance(value, int | float) and key != "stderr"}
    for key in (name, "score"):
        if key in numbers:
            return float(numbers[key])
    if not numbers:
        raise RecipeError(f"metric {name!r} returns no number but {sorted(result)}.")
    return float(next(islice(numbers.values(), 1)))
