"""Reads report.md and report.html as a browser and a Markdown renderer do, and compares them with the scorecard."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from markdown_it import MarkdownIt

RELATIVE = ("bits_per_byte", "perplexity")
SHARES = ("accuracy", "exact_match", "f1")
NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?"


class _Reader(HTMLParser):
    """Collects the texts of headings, cells and list items, and every element that is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.items: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._heading, self._open = "", ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag in ("h1", "h2", "h3", "td", "th", "li", "p"):
            self._open = ""
        elif tag == "small":
            self._open += " "
        elif tag == "tr":
            self.tables.setdefault(self._heading, []).append([])

    def handle_data(self, data: str) -> None:
        self._open += data
        self.text += data

    def handle_endtag(self, tag: str) -> None:
        shown = " ".join(self._open.split())
        if tag == "h2":
            self._heading = shown
        elif tag in ("td", "th"):
            self.tables[self._heading][-1].append(shown)
        elif tag in ("li", "p"):
            self.items.append(shown)


def read(path: Path) -> _Reader:
    """A page as it is shown: Markdown by CommonMark with GitHub's tables."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = (
            MarkdownIt("commonmark")
            .enable(["table", "strikethrough"])
            .render(re.sub(r"^---\n.*?\n---\n", "", text, flags=re.DOTALL))
        )
    text = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", text, flags=re.DOTALL)
    reader = _Reader()
    reader.feed(text)
    return reader


def require_scores_of(run: Path) -> None:
    """Compares every number of the scores, and of every change that is told, with scorecard.json."""
    rows = json.loads((run / "scorecard.json").read_text())
    by_place = {(row["stage"], row["suite"], row["metric"]): row for row in rows}
    for name in ("report.html", "report.md"):
        page = read(run / name)
        head, *body = page.tables["Scores"]
        found = set()
        for cells in body:
            suite, metric = cells[0].split()[:2]
            for stage, cell in zip(head[1:], cells[1:], strict=True):
                row = by_place.get((stage, suite, metric))
                assert (row is None) == (cell == ""), (stage, suite, metric, cell)
                if row is None:
                    continue
                found.add((stage, suite, metric))
                assert f"n = {row['n']:,}" in cells[0]
                _same(
                    _numbers(cell), [row[key] for key in ("value", "low", "high") if row.get(key) is not None], metric
                )
        assert found == set(by_place), name
        lines = [*page.items, *(f"{row[0]} {row[2]}: {row[3]}" for row in page.tables.get("What each stage did", []))]
        told = [change for change in _changes(lines) if change[:2] in {place[1:] for place in by_place}]
        assert told or not any(row["stage"] != "base" for row in rows), name
        for suite, metric, before, after, size in told:
            of_both = [row for row in rows if (row["suite"], row["metric"]) == (suite, metric)]
            values = [row["value"] for row in of_both]
            values += [value for row in of_both for value in (row.get("baselines") or {}).values()]
            pairs = [
                (one, two) for one in values for two in values if _is(before, one, metric) and _is(after, two, metric)
            ]
            assert pairs, (name, suite, metric, before, after, values)
            if metric in SHARES:
                assert any(_is(size, abs(two - one), metric) for one, two in pairs), (name, suite, metric, size)
            elif metric in RELATIVE:
                assert any(_is(size, 100 * abs(two / one - 1), metric) for one, two in pairs), (
                    name,
                    suite,
                    metric,
                    size,
                )


def _changes(lines: list[str]) -> Iterator[tuple[str, str, str, str, str]]:
    """Suite, metric, the two values, and the size, of each change in a sentence; 0 for what is unchanged."""
    for line in lines:
        if match := re.search(rf"(\S+) (\S+) ({NUMBER})(?: %)? → ({NUMBER})(?: %)?: (?:({NUMBER})|unchanged)", line):
            yield match[1], match[2], match[3], match[4], match[5] or "0"


def _numbers(text: str) -> list[str]:
    return re.findall(NUMBER, text)


def _same(shown: list[str], values: list[float], metric: str) -> None:
    assert len(shown) == len(values), (shown, values)
    for text, value in zip(shown, values, strict=True):
        assert _is(text, value, metric), (text, value, metric)


def _is(shown: str, value: float, metric: str) -> bool:
    """Returns True if a printed number is a value, rounded to the digits that are printed."""
    value *= 100 if metric in SHARES else 1
    number = float(shown.replace(",", ""))
    digits = len(shown.partition("e")[0].partition(".")[2])
    return abs(number - value) <= 0.5000001 * 10**-digits if "e" not in shown else abs(number / value - 1) < 1e-3
