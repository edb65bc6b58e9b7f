"""`hfpipe env`: versions and hardware, told whole even where a library is broken, and without any secret."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from hfpipe.cli import main


def test_versions_are_there_and_secrets_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secrets = {
        "HF_TOKEN": "hf_" + "a1" * 17,
        "WANDB_API_KEY": "0123456789abcdef" * 2,
        "HF_ENDPOINT": "http://me:pass@hub",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(Path(sys.executable).parents[2]))
    assert main(["env"]) == 0
    page = capsys.readouterr().out
    assert f"transformers {version('transformers')}" in page
    assert "HF_HUB_OFFLINE=1" in page
    assert "HF_TOKEN is set" in page
    assert "logged in at another address" in page
    for secret in (*secrets.values(), "pass", str(Path(sys.executable).parents[2]) + "/"):
        assert secret not in page


def test_a_broken_library_keeps_nothing_else_from_being_told(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13 is missing')\n")
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from hfpipe.cli import main; sys.exit(main(['env']))",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "libcudart.so.13 is missing" in done.stdout
    assert "packages" in done.stdout


def test_the_shells_complete_commands_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "hfpipe.bash").write_text(capsys.readouterr().out)
    asked = (
        "source hfpipe.bash; COMP_WORDS=(hfpipe ev); COMP_CWORD=1; "
        "$(complete -p hfpipe | grep -o '_shtab[a-z_]*') hfpipe ev hfpipe; echo ${COMPREPLY[@]}; "
        "COMP_WORDS=(hfpipe chat --st); COMP_CWORD=2; "
        "$(complete -p hfpipe | grep -o '_shtab[a-z_]*') hfpipe --st chat; echo ${COMPREPLY[@]}"
    )
    said = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert said.stdout.split() == ["evaluate", "--stage", "--strength"], said.stderr
