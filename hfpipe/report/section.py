"""A table of a report, in Markdown and in HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Section:
    """A table with a title and notes below it.

    Args:
        title: Its heading.
        rows: Cells of plain text, the head first; a cell that begins with # is a number.
        notes: Paragraphs of plain text.
    """

    title: str
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self, *, heading: bool = True) -> str:
        head, *body = self.rows
        lines = [f"## {self.title}", ""] if heading else []
        lines.append(f"| {' | '.join(cell.lstrip('#') for cell in head)} |")
        lines.append(f"| {' | '.join('---:' if cell.startswith('#') else '---' for cell in head)} |")
        lines += [f"| {' | '.join(cell.lstrip('#').replace('|', '&#124;') for cell in row)} |" for row in body]
        return "\n".join(lines) + "".join(f"\n\n{note}" for note in self.notes)

    def html(self) -> str:
        def cell(tag: str, text: str) -> str:
            kind = ' class="number"' if text.startswith("#") else ""
            return f"<{tag}{kind}>{escape(text.removeprefix('#'))}</{tag}>"

        head, *body = self.rows
        top = "".join(cell("th", text) for text in head)
        rows = "".join(f"<tr>{''.join(cell('td', text) for text in row)}</tr>" for row in body)
        notes = "".join(f'<p class="note">{escape(note)}</p>' for note in self.notes)
        table = f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table></div>'
        return f"<h2>{escape(self.title)}</h2>{table}{notes}"
