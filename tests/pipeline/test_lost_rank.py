"""Two ranks: one that is lost is named, and the same command continues; the run folder must be shared."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from hfpipe.cli import main

CPU = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu.yaml"


def rank_process(launcher: int, rank: int) -> int:
    """The process of a rank that a launcher started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in map(int, children):
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return child
    raise AssertionError(f"no rank {rank} among {children}")


def long_recipe(folder: Path) -> dict:
    content = tiny.recipe(folder, evaluate={}, merge=False, lost_rank_seconds=10)
    content["stages"] = content["stages"][:1]
    content["stages"][0]["training"] |= {"max_steps": 120, "logging_steps": 1}
    return content


@pytest.mark.slow
@pytest.mark.long
def test_a_lost_rank_is_named_and_the_same_command_continues(tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    path = tiny.write(tmp_path, long_recipe(tmp_path))
    launch = ("accelerate.commands.launch", "--config_file", str(CPU))
    process = tiny.start("run", str(path), launch=launch)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "run").glob("stages/prose/checkpoint-*/manifest.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    os.kill(rank_process(process.pid, 1), signal.SIGKILL)
    begun = time.monotonic()
    said = process.communicate(timeout=100)[0]
    assert time.monotonic() - begun < 40
    assert "hfpipe: rank 1 is gone" in said
    assert "run again to continue" in said
    assert "fault of hfpipe" not in said
    assert process.returncode != 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/stages/prose/log.jsonl").read_text().splitlines()]
    assert steps[-1] < 120
    again = tiny.start("run", str(path), launch=launch)
    said = again.communicate(timeout=200)[0]
    assert again.returncode == 0, said
    assert "continuing from checkpoint-" in said
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/stages/prose/log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 121))


@pytest.mark.slow
@pytest.mark.long
def test_a_run_folder_that_not_every_rank_sees_is_refused(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tiny.write_data(tmp_path)
    path = tiny.write(tmp_path, long_recipe(tmp_path) | {"output_dir": "run"})
    processes = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        where = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        more = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "hfpipe", "run", str(path)],
                cwd=tmp_path / str(rank),
                env=os.environ | {name: str(value) for name, value in (where | more).items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    ended = [(process.communicate(timeout=120)[0], process.returncode) for process in processes]
    assert [code for _, code in ended] == [4, 4]
    assert (
        f"the run folder run is not the same on every machine: rank 1 on {socket.gethostname()} cannot" in ended[0][0]
    )
    assert ended[1][0] == ""


def test_the_time_after_which_a_rank_is_lost_is_a_word(tmp_path: Path) -> None:
    path = tiny.write(tmp_path, tiny.recipe(tmp_path, lost_rank_seconds=1))
    assert main(["check", "--fast", str(path)]) == 2
