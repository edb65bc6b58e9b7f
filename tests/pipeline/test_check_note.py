"""The note of `hfpipe check`: a mark before each finding, a remedy below a flaw, the line that starts the run."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import terminal
import tiny

from hfpipe.cli import main

MARKS = ("✓", "!", "✗")


class Terminal(io.StringIO):
    """Standard output as a terminal."""

    def isatty(self) -> bool:
        return True


def written(folder: Path, **changes: Any) -> str:
    tiny.write_data(folder)
    content = tiny.recipe(folder, merge=False)
    content["stages"] = content["stages"][1:]
    content["stages"][0]["training"] |= changes
    template = content["stages"][0]["data"][0]["template"]
    content["stages"][0]["data"][0]["template"] = {**template, "completion": " {sound}" * 6}
    return str(tiny.write(folder, content))


def findings(page: str) -> list[tuple[str, str, list[str]]]:
    """Mark, label, and the lines of each finding."""
    found: list[tuple[str, str, list[str]]] = []
    for line in page.splitlines():
        if line[:1] in MARKS:
            found.append((line[0], line[2:12].strip(), [line[13:]]))
        elif line.startswith("   ") and found:
            found[-1][2].append(line.strip())
    return found


def test_a_flaw_of_the_data_is_marked_with_its_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = written(tmp_path, max_length=14)
    assert main(["check", recipe, "--set", f"output_dir={tmp_path}/a run"]) == 0
    page = capsys.readouterr().out
    assert "\x1b" not in page
    told = findings(page)
    flawed = [lines for mark, label, lines in told if (mark, label) == ("!", "data")]
    assert any("longer than max_length (14)" in lines[0] and "training.max_length" in lines[1] for lines in flawed)
    few = [lines[0] for mark, label, lines in told if (mark, label) == ("!", "suite")]
    assert len(few) == 2, "30 and 40 rows are few"
    assert {label for mark, label, _ in told if mark == "✓"} >= {"model", "data", "stage", "memory", "overlap", "disk"}
    many = sum(mark == "!" for mark, _, _ in told[:-1])
    assert f"no fault found, {many} things to look at" in page
    assert page.splitlines()[-1].endswith(f"hfpipe run {recipe} --set 'output_dir={tmp_path}/a run'")


def test_a_fault_ends_the_note_in_red(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = written(tmp_path, max_length=64)
    (tmp_path / "asked.jsonl").write_text("")
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["check", recipe]) == 5
    assert screen.getvalue().rstrip().endswith("\x1b[31m✗\x1b[0m a run would stop here:")
    assert "asked.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("plain", [False, True])
def test_a_terminal_has_colours_and_short_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool) -> None:
    recipe = written(tmp_path, max_length=14)
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("NO_COLOR", "1" if plain else "")
    assert main(["check", recipe]) == 0
    page = screen.getvalue()
    assert ("\x1b[33m!" in page) is not plain
    note = re.sub(r"\x1b\[\d+m", "", page).partition("\n\n")[0].splitlines()
    assert max(len(line) for line in note if "/" not in line) <= 70, "a path is not broken"


def test_suites_without_overlap_share_a_line_for_each_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def words(of: str, rows: int) -> list[str]:
        return [" ".join(f"{of}{10 * row + word}" for word in range(9)) for row in range(rows)]

    def source(name: str, texts: list[str]) -> dict[str, Any]:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return {"path": "json", "data_files": str(tmp_path / f"{name}.jsonl"), "split": "train"}

    content = tiny.recipe(tmp_path, merge=False, shift=False)
    trained = words("a", 30)
    stage = {**content["stages"][0], "data": [source("first", trained), source("second", words("b", 40))]}
    suites = {
        "known": [trained[3], *words("c", 4)],
        "near": [trained[4].replace("a42", "other"), *words("d", 4)],
        "one": words("e", 5),
        "two": words("f", 5),
        "three": words("g", 5),
    }
    content["evaluate"] = {
        name: {"data": source(name, rows), "metrics": ["bits_per_byte"]} for name, rows in suites.items()
    }
    recipe = str(tiny.write(tmp_path, content | {"stages": [stage]}))
    assert main(["check", recipe]) == 0
    told = [(mark, lines[0]) for mark, label, lines in findings(capsys.readouterr().out) if label == "overlap"]
    first, second = "30 rows of stages.prose (json)", "40 rows of stages.prose (json)"
    (mark, copied), *rest = told
    assert mark == "!"
    assert copied.startswith(f"suite known: 1 of 5 rows stands in {first}, as a whole")
    near = "1 short one is near to rows of it, within about a word"
    assert rest == [
        ("✓", f"suite near: no row stands in {first}; {near}"),
        ("✓", f"3 suites: no row stands in {first}"),
        ("✓", f"5 suites: no row stands in {second}"),
    ]
    assert main(["check", recipe, "--set", "evaluate.two=null", "--set", "evaluate.three=null"]) == 0
    told = [(mark, lines[0]) for mark, label, lines in findings(capsys.readouterr().out) if label == "overlap"]
    assert told[2:] == [("✓", f"suite one: no row stands in {first}"), ("✓", f"3 suites: no row stands in {second}")]


@pytest.mark.slow
def test_a_terminal_shows_what_check_waits_for_and_keeps_the_marks_in_colour(tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    shown = terminal.Terminal(["-m", "hfpipe", "check", str(tiny.write(tmp_path, tiny.recipe(tmp_path)))])
    assert shown.end() == 0, shown.text
    assert "importing torch, transformers and trl" in shown.text
    assert "\x1b[32m\u2713\x1b[0m model" in shown.raw
    assert "start it with:" in shown.text.splitlines()[-2]
