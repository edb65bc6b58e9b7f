"""A terminal for a command of a test: a pseudo-terminal of some width, and what was written to it."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Sequence


class Terminal:
    """Runs a command whose input and output are a terminal.

    Args:
        command: The command; a Python file or `-m hfpipe ...` after this interpreter.
        columns: The width.
        environment: More variables.
    """

    def __init__(self, command: Sequence[str], columns: int = 80, **environment: str) -> None:
        mine, theirs = pty.openpty()
        self.resize(columns, theirs)
        variables = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "RANK")}
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=variables | {"TERM": "xterm-256color"} | environment,
            start_new_session=True,
        )
        self._file, self._said = mine, b""
        self._theirs = theirs  # open to the end: where no one has it open, reading is an error
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        while True:
            over = self.process.poll() is not None
            if select.select([self._file], [], [], 0.05)[0]:
                self._said += os.read(self._file, 65536)
            elif over:
                return

    def resize(self, columns: int, file: int | None = None) -> None:
        """Gives the terminal another width, and tells the command."""
        size = struct.pack("HHHH", 24, columns, 0, 0)
        fcntl.ioctl(self._file if file is None else file, termios.TIOCSWINSZ, size)

    @property
    def raw(self) -> str:
        """All that was written so far, with what steers the terminal."""
        return self._said.decode(errors="replace")

    @property
    def text(self) -> str:
        """The same without it: a line for each line that was drawn, once for each time that it was."""
        moved = re.sub(r"(?:\x1b\[[0-9;]*[A-HJKf]|\r|\n)+", "\n", self.raw)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", moved)

    def end(self, seconds: float = 120) -> int:
        """Waits for the end, and returns the exit code."""
        code = self.process.wait(seconds)
        self._reading.join(5)
        os.close(self._file)
        os.close(self._theirs)
        return code
