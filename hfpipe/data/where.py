"""`where:` of a source: a condition on columns, such as `language_score > 0.9 and language == "en"`.

The expression is Python's syntax without calls, attributes or anything else that could do more than compare.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Sequence
from typing import Any

from hfpipe.errors import DataError, RecipeError

ALLOWED = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare, ast.cmpop),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Mod, ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple),
)


def compile_where(text: str, columns: Sequence[str], path: str) -> Callable[[dict[str, Any]], bool]:
    """A function that says of a row whether it is kept; a row in which a compared column is missing is not.

    Args:
        text: The condition.
        columns: The columns that there are.
        path: The source, for messages.

    Raises:
        RecipeError: The condition is not of the allowed form.
        DataError: It names a column that does not exist.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise RecipeError(f"source {path!r}: where: {text!r} is not a condition: {error.msg}.") from error
    for node in ast.walk(tree):
        if not isinstance(node, ALLOWED):
            raise RecipeError(
                f"source {path!r}: where: {ast.unparse(node)!r} in {text!r} is not allowed; a condition may compare columns "
                "with numbers and texts, and join comparisons with and, or, not, in."
            )
        if isinstance(node, ast.Name) and node.id not in columns:
            near = difflib.get_close_matches(node.id, columns, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise DataError(
                f"source {path!r}: where: there is no column {node.id!r}; there are {', '.join(columns)}.{hint}"
            )
    code = compile(tree, "where", "eval")

    def keep(row: dict[str, Any]) -> bool:
        try:
            return bool(eval(code, {"__builtins__": {}}, row))
        except TypeError:  # a missing value compared with a number
            return False

    return keep
