"""Metrics as `evaluate` modules: ours work offline, any other name goes to `evaluate.load`.

To add one: a subclass of `RowMetric` in a file here, and its line in `hfpipe/recipe/metric_table.py`.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RevisionNotFoundError

from hfpipe.core.errors import MachineError, RecipeError
from hfpipe.core.hub_errors import not_readable
from hfpipe.core.machine import machine_error
from hfpipe.recipe.faults import did_you_mean, listed
from hfpipe.recipe.metric_table import OUR_METRICS

if TYPE_CHECKING:
    from hfpipe.evaluation.metrics.rows import RowMetric

# Metrics of `evaluate` where less is better; it does not say itself.
LOWER_IS_BETTER = {"wer", "cer", "mape", "smape", "brier_score", "character", "charcut_mt"}


def load_metric(name: str, options: dict[str, Any] | None = None) -> Any:
    """The `evaluate` module of a name: one of ours, or what `evaluate.load` finds on the Hub or in a local script.

    Args:
        name: The metric's name.
        options: Options of one of ours; of any other, `revision` is the commit of its Space, and `arguments_of` says
            what is given to its `compute`.

    Raises:
        RecipeError: Nobody knows the name.
        MachineError: The name is not ours and the Hub cannot be reached.
    """
    if name in OUR_METRICS:
        file, class_name = OUR_METRICS[name].class_path.split(".")
        return getattr(import_module(f"hfpipe.evaluation.metrics.{file}"), class_name)(name, **(options or {}))
    import evaluate

    space = space_of(name)
    try:
        return evaluate.load(script_of(space, (options or {}).get("revision")) if space else name, keep_in_memory=True)
    except ImportError as error:
        raise MachineError(f"metric {name!r}: {error}") from error
    except (OSError, httpx2.TransportError) as error:
        found = not_readable(error, f"metric {name!r}", RecipeError)
        if not isinstance(found, RecipeError) and not (found is None and isinstance(error, FileNotFoundError)):
            raise found or MachineError(f"metric {name!r} cannot be fetched: {error}") from error
        where = f"on the Hub ({space})" if space else "a script here"
        raise RecipeError(
            f"metric {name!r} is neither one of hfpipe's ({listed(sorted(OUR_METRICS))}), nor {where}. Check the "
            f"spelling, and the network: another metric than hfpipe's own is fetched the first time."
            f"{did_you_mean(name, OUR_METRICS)}"
        ) from error
    except Exception as error:  # whatever a script raises when it is read
        if machine_error(error) is not None:
            raise
        said = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"metric {name!r} cannot be loaded: {type(error).__name__}: {said}. Look at its script."
        ) from error


def script_of(space: str, revision: str | None) -> str:
    """Fetches the script of a metric that is a Space of the Hub, and what stands beside it.

    `evaluate.load` would fetch it too, but waits for minutes and then says of everything that there is no such metric.

    Args:
        space: Its Hub id.
        revision: Commit or branch; without one, as `evaluate` chooses: the tag of its own version, or main.

    Returns:
        The path of the script, in a folder that is named as the commit.
    """
    fetch = partial(snapshot_download, space, repo_type="space", allow_patterns="*.py")
    try:
        folder: str | None = fetch(revision=revision or f"v{version('evaluate')}")
    except RevisionNotFoundError:
        if revision:
            raise
        folder = None
    return f"{folder or fetch()}/{space.rpartition('/')[2]}.py"


def space_of(name: str) -> str | None:
    """The Space of the Hub whose code a metric is; None for one of ours, and for a local script."""
    if name in OUR_METRICS or name.endswith(".py") or Path(name).exists():
        return None
    return name if "/" in name else f"evaluate-metric/{name}"


def arguments_of(options: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the options of a metric that go to its `compute`, for a metric that is not ours."""
    return {key: value for key, value in (options or {}).items() if key != "revision"}


def names_of(answer: str | list[str]) -> set[str]:
    """The classes of an answer that names one, or several."""
    return {answer} if isinstance(answer, str) else set(answer)


def is_row_metric(metric: Any) -> TypeGuard[RowMetric]:
    """Returns True for a metric of ours, which is a function of sums over rows."""
    from hfpipe.evaluation.metrics.rows import RowMetric  # late: `evaluate`, its base, imports all of scipy.stats

    return isinstance(metric, RowMetric)


def needs_of(metric: Any) -> str:
    """Returns the kind of answer that a metric needs, one of `evaluation.ANSWERS`; all that are not ours need
    `generation`.
    """
    return getattr(metric, "needs", "generation")


def higher_is_better(name: str, metric: Any) -> bool:
    return getattr(metric, "higher_is_better", name not in LOWER_IS_BETTER)
