"""The exit code of a run that a launcher started, in the run folder: torchrun and accelerate end with 1 whatever it is.

A scheduler that has to know whether to start the job again reads `RUN/exit_code`, as the launch files do.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

EXIT_CODE = "exit_code"
_SECONDS = 2.0  # a disk across a network that is lost never answers
_folder: Path | None = None


def watch(folder: Path) -> None:
    """Names the folder in which the exit code of this process is written; what an earlier run left there is removed."""
    global _folder
    if "TORCHELASTIC_RUN_ID" not in os.environ and int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return
    _folder = folder
    if os.environ.get("RANK", "0") == "0":
        (folder / EXIT_CODE).unlink(missing_ok=True)


def record(code: int) -> None:
    """Writes the code with which this process ends; every rank may, as all end with the same."""
    if _folder is None or (code == 0 and os.environ.get("RANK", "0") != "0"):
        return
    writing = threading.Thread(target=_write, args=(_folder, code), daemon=True)
    with suppress(RuntimeError):
        writing.start()
        writing.join(_SECONDS)


def _write(folder: Path, code: int) -> None:
    beside = folder / f".{EXIT_CODE}.{os.environ.get('RANK', '0')}"
    with suppress(OSError):
        if folder.is_dir():
            beside.write_text(f"{code}\n")
            beside.replace(folder / EXIT_CODE)
