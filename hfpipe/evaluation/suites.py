"""Suites on a model: every rank scores its share of the rows, and the metrics see them all."""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from hfpipe.core import display
from hfpipe.core.errors import DataError, MachineError, RecipeError
from hfpipe.data.labels import plain_labels
from hfpipe.data.sources.batches import rows_of
from hfpipe.data.sources.decoding import unmarked
from hfpipe.data.sources.load import load_rows
from hfpipe.evaluation.answers import ANSWERS, answers_of
from hfpipe.evaluation.bias_rows import bbq_rows, families, stereoset_rows
from hfpipe.evaluation.lm_eval import lm_eval_rows, score_lm_eval
from hfpipe.evaluation.metrics import arguments_of, higher_is_better, is_row_metric, load_metric, needs_of
from hfpipe.evaluation.multiple_choice import common_choices, plain_choices
from hfpipe.recipe import Suite
from hfpipe.recipe.faults import listed
from hfpipe.recipe.row_formats import BESIDE_MESSAGES, COMPLETION_TURNS, NUMBERS, format_of, question_of
from hfpipe.scores.scorecard import Paired, Score

BOOTSTRAP_SAMPLES = 200
ASKED = 1000  # characters of a question that are kept beside its answer


def suite_rows(suite: Suite) -> list[dict[str, Any]]:
    """The rows of a suite that have content, in the order of the data.

    Raises:
        DataError: There is none.
    """
    if suite.lm_eval is not None:
        return lm_eval_rows(suite)
    opened = load_rows(suite.data, default_split="test")
    if suite.limit is not None:  # of a fold
        opened = opened.take(suite.limit)
    if "sentence" in (opened.column_names or []):
        classes = any(needs_of(metric) == "choice" for metric in suite_metrics(suite).values())
        opened, _ = plain_labels(opened, suite.data.path, as_classes=classes)
    rows = [unmarked(row) for row in rows_of(opened, suite.data) if _has_content(row)]
    if rows and "answer_info" in rows[0]:
        rows = bbq_rows(rows)
    elif rows and "sentences" in rows[0]:
        rows = stereoset_rows(rows)
    elif rows and "answer" in rows[0]:
        rows = plain_choices(rows, suite)
    if not rows:
        raise DataError(f"the suite on {suite.data.path} has no row with content (and a right answer, where it asks).")
    _require_metrics_for(suite, rows[0])
    chooses = any(needs_of(metric) == "choice" for metric in suite_metrics(suite).values())
    if chooses and "completion" in rows[0] and "choices" not in rows[0]:
        common_choices(suite, rows)
    _require_two_classes(suite, rows)
    _require_rows_for(suite, rows)
    return rows


def _has_content(row: dict[str, Any]) -> bool:
    """Returns True if no text of a row is empty; what is right may be a 0, and only what is missing is empty."""
    texts = {key: value for key, value in row.items() if key not in ("id", COMPLETION_TURNS, *BESIDE_MESSAGES)}
    return all(value is not None if key in ("label", "answer") else value for key, value in texts.items())


def _require_two_classes(suite: Suite, rows: list[dict[str, Any]]) -> None:
    """Refuses Matthews' correlation of one class, which no model's answers can give a value."""
    named = [row.get("label", row.get("completion", row.get("answer"))) for row in rows]
    if "matthews_correlation" in suite.metrics and len(set(map(str, named))) < 2:
        raise DataError(
            f"the suite on {suite.data.path}: matthews_correlation is undefined where all right answers are one class, "
            f"and all {len(rows):,} rows say {named[0]!r}. Take rows of two classes or more, or accuracy."
        )


def _require_rows_for(suite: Suite, rows: list[dict[str, Any]]) -> None:
    """Refuses metrics of BBQ without a row of their kind of context, and a swap of words that no row has."""
    metrics = suite_metrics(suite)
    for name, metric in metrics.items():
        if getattr(metric, "rows", None) == "bbq" and all(row["bbq"]["context"] != metric.context for row in rows):
            raise DataError(
                f"the suite on {suite.data.path}: {name} is about rows with {metric.context} context, and none of its "
                f"{len(rows):,} rows has one. Leave it out, or take other rows (`take`, `skip`)."
            )
    swap = suite.swap
    if swap is not None and not any(families(row, swap) for row in rows):
        marks = [f"{{{mark}}}" for mark in swap] if isinstance(swap, Mapping) else None
        words = marks or [word for words in swap for word in words]
        raise DataError(
            f"the suite on {suite.data.path}: `swap` has nothing to swap, as none of its {len(rows):,} rows has one of "
            f"{listed(words)}. Correct the words, or leave flip_rate and `swap` out."
        )


