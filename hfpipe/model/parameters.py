"""A part of a model's weights, by patterns of their names: which are trained, and at which learning rate."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from hfpipe.core.errors import RecipeError
from hfpipe.recipe import Stage


def train_part(model: Any, stage: Stage) -> None:
    """Freezes the weights that a stage does not train, and looks for those that its patterns name.

    Args:
        model: The model with the stage's adapter, if it has one; shapes are enough.
        stage: The stage with its `train_only`, `freeze` and `learning_rates`.

    Raises:
        RecipeError: A pattern matches no weight that could be trained, or none is left to be trained.
    """
    freeze(model, stage.train_only, stage.freeze)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    _named_by(stage.learning_rates or (), trained, "learning_rates")


def freeze(model: Any, train_only: Sequence[str] | None, frozen: Sequence[str] | None) -> None:
    """Freezes all weights but those that patterns name, or those that patterns name, or both.

    Args:
        model: The model.
        train_only: Patterns of names; None for all.
        frozen: Patterns of names; None for none.

    Raises:
        RecipeError: A pattern matches no weight, or none is left to be trained.
    """
    names = [name for name, _ in model.named_parameters()]
    left = set(names) if train_only is None else _named_by(train_only, names, "train_only")
    if frozen is not None:
        left -= _named_by(frozen, names, "freeze")
        if not left:
            raise RecipeError("freeze: nothing is left to train. Freeze less of the model.")
    if train_only is not None or frozen is not None:
        for name, weight in model.named_parameters():
            weight.requires_grad_(name in left)


def freeze_tables(model: Any) -> None:
    """Freezes what a model makes frozen, such as Marian's table of positions; transformers forgets it at a load.

    A model that is read in parts has it so: the states of its optimizer are continued on one rank and on several.

    Args:
        model: The model as it was read, on one rank.
    """
    with torch.device("meta"):
        made = type(model)(model.config)
    for name, weight in made.named_parameters():
        model.get_parameter(name).requires_grad_(weight.requires_grad)


def _named_by(patterns: Iterable[str], names: Sequence[str], word: str) -> set[str]:
    """Returns the names in which a pattern is found."""
    named: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if re.search(pattern, name)}
        if not matched:
            examples = ", ".join(names[:: max(1, len(names) // 4)][:4])
            raise RecipeError(
                f"{word}: '{pattern}' is found in no name of a weight that could be trained. A pattern is a regular "
                f"expression; names are, for example, {examples}."
            )
        named |= matched
    return named


def set_learning_rates(optimizer: torch.optim.Optimizer, model: Any, rates: dict[str, float]) -> None:
    """Gives weights learning rates of their own, by groups of the optimizer; a schedule scales each of them.

    Args:
        optimizer: The optimizer, before its first step.
        model: The model whose weights it has.
        rates: By patterns of names; the first that matches holds.
    """
    own = {
        weight: next((rate for pattern, rate in rates.items() if re.search(pattern, name)), None)
        for name, weight in model.named_parameters()
    }
    for group in list(optimizer.param_groups):
        weights = group["params"]
        group["params"] = [weight for weight in weights if own.get(weight) is None]
        for rate in dict.fromkeys(rates.values()):
            if chosen := [weight for weight in weights if own.get(weight) == rate]:
                optimizer.add_param_group({**group, "params": chosen, "lr": rate})
