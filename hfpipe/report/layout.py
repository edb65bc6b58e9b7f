"""The parts of a page as plain data, and the templates that make HTML or Markdown of them.

Whatever the data holds is text in the result: both kinds of template escape every value. Prose (a verdict, a note) is
ours; a part of it in backticks is code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from hfpipe.core.files import write_text
from hfpipe.core.secrets import without_secrets

SHOWN = 500  # characters of a sample's text


class Number(str):
    """The title of a column of numbers, which stand to the right."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table that is more than a text.

    Args:
        text: What stands in it.
        detail: A smaller line below: an interval, a reason.
        mark: `better` or `worse` beyond the noise, or empty.
    """

    text: str
    detail: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells below the titles of their columns; the first cell of a row names it.

    Args:
        head: The titles, a `Number` for a column of numbers.
        rows: A cell for each column.
        matrix: Whether rows and columns are of one kind; any other table becomes a list on a phone.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    matrix: bool = False

    def without_empty_columns(self) -> Table:
        """The table without the columns that no row has anything in."""
        columns = zip(*self.rows, strict=True)
        kept = [n for n, column in enumerate(columns) if any(getattr(cell, "text", cell) for cell in column)]
        return Table([self.head[n] for n in kept], [[row[n] for n in kept] for row in self.rows], self.matrix)


@dataclass(frozen=True)
class SampleAnswer:
    """One row of a suite, as two models answered it.

    Args:
        suite: The suite.
        row: Its place in it, or its id.
        sort: `better`, `worse` or `the same`.
        metric: The metric that says so.
        values: The row's own score before and after.
        texts: What was asked (where that was kept), the right answer, and both models' answers, by title.
    """

    suite: str
    row: str
    sort: str
    metric: str
    values: tuple[float, float]
    texts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """A part of a page, each with a title and what there is of the rest.

    Args:
        title: Its heading.
        table: A table; it loses the columns that no row has anything in.
        notes: Paragraphs of prose below it.
        plots: SVG elements; Markdown goes without them.
        samples: Rows of a suite.
        code: A text in another language, and its name.
        links: Paths of other pages.
    """

    title: str
    table: Table | None = None
    notes: Sequence[str] = ()
    plots: Sequence[str] = ()
    samples: Sequence[SampleAnswer] = ()
    code: tuple[str, str] | None = None
    links: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.table is not None and self.table.rows and not self.table.matrix:
            object.__setattr__(self, "table", self.table.without_empty_columns())


@dataclass(frozen=True)
class Told:
    """One finding of the verdict.

    Args:
        title: What kind of finding it is; empty for a sentence that stands alone.
        items: Sentences.
        mark: `better` or `worse`, or empty.
    """

    title: str
    items: Sequence[str]
    mark: str = ""


@dataclass(frozen=True)
class Page:
    """A page: its title, what it is about, the verdict, then the sections from the most to the least important."""

    title: str
    about: str
    verdict: Sequence[Told]
    sections: Sequence[Section]


def write_page(page: Page, folder: Path) -> list[Path]:
    """Writes a page as report.md and report.html and returns their paths."""
    written = [folder / "report.md", folder / "report.html"]
    for path in written:
        write_text(path, render(path.name, page=page))
    return written


def render(template: str, **values: Any) -> str:
    """A template with its values filled in: `report.html`, `report.md` or `card.md`; without secrets."""
    kind = HTML if template.endswith(".html") else MARKDOWN
    return without_secrets(kind.get_template(template).render(values)).strip() + "\n"


def _plain(value: Any) -> str:
    """A value as a text that can be written as UTF-8."""
    return str(value).encode("utf-8", "replace").decode()


def _html(value: Any) -> Markup:
    return escape(value) if hasattr(value, "__html__") else escape(_plain(value))


def _html_prose(text: str) -> Markup:
    parts = re.split(r"`([^`]+)`", text)
    return Markup("").join(Markup("<code>{}</code>").format(p) if n % 2 else _html(p) for n, p in enumerate(parts))


# What Markdown would read as more than text: marks of emphasis, links, code, HTML, tables, formulas; entities; and what
# begins a heading, a quotation, a list or a rule at the start of a line. `a_b` is no emphasis and stays as it is.
_MARKS = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
_STARTS = re.compile(r"(?:#{1,6}|[+-]|\d+[.)])(?=\s|$)|[=-]+$|>")
_URL = re.compile(r"(\b(?:https?|ftp)://\S+|\bwww\.\S+|\b[\w.+-]+@[\w-]+\.\S+)", re.IGNORECASE)


def _inline(text: Any, first: bool = True) -> str:
    """A text as Markdown that shows as it is, in one line; a bare URL becomes code, or it would be made a link."""
    text = re.sub(r"\s+", " ", _plain(text))
    parts = [markdown_code(part) if n % 2 else _escaped(part) for n, part in enumerate(_URL.split(text))]
    start = _STARTS.match(text) if first else None
    if start:  # an escaped digit would show its backslash
        place = start.end() - 1 if text[0].isdigit() else 0
        parts[0] = f"{parts[0][:place]}\\{parts[0][place:]}"
    return "".join(parts)


def _escaped(text: str) -> str:
    return _MARKS.sub(r"\\\g<0>", text).replace("<", "&lt;")


def markdown_text(value: Any) -> Markup:
    """A value as Markdown, see `_inline`."""
    return Markup(value) if hasattr(value, "__html__") else Markup(_inline(str(value).strip()))


def markdown_code(value: Any) -> Markup:
    """A value as code within a line, whose marks are longer than any in it."""
    text = " ".join(_plain(value).split()).replace("|", "\\|")
    marks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if "`" in text else ""
    return Markup(f"{marks}{space}{text}{space}{marks}")


def _markdown_prose(text: str) -> Markup:
    parts = re.split(r"`([^`]+)`", text.strip())
    return Markup("".join(markdown_code(p) if n % 2 else _inline(p, n == 0) for n, p in enumerate(parts)))


def _markdown_block(text: Any, language: str) -> Markup:
    """A text as a block of code, whose fence is longer than any in it."""
    body = _plain(text).rstrip()
    fence = "`" * max(3, max(map(len, re.findall("`+", body)), default=0) + 1)
    return Markup(f"{fence}{language}\n{body}\n{fence}")


def _dialogue(texts: Sequence[tuple[str, str]]) -> Markup:
    return _markdown_block("\n".join(f"{title}: {shortened(text)}" for title, text in texts), "text")


def shortened(text: str) -> str:
    """A text as it is shown: its beginning, and how much there is of it."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} … ({len(text):,} characters)"


def _environment(**options: Any) -> Environment:
    folder = FileSystemLoader(Path(__file__).parent / "templates")
    made = Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options
    )
    made.tests["number_column"] = lambda title: isinstance(title, Number)
    return made


HTML = _environment(finalize=_html)
# `svg` is for what plots.py makes, which escapes what is written in a plot.
HTML.filters.update(prose=_html_prose, shortened=shortened, svg=Markup)
MARKDOWN = _environment(finalize=markdown_text)
MARKDOWN.filters.update(prose=_markdown_prose, code=markdown_code, block=_markdown_block, dialogue=_dialogue)
