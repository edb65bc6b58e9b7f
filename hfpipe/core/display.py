"""The voice of a command that works for a while: a live display on a terminal, plain lines elsewhere, or JSON.

A command starts it (`start`) in one of four modes; not started, as in Python and notebooks, it prints plain lines. On a
terminal the last lines of the screen show the work in hand, redrawn four times a second by a thread of rich's, and what
is said scrolls above them. The work itself only sets numbers, so a step costs nothing that can be measured.
`docs/display.md` lists the objects of `--json`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TextIO

from hfpipe.core.files import gibibytes

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

CALM_SECONDS = 1.0  # work that is done sooner is not shown
EVERY_SECONDS = 10.0  # between two `progress` objects of one piece of work
SPARKS = "▁▂▃▄▅▆▇█"
MIB = 2**20


@dataclass
class Work:
    """A piece of work that may take seconds or hours.

    Args:
        label: Its name, such as `scoring general`.
        begun: The clock at its beginning.
        done: Units done so far.
        total: All units; None where nobody knows.
        unit: `B` for bytes; empty for what its label names.
    """

    label: str
    unit: str = ""
    begun: float = field(default_factory=time.monotonic)
    done: int = 0
    total: int | None = None
    told: float = 0.0


@dataclass
class Training:
    """A stage while it trains.

    Args:
        title: The stage's name and kind.
        step: Steps done.
        max_steps: All its steps.
        row: The last row of its log.
        losses: Every logged loss.
        left: Seconds that are left, as of the last log.
        memory: The peak so far, in bytes.
        note: A line of its own, such as that it is stopping.
    """

    title: str
    step: int
    max_steps: int
    row: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    left: float | None = None
    memory: int = 0
    note: str = ""
    begun: float = field(default_factory=time.monotonic)


class _State:
    """All that is open: written by the main thread, read by the one that draws."""

    def __init__(self) -> None:
        self.mode = "plain"
        self.screen: _Screen | None = None
        self.out: TextIO | None = None  # of JSON; other output goes to standard error then
        self.works: list[Work] = []
        self.training: Training | None = None
        self.scores: list[str] = []


_state = _State()


def start(mode: str | None) -> None:
    """Starts the display of a command; `close` puts the terminal in order when it ends.

    Args:
        mode: None for plain lines. `auto` is live on a terminal, `verbose` too, beside every line that other output
            has; `quiet` leaves warnings and results; `json` writes one object a line.
    """
    _state.mode = mode or "plain"
    if mode == "json":
        _state.out, sys.stdout = sys.stdout, sys.stderr  # a library's print would be no JSON
    elif mode in ("auto", "verbose") and os.environ.get("RANK", "0") == "0" and _is_terminal(sys.stdout):
        _state.screen = _Screen()


def clear() -> None:
    """Takes the live lines away; what is printed from here on is the last."""
    if _state.screen is not None:
        _state.screen.stop()
        _state.screen = None


def close() -> None:
    """Ends what `start` began."""
    clear()
    if _state.out is not None:
        sys.stdout = _state.out
    _state.__init__()  # type: ignore[misc]


def leave() -> None:
    """Ends the line below which a process that ends at once says why."""
    if _state.screen is not None:
        with suppress(OSError):  # there may be no terminal any more
            os.write(1, b"\n")


def is_verbose() -> bool:
    """Returns True if libraries may speak too."""
    return _state.mode == "verbose"


def say(text: str = "", kind: str = "line") -> None:
    """Says a line.

    Args:
        text: The line.
        kind: `line` for what happens; `warning` or `result`, which `--quiet` lets through; `progress` for what the live
            lines and the objects of `count` and `logged` tell already; `sample` for what has an object of its own.
    """
    if _state.mode == "json":
        if text and kind not in ("progress", "sample"):
            event(kind, text=text.strip())
    elif _state.screen is not None:
        if kind != "progress" or _state.mode == "verbose":
            _state.screen.line(text, kind)
    elif _state.mode != "quiet" or kind in ("warning", "result"):
        print(text, flush=True)


def event(name: str, /, **fields: Any) -> None:
    """Writes an object of `--json`; nothing in any other mode."""
    if _state.out is not None:
        row = {"event": name, "time": round(time.time(), 3), **fields}
        _state.out.write(json.dumps(row, ensure_ascii=False, allow_nan=True) + "\n")  # at once: a thread may tell too
        _state.out.flush()


def scored(text: str, row: dict[str, Any]) -> None:
    """Tells a score: a line; on a terminal a part of the live lines, until `table` shows all of a stage.

    Args:
        text: The line.
        row: The score, for JSON.
    """
    event("score", **row)
    say(text, "progress")
    if _state.screen is not None:
        _state.scores.append(text.strip())


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[str]) -> None:
    """Shows a small table on a terminal; nothing elsewhere, where lines have said it.

    Args:
        title: Its title.
        head: The names of its columns.
        rows: Its rows.
        marks: For each row `better`, `worse` or nothing, which is its colour.
    """
    _state.scores = []
    if _state.screen is not None and rows:
        _state.screen.table(title, head, rows, marks)


@contextmanager
def doing(label: str) -> Iterator[None]:
    """Shows a piece of work until the block ends; `count` says how far it is."""
    work = begin(label)
    try:
        yield
    finally:
        end(work)


def begin(label: str, unit: str = "") -> Work:
    """Shows a piece of work until `end`; see `Work`."""
    work = Work(label, unit)
    _state.works.append(work)
    return work


def end(work: Work) -> None:
    """Shows a piece of work no longer; nothing if it is not shown."""
    if work in _state.works:
        _state.works.remove(work)


def count(done: int, total: int | None = None, work: Work | None = None) -> None:
    """Says how far a piece of work is; cheap enough to be called for every batch.

    Args:
        done: Units done.
        total: All units; None where nobody knows.
        work: Which; the innermost one when None.
    """
    if work is None and not _state.works:
        return
    work = work or _state.works[-1]
    work.done, work.total = done, total
    if _state.out is not None and (now := time.monotonic()) - max(work.told, work.begun) > EVERY_SECONDS:
        work.told = now
        event("progress", what=work.label, done=done, total=total)


@contextmanager
def training(title: str, step: int, max_steps: int) -> Iterator[Training]:
    """Shows a stage that trains until the block ends; whoever trains it sets the fields of what is yielded."""
    _state.training = Training(title, step, max_steps)
    try:
        yield _state.training
    finally:
        _state.training = None


def logged(line: str, row: dict[str, Any]) -> None:
    """Tells a row of a stage's log: a line; on a terminal it is a part of the live lines.

    Args:
        line: The row in words.
        row: The row, for JSON.
    """
    event("step", **row)
    say(line, "progress")


def clock(seconds: float) -> str:
    """A time as `1:02:03`, or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The way of a number in at most `width` characters: of many values each character is the mean of its part."""
    values = [value for value in values if value - value == 0]  # neither infinite nor NaN
    if len(values) < 2:
        return ""
    size = min(width, len(values))
    ends = [round(place * len(values) / size) for place in range(size + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(ends)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(SPARKS[min(7, int(8 * (mean - low) / span))] for mean in means)


def _is_terminal(stream: TextIO | None) -> bool:
    """Returns True if a stream is a terminal that can show bars."""
    if stream is None or not stream.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return False
    return (stream.encoding or "").lower().replace("-", "") == "utf8"


class _Screen:
    """The live lines of a terminal, drawn by rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        class Terminal(Console):
            def show_cursor(self, show: bool = True) -> bool:
                return False  # a process that is killed would leave it hidden

        self.console: Console = Terminal(file=sys.stdout, highlight=False)
        self.live = Live(
            self,  # type: ignore[arg-type]  # it has __rich_console__
            console=self.console,
            refresh_per_second=4,
            transient=True,
            redirect_stderr=_is_terminal(sys.stderr),
            vertical_overflow="crop",
        )
        os.register_at_fork(after_in_child=self._forget)
        self.live.start()

    def _forget(self) -> None:
        """Draws nothing in a forked process, whose output is its own."""
        if _state.screen is self:
            _state.screen = None
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__

    def stop(self) -> None:
        _state.works, _state.training, _state.scores = [], None, []
        self.live.stop()

    def line(self, text: str, kind: str) -> None:
        from rich.text import Text

        style = "yellow" if kind == "warning" or text.startswith("warning:") else ""
        # Commands and paths of a result are there to be copied, so no line break comes into them.
        self.console.print(Text(text, style=style), soft_wrap=kind == "result")

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[str]) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        made = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in head:
            made.add_column(Text(name), overflow="fold")
        colours = {"better": "green", "worse": "red"}
        for row, mark in zip(rows, marks, strict=True):
            made.add_row(
                *(
                    Text(cell, style=colours.get(mark, "") if place == len(row) - 1 else "")
                    for place, cell in enumerate(row)
                )
            )
        self.console.print(made)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:

        width = options.max_width
        lines: list[RenderableType] = []
        shown, works = _state.training, list(_state.works)
        if shown is not None:
            lines += _training_lines(shown, width)
        now = time.monotonic()
        lines += [_work_line(one, width, now) for one in works if now - one.begun > CALM_SECONDS]
        if _state.scores and lines:
            lines.append(_dim(" · ".join(_state.scores)))
        yield from lines


