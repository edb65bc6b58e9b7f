"""Layout of a report: the HTML page with its style, and tables in Markdown and HTML."""

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


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --soft: #8881; --good: #1a7f37; --bad: #c62f2f; }}
@media (prefers-color-scheme: dark) {{ :root {{ --good: #4fc26b; --bad: #ff7b72; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }}
body {{ overflow-wrap: anywhere; }} .wide {{ overflow-wrap: normal; }}
h1 {{ margin: .5rem 0 0; font-size: clamp(1.4rem, 5vw, 2rem); line-height: 1.2; }}
h2 {{ margin: 2rem 0 .5rem; font-size: 1.2rem; }}
.verdict {{ font-size: 1.15rem; padding: .8rem 1rem; background: var(--soft); border-left: 4px solid #3b76d6; }}
.verdict.over {{ border-color: var(--bad); }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }}
th, td {{ padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }}
td:last-child:not(.number):not(:first-child) {{ min-width: 12rem; }}
td.number, th.number {{ text-align: right; }} td.number {{ white-space: nowrap; }}
th {{ vertical-align: bottom; max-width: 9rem; overflow-wrap: break-word; }}
.interval {{ display: block; opacity: .7; font-size: .85em; }}
.wide th:first-child, .wide td:first-child {{ position: sticky; left: 0; background: Canvas; }}
@media (max-width: 40rem) {{
  table {{ font-size: .72rem; }} th, td {{ padding: .3rem .25rem; }} .verdict {{ font-size: 1rem; }}
}}
.better {{ color: var(--good); }} .worse {{ color: var(--bad); }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }}
svg {{ width: 100%; height: auto; max-width: 30rem; font-family: inherit; }}
pre {{ overflow-x: auto; background: var(--soft); padding: .8rem; font-size: .85rem; }}
.note {{ opacity: .75; font-size: .9rem; }}
.sample {{ border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; margin: .6rem 0; }}
.sample p {{ margin: 0 0 .4rem; }} .sample b {{ font-size: .85rem; }}
.sides {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 14rem), 1fr)); gap: .6rem; }}
.text {{ white-space: pre-wrap; background: var(--soft); padding: .4rem .6rem; border-radius: 4px; font-size: .95rem; }}
.asked {{ margin-bottom: .6rem; }}
@media print {{
  @page {{ size: landscape; margin: 12mm; }}
  html, body {{ font-size: 11px; }} body {{ max-width: none; padding: 0; }} pre {{ white-space: pre-wrap; }}
  .wide {{ overflow: visible; }} th, td {{ padding: .2rem .4rem; }} td.number {{ white-space: normal; }}
  h2, tr, svg, .sample {{ break-inside: avoid; }} h2 {{ break-after: avoid; }}
}}
</style>
</head>
<body>
{body}
</body>
</html>
"""
