"""`kind: classification`: a head on an encoder or a decoder, trained on sentence + label, by Trainer.

The labels tell the problem: one name a row is single-label, a list of names multi-label, a number with a point is a
regression. Everything of the head that is new is trained in full and saved with an adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import Trainer, set_seed

from hfpipe import ranks
from hfpipe.answers import require_known_classes
from hfpipe.data.dirt import Read, refuse_dirt, tidy_rows
from hfpipe.data.encode import IGNORED
from hfpipe.data.labels import balanced_weights, classes_of, collate_labelled, label_ids, plain_labels, problem_of
from hfpipe.data.loader import BatchLoader
from hfpipe.data.sources import load_rows
from hfpipe.errors import DataError, RecipeError
from hfpipe.model.classifier import DEFAULT_MAX_LENGTH, head_config, outermost, read_head
from hfpipe.model.load import load_model
from hfpipe.recipe import Classification
from hfpipe.stages.common import StageRun, row_length, train, trainer_arguments, with_adapter
from hfpipe.stages.plan import plan_of


def run_classification(run: StageRun) -> dict[str, Any]:
    """Trains a classification stage and saves its model; see `stages.common.train` for what is returned and raised."""
    stage = run.stage
    assert isinstance(stage, Classification)
    texts, labels, declared, sources = _labelled_rows(run, stage)
    names = _class_names(run, stage, labels, declared)
    problem = problem_of(labels)
    _require_fitting_suites(run, problem, names)
    weights = None
    if stage.class_weights == "balanced":
        if problem != "single_label_classification":
            raise RecipeError(f"stages.{stage.name}.class_weights needs one class name in each row; remove it.")
        weights = torch.tensor(balanced_weights(labels, names))
    plan = plan_of(stage, len(texts))
    arguments = trainer_arguments(run, plan.max_steps, plan.per_device, plan.accumulation, label_names=["labels"])
    set_seed(run.recipe.seed)  # the head is new, and the same on every rank and at every start
    head = head_config(problem, names, run.tokenizer.pad_token_id)
    _require_same_head(run, head)
    model, new = load_model(
        run.parent,
        frozen=stage.adapter is not None,
        head=head,
        with_new_modules=True,
    )
    limit = row_length(run, model, min(run.tokenizer.model_max_length, DEFAULT_MAX_LENGTH))
    rows = _tokenized(run, texts, labels, names, limit)
    lengths = [len(row["input_ids"]) for row in rows]
    source = plan.serve(run, rows, lengths)
    if stage.adapter is not None:  # the new modules of the head are trained in full beside it
        saved = outermost([*new, *(stage.adapter.get("modules_to_save") or [])])
        model = with_adapter(run, model, task_type="SEQ_CLS", modules_to_save=saved)
    trainer = Trainer(
        model=model, args=arguments, processing_class=run.tokenizer, compute_loss_func=_Loss(problem, weights)
    )
    ranks.say(f"  {len(rows):,} rows, {', '.join(names[:8]) + (', ...' if len(names) > 8 else '') or 'a number'}")
    loader = BatchLoader(
        source,
        plan.per_device,
        run.tokenizer.pad_token_id,
        stage.training.get("pad_to_multiple_of", 1),
        collate_labelled,
    )
    facts = train(run, trainer, loader, tokens_per_step=plan.tokens_per_step(lengths))
    facts["data"]["sources"] = sources
    return facts


class _Loss:
    """The problem's loss, summed over the rows and divided by the labels of the global batch; -100 is ignored."""

    def __init__(self, problem: str, weights: torch.Tensor | None) -> None:
        self.problem, self.weights = problem, weights

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs["logits"].float()
        known = labels != IGNORED
        count = known.sum() if num_items_in_batch is None else num_items_in_batch
        if self.problem == "single_label_classification":
            weight = None if self.weights is None else self.weights.to(logits.device)
            loss = functional.cross_entropy(logits, labels, weight=weight, ignore_index=IGNORED, reduction="sum")
        elif self.problem == "regression":
            loss = (functional.mse_loss(logits, labels, reduction="none") * known).sum()
        else:
            each = functional.binary_cross_entropy_with_logits(logits, labels * known, reduction="none")
            loss = (each * known).sum()
        return loss / count


