"""The licence of what is pushed: the base's, and where it does not agree with those of the data sets, that is said."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# What a licence asks that another may not, by its name on the Hub: https://huggingface.co/docs/hub/repositories-licenses
TERMS = {
    "forbids commercial use": re.compile(r"-nc\b|noncommercial|-research"),
    "forbids to pass on what is made of it": re.compile(r"-nd\b"),
    "asks that what is made of it carries the same licence": re.compile(r"-sa\b|^(a|l)?gpl|^odbl|^cdla-sharing|^eupl"),
    "has terms of its own": re.compile(r"^(other|unknown|llama|gemma|openrail|bigscience|creativeml|deepfloyd)"),
}


def stated(facts: Mapping[str, Any]) -> str | None:
    """The one licence that a card of the Hub names."""
    license = facts.get("license")
    return license if isinstance(license, str) and license else None


def terms_of(license: str) -> set[str]:
    return {term for term, pattern in TERMS.items() if pattern.search(license.lower())}


def licence_lines(
    license: str | None, base: str | None, base_license: str | None, data: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """What a reader must know about the licence: where it comes from, and every conflict.

    Args:
        license: What the card states; None for nothing.
        base: Hub id of the base model; None for a model that was trained from nothing.
        base_license: Its licence; None where it is not known.
        data: What the cards of the data sets say, by Hub id.
    """
    if license is None:
        yield "No licence is stated here: that of the base and of the data sets must be looked up."
    if license and base_license and license != base_license:
        yield f"**Licence conflict**: stated here is {license}, and the base {base} is under {base_license}."
    for id, facts in data.items():
        theirs = stated(facts)
        if theirs is None:
            yield f"The licence of the data set {id} is not known."
        elif more := sorted(terms_of(theirs) - terms_of(license or "")):
            here = f"{license} does not" if license else "no licence is stated here"
            yield (
                f"**Licence conflict**: the data set {id} is under {theirs}, which {' and '.join(more)}; {here}. "
                "Whether that reaches a model trained on it has to be settled before the model is used so."
            )
