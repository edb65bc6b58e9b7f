"""A chat template of a recipe: its text, the name of one that comes with TRL, or the path of a file that holds it.

The text is put in place of a name or a path when the recipe is read, so the run folder's recipe.yaml has it and a file
that changes is noticed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from hfpipe.recipe.faults import did_you_mean, listed
from hfpipe.recipe.jinja_text import parsed_jinja
from hfpipe.recipe.source_reader import package

MARKS = ("{{", "{%")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LARGEST = 200_000  # bytes of a file


@cache
def named_templates() -> dict[str, Path | None]:
    """Returns the files of the templates that are known by name; None for ChatML, which is written here."""
    folder = package("trl")
    files = sorted(folder.glob("chat_templates/*.jinja")) if folder else []
    return {"chatml": None, **{file.stem: file for file in files}}


def template_text(given: str) -> str:
    """Returns the text of a chat template.

    Raises:
        ValueError: It is none of the three, or not Jinja; the message says what is allowed.
    """
    text = given if any(mark in given for mark in MARKS) else _text_of(given)
    if not any(mark in text for mark in MARKS):
        raise ValueError(f"{given!r} holds no chat template: none of its text stands in {{{{ }}}} or {{% %}}.")
    _require_jinja(text)
    return text


def _text_of(name: str) -> str:
    known = named_templates()
    if name in known:
        file = known[name]
        return CHATML if file is None else file.read_text(encoding="utf-8")
    try:
        path = Path(name).expanduser()
        path = path / "chat_template.jinja" if path.is_dir() else path
        if path.is_file() and path.stat().st_size <= LARGEST:
            return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"found {name[:60]!r}, which cannot be read as a chat template: {error}.") from error
    raise ValueError(
        f"found {name[:60]!r}; allowed are the text of a Jinja template (with {{{{ }}}} or {{% %}}), the path of a "
        f"file that holds one, or a name: {listed(known)}.{did_you_mean(name, known)}"
    )


def _require_jinja(text: str) -> None:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block in which transformers marks what the assistant says."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own class attribute

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    try:
        parsed_jinja(ImmutableSandboxedEnvironment(extensions=extensions, optimized=False), text)
    except ValueError as error:
        raise ValueError(f"this is no Jinja template: {error}") from error
