"""Holds the predictions on a row and on its swapped form together, so that they don't follow from the listed words.

To the loss of a stage `weight` times the mean divergence of the two is added: at each token that is trained on and
stands in both forms, or of each sentence's classes, half of the Kullback-Leibler divergence in each direction. The mean
is over all that is trained on; a row without a listed word counts as 0.

Source: counterfactual logit pairing, Garg et al. 2019 (https://arxiv.org/abs/1809.10610), with the divergence in the
place of the distance of logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import Trainer

from hfpipe.core.upstream import override
from hfpipe.data.counterfactual import PLACES, SWAPPED, Collated, Swapper, with_swapped, with_swapped_sentences
from hfpipe.data.text_tokens import IGNORED
from hfpipe.model.head import Scale, backbone_of, head_of, hidden_of, require_known_head, sum_in_chunks
from hfpipe.model.positions import learned_positions
from hfpipe.stages.stage_run import StageRun


def hold_together(run: StageRun, trainer: Trainer, collated: Collated, problem: str | None = None) -> Collated:
    """Makes a trainer hold both forms of a row together, where the recipe says `counterfactual:`.

    Args:
        run: The stage.
        trainer: The trainer, with its model and its loss.
        collated: Makes a batch of rows.
        problem: transformers' `problem_type` of a classifier; None of a model of next tokens.

    Returns:
        `collated`, or what adds the swapped forms to a batch.

    Raises:
        RecipeError: The model computes its logits in another way than is known here.
    """
    block = getattr(run.stage, "counterfactual", None)
    if block is None:
        return collated
    word = f"stages.{run.stage.name}.counterfactual"
    model: Any = trainer.model
    swapper = Swapper(run.tokenizer, block.swap, learned_positions(model))
    if problem is not None:
        override(trainer, compute_loss=OfClasses(trainer, block.weight, problem))
        return with_swapped_sentences(collated, swapper)
    require_known_head(model, word, "Leave it out, and write `augment: {swap: gender}` at the source.")
    override(trainer, compute_loss=OfTokens(trainer, block.weight))
    return with_swapped(collated, swapper)


class OfTokens:
    """The loss of a trainer, with the divergence of the predictions of the tokens that both forms of a row say.

    Of the vocabulary only a chunk of tokens is held at a time, and computed again in the backward pass.

    Args:
        trainer: The trainer.
        weight: Of the mean divergence.
    """

    def __init__(self, trainer: Trainer, weight: float) -> None:
        self.trainer, self._weight = trainer, weight
        self.loss = trainer.compute_loss

    def __call__(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Returns the loss of a micro-batch, in the place of `Trainer.compute_loss`."""
        plain = {key: value for key, value in inputs.items() if key != SWAPPED}
        if SWAPPED not in inputs:
            return self.loss(model, plain, return_outputs, num_items_in_batch)
        forms = dict(inputs[SWAPPED])
        places = forms.pop(PLACES)
        inner = self.trainer.accelerator.unwrap_model(model)
        loss, outputs, total = self.both(model, inner, plain, forms, places, num_items_in_batch)
        count: Any = self.count(plain["labels"]) if num_items_in_batch is None else num_items_in_batch
        across = self.trainer.args.average_tokens_across_devices and num_items_in_batch is not None
        ranks = self.trainer.accelerator.num_processes if across else 1
        loss = loss + self._weight * ranks * total / count
        return (loss, outputs) if return_outputs else loss

    def both(
        self, model: Any, inner: Any, plain: Any, forms: Any, places: torch.Tensor, count: Any
    ) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """Returns the loss of a batch, its outputs, and the sum of the divergences at `places` (P, 4)."""
        with hidden_of(inner) as seen:
            loss: Any = self.loss(model, plain, False, count)
        with self.trainer.accelerator.autocast():
            other = backbone_of(inner)(**forms, use_cache=False)[0]
        pair = seen[-1][places[:, 0], places[:, 1]], other[places[:, 2], places[:, 3]]
        head, scale = head_of(inner), Scale(inner.config)

        def chunk(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
            return symmetric_divergence(*(scale(head(hidden)).float().log_softmax(-1) for hidden in (one, two)))

        with self.trainer.accelerator.autocast():
            return loss, None, sum_in_chunks(chunk, *pair, 2 * inner.config.get_text_config().vocab_size)

    def count(self, labels: torch.Tensor) -> torch.Tensor:
        """Returns what is trained on in a micro-batch."""
        return (labels[:, 1:] != IGNORED).sum()


class OfClasses(OfTokens):
    """The loss of a classifier, with the divergence of its answers to both forms of a sentence.

    Of several labels a row it is that of each label; of a number half of the squared difference.

    Args:
        trainer: The trainer.
        weight: Of the mean divergence.
        problem: transformers' `problem_type`.
    """

    def __init__(self, trainer: Trainer, weight: float, problem: str) -> None:
        super().__init__(trainer, weight)
        self._problem = problem

    def both(
        self, model: Any, inner: Any, plain: Any, forms: Any, places: torch.Tensor, count: Any
    ) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """See `OfTokens.both`; the answer to a sentence is what the model gives for it."""
        loss, outputs = self.loss(model, plain, True, count)
        with self.trainer.accelerator.autocast():
            other = inner(**forms).logits
        one, two = outputs["logits"][places[:, 0]].float(), other[places[:, 2]].float()
        if self._problem == "regression":
            return loss, outputs, (one - two).square().sum() / 2
        if self._problem == "single_label_classification":
            return loss, outputs, symmetric_divergence(one.log_softmax(-1), two.log_softmax(-1))
        sides = (torch.stack([functional.logsigmoid(x), functional.logsigmoid(-x)], dim=-1) for x in (one, two))
        return loss, outputs, symmetric_divergence(*sides)

    def count(self, labels: torch.Tensor) -> torch.Tensor:
        """Returns the labels of a micro-batch."""
        return (labels != IGNORED).sum()


def symmetric_divergence(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Returns the sum of half of the Kullback-Leibler divergence in each direction, of log-probabilities (..., V)."""
    return ((one.exp() - two.exp()) * (one - two)).sum() / 2
