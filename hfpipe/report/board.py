"""`hfpipe board`: the runs of a folder on read-only pages on this machine, which load themselves anew.

Every name and text of a run is text on the page (jinja2 escapes it), nothing is loaded from elsewhere, no script runs
(`POLICY`), and only paths of runs that were found are answered, so that no address leads out of the folder. Whoever
asks by another name than this machine's is refused: a page of another site could do that (DNS rebinding).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from hfpipe.core.errors import MachineError, RecipeError, UserError
from hfpipe.core.files import each_in_jsonl, read_json
from hfpipe.recipe import Recipe, load_recipe
from hfpipe.report.comparison import compare_runs
from hfpipe.report.content import about, how_trained, run_page
from hfpipe.report.layout import Cell, Number, Page, Section, Table, Told, render
from hfpipe.report.plots import loss_curve, losses_of
from hfpipe.scores.wording import number

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")
REFRESH_SECONDS = 10
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
WATCHED = ("recipe.yaml", "scorecard.json", "stages/*/*.json", "stages/*/*.jsonl")  # what pages are made of
HEAD = ["stage", "kind", "state", Number("step"), Number("loss"), Number("s/step"), Number("tokens/s")]


@dataclass(frozen=True)
class Shown:
    """A run on the first page.

    Args:
        name: Its place below the folder.
        link: The address of its page.
        about: The base and the stages, in a line.
        table: How far its stages are.
        verdict: What it gained and forgot so far.
        fault: Why it cannot be read; empty where it can.
    """

    name: str
    link: str
    about: str = ""
    table: Table | None = None
    verdict: Sequence[Told] = ()
    fault: str = ""


def serve_board(root: Path, port: int) -> None:
    """Serves the runs below a folder until it is stopped.

    Args:
        root: A folder of runs, or one run.
        port: The port on loopback; 0 for any that is free.

    Raises:
        RecipeError: There is no such folder.
        MachineError: The port is taken.
    """
    if not root.is_dir():
        raise RecipeError(
            f"{root} is no folder. `hfpipe board RUNS` takes a folder of runs, or one; `runs` when absent."
        )
    try:
        server = Board(root, port)
    except OSError as error:
        raise MachineError(f"port {port} of {HOST} is taken: {error.strerror}. Take another: --port N.") from error
    number = len(server.runs())
    told = f"{number} run{'' if number == 1 else 's'} of {root}"
    print(f"{told} on http://{HOST}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
    with server:
        server.serve_forever()


class Board(ThreadingHTTPServer):
    """The server; it reads files and writes none.

    Args:
        root: A folder of runs, or one run.
        port: The port on loopback.
    """

    daemon_threads = True

    def __init__(self, root: Path, port: int) -> None:
        self.root = root
        self._drawing = threading.Lock()  # matplotlib's settings are those of the process
        self._known: dict[str, tuple[Any, Any]] = {}
        super().__init__((HOST, port), _Handler)

    def runs(self) -> dict[str, Path]:
        """The run folders by their place below the root, the newest first; the root itself by its name."""
        files = [file for depth in ("", "*/", "*/*/") for file in self.root.glob(f"{depth}recipe.yaml")]
        folders = sorted((file.parent for file in files), key=_touched, reverse=True)
        names = [
            folder.relative_to(self.root).as_posix() for folder in folders
        ]  # a browser would drop the `.` of a path
        return {
            self.root.resolve().name if name == "." else name: one for name, one in zip(names, folders, strict=True)
        }

    def page(self, path: str) -> str | None:
        """The page at a path; None where there is none."""
        runs = self.runs()
        if path == "/":
            shown = [
                self._made(f"/{name}", folder, lambda n=name, f=folder: _shown(n, f)) for name, folder in runs.items()
            ]
            signatures = [(name, _signature(folder)) for name, folder in runs.items()]
            both = self._made("comparison", self.root, lambda: compare_runs(runs), signatures)
            title = self.root.resolve().name
            return render("board.html", root=title, runs=shown, comparison=both, refresh=REFRESH_SECONDS)
        found = next((folder for name, folder in runs.items() if path == f"/run/{quote(name, safe='')}"), None)
        return None if found is None else self._made(path, found, lambda: _run_html(found))

    def _made(self, key: str, folder: Path, make: Any, signature: Any = None) -> Any:
        """Returns what was made of a run before, or makes it anew where its files have changed."""
        signature = _signature(folder) if signature is None else signature
        with self._drawing:
            if self._known.get(key, (None,))[0] != signature:
                self._known[key] = signature, make()
            return self._known[key][1]


class _Handler(BaseHTTPRequestHandler):
    server: Board
    server_version, sys_version = "hfpipe", ""
    timeout = 30

    def do_GET(self) -> None:
        if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in NAMES:
            return self._answer(HTTPStatus.FORBIDDEN, "this board answers on this machine only")
        page = self.server.page(urlsplit(self.path).path)
        if page is None:
            return self._answer(HTTPStatus.NOT_FOUND, "there is no such page")
        return self._answer(HTTPStatus.OK, page, "text/html")

    do_HEAD = do_GET

    def _answer(self, status: HTTPStatus, text: str, kind: str = "text/plain") -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a page that loads itself anew would fill the terminal."""


