"""The recipe as plain data, seen block by block: what the checks look at before it is known to be well formed.

Every check runs on every recipe, so that a fault in one block hides none in another. A block that is not what it should
be is seen as empty here; `validate.py` reports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hfpipe.recipe.faults import Steps, nearest
from hfpipe.recipe.stage_config import KINDS


@dataclass(frozen=True)
class Block:
    """A mapping of the recipe and the path to it."""

    steps: Steps
    data: dict[Any, Any]

    def at(self, key: Any) -> Block:
        """The mapping below a key; an empty one where there is none."""
        return Block((*self.steps, key), mapping(self.data.get(key)))


@dataclass(frozen=True)
class RawStage(Block):
    """A stage, its name if it has one, and its kind (the nearest one if it is misspelt)."""

    name: str | None
    kind: str | None

    @property
    def sources(self) -> Iterator[Block]:
        for index, source in enumerate(sequence(self.data.get("data"))):
            yield Block((*self.steps, "data", index), mapping(source))


@dataclass(frozen=True)
class RawSuite(Block):
    """A suite and its name."""

    name: str

    @property
    def source(self) -> Block:
        return self.at("data")


def mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def sequence(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def texts(value: Any) -> list[str]:
    return [one for one in sequence(value) if isinstance(one, str)]


def as_text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def stages(data: dict[str, Any]) -> list[RawStage]:
    return [
        RawStage(("stages", index), mapping(stage), as_text(mapping(stage).get("name")), kind_of(stage))
        for index, stage in enumerate(sequence(data.get("stages")))
    ]


def suites(data: dict[str, Any]) -> list[RawSuite]:
    return [
        RawSuite(("evaluate", name), mapping(suite), str(name)) for name, suite in mapping(data.get("evaluate")).items()
    ]


def kind_of(stage: Any) -> str | None:
    """The kind of a stage, or the one that is meant."""
    kind = mapping(stage).get("kind")
    return kind if isinstance(kind, str) and kind in KINDS else nearest(kind, KINDS) if isinstance(kind, str) else None
