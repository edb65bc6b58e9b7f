"""No process that hfpipe starts or prints imports what lies in the working directory."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from pushing import make_run, pushes

from hfpipe.core.command import our_command, python_command

# Of the standard library and of the libraries, most of them imported while a push is made.
PLANTED = (
    "argparse, base64, calendar, dataclasses, email, fnmatch, hashlib, html, http, json, logging, "
    "mimetypes, random, secrets, shlex, shutil, socket, ssl, statistics, string, subprocess, tempfile, "
    "textwrap, urllib, uuid, xml, zipfile, httpx2, huggingface_hub, yaml, pydantic, torch, numpy"
)
TREE = Path(__file__).parents[2]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A working directory with modules that leave a trace when they are imported, and fail."""
    trace = str(tmp_path / "TRACE")
    for name in PLANTED.split(", "):
        (tmp_path / f"{name}.py").write_text(f"open({trace!r}, 'a').write({name!r} + ' ')\nraise SystemExit(9)\n")
    return tmp_path


def started(command: list[str], folder: Path, told: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(TREE), **environment}
    return subprocess.run(command, cwd=folder, env=env, input=told, text=True, capture_output=True, timeout=120)


def require_untouched(folder: Path) -> None:
    assert not (folder / "TRACE").exists(), f"imported from the working directory: {(folder / 'TRACE').read_text()}"


def test_a_push_runs_no_file_of_the_working_directory(hostile: Path, hub: HubServer) -> None:
    make_run(hostile / "run")
    done = started([sys.executable, "-P", "-m", "hfpipe", "push", "run"], hostile, **hub.env(hostile / "home"))
    require_untouched(hostile)
    assert done.returncode == 0, done.stderr
    assert pushes(hub) == 1


def test_nor_where_pythonpath_names_it(hostile: Path) -> None:
    task = json.dumps({"check": [], "seconds": 5})
    command = python_command("hfpipe.hub.upload")
    done = started(command, hostile, task, PYTHONPATH=f":{TREE}", HF_HUB_OFFLINE="1")
    require_untouched(hostile)
    assert done.returncode == 4, done.stderr
    assert "HF_HUB_OFFLINE" in done.stdout


def test_python_dash_m_hfpipe_imports_from_the_libraries_alone(hostile: Path) -> None:
    done = started([sys.executable, "-m", "hfpipe", "recipes"], hostile)
    require_untouched(hostile)
    assert done.returncode == 0, done.stderr


def test_the_command_that_is_printed_imports_nothing_from_there(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hostile)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # an environment that is not activated
    command = shlex.split(our_command())
    done = started([*command, "recipes"], hostile)
    require_untouched(hostile)
    assert done.returncode == 0, done.stderr
