"""Where a source may be cleaned: not in a suite, and not against suites that do not exist."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hfpipe.recipe.faults import Fault
from hfpipe.recipe.raw import stages, suites

WORDS = ("deduplicate", "decontaminate")


def check_cleaning(data: dict[str, Any]) -> Iterator[Fault]:
    """Yields the sources that ask for a cleaning which they cannot have."""
    for stage in stages(data):
        for source in stage.sources:
            asked = [key for key in WORDS if source.data.get(key)]
            if "decontaminate" in asked and not suites(data):
                text = "there is no suite whose rows could be left out. Remove it, or give the recipe `evaluate:`."
                yield Fault((*source.steps, "decontaminate"), text)
    for suite in suites(data):
        for key in WORDS:
            if suite.source.data.get(key):
                text = "cleans what is trained on; a suite is scored as it is, or its scores compare with no others."
                yield Fault((*suite.source.steps, key), f"{text} Remove it.")
