"""Launches that cannot work are refused in words before anything is imported."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from hfpipe.cli import main


def recipe(folder: Path) -> str:
    tiny.write_data(folder)
    return str(tiny.write(folder, tiny.recipe(folder)))


@pytest.mark.slow
@pytest.mark.parametrize("asked_by", ["an option", "a config"])
def test_fewer_processes_than_accelerate_was_asked_for_are_refused(tmp_path: Path, asked_by: str) -> None:
    config = tmp_path / "two.yaml"
    config.write_text("distributed_type: 'NO'\nuse_cpu: true\nnum_processes: 2\nnum_machines: 1\nmachine_rank: 0\n")
    options = ("--cpu", "--num_processes", "2") if asked_by == "an option" else ("--config_file", str(config))
    process = tiny.start("run", recipe(tmp_path), launch=("accelerate.commands.launch", *options))
    said = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "hfpipe: accelerate launch was asked for 2 processes and started one" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("address", "said"), [("127.0.0.1", "MASTER_ADDR is 127.0.0.1"), ("10.1.2.3", None)])
def test_machines_that_cannot_reach_each_other_are_told_at_once(
    tmp_path: Path, address: str, said: str | None, monkeypatch: Any, capsys: Any
) -> None:
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": address}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    assert main(["run", recipe(tmp_path)]) == 4
    assert (said or "GLOO_SOCKET_IFNAME=eth0") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE does not fit"),
        ({"RANK": "-1"}, "RANK does not fit"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE does not fit"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK does not fit"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK does not fit"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT does not fit"),
    ],
)
def test_variables_that_no_launcher_writes_are_refused(
    tmp_path: Path, variables: dict[str, str], said: str, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    path = recipe(tmp_path)
    for command in (["check", "--fast", path], ["run", path]):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert main(command) == 4
        assert said in capsys.readouterr().err


def test_a_module_starts_with_odd_variables_and_in_a_removed_folder(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    for environment, code in (({"WORLD_SIZE": "two"}, 4), ({}, 0)):
        gone.mkdir()
        command = f"import os, runpy, sys; os.rmdir({str(gone)!r}); sys.argv[1:] = ['recipes']; "
        command += "runpy.run_module('hfpipe', run_name='__main__')"
        given = {"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path)), **environment}
        found = subprocess.run([sys.executable, "-c", command], env=given, cwd=gone, capture_output=True, text=True)
        assert found.returncode == code, found.stderr
        assert "Traceback" not in found.stderr


def test_an_error_before_the_ranks_meet_is_said_once(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    for rank, lines in (("0", 1), ("1", 0)):
        command = [sys.executable, "-m", "hfpipe", "run", path, "--set", "stages.prose.lr=1"]
        environment = {"RANK": rank, "PATH": "", "PYTHONPATH": ":".join(sys.path)}
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert found.returncode == 2
        assert found.stderr.count("hfpipe: ") == lines
