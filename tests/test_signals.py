"""Signals in every phase, two runs in one folder, a reader that goes away: real processes, each with a time limit."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from hfpipe.cli import main
from hfpipe.core import signals

BOUND = 30  # seconds from a signal to the end of a process, on a busy machine
HFPIPE = [sys.executable, "-m", "hfpipe"]


def recipe(folder: Path, **training: object) -> Path:
    tiny.write_data(folder)
    content = tiny.recipe(folder, merge=False)
    content["stages"] = content["stages"][:1]
    content["stages"][0]["training"] |= {"logging_steps": 1, **training}
    return tiny.write(folder, content)


def read_until(process: subprocess.Popen, words: str) -> str:
    """Reads the output of a process up to a line with some words."""
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if words in line:
            return said
    raise AssertionError(f"{words!r} was not said:\n{said}")


def ended(process: subprocess.Popen, *signals: signal.Signals) -> tuple[int, str]:
    """Sends signals to a process; its exit code and what it said after the first."""
    for number in signals:
        process.send_signal(number)
        time.sleep(0.05)
    said = process.communicate(timeout=BOUND)[0]
    return process.returncode, said


@pytest.mark.parametrize("seconds", [0.5, 3.0])
def test_ctrl_c_at_the_start_ends_it_with_one_line(tmp_path: Path, seconds: float) -> None:
    path = recipe(tmp_path)
    process = tiny.start("run", str(path))
    time.sleep(seconds)
    code, said = ended(process, signal.SIGINT, signal.SIGINT)
    assert code == 130, said
    assert "Traceback" not in said
    assert said.count("interrupted; run the same command again") == 1


def test_ctrl_c_on_a_server_speaks_of_nothing_to_continue(tmp_path: Path) -> None:
    process = tiny.start("board", str(tmp_path), "--port", "0")
    read_until(process, "Ctrl-C ends it")
    time.sleep(0.2)  # a signal within Python's write of that line has it written twice
    code, said = ended(process, signal.SIGINT)
    assert (code, said) == (130, "hfpipe: stopped by Ctrl-C\n")


@pytest.mark.slow
@pytest.mark.long
def test_a_folder_has_one_run_at_a_time_and_the_dead_hold_no_lock(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    first = tiny.start("run", str(path))
    read_until(first, "base: general")  # while the base is scored
    second = tiny.start("run", str(path))
    said = second.communicate(timeout=BOUND)[0]
    assert second.returncode == 4, said
    assert f"process {first.pid} on {os.uname().nodename}" in said
    assert ended(first, signal.SIGKILL)[0] == -signal.SIGKILL
    assert (tmp_path / "run" / "run.lock").exists()
    third = tiny.start("run", str(path))
    read_until(third, "step 1/6")
    code, said = ended(third, signal.SIGTERM)
    assert code == 75, said
    assert said.splitlines()[-1].startswith("hfpipe: stopped by a signal at step"), said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "run.lock").exists()


@pytest.mark.slow
def test_a_lock_of_another_machine_holds_for_as_long_as_it_is_touched(tmp_path: Path, capsys) -> None:
    path, lock = recipe(tmp_path), tmp_path / "run" / "run.lock"
    lock.parent.mkdir()
    lock.write_text(
        json.dumps({"host": "node-7", "pid": 1, "boot": "another", "command": "hfpipe run", "since": "now"})
    )
    assert main(["run", str(path)]) == 4
    assert "process 1 on node-7" in capsys.readouterr().err
    assert lock.exists()
    os.utime(lock, (time.time() - 3600,) * 2)
    assert main(["run", str(path)]) == 0
    assert not lock.exists()


@pytest.mark.slow
def test_ctrl_c_while_suites_are_scored_ends_it_with_one_line(tmp_path: Path) -> None:
    process = tiny.start("run", str(recipe(tmp_path)))
    read_until(process, "base: general")
    code, said = ended(process, signal.SIGINT, signal.SIGINT)
    assert code == 130, said
    assert said.count("run the same command again") == 1
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("saving", ["steps", "no"])
def test_a_signal_at_the_last_step_is_heeded_and_nothing_is_trained_twice(tmp_path: Path, saving: str) -> None:
    path = recipe(tmp_path, save_strategy=saving)
    process = tiny.start("run", str(path))
    read_until(process, "step 5/6")
    code, said = ended(process, signal.SIGTERM)
    assert code == 75, said
    assert "prose: general" not in said, "nothing goes on after the stage"
    assert main(["run", str(path)]) == 0
    log = (tmp_path / "run" / "stages" / "prose" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.long
def test_a_terminal_that_goes_away_leaves_a_checkpoint(tmp_path: Path) -> None:
    """A connection breaks: the terminal takes no more, and SIGHUP comes."""
    path, log = recipe(tmp_path), tmp_path / "run" / "stages" / "prose" / "log.jsonl"
    mine, theirs = pty.openpty()
    process = subprocess.Popen(
        [*HFPIPE, "run", str(path)], stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    end = time.monotonic() + 180
    while not (log.exists() and log.read_text()) and time.monotonic() < end:
        if select.select([mine], [], [], 0.1)[0]:
            os.read(mine, 65536)
    os.close(mine)
    process.send_signal(signal.SIGHUP)
    assert process.wait(BOUND) == 75
    assert list((tmp_path / "run" / "stages" / "prose").glob("checkpoint-*/manifest.json"))


@pytest.mark.parametrize("ignored", [True, False])
def test_a_hangup_ends_a_command_unless_nohup_says_otherwise(ignored: bool) -> None:
    start = "from hfpipe.core import signals; signals.install(); import os, signal, time"
    code = f"{start}; os.kill(os.getpid(), signal.SIGHUP); time.sleep(1); print('went on')"
    before = f"import signal; signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if ignored else 'SIG_DFL'}); "
    found = subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, check=False)
    assert ("went on" in found.stdout) == ignored


def test_a_reader_that_goes_away_is_no_fault() -> None:
    for arguments in (["schema"], ["recipes"]):
        process = subprocess.Popen([*HFPIPE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.close()
        error = process.communicate(timeout=BOUND)[1]
        assert (process.returncode, error) == (0, b"")


def test_an_error_that_a_signal_to_the_whole_group_brought_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A scheduler stops a group of processes, and the compiler that a training waits for may end first."""

    def work(options: object) -> None:
        with signals.held():
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("the compiler was killed")

    monkeypatch.setattr("hfpipe.cli.commands.recipes", work)
    assert main(["recipes"]) == 75
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("hfpipe: stopped by SIGTERM")
