"""Views of a run: they read what the run folder's JSON files hold and compute nothing that is not in them."""

from __future__ import annotations

from pathlib import Path


def write_reports(folder: Path) -> list[Path]:
    """Writes report.md and report.html of a run folder and returns their paths.

    Raises:
        FileNotFoundError: The folder holds no scorecard.
    """
    from hfpipe.report.html import write_html
    from hfpipe.report.markdown import write_report

    return [write_report(folder), write_html(folder)]