def _require_metrics_for(suite: Suite, row: dict[str, Any]) -> None:
    """Refuses metrics that ask for something else than what the rows hold."""
    format = format_of(row)
    needs, fitting, holds = format.needs, format.fitting, format.description
    if isinstance(row.get("label"), float):
        needs, fitting, holds = NUMBERS
    for name, metric in suite_metrics(suite).items():
        need, rows = needs_of(metric), getattr(metric, "rows", None)
        if need not in needs or (rows and rows not in row):
            raise RecipeError(
                f"the suite on {suite.data.path}: {name} scores {_SCORED[rows or need]}, and its rows hold {holds}. "
                f"Take {fitting}, or name other columns."
            )
    needed = {needs_of(metric) for metric in suite_metrics(suite).values()}
    if suite.generation and not needed & {"generation", "swap"}:
        raise RecipeError(
            f"the suite on {suite.data.path}: `generation` has no effect, since none of its metrics "
            f"({', '.join(suite.metrics)}) looks at a generated answer. Leave it out, or add one, such as exact_match."
        )


_SCORED = {
    "likelihood": "text",
    "choice": "classes or choices",
    "number": "numbers",
    "generation": "generated text",
    "masked": "masked tokens of `text`",
    "stereotype_pair": "pairs of stereotypes (`more` and `less`)",
    "stereotypes": "StereoSet's sentences",
    "bbq": "BBQ's rows",
    "pair": "pairs of answers (`chosen` and `rejected`)",
    "swap": "answers to rows with swapped words",
}


@dataclass(frozen=True)
class Scored:
    """A suite's scores, and what each row gave.

    Args:
        scores: One a metric.
        records: One for each row that was scored, in the order of the data: `row` (its place in the suite), `id` (where
            the data has one), `asked` (the beginning of the question), what the model gave by need (`likelihood`,
            `choice`, `number`, `generation`), and `values`, the scores of the row alone of the metrics that have one.
    """

    scores: list[Score]
    records: list[dict[str, Any]]


def suite_metrics(suite: Suite) -> dict[str, Any]:
    """The `evaluate` modules of a suite by name.

    Raises:
        RecipeError: Nobody knows the name, or an option is wrong.
    """
    return {name: load_metric(name, suite.metric_options.get(name)) for name in suite.metrics}


def score_suite(name: str, suite: Suite, rows: list[dict[str, Any]], model: Any, tokenizer: Any, stage: str) -> Scored:
    """Scores one suite on a model.

    Args:
        name: The suite's name.
        suite: The suite.
        rows: All its rows, the same on every rank.
        model: A causal language model in evaluation mode, on every rank.
        tokenizer: The model's tokenizer.
        stage: What the scores are filed under.

    Returns:
        The scores and records, on every rank; each row was scored on one of them, once.
    """
    with display.doing(f"scoring {name} of {stage}"):
        if suite.lm_eval is not None:
            return Scored(score_lm_eval(name, suite, model, tokenizer, stage), [])
        return _score_rows(name, suite, rows, model, tokenizer, stage)


def _score_rows(name: str, suite: Suite, rows: list[dict[str, Any]], model: Any, tokenizer: Any, stage: str) -> Scored:
    """Scores a suite whose rows are ours to ask; see `score_suite`."""
    metrics = suite_metrics(suite)
    records: list[dict[str, Any]] = [
        {"row": number, **({"id": str(row["id"])} if "id" in row else {}), **_asked(row), "values": {}}
        for number, row in enumerate(rows)
    ]
    for need in dict.fromkeys(needs_of(metric) for metric in metrics.values()):
        found = False
        for record, answer in zip(records, answers_of(need, suite, rows, model, tokenizer), strict=True):
            if answer is not None:
                record[need], found = answer, True
        if not found:
            raise DataError(f"suite {name}: no row has a token to score; is max_length shorter than the prompts?")
    scores = []
    for metric_name, metric in metrics.items():
        taken = [record for record in records if needs_of(metric) in record]
        predictions, references = _pairs(metric, taken)
        result = _compute(metric_name, metric, predictions, references, suite.metric_options.get(metric_name))
        better = higher_is_better(metric_name, metric)
        ideal = getattr(metric, "ideal", None)
        result["signature"] = "; ".join(filter(None, [result.get("signature"), *_cuts(taken, needs_of(metric))]))
        result["baselines"] = baselines(metric, references) if "sentence" in rows[0] else {}
        scores.append(Score(stage, name, metric_name, higher_is_better=better, ideal=ideal, **result))
        if getattr(metric, "by_row", False):
            values = metric.value(metric.statistics(predictions, references))
            for record, value in zip(taken, values.tolist(), strict=True):
                record["values"][metric_name] = value
    return Scored(scores, [record for record in records if len(record.keys() & ANSWERS.keys())])


def _cuts(records: Sequence[dict[str, Any]], need: str) -> list[str]:
    """Says how many prompts lost their beginning, where some did: a fact of the score."""
    cut = [record[need]["cut"] for record in records if record[need].get("cut")]
    if not cut:
        return []
    return [f"{len(cut)} of {len(records)} prompts lost their beginning ({max(cut)} tokens at most)"]


