"""hfpipe: one recipe from raw web text to a scored adapter on the Hub.

In Python as on the command line: `from hfpipe import load_recipe, check, run, evaluate`; see docs/python.md. The names
are imported when they are first asked for, so that `hfpipe --help` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hfpipe.core.version import __version__ as __version__

if TYPE_CHECKING:
    from hfpipe.core.errors import BudgetExceeded as BudgetExceeded
    from hfpipe.core.errors import DataError as DataError
    from hfpipe.core.errors import MachineError as MachineError
    from hfpipe.core.errors import RecipeError as RecipeError
    from hfpipe.core.errors import UserError as UserError
    from hfpipe.pipeline.api import Recipe as Recipe
    from hfpipe.pipeline.api import Run as Run
    from hfpipe.pipeline.api import Scorecard as Scorecard
    from hfpipe.pipeline.api import check as check
    from hfpipe.pipeline.api import evaluate as evaluate
    from hfpipe.pipeline.api import load_recipe as load_recipe
    from hfpipe.pipeline.api import open_run as open_run
    from hfpipe.pipeline.api import run as run

_PLACES = {
    "hfpipe.pipeline.api": ("Recipe", "Run", "Scorecard", "check", "evaluate", "load_recipe", "open_run", "run"),
    "hfpipe.core.errors": ("BudgetExceeded", "DataError", "MachineError", "RecipeError", "UserError"),
}
__all__ = sorted(name for names in _PLACES.values() for name in names)


def __getattr__(name: str) -> Any:
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
