"""Private names stay where they are made: those of libraries in core/upstream.py, those of hfpipe out of its tests."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UPSTREAM = {"hfpipe/core/upstream.py", "tests/core/test_upstream.py"}
# Torch's notes on extending it name these modules; its operators are reached by their registered names.
OF_TORCH = {"torch.utils._python_dispatch", "torch.utils._pytree"}
OWNERS = {"self", "cls", "os", "aten", "shard"}  # `shard` is a copy of self


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(path: Path) -> Iterator[str]:
    """Yields the private names of others that a module imports, reads or sets, with their lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module not in OF_TORCH:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (f"{node.lineno}: {name}" for name in names if is_private(name))
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = node.value
            is_base = isinstance(owner, ast.Call) and ast.unparse(owner.func) in ("super", "copy.copy")
            if not is_base and not (isinstance(owner, ast.Name) and owner.id in OWNERS):
                yield f"{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("hfpipe."):
            yield from (f"{node.lineno}: {part}" for part in node.value.split(".") if is_private(part))


@pytest.mark.parametrize("folder", ["hfpipe", "tests", "benchmarks"])
def test_private_names_are_used_by_their_owners_alone(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.relative_to(ROOT).as_posix() not in UPSTREAM
        for name in private_names(path)
    ]
    assert not found, "\n".join(found)