def _dim(text: str) -> Any:
    """A line of small print, cut to the width."""
    from rich.text import Text

    return Text(f"  {text}", style="dim", no_wrap=True, overflow="ellipsis")


def _bar(share: float, width: int) -> Any:
    from rich.progress_bar import ProgressBar

    return ProgressBar(total=1.0, completed=share, width=width)


def _row(*cells: Any) -> Any:
    """Cells beside each other on one line."""
    from rich.table import Table

    made = Table.grid(padding=(0, 1))
    for _ in cells:
        made.add_column(no_wrap=True, overflow="ellipsis")
    made.add_row(*cells)
    return made


def _work_line(work: Work, width: int, now: float) -> Any:
    from rich.text import Text

    passed = now - work.begun
    label = Text(f"  {work.label}", no_wrap=True, overflow="ellipsis")
    if not work.total:
        many = f"  {_counted(work, work.done)}" if work.done else ""
        return _row(label, Text(f"{many}  {clock(passed)}", style="dim"))
    left = passed * (work.total - work.done) / work.done if work.done else None
    told = f"{_counted(work, work.done).removesuffix(' MiB')}/{_counted(work, work.total)}  "
    told += f"{clock(left)} left" if left is not None else clock(passed)
    label.truncate(max(4, width - len(told) - 12), overflow="ellipsis")
    return _row(label, _bar(work.done / work.total, max(8, width - label.cell_len - len(told) - 4)), told)


