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

from hfpipe.core import ranks
from hfpipe.data.dataloader import BatchLoader
from hfpipe.data.labels import LabelledTokens, balanced_weights, collate_labelled
from hfpipe.data.tokenize import IGNORED
from hfpipe.model.base import shapes_of
from hfpipe.model.classifier import DEFAULT_MAX_LENGTH, head_config, outermost, read_head
from hfpipe.recipe import Classification
from hfpipe.stages.arguments import clear_refusal
from hfpipe.stages.counterfactual import hold_together
from hfpipe.stages.labels import Head, head_for, labelled_tokens, require_fitting_suites
from hfpipe.stages.trainer import StageRun, load_parent, plan_of, row_length, train, trainer_arguments, with_adapter


def run_classification(run: StageRun) -> dict[str, Any]:
    """Trains a classification stage and saves its model; see `stages.trainer.train` for what is returned and raised."""
    stage = run.stage
    assert isinstance(stage, Classification)
    limit = labelled_length(run, shapes_of(run.parent))
    tokens, found = labelled_tokens(run, limit)
    labels, lengths = found.labels, tokens.lengths
    head = head_for(stage, found, _earlier_head(run))
    problem, names = head.problem, head.names
    require_fitting_suites(run.recipe, stage, head, run.rows)
    weights = torch.tensor(balanced_weights(labels, names)) if stage.class_weights == "balanced" else None
    plan = plan_of(stage, len(tokens))
    arguments = trainer_arguments(run, plan.max_steps, plan.per_device, plan.accumulation, label_names=["labels"])
    set_seed(run.recipe.seed)  # the head is new, and the same on every rank and at every start
    model, new = load_parent(
        run,
        head=head_config(problem, names, run.tokenizer.pad_token_id),
        with_new_modules=True,
    )
    source = plan.serve(run, LabelledTokens(tokens, labels, names), lengths, grouped=False)
    # The new modules of the head are trained in full beside an adapter.
    saved = outermost([*new, *((stage.adapter or {}).get("modules_to_save") or [])])
    model = with_adapter(run, model, task_type="SEQ_CLS", modules_to_save=saved)
    loss = _Loss(problem, weights, arguments.label_smoothing_factor)
    with clear_refusal(stage, "Trainer"):
        trainer = Trainer(model=model, args=arguments, processing_class=run.tokenizer, compute_loss_func=loss)
    ranks.say(f"  {len(tokens):,} rows, {', '.join(names[:8]) + (', ...' if len(names) > 8 else '') or 'a number'}")
    collated = hold_together(run, trainer, collate_labelled, problem)
    multiple = stage.training.get("pad_to_multiple_of", 1)
    loader = BatchLoader(source, plan.per_device, run.tokenizer.pad_token_id, multiple, collated)
    facts = train(run, trainer, loader, tokens_per_step=plan.tokens_per_step(lengths), longest=(source.longest(), 0))
    facts["data"]["sources"] = found.sources
    return facts


class _Loss:
    """The problem's loss, summed over the rows and divided by the labels of the global batch; -100 is ignored."""

    def __init__(self, problem: str, weights: torch.Tensor | None, smoothing: float) -> None:
        self.problem, self.weights, self.smoothing = problem, weights, smoothing

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs["logits"].float()
        known = labels != IGNORED
        count = known.sum() if num_items_in_batch is None else num_items_in_batch
        if self.problem == "single_label_classification":
            weight = None if self.weights is None else self.weights.to(logits.device)
            options: dict[str, Any] = {"ignore_index": IGNORED, "label_smoothing": self.smoothing}
            loss = functional.cross_entropy(logits, labels, weight=weight, reduction="sum", **options)
        elif self.problem == "regression":
            loss = (functional.mse_loss(logits, labels, reduction="none") * known).sum()
        else:
            each = functional.binary_cross_entropy_with_logits(logits, labels * known, reduction="none")
            loss = (each * known).sum()
        return loss / count


def _earlier_head(run: StageRun) -> Head | None:
    """The head of the adapter that is trained further."""
    if run.continued is None:
        return None
    saved = read_head(Path(run.continued.path))
    problem = saved["problem_type"]
    return Head(problem, [] if problem == "regression" else list(saved["label2id"]))


def labelled_length(run: StageRun, model: Any) -> int:
    """Returns the most tokens of a sentence.

    Args:
        run: The stage.
        model: Its model; the shapes are enough.
    """
    return row_length(run, model, min(run.tokenizer.model_max_length, DEFAULT_MAX_LENGTH))