def _labelled_rows(
    run: StageRun, stage: Classification
) -> tuple[list[str], list[Any], list[str], dict[str, dict[str, Any]]]:
    """Texts and labels of every row that has both, the names that the data declares, and what was read by source."""
    facts: dict[str, dict[str, Any]] = {}
    texts: list[str] = []
    labels: list[Any] = []
    declared: list[str] = []
    for source in stage.data:
        opened = load_rows(source, seed=run.recipe.seed, kinds=("classification",))
        rows, names = plain_labels(opened, source.path, stage.labels)
        declared += [name for name in names if name not in declared]
        read = Read()
        rows, removed = run.cleaner.rows(rows, source)
        for row in tidy_rows(rows, source, read):
            if row["label"] is None:
                read.dirty.add(["without a label"], str(row.get("id", f"row {read.rows - 1}")))
            else:
                texts.append(row["sentence"])
                labels.append(row["label"])
        refuse_dirt(source, read.dirty, read.rows, stage.max_dirty_share)
        facts[f"{len(facts)}: {source.path}"] = read.facts() | removed
    if not texts:
        raise DataError(f"stages.{stage.name}: no row has a sentence and a label.")
    return texts, labels, declared, facts


def _class_names(run: StageRun, stage: Classification, labels: list[Any], declared: list[str]) -> list[str]:
    """The classes in order; none for numbers."""
    if len({problem_of([label]) for label in labels}) > 1:
        raise DataError(f"stages.{stage.name}: the sources mix class names, lists of them and numbers with a point.")
    if problem_of(labels) == "regression":
        if any(label != label or label == IGNORED for label in labels):
            raise DataError(f"stages.{stage.name}: a label is not a number, or is -100, which marks ignored rows.")
        return []
    found = classes_of(labels)
    earlier = list(read_head(Path(run.continued.path))["label2id"]) if run.continued is not None else None
    names = stage.labels or earlier or declared or found
    if unknown := [name for name in found if name not in names]:
        raise DataError(
            f"stages.{stage.name}: the data has the labels {', '.join(unknown[:5])}, which are not among "
            f"{', '.join(names)}. Correct `labels`, or leave it out to take those of the data."
        )
    if len(names) < 2:
        raise DataError(f"stages.{stage.name}: every row has the label {names[0]!r}; there is nothing to tell apart.")
    return names


def _require_fitting_suites(run: StageRun, problem: str, names: list[str]) -> None:
    """Refuses right answers that the stage's classifier could never give, before it is trained."""
    if sum(stage.kind == "classification" for stage in run.recipe.stages) > 1:
        return  # which suite is whose shows when they are scored
    for name, rows in run.rows.items():
        if "sentence" not in rows[0]:
            continue
        if problem == "regression" and not isinstance(rows[0]["label"], float):
            raise DataError(
                f"stages.{run.stage.name}: the labels are numbers with a point, which makes a regression, and the "
                f"suite {name} has classes. Name the classes in `labels` of the stage, or give both the same labels."
            )
        if problem != "regression":
            try:
                require_known_classes(rows, names)
            except DataError as error:
                raise DataError(f"suite {name}: {error}") from error


def _require_same_head(run: StageRun, head: dict[str, Any]) -> None:
    """Refuses rows of another problem, or other classes, than an adapter that is trained further was made for."""
    earlier = read_head(Path(run.continued.path)) if run.continued is not None else head
    if head != earlier:
        now, then = (f"{one['problem_type']} ({', '.join(one['label2id'])})" for one in (head, earlier))
        raise RecipeError(
            f"stages.{run.stage.name}: the rows and labels make a head for {now}, and the adapter that is trained "
            f"further has one for {then}. Give it the same, or write `parent_adapter: merge`."
        )


def _tokenized(
    run: StageRun, texts: list[str], labels: list[Any], names: list[str], limit: int
) -> list[dict[str, Any]]:
    ids = run.tokenizer(texts, truncation=True, max_length=limit, return_attention_mask=False)["input_ids"]
    return [
        {"input_ids": row or [run.tokenizer.pad_token_id], "labels": label_ids(label, names)}
        for row, label in zip(ids, labels, strict=True)
    ]
