"""Metrics as `evaluate` modules: ours work offline, any other name goes to `evaluate.load`.

To add one: a file here with a subclass of `evaluate.Metric`, and its line in `OURS`. A module of ours says what it
needs from the model (`needs`), which way is better, and returns its standard error as `stderr` beside its value.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

from hfpipe.errors import MachineError, RecipeError

OURS = {"accuracy": "Accuracy", "bits_per_byte": "BitsPerByte", "exact_match": "ExactMatch"}

# Metrics of `evaluate` where less is better; it does not say itself.
LOWER_IS_BETTER = {"perplexity", "wer", "cer", "ter", "mse", "mae", "mape", "smape", "brier_score", "character"}


def load_metric(name: str) -> Any:
    """The `evaluate` module of a name: one of ours, or what `evaluate.load` finds on the Hub or in a local script.

    Raises:
        RecipeError: Nobody knows the name.
        MachineError: The name is not ours and the Hub cannot be reached.
    """
    if name in OURS:
        module = import_module(f"hfpipe.metrics.{name}")
        return getattr(module, OURS[name])(keep_in_memory=True)
    import evaluate

    try:
        return evaluate.load(name, keep_in_memory=True)
    except FileNotFoundError as error:
        near = difflib.get_close_matches(name, OURS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise RecipeError(
            f"metric {name!r} is neither one of hfpipe's ({', '.join(sorted(OURS))}), nor on the Hub "
            f"(evaluate-metric/{name}), nor a local script. Check the spelling, and the network: another metric than "
            f"hfpipe's own is fetched the first time.{hint}"
        ) from error
    except ImportError as error:
        raise MachineError(f"metric {name!r}: {error}") from error
    except OSError as error:
        raise MachineError(f"metric {name!r} cannot be fetched: {error}") from error


def needs_of(metric: Any) -> str:
    """What a metric needs from the model: `likelihood`, `choice` or `generation` (all that are not ours)."""
    return getattr(metric, "needs", "generation")


def higher_is_better(name: str, metric: Any) -> bool:
    return getattr(metric, "higher_is_better", name not in LOWER_IS_BETTER)
