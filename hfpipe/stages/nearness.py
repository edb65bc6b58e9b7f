"""Holds a stage near its parent: by what the parent predicts on its own texts (`kl`), or by its weights (`l2`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfpipe.core.errors import MachineError, RecipeError
from hfpipe.core.upstream import override
from hfpipe.data.tokenize import IGNORED
from hfpipe.model.adapter import TOLERANCE
from hfpipe.model.load import load_model
from hfpipe.stages.context import StageRun
from hfpipe.stages.saving import is_sharded

LOGITS = 2**24  # of a chunk, on each of both sides
OWN = "parents_own"  # (B, L), True where a token is of the parent's own texts
_PROBE = 16  # tokens on which the head is tried


def hold_near(run: StageRun, trainer: Trainer, share: float) -> None:
    """Makes a trainer hold its model near the stage's parent, as the recipe's `keep:` says.

    Args:
        run: The stage.
        trainer: The trainer, with its model.
        share: Of the trained tokens, those of the parent's own texts.

    Raises:
        MachineError: The model is spread over the ranks.
        RecipeError: The model computes its logits in another way than is known here.
    """
    keep = run.stage.kept
    for word in ("kl", "l2"):
        if getattr(keep, word) is not None and is_sharded(trainer):
            raise MachineError(
                f"stages.{run.stage.name}.keep.{word} needs the whole model on each rank, and here FSDP or DeepSpeed "
                "spreads it. Leave it out (`keep: self` alone works there), or train an adapter without them."
            )
    if keep.kl is not None:
        parent = None if run.stage.adapter is not None else load_model(run.parent, frozen=True)
        override(trainer, compute_loss=NearParent(trainer, parent, keep.kl.weight, share))
    if keep.l2 is not None:
        trainer.add_callback(_DrawnToParent(trainer.model, keep.l2.weight))


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
        _require_known_head(model)
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
        rows = wanted.any(dim=1)
        parents = self._parents(inner, inputs, rows) if rows.any() else None
        with _hidden_of(inner) as seen:
            found = self._loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = found if isinstance(found, tuple) else (found, None)
        loss = loss / (1 - self._share)
        if parents is not None:
            places = wanted[rows][:, 1:]
            pair = seen[-1][rows][:, :-1][places], parents[:, :-1][places]
            total = self._divergence(inner, *pair)
            count: Any = (labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
            across = self._trainer.args.average_tokens_across_devices and num_items_in_batch is not None
            ranks = self._trainer.accelerator.num_processes if across else 1
            loss = loss + self._weight * ranks * total / count / self._share
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _parents(self, inner: Any, inputs: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """Returns the parent's hidden states (R, L, H) on some rows, without its logits."""
        words = {key: inputs[key][rows] for key in ("input_ids", "attention_mask", "position_ids") if key in inputs}
        parent, off = self._parent, nullcontext()
        if parent is None:
            parent, off = inner, inner.disable_adapter()
        training = parent.training
        with off, self._trainer.accelerator.autocast():
            parent.eval()
            hidden = _backbone(parent)(**words, use_cache=False)[0]
            parent.train(training)
        return hidden

    def _divergence(self, inner: Any, hidden: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Returns the sum over tokens of KL(parent || model), from hidden states (T, H) of both."""
        head, parents_head = _head(inner), _head(inner if self._parent is None else self._parent)
        if isinstance(parents_head, AuxiliaryTrainingWrapper):
            parents_head = parents_head.original_module
        scale = _Scale(inner.config)

        def chunk(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                expected = scale(parents_head(theirs)).float().log_softmax(-1)
            predicted = scale(head(ours)).float().log_softmax(-1)
            return (expected.exp() * (expected - predicted)).sum()

        size = max(1, LOGITS // inner.config.get_text_config().vocab_size)
        total = hidden.new_zeros((), dtype=torch.float32)
        with self._trainer.accelerator.autocast():
            for begin in range(0, len(hidden), size):
                pair = hidden[begin : begin + size], parents[begin : begin + size]
                total = total + checkpoint(chunk, *pair, use_reentrant=False)
        return total


class _Scale:
    """The factor and the soft cap that a model applies to the logits of its head.

    Args:
        config: Its config.
    """

    def __init__(self, config: Any) -> None:
        text = config.get_text_config()
        factors = [getattr(text, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
        self._factor = next((factor for factor in factors if factor is not None), 1.0)
        divisor = getattr(text, "logits_scaling", None)
        if divisor is not None:
            self._factor = divisor if text.model_type == "hyperclovax" else 1 / divisor
        self._cap = getattr(text, "final_logit_softcapping", None)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits if self._factor == 1.0 else logits * self._factor
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _backbone(model: Any) -> Any:
    return _base(model).base_model


def _head(model: Any) -> Any:
    return _base(model).get_output_embeddings()


@contextmanager
def _hidden_of(model: Any) -> Iterator[list[torch.Tensor]]:
    """Gives the last hidden states (B, L, H) of each forward pass of the block, as the head gets them."""
    seen: list[torch.Tensor] = []
    hook = _backbone(model).register_forward_hook(lambda module, given, output: seen.append(output[0]))
    try:
        yield seen
    finally:
        hook.remove()


@torch.no_grad()
def _require_known_head(model: Any) -> None:
    """Refuses a model whose logits are not those of its head on its last hidden states, scaled as its config says.

    Raises:
        RecipeError: They are not.
    """
    training = model.training
    model.eval()
    ids = torch.arange(_PROBE, device=model.device)[None] % model.config.get_text_config().vocab_size
    with _hidden_of(model) as seen:
        logits = model(input_ids=ids, use_cache=False).logits
    found = _Scale(model.config)(_head(model)(seen[-1])).to(logits.dtype)
    model.train(training)
    difference = float((found.float().log_softmax(-1) - logits.float().log_softmax(-1)).abs().max())
    if not difference <= TOLERANCE.get(model.dtype, 0.25):
        raise RecipeError(
            f"keep.kl: {type(_base(model)).__name__} computes its logits in a way that is not known here (they differ "
            f"by {difference:.2g} nats from its head on its last hidden states). Leave `kl` out: the parent's own "
            "texts are then replayed by their tokens."
        )


class _DrawnToParent(TrainerCallback):
    """Adds the gradient of weight / 2 x |weights - the parent's|^2 once a step, after the clipping of the others.

    Args:
        model: The model, as its parent left it.
        weight: Of the penalty.
    """

    def __init__(self, model: Any, weight: float) -> None:
        self._weight = weight
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
