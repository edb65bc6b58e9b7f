"""Compiles a Jinja text of a recipe, so that what is wrong with it is told before a row is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfpipe.recipe.faults import did_you_mean

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.nodes import Template


def parsed_jinja(jinja: Environment, text: str) -> Template:
    """Parses and compiles a text, and runs nothing of it.

    Args:
        jinja: The environment that it will be rendered in; without an optimizer, which computes constants.
        text: The text.

    Raises:
        ValueError: It is not Jinja, names a filter or a test that there is not, or asks for another file.
    """
    from jinja2 import TemplateSyntaxError, nodes  # a tenth of a second, for recipes with a template

    try:
        tree = jinja.parse(text)
        _require_known(jinja, tree)
        jinja.compile(tree)
    except TemplateSyntaxError as error:
        raise ValueError(f"{error.message} (line {error.lineno} of it).") from error
    except (RecursionError, MemoryError, SyntaxError) as error:  # Python's own limits
        raise ValueError("it is nested too deep.") from error
    others = tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends))
    if other := next(others, None):
        raise ValueError(f"it asks for another file (line {other.lineno} of it), and there is none.")
    return tree


def _require_known(jinja: Environment, tree: Template) -> None:
    """Refuses unknown filters and tests; of a branch Jinja itself tells them only once a row comes there."""
    from jinja2 import nodes

    filters, tests = (list(tree.find_all(kind)) for kind in (nodes.Filter, nodes.Test))
    if any(one.name in ("filter", "test") for one in tests):  # {% if "x" is filter %}
        return
    for found, kind, known in ((filters, "filter", jinja.filters), (tests, "test", jinja.tests)):
        if unknown := next((one for one in found if one.name not in known), None):
            hint = did_you_mean(unknown.name, known)
            raise ValueError(f"there is no {kind} {unknown.name!r} (line {unknown.lineno} of it).{hint}")
