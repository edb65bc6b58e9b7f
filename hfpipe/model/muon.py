"""Muon for the matrices of a model's layers, beside the trainer's own optimizer for all other weights.

torch has Muon for matrices alone, and a trainer takes one optimizer.
Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Muon, Optimizer

from hfpipe.core.errors import RecipeError


class WithMuon(Optimizer):
    """Two optimizers as one: their groups in a row, and one state.

    Args:
        others: The optimizer of the other weights.
        muon: That of the matrices.
    """

    def __init__(self, others: Optimizer, muon: Optimizer) -> None:
        self._parts = (others, muon)
        super().__init__([*others.param_groups, *muon.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Lets both read the groups, whose learning rates a schedule sets, and write the state, which is saved."""
        others, muon = self._parts
        count = len(others.param_groups)
        others.param_groups, muon.param_groups = self.param_groups[:count], self.param_groups[count:]
        others.state = muon.state = self.state

    def load_state_dict(self, state_dict: Any) -> None:
        """Takes up a state that was saved."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Changes all weights once.

        Args:
            closure: Not taken; a trainer gives none.
        """
        assert closure is None
        for part in self._parts:
            part.step()


def with_muon(optimizer: Optimizer, model: Any, options: Mapping[str, Any]) -> WithMuon:
    """Hands the matrices of a model's layers over to Muon; embeddings, head, norms and biases stay.

    Args:
        optimizer: The trainer's optimizer, before its first step.
        model: The model whose weights it has.
        options: Arguments of `torch.optim.Muon`; without `lr` and `weight_decay` those of the optimizer hold.

    Raises:
        RecipeError: It trains no matrix.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = [module for module in base.modules() if isinstance(module, torch.nn.Embedding)]
    ends += [head for head in (base.get_output_embeddings(),) if head is not None]
    left = {weight for module in ends for weight in module.parameters()}
    groups = []
    for group in optimizer.param_groups:
        matrices = [weight for weight in group["params"] if weight.ndim == 2 and weight not in left]
        group["params"] = [weight for weight in group["params"] if weight.ndim != 2 or weight in left]
        if matrices:
            groups.append({"params": matrices, "lr": group["lr"], "weight_decay": group["weight_decay"], **options})
    if not groups:
        raise RecipeError("muon: the stage trains no matrix of a layer. Leave it out.")
    return WithMuon(optimizer, Muon(groups))


def require_muon(options: Mapping[str, Any]) -> None:
    """Tries options on a small matrix.

    Raises:
        ValueError: torch refuses them; or another error of torch's.
    """
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    Muon([weight], **options).step()
