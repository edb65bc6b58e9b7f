"""The cross-entropy of a causal model whose logits are a linear layer, without the logits of a whole batch.

The logits of a batch are its largest tensor by far, and rows of a fine-tune are trained in part. torch's
`linear_cross_entropy` takes the hidden states of the trained tokens alone, a piece at a time, and makes the gradient in
the same pass. On a CPU that is 3 to 6 times as fast as TRL's tiled head, which is made for Triton's kernels, and no
slower than full logits; see benchmarks/step.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import LinearCrossEntropyOptions, functional

PIECE = 512  # tokens whose logits are held at once
TOLERANCE = 1e-4  # between logits of a float32 model


class LinearLoss:
    """Computes the loss of a model from the input of its LM head; see `linear_loss` for a model that has one.

    Args:
        head: The model's LM head.
    """

    def __init__(self, head: torch.nn.Linear) -> None:
        self.head = head
        self.options = LinearCrossEntropyOptions(batch_chunk_size=PIECE, chunking_method=None, acc_policy="accurate")

    def hidden(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Runs a model up to its LM head.

        Args:
            model: The model, as the trainer has wrapped it.
            inputs: Its batch, without labels.

        Returns:
            The head's input, (B, L, H).
        """
        seen: list[torch.Tensor] = []

        def keep(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            seen.append(args[0])
            return (args[0][:, :0],)

        handle = self.head.register_forward_pre_hook(keep)
        try:
            model(**inputs)
        finally:
            handle.remove()
        return seen[0]

    def __call__(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Returns the cross-entropy summed over the trained tokens of a batch.

        Args:
            model: The model, as the trainer has wrapped it.
            inputs: Its batch, with labels (B, L), -100 where a token is not trained.
        """
        labels = inputs["labels"][:, 1:]
        hidden = self.hidden(model, {key: value for key, value in inputs.items() if key != "labels"})[:, :-1]
        trained = labels != -100
        kept = hidden[trained]
        if not len(kept):
            return hidden.sum() * 0.0
        return functional.linear_cross_entropy(
            kept,
            self.head.weight,
            labels[trained],
            linear_bias=self.head.bias,
            reduction="sum",
            options=self.options,
        )


@torch.no_grad()
def linear_loss(model: Any) -> LinearLoss | None:
    """Returns the linear loss of a model, or None where it has to be computed otherwise.

    That is on a GPU, in half precision, and where logits are more than a linear layer of hidden states: capped, scaled,
    cut, or made by a head that an adapter has changed. It is tried on a row of the model itself.

    Args:
        model: A causal language model with its adapter, not yet wrapped by accelerate.
    """
    head = model.get_output_embeddings()
    weights = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    if type(head) is not torch.nn.Linear or head.weight.device.type != "cpu" or weights != {torch.float32}:
        return None
    loss, was_training = LinearLoss(head), model.training
    model.eval()
    ids = torch.arange(8)[None] % model.get_input_embeddings().weight.shape[0]
    logits = model(input_ids=ids, use_cache=False).logits
    hidden = loss.hidden(model, {"input_ids": ids, "use_cache": False})
    model.train(was_training)
    if hidden.shape[:2] != ids.shape or logits.shape[:2] != ids.shape:
        return None
    return loss if torch.allclose(head(hidden), logits, atol=TOLERANCE) else None
