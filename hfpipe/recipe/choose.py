"""The suites of a file that a command line asks for."""

from __future__ import annotations

from collections.abc import Sequence

from hfpipe.core.errors import RecipeError
from hfpipe.recipe.config import Suite, Suites
from hfpipe.recipe.faults import did_you_mean, listed


def chosen_suites(suites: Suites, names: Sequence[str] | None, limit: int | None) -> Suites:
    """The suites that are asked for, or the first rows of them.

    Args:
        suites: All suites of the file.
        names: Those to keep; all when None or empty.
        limit: Rows of each suite; all when None.

    Raises:
        RecipeError: There is no such suite.
    """
    for name in names or ():
        if name not in suites.evaluate:
            known = list(suites.evaluate)
            raise RecipeError(
                f"--suite {name}: there is no such suite; the file has {listed(known)}.{did_you_mean(name, known)}"
            )
    kept = {name: suite for name, suite in suites.evaluate.items() if not names or name in names}
    if limit is not None:
        if limit < 1:
            raise RecipeError(f"--limit {limit}: allowed is a number of rows, 1 or more.")
        kept = {name: _first_rows(suite, limit) for name, suite in kept.items()}
    return suites.model_copy(update={"evaluate": kept})


def _first_rows(suite: Suite, limit: int) -> Suite:
    if suite.lm_eval is not None:
        return suite.model_copy(update={"limit": min(limit, suite.limit or limit)})
    take = min(limit, suite.data.take or limit)
    return suite.model_copy(update={"data": suite.data.model_copy(update={"take": take})})
