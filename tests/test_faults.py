"""A tenth of what `make faults` tries: no spoilt input ends in a traceback, exit code 1, a crash or a hang."""

from __future__ import annotations

from pathlib import Path

import faults
import pytest

SHARE = {kind: count // 10 for kind, count in faults.COUNTS.items()}  # about two minutes of one core


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("spoilt")
    faults.prepare(home)
    return home


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", SHARE)
def test_no_spoilt_input_is_told_as_a_fault_of_hfpipe(kind: str, home: Path) -> None:
    tried = list(faults.in_processes(kind, home, range(SHARE[kind])))
    assert len({one.number for one in tried}) == SHARE[kind]
    assert not [one for one in tried if one.is_fault], faults.summary([one for one in tried if one.is_fault])
    assert len({one.code for one in tried}) > 1, "nothing was refused: is anything spoilt?"
