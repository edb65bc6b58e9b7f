"""Processor time and memory of hfpipe's commands as their work grows tenfold, twice.

    python benchmarks/growth.py [--only rows,files] [--more]

Each line is a command in a process of its own, on a model of some 30,000 parameters and rows made here:

- steps: `run` trains so many optimizer steps.
- rows: `prepare` tokenizes so many pairs of one file of JSON lines.
- documents: `run` streams so many documents of one file of JSON lines, each read once.
- files: `run` streams from a pattern that so many files match, and trains five steps.
- suites: `evaluate` scores so many suites of eight rows.
- log rows: `report` draws a run with so many rows in its log.

Printed are the processor time, the peak memory, and what one more unit costs from a size to the next, in milliseconds.
The second such cost divided by the first is the growth: about 1 is linear, below 1 better. Wanted: at most 1.2 in time,
and at most 1.2 times the peak memory of the smallest. `--more` adds a third growth, to 1,000 times the smallest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

SIZES = {"steps": 20, "rows": 1_000, "documents": 1_000, "files": 100, "suites": 2, "log rows": 1_000}
ARCHITECTURE = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
MODEL = {
    "architecture": {**ARCHITECTURE, "num_attention_heads": 2, "max_position_embeddings": 128},
    "tokenizer": {"train": {"vocab_size": 400, "take": 50}},
}
WORDS = "the model reads a document of some words and learns which one comes next in the line".split()  # noqa: SIM905


def document(number: int) -> str:
    """Returns a text of 24 words that no other number has."""
    return f"{number} " + " ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 24))


def write_rows(path: Path, rows: range) -> str:
    """Writes documents as JSON lines, which are pairs too, and returns the path."""
    with path.open("w") as file:
        file.writelines(
            json.dumps({"text": document(n), "prompt": f"{n}?", "completion": document(n)}) + "\n" for n in rows
        )
    return str(path)


def recipe(folder: Path, kind: str, columns: dict[str, Any], training: dict[str, Any], **source: Any) -> list[str]:
    """Writes a recipe of one stage, and returns its path and the options of the command."""
    stage = {
        "name": "grown",
        "kind": kind,
        "data": [{"columns": columns, **source}],
        "global_batch_size": 8,
        "training": {"max_length": 64, "logging_steps": 10, "save_strategy": "no", "max_steps": 5, **training},
    }
    content = {"name": "growth", "output_dir": str(folder / "run"), "model": MODEL, "stages": [stage], "energy": False}
    path = folder / "growth.yaml"
    path.write_text(yaml.safe_dump(content))
    return [str(path)]


TEXT = {"text": "text"}


def steps(folder: Path, size: int) -> list[str]:
    data = write_rows(folder / "rows.jsonl", range(200))
    return ["run", *recipe(folder, "pretrain", TEXT, {"max_steps": size}, path=data)]


def rows(folder: Path, size: int) -> list[str]:
    data = write_rows(folder / "rows.jsonl", range(size))
    return ["prepare", *recipe(folder, "sft", {"prompt": "prompt", "completion": "completion"}, {}, path=data)]


def documents(folder: Path, size: int) -> list[str]:
    data = write_rows(folder / "rows.jsonl", range(size))
    return ["run", *recipe(folder, "pretrain", TEXT, {"max_steps": size // 8}, path=data, streaming=True)]


def files(folder: Path, size: int) -> list[str]:
    (folder / "files").mkdir()
    for number in range(size):
        write_rows(folder / "files" / f"{number}.jsonl", range(number * 10, number * 10 + 10))
    return ["run", *recipe(folder, "pretrain", TEXT, {}, path=str(folder / "files/*.jsonl"), streaming=True)]


def trained(folder: Path) -> Path:
    """Trains twenty steps, and returns the folder of the run."""
    measure(steps(folder, 20))
    return folder / "run"


def suites(folder: Path, size: int) -> list[str]:
    run = trained(folder)
    data = write_rows(folder / "asked.jsonl", range(8))
    suite = {"data": {"path": data, "columns": TEXT}, "metrics": ["perplexity"], "max_length": 64}
    path = folder / "suites.yaml"
    path.write_text(yaml.safe_dump({"evaluate": {f"suite{number}": suite for number in range(size)}}))
    return ["evaluate", str(run / "stages/grown/model"), str(path)]


def log_rows(folder: Path, size: int) -> list[str]:
    run = trained(folder)
    log = run / "stages/grown/log.jsonl"
    row = json.loads(log.read_text().splitlines()[0])
    log.write_text("".join(json.dumps({**row, "step": number + 1}) + "\n" for number in range(size)))
    return ["report", str(run)]


def measure(arguments: list[str]) -> tuple[float, float]:
    """Runs hfpipe, and returns its processor seconds and its peak of memory in MiB.

    Raises:
        SystemExit: If the command fails.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "hfpipe", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(said)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


KINDS: dict[str, Callable[[Path, int], list[str]]] = {
    "steps": steps,
    "rows": rows,
    "documents": documents,
    "files": files,
    "suites": suites,
    "log rows": log_rows,
}


def grow(name: str, sizes: list[int]) -> None:
    """Prints a line for each size of one kind of work."""
    found: list[tuple[int, float, float]] = []
    costs: list[float] = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            found.append((size, *measure(KINDS[name](Path(folder), size))))
        line = f"{name:10} {size:9,}  {found[-1][1]:7.1f} s  {found[-1][2]:6,.0f} MiB"
        if len(found) > 1:
            (fewer, before, _), (more, after, memory) = found[-2:]
            costs.append((after - before) / (more - fewer))
            line += f"  {1000 * costs[-1]:8.3f} ms each  memory {memory / found[0][2]:.2f}"
        if len(costs) > 1:
            line += f"  growth {costs[-1] / costs[-2]:.2f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of work, with commas between")
    parser.add_argument("--more", action="store_true", help="one size more of each")
    options = parser.parse_args()
    for name in options.only.split(","):
        grow(name, [SIZES[name] * 10**power for power in range(4 if options.more else 3)])


if __name__ == "__main__":
    main()
