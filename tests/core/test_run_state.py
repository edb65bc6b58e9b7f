"""A damaged file of a run folder is told by its name, whatever is wrong with it, and is never a fault of hfpipe."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from pushing import make_run

from hfpipe.cli import main
from hfpipe.core.run_state import SHAPES, fault_of_value, require_whole_state

BROKEN = [b"", b"{", b'{"a": 1', b"null", b"[[1]]", b"3", b'"x"', b"\xff\xfe\x00", b"[" * 100_000]


def example(shape: Any) -> Any:
    """Returns a value of a shape, with everything in it that may be there."""
    if isinstance(shape, tuple):
        return example(shape[0])
    if isinstance(shape, list):
        return [example(shape[0])]
    if isinstance(shape, dict):
        return {"any" if name is str else name.removeprefix("?"): example(part) for name, part in shape.items()}
    return {str: "x", int: 1, float: 0.5, bool: True, dict: {}, list: []}.get(shape)


def place(folder: Path, pattern: str) -> Path:
    path = folder / pattern.replace("stages/*", "stages/chat").replace("*", "general")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize("pattern", SHAPES)
def test_every_file_is_looked_at_before_it_is_read(
    pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    path = place(run, pattern)
    path.write_text(json.dumps(example(SHAPES[pattern][0])) + "\n")
    require_whole_state(run)
    for content in BROKEN:
        path.write_bytes(content)
        if path.suffix == ".jsonl" and not content:
            continue  # no row yet
        if path.name == "log.jsonl" and b"\n" not in content:
            content += b"\n"
            path.write_bytes(content)
        assert main(["report", str(run)]) == 5, content[:20]
        said = capsys.readouterr().err
        assert f"{path} is damaged" in said
        assert "Traceback" not in said
        assert len(said) < 1500


@pytest.mark.parametrize("pattern", SHAPES)
def test_every_value_of_it_has_to_be_there_and_of_its_kind(pattern: str) -> None:
    shape, _ = SHAPES[pattern]
    whole = example(shape)
    assert fault_of_value(whole, shape) is None

    def leaves(value: Any, steps: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        inner = [found for key, item in items for found in leaves(item, (*steps, key))]
        return inner or ([steps] if steps else [])

    for steps in leaves(whole):
        for odd in (object, [None], {"a": [None]}):
            spoilt = copy.deepcopy(whole)
            outer = spoilt
            for step in steps[:-1]:
                outer = outer[step]
            if odd is object:
                outer[steps[-1]] = float("nan")
            elif isinstance(outer[steps[-1]], type(odd)):
                continue
            else:
                outer[steps[-1]] = odd
            why = fault_of_value(spoilt, shape)
            assert why is not None
            assert str(steps[-1]) in why


def test_a_log_whose_last_line_was_cut_by_a_kill_is_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "stages/chat/log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    require_whole_state(run)
