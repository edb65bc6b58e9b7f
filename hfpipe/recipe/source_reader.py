"""The source of installed libraries, read with `ast`: nothing is imported.

What cannot be found or parsed is empty or None, never an error: the check that needs it is left out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

UNKNOWN = object()  # a value that is no literal
_HOMES = {"TrainingArguments": "transformers.training_args"}  # what `from transformers import ...` reaches lazily
_FUNCTION = re.compile(r"^( *)(?:async )?def .*\n(?:(?:\1 .*|\1\).*|[ \t]*)\n)*", re.MULTILINE)


@cache
def package(name: str) -> Path | None:
    """Folder of a top-level package; asking for one imports nothing."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


@cache
def _file(module: str) -> Path | None:
    top, *rest = module.split(".")
    folder = package(top)
    if folder is None:
        return None
    place = folder.joinpath(*rest)
    candidates = (place / "__init__.py", place.with_suffix(".py")) if rest else (place / "__init__.py",)
    return next((file for file in candidates if file.is_file()), None)


@cache
def source_of(module: str) -> str:
    """Returns the text of a module; empty where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8") if (file := _file(module)) else ""
    except (OSError, ValueError):
        return ""


@cache  # one file is asked for many classes
def parsed(module: str, *, bodies: bool = False) -> ast.Module:
    """The tree of a module; without the bodies of its functions, which would take two thirds of the time."""
    source = source_of(module)
    try:
        return ast.parse(source if bodies else _FUNCTION.sub(r"\1def _(): ...\n", source))
    except (SyntaxError, ValueError):
        return ast.Module([], []) if bodies else parsed(module, bodies=True)


@cache
def _names(module: str) -> dict[str, ast.ClassDef | ast.ImportFrom]:
    """Returns the names that the top level of a module defines or imports, also inside `if` and `try`."""
    names: dict[str, ast.ClassDef | ast.ImportFrom] = {}
    statements: list[ast.stmt] = list(parsed(module).body)
    while statements:
        statement = statements.pop(0)
        if isinstance(statement, ast.ClassDef):
            names[statement.name] = statement
        elif isinstance(statement, ast.ImportFrom):
            names |= {alias.asname or alias.name: statement for alias in statement.names}
        elif isinstance(statement, (ast.If, ast.Try)):
            statements = [*statement.body, *statement.orelse, *statements]
    return names


@cache
def find_class(module: str, name: str, hops: int = 5) -> tuple[str, ast.ClassDef] | None:
    """Finds a class from where its name is used: the module that defines it, and its definition."""
    node = _names(module).get(name)
    if isinstance(node, ast.ClassDef):
        return module, node
    if node is None or not hops:
        return None
    original = next((alias.name for alias in node.names if name in (alias.asname, alias.name)), name)
    home = _HOMES.get(original) or _imported_module(module, node)
    if home.split(".")[0] != module.split(".")[0] and original not in _HOMES:
        return None  # another library's mix-in
    return find_class(home, original, hops - 1)


def _imported_module(module: str, node: ast.ImportFrom) -> str:
    """The absolute name of the module in `from ..x import y`."""
    if not node.level:
        return node.module or ""
    file = _file(module)
    parts = module.split(".")
    up = node.level - 1 if file and file.name == "__init__.py" else node.level
    return ".".join([*parts[: len(parts) - up], *([node.module] if node.module else [])])


def ancestry(module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
    """The bases of a class that can be found, farthest first, and the class itself."""
    for base in reversed(node.bases):
        located = find_class(module, base.id) if isinstance(base, ast.Name) else None
        if located and located[1] is not node:
            yield from ancestry(*located)
    yield module, node


def is_whole(module: str, node: ast.ClassDef) -> bool:
    """Returns True if every base that may hold fields was found; without one, right keys would look wrong."""
    bases = [base.id for base in node.bases if isinstance(base, ast.Name) and re.search("Config|Arguments", base.id)]
    located = [find_class(module, base) for base in bases]
    return all(found is not None and is_whole(*found) for found in located)


def methods_of(module: str, node: ast.ClassDef) -> list[ast.FunctionDef]:
    """The methods of a class, with their bodies."""
    classes = [part for part in parsed(module, bodies=True).body if isinstance(part, ast.ClassDef)]
    return [
        method
        for part in classes
        if part.name == node.name
        for method in part.body
        if isinstance(method, ast.FunctionDef)
    ]


@cache
def signature_of(module: str, name: str) -> ast.FunctionDef | None:
    """The signature of a function of a module; the last one where there are overloads."""
    headers = re.findall(rf"^def {name}\([^)]*\n\).*:$", source_of(module), re.MULTILINE)
    try:
        node = ast.parse(f"{headers[-1]} ...").body[0]
    except (IndexError, SyntaxError):
        return None
    return node if isinstance(node, ast.FunctionDef) else None


def enum_members(module: str, name: str) -> tuple[str, ...] | None:
    """Values of the members of a class that a module names; None if it is no enum, or not found."""
    located = find_class(module, name)
    if located is None or not any(ast.unparse(base).endswith("Enum") for base in located[1].bases):
        return None
    values = [literal(line.value) for line in located[1].body if isinstance(line, ast.Assign)]
    return tuple(value for value in values if isinstance(value, str)) or None


def assigned(body: list[ast.stmt], name: str) -> ast.expr | None:
    """The value that a class body gives to a name."""
    for statement in body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return statement.value  # type: ignore[attr-defined, no-any-return]
    return None


def literal(node: ast.expr | None) -> Any:
    """The value of an expression of constants; UNKNOWN for any other."""
    try:
        return UNKNOWN if node is None else ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return UNKNOWN
