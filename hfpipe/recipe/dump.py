"""A recipe as YAML that `load_recipe` reads again, also for others, and the hash of any part of it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import PurePath
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from hfpipe.recipe.config import Recipe
from hfpipe.recipe.document import Dumper

FROM_ROOT = re.compile(r"(?:file://)?(?:/[^/\s]+/|~[^/\s]*/|[A-Za-z]:[\\/])")  # of a path, not of a prompt as `/think`


def dump_recipe(recipe: Recipe) -> str:
    """Writes a recipe, overrides and all; what is at its default is left out, but the seed is always there."""
    data = recipe.model_dump(exclude_defaults=True)
    data = {"name": recipe.name, "seed": recipe.seed, **data}
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)


def shared_recipe(recipe: Recipe) -> Recipe:
    """The recipe as others may see it: of a path from the root or the home of this machine, `./` and its last name.

    Where the run folder lay is left out.
    """
    data = _without_folders(recipe.model_dump(exclude_defaults=True))
    if FROM_ROOT.match(recipe.output_dir or ""):
        del data["output_dir"]
    return Recipe.model_validate(data)


def _without_folders(value: Any) -> Any:
    if isinstance(value, str) and FROM_ROOT.match(value):
        return f"./{PurePath(value.replace(chr(92), '/')).name}"
    if isinstance(value, dict):
        texts = ("template", "chat_template")  # which may begin as they like
        return {key: item if key in texts else _without_folders(item) for key, item in value.items()}
    return [_without_folders(item) for item in value] if isinstance(value, (list, tuple)) else value


def hash_of(value: Any) -> str:
    """SHA-256 (hex) of a model, or of any plain data, as canonical JSON: the order of keys does not matter.

    Keys at their default do not count, so that a key which a later version adds leaves the hashes of older recipes
    alone.
    """
    canonical = json.dumps(to_jsonable_python(_plain(value)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
