"""A stage that does not fit is refused before anything is loaded, with what would make it smaller."""

import re
from pathlib import Path
from typing import Any

import pytest
import tiny

from hfpipe.cli import main


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """A recipe whose one step takes far more memory than any machine has: logits of a million rows at once."""
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False)
    content["stages"] = content["stages"][:1]
    content["stages"][0]["global_batch_size"] = 2**20
    content["stages"][0]["training"]["per_device_train_batch_size"] = 2**20
    return content


@pytest.mark.parametrize("command", ["check", "run"])
def test_what_does_not_fit_is_refused_with_ranked_remedies(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([command, str(tiny.write(tmp_path, content))]) == 4
    told = capsys.readouterr().err
    assert "stage prose needs about" in told
    assert re.search(r"1\. per_device_train_batch_size: \d+ -> [\d.]+ GiB \(the same result", told)
    assert not (tmp_path / "run/stages/prose").exists()


def test_fit_auto_takes_the_cheapest_and_keeps_the_global_batch(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(tiny.write(tmp_path, content | {"fit": "auto"}))]) == 0
    told = capsys.readouterr().out
    assert "6 steps of 1048576 rows" in told
    assert re.search(
        r"fit +prose: per_device_train_batch_size: \d+ \(the same result, a little slower; [\d.]+ GiB\)", told
    )


def test_check_shows_the_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False)
    content["model"]["architecture"] |= {"hidden_size": 512, "intermediate_size": 2048}
    assert main(["check", str(tiny.write(tmp_path, content))]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("memory     prose"))
    assert all(part in line for part in ("at the peak", "4 rows of 64 tokens", "weights", "optimizer", "framework"))