def _touched(folder: Path) -> float:
    return max(time for time, _ in _signature(folder))


def _signature(folder: Path) -> list[tuple[float, int]]:
    """Times and sizes of the files that a page is made of."""
    stats = [file.stat() for pattern in WATCHED for file in sorted(folder.glob(pattern)) if file.is_file()]
    return [(one.st_mtime, one.st_size) for one in stats] or [(0.0, 0)]


def _shown(name: str, folder: Path) -> Shown:
    link = f"/run/{quote(name, safe='')}"
    try:
        recipe = load_recipe(folder / "recipe.yaml")
        scored = (folder / "scorecard.json").exists()
        verdict = run_page(folder).verdict if scored else ()
        return Shown(name, link, about(recipe), _progress(folder, recipe), verdict)
    except (UserError, ValueError, KeyError, TypeError, OSError) as error:
        return Shown(name, link, fault=str(error))


def _run_html(folder: Path) -> str:
    try:
        recipe = load_recipe(folder / "recipe.yaml")
        page = Page(recipe.name, about(recipe), [Told("", ["Nothing is scored after a stage yet."])], [])
        if (folder / "scorecard.json").exists():
            page = run_page(folder)
        done = all((folder / "stages" / stage.name / "done.json").exists() for stage in recipe.stages)
        if not done or not page.sections:
            live = Section("Now", _progress(folder, recipe), plots=_curves(folder, recipe))
            page = Page(page.title, page.about, page.verdict, [live, *page.sections])
    except (UserError, ValueError, KeyError, TypeError, OSError) as error:
        page = Page(folder.name, "", [Told("", [f"This run cannot be read: {error}"])], [])
    return render("report.html", page=page, refresh=REFRESH_SECONDS)


def _progress(folder: Path, recipe: Recipe) -> Table:
    """The place that each stage has reached."""
    rows: list[list[str | Cell]] = []
    for stage in recipe.stages:
        place = folder / "stages" / stage.name
        facts, last = read_json(place / "done.json"), _last_row(place)
        state = "done" if facts else "training" if last else "waiting"
        step, steps = facts.get("steps", last.get("step")), last.get("max_steps")
        rows.append(
            [
                stage.name,
                f"{stage.kind}, {how_trained(stage)}",
                state,
                "" if step is None else f"{step:,}" if facts or not steps else f"{step:,} of {steps:,}",
                number(last["loss"]) if last else "",
                f"{last['seconds_per_step']:.2f}" if "seconds_per_step" in last else "",
                f"{last['tokens_per_second']:,}" if "tokens_per_second" in last else "",
            ]
        )
    return Table(HEAD, rows)


def _last_row(place: Path) -> dict[str, Any]:
    """The last row of a stage's log that has a loss; empty where there is none."""
    last: dict[str, Any] = {}
    if (place / "log.jsonl").exists():
        for row in each_in_jsonl(place / "log.jsonl"):
            last = row if "loss" in row else last
    return last


def _curves(folder: Path, recipe: Recipe) -> list[str]:
    logs = {stage.name: losses_of(folder / "stages" / stage.name) for stage in recipe.stages}
    return [loss_curve(name, steps, losses, "") for name, (steps, losses) in logs.items() if steps]
