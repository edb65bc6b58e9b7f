"""A module imports only from lower layers, and the recipe layer imports nothing heavy."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hfpipe"
LAYERS = [
    {"errors", "files", "folders", "recipe", "scores", "secrets", "shipped", "tradeoff"},
    {"connection", "ranks", "data", "model", "metrics"},
    {"answers", "pair_answers", "harness", "evaluation", "checkpoints", "cost", "environment"}
    | {"overlap", "shift", "stages"},
    {"hub", "report"},
    {"dial", "pipeline", "run"},
    {"artifacts", "preflight", "repeats"},
    {"cli", "__main__"},
]
HEAVY = {"torch", "transformers", "datasets", "trl", "peft", "accelerate", "evaluate", "numpy", "pandas"}


def layer_of(part: str) -> int:
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports_of(tree: ast.AST) -> set[str]:
    """Full names of everything a module imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if part_of(path) != "__init__")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_lower_layers(path: Path) -> None:
    own = part_of(path)
    for name in imports_of(ast.parse(path.read_text())):
        top, _, rest = name.partition(".")
        part = rest.partition(".")[0]
        if top == "hfpipe" and part not in {"", own, "errors", "__version__"}:
            if own != "cli":
                assert layer_of(part) <= layer_of(own), f"{path} imports {name} from a higher layer"
            if layer_of(own) == 0:
                assert layer_of(part) == 0
        if layer_of(own) == 0:
            assert top not in HEAVY, f"{path} imports {name}, which is heavy"


def test_every_module_has_a_place_and_says_what_it_is_for() -> None:
    for path in MODULES:
        layer_of(part_of(path))
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
