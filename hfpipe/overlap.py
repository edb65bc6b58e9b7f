"""Nothing is trained on what a suite holds: looked for in the data itself, before training, and refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset

from hfpipe.core import ranks
from hfpipe.core.errors import DataError
from hfpipe.core.files import write_json
from hfpipe.data.blocks import rows_of
from hfpipe.data.overlap import SuiteIndex
from hfpipe.data.shift import text_of
from hfpipe.data.sources import load_rows
from hfpipe.recipe import Recipe, Source

TABLE_ROWS, STREAM_ROWS = 100_000, 10_000  # looked at: about ten seconds, and what a network brings in as long
NAMED = 3  # rows of a suite that a message names
Rows = Sequence[dict[str, Any]]


def require_no_overlap(recipe: Recipe, suites: Mapping[str, Rows], folder: Path | None = None) -> list[dict[str, Any]]:
    """Looks for the rows of every suite in the data of every stage.

    Args:
        recipe: The recipe; with `overlap: report` nothing is refused.
        suites: The rows of every suite.
        folder: The run folder, where overlap.json keeps what was found; None for nowhere.

    Returns:
        A line for each source and suite, see `_pairs`.

    Raises:
        DataError: A suite's row is trained on.
    """
    pairs: list[dict[str, Any]] = []
    if ranks.is_main() and suites:
        pairs = list(_pairs(recipe, suites))
        if folder is not None:
            write_json(folder / "overlap.json", {"pairs": pairs})
    pairs = ranks.from_main(pairs)
    found = [line for line, pair in zip(overlap_lines(pairs), pairs, strict=True) if pair["which"]]
    if found and recipe.overlap == "refuse":
        more = f" So do rows of {len(found) - 1} more pairs of suite and source." if len(found) > 1 else ""
        raise DataError(
            f"{found[0]}.{more} A score on rows that were trained on says nothing. Leave them out of the source "
            "(`decontaminate: true`, `where`, another split) or out of the suite, or write `overlap: report` to go on "
            "and have it in the report."
        )
    return pairs


def overlap_lines(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was found, a sentence for each pair."""
    lines = []
    for pair in pairs:
        source = f"{pair['looked_at']:,} rows of stages.{pair['stage']} ({pair['source']})"
        if pair["which"]:
            text = f"suite {pair['suite']}: {pair['held']:,} of {pair['rows']:,} rows stand in {source}"
            lines.append(
                f"{text}, as a whole or by half or more of their 13-word sequences: {'; '.join(pair['which'])}"
            )
        else:
            lines.append(f"suite {pair['suite']}: no row stands in {source}")
    return lines


def _pairs(recipe: Recipe, suites: Mapping[str, Rows]) -> Iterable[dict[str, Any]]:
    """For each source and suite: `rows` of the suite, `looked_at`, and how many are `exact`, `partly`, `touched`."""
    index = SuiteIndex([row for rows in suites.values() for row in rows])
    for stage in recipe.stages:
        for source in stage.data:
            if source.decontaminate:  # what overlaps is removed before the stage trains, and counted there
                continue
            found = index.look_in(_rows(source, recipe.seed))
            start = 0
            for name, rows in suites.items():
                here = range(start, start + len(rows))
                start += len(rows)
                held = [place for place in sorted({*found.exact, *found.partly}) if place in here]
                yield {
                    "stage": stage.name,
                    "source": source.title,
                    "suite": name,
                    "rows": len(rows),
                    "looked_at": found.looked_at,
                    "held": len(held),
                    **{key: sum(p in here for p in getattr(found, key)) for key in ("exact", "partly", "touched")},
                    "which": [_name(rows[place - here.start], place - here.start) for place in held[:NAMED]],
                }


def _rows(source: Source, seed: int) -> Iterable[dict[str, Any]]:
    """Rows of a source: of a large table at even distances, of a stream the first."""
    rows = load_rows(source, seed=seed)
    if not isinstance(rows, Dataset):
        return islice(rows_of(rows, source), STREAM_ROWS)
    if len(rows) > TABLE_ROWS:
        rows = rows.select([place * len(rows) // TABLE_ROWS for place in range(TABLE_ROWS)])
    return rows_of(rows, source)


def _name(row: Mapping[str, Any], place: int) -> str:
    """A row's id, or its place, and its first words."""
    words = " ".join(text_of(dict(row)).split()[:8])
    return f"{row.get('id', f'row {place}')} '{words[:60]}...'"
