"""Progress of a stream by lane, and the facts that a report has of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hfpipe.data.cleaning.minhash import counts_of
from hfpipe.data.cleaning.text_rules import Tally, merged
from hfpipe.recipe import Source

COUNTED = ("rows", "tokens", "documents", "cut", "continued_rows")


@dataclass
class Position:
    """The place that a lane has reached.

    Args:
        served: Tokens of each source that were given so far, documents that began, and those that ended.
        start: The lane's state before its window; None at the beginning.
        given: Rows given out of that window.
        counts: What was given so far, see `facts_of`.
        sources: What each source had given by the end of that window, see `Window`.
        ended: Whether the lane has given its last row.
    """

    served: list[list[int]]
    start: dict[str, Any] | None = None
    given: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    sources: list[dict[str, Any]] = field(default_factory=list)
    ended: bool = False


def facts_of(
    positions: Sequence[Position],
    max_length: int,
    origins: Sequence[Source],
    replayed: Sequence[bool],
    table_rows: Sequence[int | None],
    removed: Sequence[list[np.ndarray] | None],
) -> dict[str, Any]:
    """Counts the rows already yielded; prefetched rows are not counted.

    Args:
        positions: Of every lane.
        max_length: L, tokens of a row.
        origins: What each source was opened from.
        replayed: Of each source, whether it is another stage's.
        table_rows: Rows of each source; None for a stream.
        removed: Of each source, why rows are removed of each share.

    Returns:
        `rows`, `tokens` without padding, `documents` that began, those that were `cut` to go on in another row,
        `continued_rows` that begin in the middle of one, `cut_share`, `padding_share`, `lanes`; and of each of the
        `sources`: `tokens`, `token_share`, `documents`, `epochs` (whole documents by those of an epoch, which of a
        stream are not known before it was read to its end: 0 until then), `replayed`; of what was read for that, a
        window of each lane more, the different `rows`, the `dirty` and `mended` ones among them by reason (see
        `text_rules.py`), those `removed` by cleaning, and the ids of some of each.
    """
    total = {name: sum(position.counts[name] for position in positions) for name in COUNTED}
    begun = [position for position in positions if position.sources]
    sources = {}
    for number, origin in enumerate(origins):
        tokens, documents, whole = (sum(position.served[number][kind] for position in begun) for kind in range(3))
        lanes = [position.sources[number] for position in begun]
        of_lanes = [facts["documents"] for facts in lanes]
        known = len(lanes) == len(positions) and None not in of_lanes
        of_epoch = sum(of_lanes) if known else table_rows[number]
        sources[f"{number}: {origin.title}"] = facts = {
            "epochs": round(whole / of_epoch, 4) if of_epoch else 0.0,
            "token_share": round(tokens / max(total["tokens"], 1), 4),
            "tokens": tokens,
            "documents": documents,
            "rows": sum(facts["rows"] for facts in lanes),
            "replayed": replayed[number],
        }
        for kind in ("untrained", "long"):  # of examples
            if lanes and kind in lanes[0]:
                facts[kind] = sum(lane[kind] for lane in lanes)
        for kind in ("dirty", "mended", "removed"):
            found = merged([Tally(facts[kind], facts[f"{kind}_ids"]) for facts in lanes])
            facts |= {kind: found.counts, f"{kind}_ids": found.ids}
        if (gone := removed[number]) is not None:  # of all rows, and not of those that were met
            facts["removed"] = counts_of(np.concatenate(gone))
    return {
        **total,
        "cut_share": round(total["cut"] / max(total["documents"], 1), 4),
        "padding_share": round(1 - total["tokens"] / (total["rows"] * max_length), 4) if total["rows"] else 0.0,
        "lanes": len(positions),
        "sources": sources,
    }
