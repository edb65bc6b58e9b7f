"""Wheel and source archive: built from the files that the Dockerfile copies, they work outside of the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
BUILD = "from setuptools import build_meta; print(build_meta.build_{}('{}'))"


def build(folder: Path, what: str, target: Path) -> Path:
    """Builds `wheel` or `sdist` of the sources in a folder, without the isolation that needs a network."""
    command = [sys.executable, "-c", BUILD.format(what, target)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a wheel holds that was built from the source archive."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("packaging")
    copied = [
        name
        for line in re.findall(r"^COPY (.+)$", (ROOT / "Dockerfile").read_text(), re.M)
        for name in line.split()[:-1]
    ]
    kept = (ROOT / ".dockerignore").read_text().split()
    for name in copied:
        assert f"!{name}" in kept, f".dockerignore keeps {name} out"
        source, target = ROOT / name, folder / "sources" / name
        target.parent.mkdir(exist_ok=True)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target, ignore=ignored) if source.is_dir() else shutil.copy(source, target)
    archive = build(folder / "sources", "sdist", folder)
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    wheel = build(unpacked, "wheel", folder)
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, where: Path, *arguments: str) -> str:
    """Runs a command of the wheel outside of the checkout, and returns its output."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hfpipe", *arguments]
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_recipes_templates_and_types_are_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    assert str(installed) in run(installed, tmp_path, "env"), "the checkout was started, and not the wheel"
    names = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert names <= {line.split()[0] for line in run(installed, tmp_path, "recipes").splitlines() if line}
    run(installed, tmp_path, "recipes", "--copy", "quickstart")
    assert "no fault found" in run(installed, tmp_path, "check", "--fast", "quickstart.yaml")
    inside = {
        str(path.relative_to(installed / "hfpipe")) for path in (installed / "hfpipe").rglob("*") if path.is_file()
    }
    checkout = {
        str(path.relative_to(ROOT / "hfpipe"))
        for path in (ROOT / "hfpipe").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert checkout <= inside, f"the wheel lacks {sorted(checkout - inside)}"
