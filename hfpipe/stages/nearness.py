"""Holds a stage near its parent: by what the parent predicts on its own texts (`kl`), or by its weights (`l2`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfpipe.core.upstream import override, without_hooks
from hfpipe.data.tokenize import IGNORED
from hfpipe.model.head import Scale, head_of, hidden_by, hidden_of, require_known_head, sum_in_chunks
from hfpipe.model.load import load_model
from hfpipe.model.spread import gather_head, is_spread
from hfpipe.recipe import Quantization
from hfpipe.stages.stage_run import StageRun

OWN = "parents_own"  # (B, L), True where a token is of the parent's own texts
_INSTEAD = "Leave `kl` out: the parent's own texts are then replayed by their tokens."


def hold_near(run: StageRun, trainer: Trainer, share: float) -> None:
    """Makes a trainer hold its model near the stage's parent, as the recipe's `keep:` says.

    Args:
        run: The stage.
        trainer: The trainer, with its model.
        share: Of the trained tokens, those of the parent's own texts.

    Raises:
        UserError: As `near_parent`.
    """
    near = near_parent(run, trainer, share)
    if near is not None:
        override(trainer, compute_loss=near)


def near_parent(run: StageRun, trainer: Trainer, share: float) -> NearParent | None:
    """Draws a trainer's weights to those of the parent where the recipe says so, and returns what `kl` asks for.

    Raises:
        RecipeError: The model computes its logits in another way than is known here.
    """
    keep = run.stage.kept
    if keep.l2 is not None:
        trainer.add_callback(_DrawnToParent(trainer, keep.l2.weight))
    if keep.kl is None:
        return None
    parent = None
    if run.stage.adapter is None:
        # In a type that can be spread; the numbers are the same in any.
        form = {"type": keep.kl.parent, "bnb_4bit_quant_storage": "bfloat16"}
        block = None if keep.kl.parent is None else Quantization.model_validate(form)
        parent = load_model(replace(run.parent, quantization=block), frozen=True, spread=True)
    return NearParent(trainer, parent, keep.kl.weight, share)


class NearParent:
    """The loss of a trainer, with the forward KL divergence from the parent on the parent's own texts.

    The loss is that of the stage's own data, by token, plus `weight` times the mean divergence. Both are sums over the
    micro-batch that are divided by constants and by the tokens of the global batch, so that a step is the same however
    it is divided. Of the vocabulary only a chunk of tokens is held at a time, on both sides, and computed again in the
    backward pass.

    Args:
        trainer: The trainer.
        parent: A frozen copy of the parent; None where it is the model with its adapter off.
        weight: Of the divergence.
        share: Of the trained tokens, those of the parent's own texts.
    """

    def __init__(self, trainer: Trainer, parent: Any, weight: float, share: float) -> None:
        self._trainer, self._parent, self._weight, self._share = trainer, parent, weight, share
        self._loss = trainer.compute_loss
        model = trainer.accelerator.unwrap_model(trainer.model)
        require_known_head(model, "keep.kl", _INSTEAD)
        if parent is not None:
            parent.requires_grad_(False)
            parent.config.use_cache = False

    def __call__(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Returns the loss of a micro-batch, in the place of `Trainer.compute_loss`."""
        inputs = dict(inputs)
        own, labels = inputs.pop(OWN), inputs["labels"]
        wanted = own & (labels != IGNORED)
        wanted[:, 0] = False
        inputs["labels"] = labels.masked_fill(own, IGNORED)
        inner = self._trainer.accelerator.unwrap_model(model)
        rows = self._read(wanted.any(dim=1))
        parents = self.parents(inner, inputs, rows) if rows.any() else None
        with hidden_of(inner) as seen:
            found = self._loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = found if isinstance(found, tuple) else (found, None)
        loss = loss / (1 - self._share)
        if parents is not None:
            places = wanted[rows][:, 1:]
            pair = seen[-1][rows][:, :-1][places], parents[:, :-1][places]
            total = self.divergence(inner, *pair)
            count: Any = (labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
            across = self._trainer.args.average_tokens_across_devices and num_items_in_batch is not None
            ranks = self._trainer.accelerator.num_processes if across else 1
            loss = loss + self._weight * ranks * total / count / self._share
        return (loss, outputs) if return_outputs else loss

    def _read(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the rows (B,) that the parent reads, given those with a token of its own.

        All ranks take part where weights are gathered: if one has such a row, each reads one.
        """
        if self._trainer.is_fsdp_enabled:
            anywhere = rows.any().int()
            torch.distributed.all_reduce(anywhere, op=torch.distributed.ReduceOp.MAX)
            if anywhere and not rows.any():
                rows[0] = True
        return rows

    @torch.no_grad()
    def parents(self, inner: Any, inputs: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """Returns the parent's hidden states (R, L, H) on some rows, without its logits.

        Where its weights are spread, every rank has to call this.
        """
        words = {key: inputs[key][rows] for key in ("input_ids", "attention_mask", "position_ids") if key in inputs}
        parent = inner if self._parent is None else self._parent
        off = _switched_off(inner) if self._parent is None else nullcontext()
        training = parent.training
        with off, self._trainer.accelerator.autocast():
            parent.eval()
            hidden = hidden_by(parent, **words)
            parent.train(training)
        return hidden

    def divergence(self, inner: Any, hidden: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Returns the sum over tokens of KL(parent || model), from hidden states (T, H) of both.

        Where weights are spread, every rank has to call this, after the passes that made the states.
        """
        parent = inner if self._parent is None else self._parent
        head, parents_head = head_of(inner), head_of(parent)
        gather_head(inner, head)
        gather_head(parent, parents_head)
        if isinstance(parents_head, AuxiliaryTrainingWrapper):
            parents_head = parents_head.original_module
        elif isinstance(parents_head, BaseTunerLayer):
            parents_head = parents_head.get_base_layer()
        scale = Scale(inner.config)

        def chunk(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            # Each rank has chunks of its own, and by FSDP2's hooks every rank would take part in each.
            with without_hooks(head), without_hooks(parents_head):
                with torch.no_grad():
                    expected = scale(parents_head(theirs)).float().log_softmax(-1)
                predicted = scale(head(ours)).float().log_softmax(-1)
            return (expected.exp() * (expected - predicted)).sum()

        with self._trainer.accelerator.autocast():
            return sum_in_chunks(chunk, hidden, parents, inner.config.get_text_config().vocab_size)


@contextmanager
def _switched_off(model: Any) -> Iterator[None]:
    """Switches an adapter off inside the block, and leaves its weights as ones that are trained.

    PEFT marks them as frozen meanwhile, and FSDP2 keeps that mark for what it gathers so and holds on to.
    """
    trained = [one for one in model.parameters() if one.requires_grad]
    with model.disable_adapter():
        for one in trained:
            one.requires_grad_(True)
        yield


class _DrawnToParent(TrainerCallback):
    """Adds the gradient of weight / 2 x |weights - the parent's|^2 once a step, after the clipping of the others.

    Args:
        trainer: The trainer, with its model as the parent left it.
        weight: Of the penalty.
    """

    def __init__(self, trainer: Trainer, weight: float) -> None:
        self._weight = weight
        if trainer.is_fsdp_enabled and not is_spread(trainer.model):
            # Accelerate divides the weights, then the schedule is made, then a checkpoint is read.
            make = trainer.create_scheduler

            def take_and_make(*arguments: Any, **words: Any) -> Any:
                self._take(trainer.model)
                return make(*arguments, **words)

            override(trainer, create_scheduler=take_and_make)
        else:
            self._take(trainer.model)

    def _take(self, model: Any) -> None:
        """Copies the weights that are trained, of spread ones the part of this rank."""
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self._parents = [(one, one.detach().clone()) for one in trained.values()]

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        for weight, parents in self._parents:
            if weight.grad is not None:
                weight.grad.add_(weight - parents, alpha=self._weight)


def mark_own(rows: Sequence[dict[str, Any]], batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adds to a batch which of its tokens are of the parent's own texts.

    Args:
        rows: The rows, each with `own`: whether it is such a text, or (L,) which of its tokens are.
        batch: Their tensors (B, L).
    """
    own = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        own[index, : len(row["input_ids"])] = torch.as_tensor(row["own"])
    return {**batch, OWN: own}
