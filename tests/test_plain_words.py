"""Docstrings say what a thing does or is in a sentence of their own, see CONTRIBUTING.md."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUESTION = re.compile(r"(What|Whether|How|Which|Why|Where|When|Who|Whose|Of|As)\b")


@pytest.mark.parametrize("folder", ["hfpipe", "tests", "benchmarks"])
def test_docstrings_begin_as_sentences(folder: str) -> None:
    bad = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if QUESTION.match(text):
                    bad.append(f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}")
    assert not bad, "\n".join(bad)