def speed_facts(row: Mapping[str, Any], memory: int, predicted: int | None = None) -> list[str]:
    """The speed of a stage in words, as far as it is known.

    Args:
        row: `tokens_per_second`, `mfu` and `data_wait` (shares), `seconds_per_step`.
        memory: The peak memory so far, in bytes; 0 where that is not known.
        predicted: What it was predicted to be; None says nothing of it.
    """
    told = f" ({gibibytes(predicted)} predicted)" if predicted else ""
    known = {key: value for key, value in row.items() if value is not None}
    facts = [f"{known['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in known else []
    facts += [f"MFU {known['mfu']:.0%}"] if "mfu" in known else []
    facts += [f"{known['seconds_per_step']:.2f} s/step"] if "seconds_per_step" in known else []
    facts += [f"peak memory {gibibytes(memory)} GiB{told}"] if memory else []
    facts += [f"{known['data_wait']:.0%} waiting for data"] if "data_wait" in known else []
    return facts


def _counted(work: Work, many: int) -> str:
    return f"{many / MIB:,.1f} MiB" if work.unit == "B" else f"{many:,}"


def _training_lines(shown: Training, width: int) -> list[Any]:
    from rich.text import Text

    row, share = shown.row, shown.step / max(shown.max_steps, 1)
    told = f"{shown.step:,}/{shown.max_steps:,}  {share:.0%}"
    if shown.left is not None:
        told += f"  {clock(shown.left)} left"
    title = Text(f"  {shown.title}", style="bold")
    title.truncate(max(4, width - len(told) - 12), overflow="ellipsis")
    lines = [_row(title, _bar(share, max(8, width - title.cell_len - len(told) - 4)), told)]
    facts = speed_facts(row, shown.memory)
    if shown.losses:
        loss = f"  loss {shown.losses[-1]:.4f}  "
        lines += [Text(loss + sparkline(shown.losses, min(60, width - len(loss)))), _dim("   ".join(facts))]
    elif not shown.note:
        lines.append(_dim(f"begun {clock(time.monotonic() - shown.begun)} ago; the first loss comes with the log"))
    if shown.note:
        lines.append(Text(f"  {shown.note}", style="yellow", no_wrap=True, overflow="ellipsis"))
    return lines
