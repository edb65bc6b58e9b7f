"""A module imports only from its own room or from lower ones, without circles, and reading a recipe stays light."""

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hfpipe"
FLOORS = [  # from the ground up
    {"core"},
    {"recipe"},
    {"scores", "data"},
    {"report", "model", "convert"},
    {"evaluation"},
    {"stages", "hub"},
    {"pipeline"},
    {"cli"},
    {"__main__"},
]
HEAVY = {"torch", "transformers", "datasets", "trl", "peft", "accelerate", "evaluate", "numpy", "pandas"}
LIGHT = ("hfpipe.recipe", "hfpipe.cli", "hfpipe.core.errors", "hfpipe.core.files", "hfpipe.core.command")


def room_of(module: str) -> str:
    return module.split(".")[1]


def floor_of(module: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room_of(module) in rooms)


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = [name for name in PATHS if name != "hfpipe"]


@cache
def imports_of(module: str, *, inner: bool) -> frozenset[str]:
    """Names of the modules that a module imports, of ours by file; `inner` counts imports inside of functions too."""
    tree = ast.parse(PATHS[module].read_text())
    nodes = ast.walk(tree) if inner else [node for part in tree.body for node in statements(part)]
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in PATHS else node.module for name in whole}
    return frozenset(names - {"hfpipe"})


def statements(node: ast.stmt) -> list[ast.AST]:
    """Parts of a top-level statement that run when the module is imported."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or "TYPE_CHECKING" in ast.dump(node):
        return []
    return list(ast.walk(node))


def reached_from(module: str, *, packages: bool) -> set[str]:
    """Every module that one of ours imports, directly or by way of others; `packages` follows those they lie in too."""
    found: set[str] = set()
    open_ends = [module]
    while open_ends:
        name = open_ends.pop()
        if name in found:
            continue
        found.add(name)
        if name in PATHS:
            open_ends += imports_of(name, inner=False)
            parent = name.rpartition(".")[0]
            open_ends += [parent] if packages and parent in PATHS else []
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_from_lower_floors(module: str) -> None:
    for name in imports_of(module, inner=True):
        if name in PATHS and room_of(name) != room_of(module):
            assert floor_of(name) < floor_of(module), f"{module} imports {name}, which is on no lower floor"


def test_the_rooms_are_few_and_tied_by_few_arrows() -> None:
    """The figures that CONTRIBUTING.md gives: 12 rooms, 8 floors, 43 arrows, no room larger than 22 % of the lines."""
    rooms = {room_of(module) for module in MODULES} - {"__main__"}
    arrows = {
        (room_of(module), room_of(name))
        for module in MODULES
        for name in imports_of(module, inner=True)
        if name in PATHS and room_of(name) != room_of(module)
    }
    arrows = {arrow for arrow in arrows if "__main__" not in arrow}
    lines = Counter[str]()
    for module in MODULES:
        lines[room_of(module)] += len(PATHS[module].read_text().splitlines())
    assert (len(rooms), len(FLOORS) - 1, len(arrows)) == (12, 8, 43)
    assert max(lines.values()) <= 0.22 * lines.total()
    assert "12 rooms on 8 floors, tied by 43 arrows" in (PACKAGE.parent / "CONTRIBUTING.md").read_text()


def test_no_module_imports_itself_by_way_of_others() -> None:
    for module in MODULES:
        for name in imports_of(module, inner=False):
            if name in PATHS:
                assert module not in reached_from(name, packages=False), f"{module} and {name} import each other"


@pytest.mark.parametrize("module", LIGHT)
def test_reading_a_recipe_imports_no_heavy_library(module: str) -> None:
    heavy = {name for name in reached_from(module, packages=True) if name.partition(".")[0] in HEAVY}
    assert not heavy, f"{module} imports {heavy}"


def test_every_module_has_a_place_and_says_what_it_is_for() -> None:
    for module in MODULES:
        floor_of(module)
        source = PATHS[module].read_text()
        assert not source or ast.get_docstring(ast.parse(source)), f"{module} has no docstring"
