"""A recipe in the making, with notes on everything of a config that it does not say, and why.

A tool's table gives every key of its configs one of five fates:

- a place, such as `stage.training.learning_rate` or `model.id`, where the value goes as it is;
- `Said(place, make)`: a place, and how the value is made;
- `Unneeded(why)`: it has no effect on the weights, so it is left out and told;
- `Lost(why)`: it changes the weights and a recipe cannot say it;
- `Out(why)`: the whole config is for something that hfpipe does not do.

A function in place of these decides by the value. A key that is in no table counts as lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from hfpipe.core.errors import RecipeError
from hfpipe.recipe.annotations import fits
from hfpipe.recipe.passthrough import stage_fields
from hfpipe.recipe.signatures import Fields, lora_fields

OFF: tuple[Any, ...] = (None, False, "", [], {})  # values by which a key asks for nothing


class OutOfScope(RecipeError):
    """The config is for something that hfpipe does not do."""


@dataclass(frozen=True)
class Said:
    """A place of the recipe, and how the value that stands there is made."""

    place: str
    make: Callable[[Any], Any]


@dataclass(frozen=True)
class Unneeded:
    """A key without an effect on the weights."""

    why: str


@dataclass(frozen=True)
class Lost:
    """A key that changes the weights and that a recipe cannot say; its `off` values change nothing."""

    why: str
    off: tuple[Any, ...] = OFF


@dataclass(frozen=True)
class Out:
    """A key that makes a config one for something else; its `off` values do not."""

    why: str
    off: tuple[Any, ...] = OFF


Rule = str | Said | Unneeded | Lost | Out | Callable[["Draft", Any], None]
Table = dict[str, Rule]


@dataclass(frozen=True)
class Note:
    """The fate of a key: `lost` changes the weights, `changed` is said otherwise, `unneeded` has no effect."""

    kind: Literal["lost", "changed", "unneeded"]
    key: str
    why: str


@dataclass
class Draft:
    """The recipe so far.

    Args:
        tool: The tool's name, for messages.
        config: The whole config, as its file says it.
        text: The file's text: some configs name their model in a comment only.
        folder: The folder of the file, where others may lie beside it.
    """

    tool: str
    config: dict[str, Any]
    text: str = ""
    folder: str = "."
    recipe: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    suites: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stage.update({"name": "train", "kind": "sft", "data": []})

    def note(self, kind: Literal["lost", "changed", "unneeded"], key: str, why: str) -> None:
        """Adds a note, once."""
        if (note := Note(kind, key, why)) not in self.notes:
            self.notes.append(note)

    def put(self, place: str, value: Any) -> None:
        """Writes a value at a dotted place; one that begins with `stage.` is of the stage."""
        first, _, rest = place.partition(".")
        block, steps = (self.stage, rest.split(".")) if first == "stage" else (self.recipe, place.split("."))
        for step in steps[:-1]:
            block = block.setdefault(step, {})
        block[steps[-1]] = value

    def take(self, place: str) -> Any:
        """The value at a dotted place; None where there is none."""
        block: Any = {"stage": self.stage, **self.recipe}
        for step in place.split("."):
            block = block.get(step) if isinstance(block, dict) else None
        return block

    def train(self, key: str, name: str, value: Any) -> None:
        """Writes a field of `training:` or of `lora:`, if the installed library has it and takes the value."""
        block, _, word = name.partition(".")
        fields = _fields_of(block, self.stage["kind"])
        if word not in fields:
            self.note("lost", key, f"`{block}:` has no field `{word}` in the installed libraries")
        elif not fits(value, fields[word].kinds):
            self.note("lost", key, f"`{value}` is not among the values of `{block}.{word}` in the installed libraries")
        else:
            self.put(f"stage.{name}", value)

    def apply(self, table: Mapping[str, Rule], config: Mapping[str, Any] | None = None) -> None:
        """Gives every key of a config its fate.

        Args:
            table: By key; `a.b` is the key `b` of the block `a`, and `a.*` stands for every other key that starts so.
            config: The part of the config to go through; the whole when absent.

        Raises:
            OutOfScope: The config is for something that hfpipe does not do.
        """
        for key, value in _leaves(self.config if config is None else config, table):
            rule = rule_of(table, key)
            if rule is None:
                if value is not None:
                    self.note("lost", key, f"`hfpipe convert` does not know this key of {self.tool}")
            else:
                self.follow(key, rule, value)

    def follow(self, key: str, rule: Rule, value: Any) -> None:
        """Gives one key its fate."""
        if callable(rule):
            rule(self, value)
        elif value is None and not isinstance(rule, Lost | Out):
            return
        elif isinstance(rule, Unneeded):
            if value not in OFF:
                self.note("unneeded", key, rule.why)
        elif isinstance(rule, Lost):
            if value not in rule.off:
                self.note("lost", key, rule.why)
        elif isinstance(rule, Out):
            if value not in rule.off:
                raise OutOfScope(f"this {self.tool} config is {rule.why} (`{key}: {_short(value)}`).")
        else:
            place, made = (rule, value) if isinstance(rule, str) else (rule.place, rule.make(value))
            if place.startswith(("stage.training.", "stage.lora.")):
                self.train(key, place.removeprefix("stage."), made)
            else:
                self.put(place, made)

    def default(self, place: str, value: Any) -> None:
        """Writes what the tool does where its config is silent and hfpipe would do otherwise."""
        if self.take(place) is None:
            self.put(place, value)


@cache
def _fields_of(block: str, kind: str) -> Fields:
    """Fields of `lora:`, or of `training:` of a kind of stage; empty where the library cannot be read."""
    return (lora_fields() if block == "lora" else stage_fields(kind)) or {}


def _leaves(config: Mapping[str, Any], table: Mapping[str, Rule], before: str = "") -> Iterable[tuple[str, Any]]:
    """Keys with their values; a block that no rule stands for is gone through key by key."""
    for name, value in config.items():
        key = f"{before}{name}"
        if isinstance(value, Mapping) and value and rule_of(table, key) is None:
            yield from _leaves(value, table, f"{key}.")
        else:
            yield key, value


def rule_of(table: Mapping[str, Rule], key: str) -> Rule | None:
    """The rule for a key: its own, or that of a beginning."""
    beginnings = (rule for name, rule in table.items() if name.endswith("*") and key.startswith(name[:-1]))
    return table.get(key) or next(beginnings, None)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def with_another(draft: Draft, value: Any) -> None:
    """The rule of a key that is read together with another one."""


def same(rule: Rule, keys: str) -> Table:
    """One rule for each of these keys, which a blank separates."""
    return dict.fromkeys(keys.split(), rule)


def if_set(follow: Callable[[Draft, Any], None]) -> Callable[[Draft, Any], None]:
    """The rule of a key that asks for nothing by its `OFF` values."""

    def rule(draft: Draft, value: Any) -> None:
        if value not in OFF:
            follow(draft, value)

    return rule
