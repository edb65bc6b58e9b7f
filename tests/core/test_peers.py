"""Ranks as processes of their own: long work of one, errors of one, and ranks that are lost or silent."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.long]

BEGIN = """
import os, signal, sys, time
from hfpipe.core import peers, ranks
from hfpipe.core.errors import DataError
from hfpipe.cli import _tell
import torch
ranks.open_group(3, 5)
mine = ranks.rank()
def work():
    print(ranks.gather(mine))
    {body}
code = 0
try:
    work()
    peers.leave()
except Exception as error:
    code = _tell(error)
sys.stderr.flush(); sys.stdout.flush()
os._exit(code)
"""

Ended = list[tuple[int, str]]


@pytest.fixture
def ranks_of() -> Any:
    """Starts ranks that run a body, and returns the exit code of each and what it wrote."""
    started: list[subprocess.Popen] = []

    def run(body: str, count: int = 2, then: Callable[[list[subprocess.Popen]], None] = lambda _: None) -> Ended:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        code = BEGIN.format(body=body.replace("\n", "\n    "))
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            more = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1}
            env = os.environ | {name: str(value) for name, value in (place | more).items()}
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
        mine = started[-count:]
        then(mine)
        return [(one.wait(timeout=90), one.stdout.read() if one.stdout else "") for one in mine]

    yield run
    for one in started:
        one.kill()


def test_a_rank_may_work_for_longer_than_a_collective_call_waits(ranks_of: Any) -> None:
    body = "print('main found', ranks.on_main(lambda: time.sleep(7) or 42))"
    for code, said in ranks_of(body, count=3):
        assert code == 0, said
        assert "[0, 1, 2]\nmain found 42" in said


def test_a_collective_call_is_given_up_on_after_ddp_timeout(ranks_of: Any) -> None:
    body = "if mine: time.sleep(60)\ntorch.distributed.all_reduce(torch.ones(1))"
    begun = time.monotonic()
    (code, said), _ = ranks_of(body, then=lambda started: (started[0].wait(timeout=60), started[1].kill()))
    assert code == 4
    assert "gone" in said
    assert "fault of hfpipe" not in said
    assert time.monotonic() - begun < 50


def test_an_error_of_one_rank_is_said_with_its_rank_and_ends_all(ranks_of: Any) -> None:
    body = "if mine == 1: raise DataError('row 7 is bad.')\nranks.each(lambda: mine)"
    ended = ranks_of(body, count=3)
    assert [code for code, _ in ended] == [5, 5, 5]
    assert "hfpipe: rank 1 has failed: row 7 is bad." in ended[0][1] or "hfpipe: rank 1: row 7 is bad." in ended[1][1]
    assert sum("row 7" in said for _, said in ended) <= 2
    assert "row 7" not in ended[2][1]


def test_a_fault_of_ours_is_said_by_the_rank_that_has_it(ranks_of: Any) -> None:
    ended = ranks_of("if mine == 1: raise KeyError('odd')\nranks.wait()")
    assert [code for code, _ in ended] == [1, 1]
    assert "hfpipe: rank 1: this is a fault of hfpipe" in ended[1][1]
    assert "KeyError: 'odd'" in ended[1][1]
    assert "fault of hfpipe" not in ended[0][1]


def test_what_all_ranks_find_is_said_once(ranks_of: Any) -> None:
    for body in (
        "ranks.on_main(lambda: (_ for _ in ()).throw(DataError('nothing to train on.')))",
        "raise DataError('nothing to train on.')",
    ):
        ended = ranks_of(body)
        assert [code for code, _ in ended] == [5, 5]
        assert sum(said.count("nothing to train on") for _, said in ended) == 1, ended


@pytest.mark.parametrize(("kept", "expected"), [("", 4), ("peers.keep()\n", 75)])
def test_a_killed_rank_is_named(ranks_of: Any, kept: str, expected: int) -> None:
    body = kept + "if mine == 1: os.kill(os.getpid(), signal.SIGKILL)\nranks.wait()"
    (code, said), _ = ranks_of(body)
    assert code == expected
    assert "hfpipe: rank 1 is gone (its process has ended). What was finished stays: run again to continue." in said


@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_gives_no_sign_of_life_ends_all_in_the_time_of_the_recipe(ranks_of: Any, silent: int) -> None:
    """In a collective call that would wait for it: a stopped process keeps its connections, as a cut network does."""
    body = (
        "torch.distributed.distributed_c10d._set_pg_timeout(__import__('datetime').timedelta(seconds=600))\n"
        f"if mine == {silent}: os.kill(os.getpid(), signal.SIGSTOP)\n"
        "for _ in range(2): torch.distributed.all_reduce(torch.ones(1))"
    )
    took: list[float] = []

    def end(started: list[subprocess.Popen]) -> None:
        stat = Path(f"/proc/{started[silent].pid}/stat")
        while "T" not in stat.read_text().rpartition(")")[2][:3]:
            time.sleep(0.05)
        begun = time.monotonic()
        started[1 - silent].wait(timeout=30)
        took.append(time.monotonic() - begun)
        os.kill(started[silent].pid, signal.SIGKILL)

    code, said = ranks_of(body, then=end)[1 - silent]
    assert code == 4
    assert f"rank {silent} is gone" in said or silent == 0
    assert took[0] < 5.5