def _asked(row: dict[str, Any]) -> dict[str, str]:
    """Returns the question of a row, cut to the length that a report shows; nothing for a row that is text alone."""
    text = question_of(row)
    return {"asked": text[:ASKED]} if text else {}


def compare_rows(suite: Suite, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Paired]:
    """The differences between two models on the rows that both have, with their errors and p-values.

    Args:
        suite: The suite.
        before: The records of one model.
        after: Those of the other.

    Returns:
        By metric; without those that are not ours, or have no row in common.
    """
    from hfpipe.evaluation.metrics.rows import paired_test  # late, see `is_row_metric`

    earlier = {record["row"]: record for record in before}
    found = {}
    for name, metric in suite_metrics(suite).items():
        need, takes = needs_of(metric), getattr(metric, "takes", ())
        pairs = [(earlier.get(row["row"], {}), row) for row in after]
        both = [pair for pair in pairs if all(set(takes) <= (record.get(need) or {}).keys() for record in pair)]
        if is_row_metric(metric) and both:
            old, new = ([pair[side] for pair in both] for side in (0, 1))
            found[name] = paired_test(metric, _pairs(metric, old), _pairs(metric, new))
    return found


def _pairs(metric: Any, records: Sequence[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Returns the predictions and references that a metric takes."""
    need, (one, other) = needs_of(metric), getattr(metric, "takes", ("prediction", "reference"))
    return [record[need][one] for record in records], [record[need][other] for record in records]


def _compute(
    name: str, metric: Any, predictions: Sequence[Any], references: Sequence[Any], options: dict[str, Any] | None
) -> dict[str, Any]:
    """Value, standard error and 95 % interval; those of a metric that is not ours by the bootstrap over rows."""
    if is_row_metric(metric):
        result = metric.compute(predictions=predictions, references=references)
        found = {key: result[key] for key in ("stderr", "low", "high", "n")}
        return {"value": result[name], **found, "signature": metric.signature}
    extra = arguments_of(options)
    try:
        value = _value(name, metric.compute(predictions=predictions, references=references, **extra))
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"metric {name!r} does not take generated texts and right answers (strings): {str(error)[:300]}"
        ) from error
    except ImportError as error:
        raise MachineError(f"metric {name!r}: {error}") from error
    if not math.isfinite(value):  # JSON has no such number, and no budget could be held against it
        raise RecipeError(
            f"metric {name!r} gives {value} for these answers, which is no number to compare. Leave it out."
        )
    generator = random.Random(0)
    values = []
    for _ in range(BOOTSTRAP_SAMPLES):
        drawn = generator.choices(range(len(references)), k=len(references))
        chosen = [predictions[i] for i in drawn], [references[i] for i in drawn]
        values.append(_value(name, metric.compute(predictions=chosen[0], references=chosen[1], **extra)))
    values = [one for one in values if math.isfinite(one)]
    if len(values) < 2:
        return {"n": len(references), "value": value, "stderr": None}
    cuts = statistics.quantiles(values, n=40)  # of 2.5 % each
    return {
        "n": len(references),
        "value": value,
        "stderr": statistics.stdev(values),
        "low": min(value, cuts[0]),
        "high": max(value, cuts[-1]),
    }


def baselines(metric: Any, references: Sequence[Any]) -> dict[str, float]:
    """Returns the scores on a suite's labels of answers without a model, for models that come without a head for them.

    Args:
        metric: One of ours that takes predicted and right labels; others have none.
        references: The right labels: names, lists of names, or numbers.

    Returns:
        The score of the most frequent label (or set of labels), of the mean of numbers (of absolute errors the median);
        of `accuracy` also that of a guess among the labels.
    """
    if not is_row_metric(metric) or metric.takes != ("prediction", "reference"):
        return {}
    if all(isinstance(reference, int | float) for reference in references):
        name, average = ("the median", statistics.median) if metric.key == "mae" else ("the mean", statistics.fmean)
        answer, labels = average(references), 0
    else:
        counts = Counter(tuple(one) if isinstance(one, list) else one for one in references)
        most = max(counts, key=lambda one: (counts[one], str(one)))
        name, answer, labels = "the majority class", list(most) if isinstance(most, tuple) else most, len(counts)
    found = {name: metric.compute(predictions=[answer] * len(references), references=references)[metric.key]}
    if metric.key == "accuracy" and isinstance(answer, str) and labels > 1:
        found["chance"] = 1 / labels
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _value(name: str, result: dict[str, Any]) -> float:
    """The number a metric's result is about: under its own name, `score` (sacrebleu's modules), or the only one."""
    numbers = {key: value for key, value in result.items() if isinstance(value, int | float) and key != "stderr"}
    for key in (name, "score"):
        if key in numbers:
            return float(numbers[key])
    if not numbers:
        raise RecipeError(f"metric {name!r} returns no number but {sorted(result)}.")
    return float(next(islice(numbers.values(), 1)))
