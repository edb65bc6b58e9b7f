"""Reads the values that an annotation allows from its source: `Optional[Union[list[str], str]]`, `SchedulerType | str`.

An annotation that is not understood allows anything: the library itself has the last word.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hfpipe.recipe.faults import found_and_allowed, listed, near_to, nearest

EnumReader = Callable[[str], "tuple[str, ...] | None"]  # name of a class -> the values of its members, if it is an enum


@dataclass(frozen=True)
class ValueKind:
    """One of the kinds of value that a field takes.

    Args:
        word: int, float, str, bool, list, dict or null.
        choices: The only values allowed; empty for any.
        items: Kinds of the items of a list or of the values of a mapping; empty for any.
        of_enum: Whether the choices are an enum's, which the class converts from text.
    """

    word: str
    choices: tuple[Any, ...] = ()
    items: tuple[ValueKind, ...] = ()
    of_enum: bool = False


MOST_CHOICES = 15  # that a message lists

ANYTHING: tuple[ValueKind, ...] = ()
NULL = ValueKind("null")
_NAMES = {
    "int": "int",
    "float": "float",
    "str": "str",
    "bool": "bool",
    "list": "list",
    "List": "list",
    "tuple": "list",
    "Tuple": "list",
    "set": "list",
    "Sequence": "list",
    "dict": "dict",
    "Dict": "dict",
    "Mapping": "dict",
}
_SPELLED = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "list": "a list",
    "dict": "a mapping",
    "null": "null",
}
_PLURAL = {
    "int": "whole numbers",
    "float": "numbers",
    "str": "texts",
    "bool": "true or false",
    "list": "lists",
    "dict": "mappings",
    "null": "null",
}
_TYPES = {"int": int, "float": (int, float), "str": str, "bool": bool, "list": list, "dict": dict, "null": type(None)}
_SCHEMA = {
    "int": "integer",
    "float": "number",
    "str": "string",
    "bool": "boolean",
    "list": "array",
    "dict": "object",
    "null": "null",
}


def value_kinds(annotation: ast.expr | None, enum: EnumReader) -> tuple[ValueKind, ...]:
    """The kinds that an annotation allows; empty for anything."""
    try:
        kinds = tuple(_read(annotation, enum))
    except _NotUnderstood:
        return ANYTHING
    if any(kind.of_enum for kind in kinds):  # `SchedulerType | str`: text is converted, so it must name a member
        kinds = tuple(kind for kind in kinds if kind != ValueKind("str"))
    return kinds


class _NotUnderstood(Exception):
    pass


def _read(node: ast.expr | None, enum: EnumReader) -> list[ValueKind]:
    match node:
        case ast.Constant(value=None):
            return [NULL]
        case ast.Constant(value=str(text)):
            return _read(ast.parse(text, mode="eval").body, enum)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _read(left, enum) + _read(right, enum)
        case ast.Name(id=name) if name in _NAMES:
            return [ValueKind(_NAMES[name])]
        case ast.Name(id=name) if members := enum(name):
            return [ValueKind("str", members, of_enum=True)]
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return [*_read(inner, enum), NULL]
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=parts)):
            return [kind for part in parts for kind in _read(part, enum)]
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            return _literal(inner.elts if isinstance(inner, ast.Tuple) else [inner])
        case ast.Subscript(value=ast.Name(id=name), slice=inner) if name in _NAMES:
            return [ValueKind(_NAMES[name], items=_items(name, inner, enum))]
    raise _NotUnderstood


def _items(name: str, inner: ast.expr, enum: EnumReader) -> tuple[ValueKind, ...]:
    """Kinds of what is in a list or mapping; a tuple's members may differ, so they are not looked at."""
    if _NAMES[name] == "dict":
        return value_kinds(inner.elts[1], enum) if isinstance(inner, ast.Tuple) and len(inner.elts) == 2 else ANYTHING
    return ANYTHING if isinstance(inner, ast.Tuple) else value_kinds(inner, enum)


def _literal(nodes: list[ast.expr]) -> list[ValueKind]:
    values = [node.value for node in nodes if isinstance(node, ast.Constant)]
    words = dict.fromkeys(_word_of(value) for value in values)
    return [ValueKind(word, tuple(value for value in values if _word_of(value) == word)) for word in words]


def _word_of(value: Any) -> str:
    return {bool: "bool", int: "int", float: "float", str: "str"}.get(type(value), "null")


def fits(value: Any, kinds: tuple[ValueKind, ...], *, exact: bool = False) -> bool:
    """Returns True if a value is of one of the kinds.

    Args:
        value: The recipe's value.
        kinds: See `value_kinds`.
        exact: Whether 1 is wrong where 1.0 is asked for, as it is in a transformers config.
    """
    return not kinds or any(_is(value, kind, exact) for kind in kinds)


def _is(value: Any, kind: ValueKind, exact: bool) -> bool:
    if not isinstance(value, _TYPES[kind.word]) or (isinstance(value, bool) and kind.word != "bool"):  # type: ignore[arg-type]
        return False
    if kind.word == "float" and exact and isinstance(value, int):
        return False
    if kind.choices:
        return any(_matches(value, choice) for choice in kind.choices)
    if kind.word in ("list", "dict"):
        return all(fits(item, kind.items) for item in (value.values() if isinstance(value, dict) else value))
    return True


def _matches(value: Any, choice: Any) -> bool:
    """Equality, but "pissa_niter_[number of iters]" stands for pissa_niter_16."""
    if isinstance(choice, str) and "[" in choice:
        return re.fullmatch(re.sub(r"\\\[.*?\\\]", r"\\d+", re.escape(choice)), value) is not None
    return value == choice


def explain(value: Any, kinds: tuple[ValueKind, ...]) -> str:
    """Names the value found and the values allowed, for a value that does not fit."""
    near = nearest(value, _words(kinds)) if isinstance(value, str) else None
    if isinstance(value, int) and not isinstance(value, bool) and any(kind.word == "float" for kind in kinds):
        return f"found the number {value}; this library asks for a float. Did you mean {value}.0?"
    return found_and_allowed(value, ", or ".join(_spell(kind, near) for kind in kinds), near=near)


def _words(kinds: tuple[ValueKind, ...]) -> list[str]:
    return [word for kind in kinds for word in kind.choices if isinstance(word, str)]


def _spell(kind: ValueKind, near: str | None) -> str:
    """A kind in words; of a long list of choices only a few."""
    if kind.choices:
        words = [word if isinstance(word, str) else json.dumps(word) for word in kind.choices]
        if len(words) > MOST_CHOICES:
            return f"one of {len(words)} words, such as {listed(near_to(near, words) if near else words[:5])}"
        return f"one of {listed(words)}" if len(words) > 1 else words[0]
    if kind.items:
        return f"{_SPELLED[kind.word]} of {' or '.join(_PLURAL[item.word] for item in kind.items)}"
    return _SPELLED[kind.word]


def json_schema_of(kinds: tuple[ValueKind, ...]) -> dict[str, Any]:
    """The same as JSON Schema; {} allows anything."""
    schemas = [_schema_of(kind) for kind in kinds]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas} if schemas else {}


def _schema_of(kind: ValueKind) -> dict[str, Any]:
    if kind.choices and not any("[" in str(choice) for choice in kind.choices):
        return {"enum": list(kind.choices)}
    schema: dict[str, Any] = {"type": _SCHEMA[kind.word]}
    if kind.items:
        schema["items" if kind.word == "list" else "additionalProperties"] = json_schema_of(kind.items)
    return schema
