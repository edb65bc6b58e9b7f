"""`where:` of a source: a condition on columns, such as `language_score > 0.9 and language == "en"`.

It is Python's syntax without calls, attributes or anything else that could do more than compare; it is walked, not run.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from functools import cached_property
from typing import Any

from hfpipe.core.errors import DataError, RecipeError

ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda value, values: value in values,
    ast.NotIn: lambda value, values: value not in values,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
FOR_MISSING = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot)  # what may be asked of a value that is missing
ALLOWED: tuple[type[ast.AST], ...] = (
    *(ast.BoolOp, ast.boolop, ast.UnaryOp, ast.Not, ast.USub, ast.UAdd, ast.BinOp, ast.Compare),
    *(ast.Name, ast.Load, ast.List, ast.Tuple),
    *COMPARISONS,
    *ARITHMETIC,
)


class RowFilter:
    """A condition, called with the values of `columns` in that order.

    Args:
        text: The condition.
        path: The source, for messages.

    Raises:
        RecipeError: The condition is not of the allowed form.
    """

    def __init__(self, text: str, path: str) -> None:
        self.text, self.path = text, path
        for node in ast.walk(self._tree):
            is_constant = isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None)
            asks_is = isinstance(node, ast.Compare) and any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops)
            if asks_is and not all(_is_none(right) for right in node.comparators):  # type: ignore[attr-defined]
                raise self._refused(node, "`is` is for None alone; write `==`")
            odd_operator = isinstance(node, ast.BinOp | ast.UnaryOp) and not isinstance(node.op, ALLOWED)
            if odd_operator or not (is_constant or isinstance(node, ALLOWED)):
                raise self._refused(node, "compare columns with numbers and texts, and join that by and, or, not")
        if not self.columns:
            raise self._refused(self._tree, "it names no column")

    def __reduce__(self) -> tuple[type[RowFilter], tuple[str, str]]:
        return RowFilter, (self.text, self.path)  # the same bytes on every rank: `datasets` caches by them

    @cached_property
    def _tree(self) -> ast.expr:
        try:
            return ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            at = f" at character {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
            reason = error.msg if isinstance(error, SyntaxError) else "it cannot be read"
            raise RecipeError(
                f"source {self.path!r}: where: {self.text!r} is not a condition{at}: {reason}. Write it like "
                "`language_score > 0.9 and language in ['en', 'de']`."
            ) from error

    def _refused(self, node: ast.AST, reason: str) -> RecipeError:
        at = getattr(node, "col_offset", 0) + 1
        part = ast.unparse(node)
        return RecipeError(
            f"source {self.path!r}: where: {part!r}, at character {at} of {self.text!r}, is not allowed; {reason}."
        )

    @cached_property
    def columns(self) -> list[str]:
        """The columns that the condition names, in order of appearance."""
        names = (node for node in ast.walk(self._tree) if isinstance(node, ast.Name))
        return list(dict.fromkeys(node.id for node in sorted(names, key=lambda node: node.col_offset)))

    def __call__(self, *values: Any) -> bool:
        """Returns True if a row is kept; a comparison with a missing value is false, except `x == None` and `x is
        None`.

        Raises:
            DataError: Values are compared that have no order, such as a text with a number.
        """
        row = dict(zip(self.columns, values, strict=True))
        try:
            return bool(_value(self._tree, row))
        except TypeError as error:
            kinds = ", ".join(f"{name} is {type(value).__name__}" for name, value in row.items())
            raise DataError(
                f"source {self.path!r}: where: {self.text!r} cannot be asked of a row in which {kinds}: {error}."
            ) from error
        except (ZeroDivisionError, OverflowError):
            return False


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _value(node: ast.expr, row: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return row[node.id]
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(element, row) for element in node.elts]
    if isinstance(node, ast.BoolOp):
        values = (bool(_value(part, row)) for part in node.values)
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.UnaryOp):
        value = _value(node.operand, row)
        if isinstance(node.op, ast.Not):
            return not value
        return None if value is None else -value if isinstance(node.op, ast.USub) else +value
    if isinstance(node, ast.BinOp):
        left, right = (_as_number(_value(side, row)) for side in (node.left, node.right))
        if left is None or right is None:
            return None
        if not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise TypeError("only numbers can be calculated with")  # and a list times a number could fill the memory
        return ARITHMETIC[type(node.op)](left, right)
    assert isinstance(node, ast.Compare)
    return _comparison(node, row)


def _comparison(node: ast.Compare, row: dict[str, Any]) -> bool:
    left = _value(node.left, row)
    for sign, comparator in zip(node.ops, node.comparators, strict=True):
        right = _value(comparator, row)
        if (left is None or right is None) and not isinstance(sign, FOR_MISSING):
            return False
        if not COMPARISONS[type(sign)](*_alike(left, right)):
            return False
        left = right
    return True


def _alike(left: Any, right: Any) -> tuple[Any, Any]:
    """Two values, with the number that a text writes where the other is a number: columns such as 0.50 are texts."""
    if isinstance(right, list):
        return (_as_number(left) if all(isinstance(one, int | float) for one in right) else left), right
    if isinstance(left, str) and isinstance(right, int | float):
        return _as_number(left), right
    if isinstance(right, str) and isinstance(left, int | float):
        return left, _as_number(right)
    return left, right


def _as_number(value: Any) -> Any:
    """The number that a text writes; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return int(value) if value.strip().lstrip("+-").isdecimal() else float(value)
    except ValueError:
        return value
