"""The loss of causal models in training: next-token cross-entropy, in the form that is fastest on the device.

Neither form holds the logits of a batch, its largest tensor by far. On a CPU it is torch's linear cross-entropy (see
`hfpipe.model.linear_loss`), elsewhere TRL's fused LM head, a Triton kernel. SFTTrainer takes that head too, but gathers
an entropy and an accuracy over the ranks and waits for them in every micro-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from trl.trainer import add_fused_lm_head

from hfpipe.data.tokenize import IGNORED
from hfpipe.model.fake_quantized import is_fake_quantized
from hfpipe.model.head import head_of
from hfpipe.model.linear_loss import LinearLoss, linear_loss
from hfpipe.model.spread import is_spread
from hfpipe.stages.saving import is_sharded

if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object

FUSED_ON = ("cuda",)  # where the head is a Triton kernel
TOLERANCE = 0.05  # nats per token, between the fused head and the model's own loss in half precision


class WithFastLoss(Base):
    """Gives Trainer or SFTTrainer the fast form of the loss where a model and the arguments allow it, else theirs."""

    linear: LinearLoss | None = None
    fused = False
    rounds = False  # the head, which TRL's form would pass by

    def use_fast_loss(self) -> None:
        """Chooses the form; call it once, before the training."""
        model: Any = self.model
        config = model.config.get_text_config()
        plain = (
            self.compute_loss_func is None
            and self.label_smoother is None
            and getattr(self.args, "loss_type", "nll") == "nll"
            # A mixture of experts adds the loss of its routers to that of the tokens.
            and not getattr(config, "output_router_logits", False)
        )
        self.rounds = is_fake_quantized(head_of(model))
        if not plain or self.rounds:
            return
        if not is_sharded(self):  # the head's weight is whole within the model's own forward pass alone
            self.linear = linear_loss(model)
        whole = self.linear is None and not is_spread(model)
        self.fused = whole and model.device.type in FUSED_ON and fuse_head(model)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Returns the sum over the trained tokens divided by those of the global batch, as Trainer scales it."""
        if self.rounds:
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)  # type: ignore[arg-type]
        if return_outputs or not (self.fused or self.linear is not None):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[safe-super]
        if self.linear is not None:
            total = self.linear(model, inputs | {"use_cache": False})
        else:
            total = -model(**inputs, fused_lm_head=True).log_probs.sum()
        if num_items_in_batch is None:
            return total / (inputs["labels"][:, 1:] != IGNORED).sum().clamp(min=1)
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return total * ranks / num_items_in_batch


@torch.no_grad()
def fuse_head(model: Any) -> bool:
    """Gives a model TRL's fused head, and takes it away again where its loss is not that of the model itself.

    Args:
        model: A causal language model with its adapter, not yet wrapped by accelerate.

    Returns:
        True if the head is there.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if type(head_of(model)) is not torch.nn.Linear:
        return False  # an adapter has changed it
    before = vars(inner).get("forward")
    add_fused_lm_head(inner)
    was_training = model.training
    model.eval()
    ids = torch.arange(8, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    found = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
    model.train(was_training)
    if abs(float(expected - found)) <= TOLERANCE:
        return True
    del inner.forward
    if before is not None:
        inner.forward = before
    return False
