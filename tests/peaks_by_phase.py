"""Runs hfpipe on a rank and leaves its peaks of memory in bytes as JSON: until a stage is trained, in it, and after it.

    PEAKS=FOLDER torchrun --nproc-per-node 2 tests/peaks_by_phase.py run RECIPE

Linux keeps the peak of a process (VmHWM) and begins it anew when asked to.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import transformers

from hfpipe.cli import main as command

PROCESS = Path("/proc/self")


def peak() -> int:
    """The peak since the last call."""
    lines = (PROCESS / "status").read_text().splitlines()
    found = next(line for line in lines if line.startswith("VmHWM:"))
    (PROCESS / "clear_refs").write_text("5")
    return int(found.split()[1]) * 1024


def main() -> int:
    peaks: dict[str, int] = {}
    train = transformers.Trainer.train

    def trained(*arguments: Any, **words: Any) -> Any:
        peaks["read"] = max(peaks.get("read", 0), peak())
        try:
            return train(*arguments, **words)
        finally:
            peaks["trained"] = max(peaks.get("trained", 0), peak())

    transformers.Trainer.train = trained
    code = command()
    peaks["scored"] = peak()
    Path(os.environ["PEAKS"], os.environ["RANK"]).write_text(json.dumps(peaks))
    return code


if __name__ == "__main__":
    sys.exit(main())
