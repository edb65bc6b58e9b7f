"""Signals, from the first line of the program to the last: an end within seconds, one line, the right exit code.

SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal or the connection is gone) raise `Interrupted` in the main thread.
While a stage trains and is saved (`held`) the first one only asks: training saves a checkpoint at the end of its step,
and a second Ctrl-C ends it at once. A thread reads each signal too: where the main thread does not come to its end in
time (it waits inside a library, or a library has swallowed the exception) the thread ends the process. Imports nothing
heavy: it comes before everything else.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from hfpipe.core import display, ending

BOUND = 8.0  # seconds from a signal to the end of the process
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGHUP: 75}
LINES = {
    signal.SIGINT: "interrupted; run the same command again to continue",
    signal.SIGTERM: "stopped by SIGTERM; what was finished stays. Run the same command again to continue",
    signal.SIGHUP: "the terminal is gone; what was finished stays. Run the same command again to continue",
}
SERVER_LINES = {
    signal.SIGINT: "stopped by Ctrl-C",
    signal.SIGTERM: "stopped by SIGTERM",
    signal.SIGHUP: "stopped: the terminal is gone",
}
_IMPORTING = "<frozen importlib._bootstrap>"


class Interrupted(KeyboardInterrupt):
    """A signal ends the program."""


class _State:
    """The signals received so far; written by the main thread, read by the one that watches."""

    def __init__(self) -> None:
        self.depth = 0  # of `held`
        self.pending: int | None = None  # a signal that came while held
        self.ending: int | None = None  # the signal that ends the program
        self.code: int | None = None  # the exit code, once it is certain
        self.told = False
        self.lines = LINES
        self.wakeup = -1


_state = _State()


def exit_code() -> int | None:
    """The exit code that a signal has made certain; None while none ends the program."""
    return None if _state.ending is None else EXIT_CODES[signal.Signals(_state.ending)]


def pending() -> bool:
    """Returns True if a signal has come that what is under way has to heed."""
    return _state.pending is not None or _state.ending is not None


@contextmanager
def held() -> Iterator[None]:
    """Lets the first signal only ask (see `pending`) until the block ends; whoever holds it has to look."""
    _state.depth += 1
    try:
        yield
    finally:
        _state.depth -= 1


def heed() -> None:
    """Raises `Interrupted` where a signal has come while it was held and nothing has heeded it."""
    if _state.pending is not None and not _state.depth:
        _end_by(_state.pending)
        raise Interrupted


def serves() -> None:
    """Says that the command lasts until a signal ends it, and has nothing to continue."""
    _state.lines = SERVER_LINES


@contextmanager
def watched() -> Iterator[None]:
    """Handles signals until the block ends. Inside of another such block, and outside the main thread, does nothing."""
    if _state.wakeup >= 0 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = install()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(_state.wakeup)  # ends the thread
        _state.__init__()  # type: ignore[misc]


def install() -> dict[int, Any]:
    """Handles signals from here on; returns the handlers before."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    _state.wakeup = writing
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()
    goes_on = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # by nohup
    wanted = [number for number in EXIT_CODES if number != signal.SIGHUP or not goes_on]
    before: dict[int, Any] = {number: signal.signal(number, _on_signal) for number in wanted}
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    return before


def _forget() -> None:
    """Lets signals end a forked process, without a message."""
    if _state.wakeup >= 0 and signal.getsignal(signal.SIGINT) is _on_signal:
        signal.set_wakeup_fd(-1)
        for number in EXIT_CODES:
            if signal.getsignal(number) is _on_signal:
                signal.signal(number, signal.SIG_DFL)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _state.code is not None or _state.ending is not None:
        if _state.code is not None or number == signal.SIGINT:
            leave(_state.ending or number)
        return
    if _state.depth:
        first, _state.pending = _state.pending is None, _state.pending or number
        if first or number != signal.SIGINT:
            return
    _end_by(number)
    if _in_import(frame):  # half-imported modules fail in ways of their own
        leave(number)
    raise Interrupted


def _end_by(number: int) -> None:
    _state.ending = number
    sys.unraisablehook = lambda *_: None  # where a library swallows the exception, Python would print it
    threading.excepthook = lambda *_: None


def _in_import(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            return True
        frame = frame.f_back
    return False


def _watch(reading: int) -> None:
    """Ends the process where a signal has come and the main thread is not done in time."""
    deadline = last = None
    asked = 0  # signals that came while held
    while True:
        ready, _, _ = select.select(
            [reading], [], [], None if deadline is None else max(0, deadline - time.monotonic())
        )
        if not ready:
            leave(last or signal.SIGTERM)
        try:
            byte = os.read(reading, 1)
        except OSError:
            return
        if not byte:
            os.close(reading)
            return
        if byte[0] not in EXIT_CODES:
            continue
        number = signal.Signals(byte[0])
        asked += bool(_state.depth)
        if _state.depth and (asked == 1 or number != signal.SIGINT):
            continue
        if deadline is None:
            last, deadline = number, time.monotonic() + BOUND
        elif number == signal.SIGINT:
            leave(last or number)


def leave(number: int) -> None:
    """Ends the process at once, with the line and the exit code of a signal, unless it is ending with another code."""
    code = EXIT_CODES[signal.Signals(number)] if _state.code is None else _state.code
    display.leave()
    if _state.code is None:
        tell(number)
    ending.record(code)
    os._exit(code)


def tell(number: int | None = None) -> None:
    """Writes the line of the signal that ends the program, once, on the main process."""
    number = _state.ending if number is None else number
    if _state.told or number is None or os.environ.get("RANK", "0") != "0":
        return
    _state.told = True
    with suppress(OSError):  # there may be no terminal any more
        os.write(2, f"hfpipe: {_state.lines[signal.Signals(number)]}\n".encode())


def finish(code: int) -> int:
    """Says with which code the program ends: a signal that comes later changes it no more."""
    _state.code = code
    return code
