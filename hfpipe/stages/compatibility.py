"""Checks that data, stages, suites and model fit together, before anything is trained, for `run` and `check`.

A chain of hours must not end at its third stage over what its first rows say.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from heapq import nlargest
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from hfpipe.core.errors import DataError, RecipeError
from hfpipe.data.cleaning.text_rules import LOOK, Read, refuse_dirt, tidy_rows
from hfpipe.data.labels import Problem, known_names
from hfpipe.data.masking import Masking, frame_of, tokens_of_texts
from hfpipe.data.sources.formats import Taken
from hfpipe.data.sources.load import open_source
from hfpipe.data.tokenize import IGNORED, RowTokenizer, sft_tokenizer
from hfpipe.evaluation.answers import asked_of, tells_apart
from hfpipe.evaluation.generation import require_generation, require_window
from hfpipe.evaluation.metrics import is_row_metric
from hfpipe.evaluation.suites import suite_metrics
from hfpipe.model.positions import context_of
from hfpipe.model.seq2seq import encode_pairs, set_languages
from hfpipe.recipe import Classification, Pretrain, Recipe, Sft, Source, Stage, Suite
from hfpipe.recipe.row_formats import formats_of_stage
from hfpipe.recipe.source_config import BASE
from hfpipe.stages import TOKENIZERS
from hfpipe.stages.labels import Head, first_labels, head_for, require_fitting_suites
from hfpipe.stages.sft_rows import BLOCK, nothing_to_train
from hfpipe.stages.trainer import require_positions

LABELS = 100_000  # rows of a source whose labels are looked at
FIRST_ROWS = 200  # of a source, that are made into tokens
LONGEST_ROWS = 50  # and of those with the most text, among so many
LOOKED_AT = 100_000
TAKEN = ("prediction", "reference")
METRIC_ROWS = 200  # of a suite, whose right answers a metric of texts is asked about

Rows = list[dict[str, Any]]


def require_fitting(recipe: Recipe, tokenizer: Any, suites: Mapping[str, Rows], model: Any, task: str) -> None:
    """Refuses what a stage would refuse when it begins, as far as the first rows of its data can say it.

    Args:
        recipe: The recipe.
        tokenizer: The run's tokenizer.
        suites: The rows of every suite.
        model: The base; its shapes are enough, see `model.loadable.shapes_of`.
        task: What the base is for, a key of `AUTO_CLASSES`.

    Raises:
        RecipeError: A stage asks for more positions than the model has, weighs classes that it has not, or no model of
            the run can answer a suite.
        DataError: Data lacks columns, has labels that do not fit, or gives no row to train on.
    """
    heads: dict[str, Head] = {}
    if task == "classification":
        problem: Problem = model.config.problem_type or "single_label_classification"
        heads[BASE] = Head(problem, list(model.config.id2label.values()))
    for stage in recipe.stages:
        require_positions(stage, model)
        if isinstance(stage, Classification):
            _require_classifier(stage, model.config)
            found = first_labels(stage, LABELS)
            earlier = heads.get(recipe.parent_of(stage.name)) if stage.parent_adapter == "continue" else None
            heads[stage.name] = head = head_for(stage, found, earlier)
            if stage.training.get("label_smoothing_factor") and head.problem != "single_label_classification":
                raise RecipeError(
                    f"stages.{stage.name}.training.label_smoothing_factor has no effect on a {_HEADS[head.problem]}: "
                    "it takes a share of one right class and gives it to the others. Leave it out."
                )
            if found.whole or stage.labels or found.declared:
                require_fitting_suites(recipe, stage, head, suites)
    for name, rows in suites.items():
        _require_answerable(recipe, name, rows, task, heads)
        _require_metrics(recipe.evaluate[name], name, rows, heads)
        reads_pairs, rows_of_ids = "source" in rows[0], model.get_input_embeddings().num_embeddings
        vocabulary = max(rows_of_ids, len(tokenizer))
        require_generation(recipe.evaluate[name], name, vocabulary, tokenizer, reads_pairs=reads_pairs)
        if task == "causal" and recipe.evaluate[name].generation:
            require_window(recipe.evaluate[name], model)
        if "source" in rows[0]:
            set_languages(tokenizer, recipe.evaluate[name].data)


def _require_classifier(stage: Stage, config: Any) -> None:
    """Refuses a base of whose type transformers has no classifier."""
    own = getattr(config, "auto_map", None) or {}  # of a repository with code
    if (
        type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        and "AutoModelForSequenceClassification" not in own
    ):
        raise RecipeError(
            f"stages.{stage.name}: transformers has no classifier of a {config.model_type} model. Take a base of "
            "another type, such as an encoder (BERT, ModernBERT) or a Llama."
        )


@dataclass(frozen=True)
class Sample:
    """The first rows of a source, and the longest.

    Args:
        rows: The first rows, those with content.
        count: Rows of the whole source; None of a stream.
        taken: The format that the source was taken for.
        longest: The rows with the most text among the others; none of a stream.
        whole: Whether every row of the source was looked at for it.
    """

    rows: Rows
    count: int | None
    taken: Taken
    longest: Rows
    whole: bool


def require_rows(recipe: Recipe, tokenizer: Any) -> dict[tuple[str, int], Sample]:
    """Refuses data whose first rows no stage could be trained on.

    Returns:
        The first rows of every source, by the stage's name and the place among its sources.

    Raises:
        DataError: There is no row, too many are dirty, or no tokens can be made of one.
    """
    return {
        (stage.name, place): _first_rows(recipe, stage, source, tokenizer)
        for stage in recipe.stages
        for place, source in enumerate(stage.data)
    }


def _first_rows(recipe: Recipe, stage: Stage, source: Source, tokenizer: Any) -> Sample:
    """Returns the first rows of a source, of which tokens can be made."""
    opened, read = open_source(source, kinds=formats_of_stage(stage.kind)), Read()
    rows = opened.rows
    count = getattr(rows, "num_rows", None)
    first = list(tidy_rows(rows.take(FIRST_ROWS), source, read))
    if not read.rows:
        raise DataError(f"stages.{stage.name}: {source.title} has no row. {LOOK}")
    ended = read.rows < FIRST_ROWS
    if count is not None or ended or not first:  # the rest of a stream is read until one dirty row too many
        refuse_dirt(source, read.dirty, count or read.rows, stage.max_dirty_share)
    if ended and not first:
        raise DataError(f"source {source.path!r} has no document with text in it. {LOOK}")
    if first and stage.kind not in ("pretrain", "classification"):  # texts of any length, of which nothing is asked
        length = stage.training.get("max_length") or 1024
        encoded = encode_rows(first, stage, tokenizer, length, recipe.seed, source)
        if stage.task == "causal" and not encoded and (count is not None or ended):  # the rest of a table may have some
            read = Read()
            every = tidy_rows(rows, source, read)
            while chunk := list(islice(every, BLOCK)):
                if encode_rows(chunk, stage, tokenizer, length, recipe.seed, source):
                    break
            else:
                raise nothing_to_train(stage, source, read.rows - len(read.dirty))
    if ended or not isinstance(rows, Dataset) or stage.kind == "pretrain":  # whose rows are as long as max_length
        return Sample(first, count, opened.taken, [], ended)
    return Sample(first, count, opened.taken, _longest_rows(rows, source), len(rows) <= LOOKED_AT)


def _longest_rows(rows: Dataset, source: Source) -> Rows:
    """Returns the rows with the most text behind the first ones; of a large table, of some at even distances."""
    if len(rows) > LOOKED_AT:
        rows = rows.select([place * len(rows) // LOOKED_AT for place in range(LOOKED_AT)])
    later = islice(tidy_rows(rows, source, Read()), FIRST_ROWS, None)
    return nlargest(LONGEST_ROWS, later, key=lambda row: _size("".join(map(str, row.values()))))


def _size(text: str) -> int:
    """Returns the characters of a text, each further byte of one for three: in other scripts they are more tokens."""
    return 3 * len(text.encode(errors="replace")) - 2 * len(text)


def _require_answerable(recipe: Recipe, name: str, rows: Rows, task: str, heads: Mapping[str, Head]) -> None:
    """Refuses a suite that neither the base nor any stage can be asked, and early stopping on another model's suite.

    Raises:
        RecipeError: There is one.
    """
    suite = recipe.evaluate[name]
    able = [stage.name for stage in recipe.stages if _answers(suite, rows, stage.task, heads.get(stage.name))]
    if not able and not _answers(suite, rows, task, heads.get(BASE)):
        raise RecipeError(f"evaluate.{name}: {_unanswered(suite, rows, task, recipe, heads)}")
    for stage in recipe.stages:
        block = stage.early_stopping
        if block is not None and block.suite == name and stage.name not in able:
            raise RecipeError(
                f"stages.{stage.name}.early_stopping.suite: {name!r} can be asked {_WANTS[asked_of(suite, rows)[0]]}, "
                f"and this stage trains {_MODELS[stage.task]}. Take another suite."
            )


def _require_metrics(suite: Suite, name: str, rows: Rows, heads: Mapping[str, Head]) -> None:
    """Asks the metrics of classes and of generated texts what they say of the right answers: a few refuse them.

    Raises:
        RecipeError: One does, by its options or for its kind.
    """
    if "sentence" in rows[0]:
        need, classes = "choice", [head.names for head in heads.values() if head.problem != "regression"]
        labels = [row["label"] for row in rows if not isinstance(row["label"], float)]
        known = [names for names in (known_names(labels, of) for of in classes) if names]
        sides = [[_named(label, names) for label in labels] for names in known]
    else:
        need = "generation"
        texts = [row.get("target") or row.get("completion") or _last_turn(row) for row in rows[:METRIC_ROWS]]
        sides = [texts] if all(texts) else []
    for metric in suite_metrics(suite).values():
        for right in sides if is_row_metric(metric) and (metric.needs, metric.takes) == (need, TAKEN) else ():
            try:
                metric.whole(right, right, metric.statistics(right, right))
            except RecipeError as error:
                raise RecipeError(f"evaluate.{name}: {error}") from error


def _named(label: str | list[str], names: Mapping[str, str]) -> Any:
    return [names.get(one, one) for one in label] if isinstance(label, list) else names.get(label, label)


def _last_turn(row: dict[str, Any]) -> str | None:
    return row["messages"][-1].get("content") if row.get("messages") else None


def _answers(suite: Suite, rows: Rows, task: str, head: Head | None) -> bool:
    if task not in asked_of(suite, rows):
        return False
    return task != "classification" or (head is not None and tells_apart(rows, head.problem, head.names))


_HEADS = {"regression": "regression", "multi_label_classification": "classifier of several labels a row"}
_MODELS = {
    "causal": "a model of next tokens",
    "masked": "a model of masked tokens",
    "seq2seq": "an encoder-decoder model",
    "classification": "a classifier",
}
_WANTS = {task: f"of {model} alone" for task, model in _MODELS.items()}
_REMEDIES = {
    "causal": "Leave it out, or take metrics of the task at hand (docs/evaluation.md)",
    "masked": "Take other metrics, such as bits_per_byte of a decoder, or add a stage with `objective: masked`",
    "seq2seq": "Give it a prompt and its completion by `template:`, or add a stage of `kind: translation`",
    "classification": "Add a stage of `kind: classification`, or give it a prompt and its completion by `template:`",
}


def _unanswered(suite: Suite, rows: Rows, task: str, recipe: Recipe, heads: Mapping[str, Head]) -> str:
    """The reason why no model of a run can answer a suite, and what to do."""
    wanted = asked_of(suite, rows)[0]
    if wanted == "classification" and heads:
        said = rows[0]["label"]
        told = "; ".join(f"{name} has {head}" for name, head in heads.items())
        return (
            f"no stage has the classes of its rows, such as {said!r}: {told}. Correct its labels or those of the data."
        )
    trained = dict.fromkeys([task, *(stage.task for stage in recipe.stages)])
    return (
        f"it can be asked {_WANTS[wanted]}, and this run has {' and '.join(_MODELS[one] for one in trained)}, so it "
        f"would never be scored. {_REMEDIES[wanted]}."
    )


def long_rows(stage: Stage, model: Any) -> str | None:
    """Warns of rows that are longer than the length that a model with computed positions was made for."""
    asked, context = stage.training.get("max_length"), context_of(model)
    if asked is None or context is None or asked <= context:
        return None
    return (
        f"stages.{stage.name}.training.max_length is {asked:,}, and the model was made for {context:,} tokens "
        "(max_position_embeddings): longer rows are trained on, and may be learned badly"
    )


def encode_rows(
    rows: list[dict[str, Any]], stage: Stage, tokenizer: Any, max_length: int | None, seed: int, source: Source
) -> list[dict[str, Any]]:
    """Rows as a stage trains on them: `input_ids`, and `labels` with -100 where nothing is learned; of a pair
    `rejected_ids` too.

    Args:
        rows: Tidy rows of a source.
        stage: The stage.
        tokenizer: The run's tokenizer.
        max_length: Tokens to keep of a row; None for all.
        seed: Of the run, for what is masked.
        source: Where the rows are from.
    """
    if not rows:
        return []
    if stage.kind == "translation":  # a source, and its target behind it
        set_languages(tokenizer, source)
        limits = max_length or sys.maxsize, stage.training.get("max_target_length") or max_length or sys.maxsize
        sources, targets = ([row[side] or "" for row in rows] for side in ("source", "target"))
        pairs = encode_pairs(tokenizer, sources, targets, *limits)
        return [
            {"input_ids": pair.input_ids + pair.labels, "labels": [IGNORED] * len(pair.input_ids) + pair.labels}
            for pair in pairs
        ]
    if stage.kind == "classification":  # a sentence, and its label behind it
        ids = tokenizer([row["sentence"] for row in rows], truncation=True, max_length=max_length)["input_ids"]
        return [{"input_ids": row, "labels": row} for row in ids]
    if isinstance(stage, Pretrain) and stage.objective == "masked":
        masking = Masking(tokenizer, stage.masking or {}, seed)
        frame = frame_of(tokenizer, words=masking.collator.whole_word_mask)
        bodies = tokens_of_texts([row["text"] for row in rows], tokenizer.backend_tokenizer, frame.words)
        size = None if max_length is None else max_length - frame.size
        masked = [masking.row(frame.row(np.array(body[:size])), number) for number, body in enumerate(bodies)]
        return [{key: value.tolist() for key, value in row.items()} for row in masked]
    if stage.kind in TOKENIZERS:
        return list(TOKENIZERS[stage.kind](stage, tokenizer, max_length).encode(rows))
    if isinstance(stage, Sft):
        return list(sft_tokenizer(stage, tokenizer, max_length, source).encode(rows))
    return list(RowTokenizer(tokenizer, max_length, train_on="all").encode(rows))
