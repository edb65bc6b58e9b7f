"""Views of a run: they read what the run folder's JSON files hold and compute nothing that is not in them."""

from __future__ import annotations

from pathlib import Path


def write_reports(folder: Path) -> list[Path]:
    """Writes report.md and report.html of a run folder, and the README.md beside each model in it.

    Returns:
        The paths of the two reports.

    Raises:
        FileNotFoundError: The folder holds no scorecard.
    """
    from hfpipe.report.card import write_cards
    from hfpipe.report.content import run_page
    from hfpipe.report.layout import write_page

    write_cards(folder)
    return write_page(run_page(folder), folder)
