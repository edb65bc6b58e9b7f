"""The loss of causal models in training: next-token cross-entropy, in the form that is fastest on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from hfpipe.model.linear_loss import LinearLoss, linear_loss
from hfpipe.stages.saving import is_sharded

if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object


class WithLinearLoss(Base):
    """Gives Trainer or SFTTrainer the loss of `hfpipe.model.linear_loss` where a model has it, else leaves theirs.

    SFTTrainer then reports no entropy and no token accuracy, which it makes of every logit.
    """

    linear: LinearLoss | None = None

    def use_linear_loss(self) -> None:
        """Looks whether the model and the arguments allow it; call it once, before the training."""
        model: Any = self.model
        config = model.config.get_text_config()
        plain = (
            not is_sharded(self)  # the head's weight is whole within the model's own forward pass alone
            and self.compute_loss_func is None
            and self.label_smoother is None
            and getattr(self.args, "loss_type", "nll") == "nll"
            # A mixture of experts adds the loss of its routers to that of the tokens.
            and not getattr(config, "output_router_logits", False)
        )
        self.linear = linear_loss(self.model) if plain else None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Returns the sum over the trained tokens divided by those of the global batch, as Trainer scales it."""
        if self.linear is None or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[safe-super]
        total = self.linear(model, inputs | {"use_cache": False})
        if num_items_in_batch is None:
            return total / (inputs["labels"][:, 1:] != -100).sum().clamp(min=1)
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return total * ranks / num_items_in_batch
