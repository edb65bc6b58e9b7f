"""No token or password in a recipe: the run folder, the report and the Hub get a copy of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hfpipe.core.secrets import has_secret
from hfpipe.recipe.faults import Fault, Steps
from hfpipe.recipe.raw import Block, stages, suites

# Keys of fsspec's storage options that hold a secret, and the values of theirs that name a way to log in instead.
_SECRET_KEY = re.compile(r"(^|_|-)(token|secret|password|passwd|key|authorization)$", re.IGNORECASE)
_WAYS = ("anon", "browser", "cache", "cloud", "google_default")
_TEXT = (
    "holds a token, a password or a signed address, and a recipe is copied into the run folder, the report and the "
    "Hub. Remove it from the file: log in with `hf auth login` or set HF_TOKEN; other stores read their own variables, "
    "such as AWS_SECRET_ACCESS_KEY."
)


def check_secrets(data: dict[str, Any]) -> Iterator[Fault]:
    """Yields every value that is a secret, without showing it."""
    yield from _with_tokens((), data)
    sources = [source for stage in stages(data) for source in stage.sources]
    for source in [*sources, *(suite.source for suite in suites(data))]:
        yield from _with_keys(source.at("storage_options"))


def _with_tokens(steps: Steps, value: Any) -> Iterator[Fault]:
    if isinstance(value, str) and has_secret(value):
        yield Fault(steps, _TEXT)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(key, str) and has_secret(key):
            yield Fault(steps, _TEXT)
        else:
            yield from _with_tokens((*steps, key), item)


def _with_keys(block: Block) -> Iterator[Fault]:
    for key, value in block.data.items():
        steps = (*block.steps, key)
        if isinstance(value, dict):
            yield from _with_keys(block.at(key))
        elif _SECRET_KEY.search(str(key)) and isinstance(value, str) and value not in _WAYS and not has_secret(value):
            yield Fault(steps, _TEXT)
