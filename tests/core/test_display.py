"""The live display on a terminal, plain lines elsewhere, JSON: a command of a second that does nothing but tell."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from terminal import Terminal

from hfpipe.core.display import clock, sparkline

COMMAND = """
import os, sys, time
from hfpipe.core import display
display.start({mode!r})
display.say("first line")
display.say("odd rows", "warning")
with display.doing("tokenizing [bold]rows[/bold]"):
    for done in range(0, 200, 10):
        display.count(done, 200)
        time.sleep({pause})
display.scored("  base: general 4.4102", {{"suite": "general", "value": 4.4102}})
with display.training("prose (pretrain, stage 1 of 2)", 0, 20) as shown:
    for step in range(1, 21):
        shown.step, shown.row, shown.left = step, {{"tokens_per_second": 12448, "seconds_per_step": 0.1}}, 20 - step
        shown.losses.append(5 - step / 10)
        display.logged(f"  step {{step}}/20  loss", {{"step": step, "loss": 5 - step / 10}})
        time.sleep({pause})
display.table("prose", ("suite", "now"), [("general", "2.5932")], ["better"])
display.say("gained     general", "result")
print("a library's line")
{last}
display.close()
"""


def command(tmp_path: Path, mode: str | None, pause: float = 0.0, last: str = "") -> list[str]:
    path = tmp_path / "command.py"
    path.write_text(COMMAND.format(mode=mode, pause=pause, last=last))
    return [str(path)]


def piped(words: list[str]) -> tuple[str, str]:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_what_is_no_terminal_gets_plain_lines(tmp_path: Path) -> None:
    plain = piped(command(tmp_path, None))
    assert plain == piped(command(tmp_path, "auto")) == piped(command(tmp_path, "verbose"))
    lines = plain[0].splitlines()
    assert lines[:4] == ["first line", "odd rows", "  base: general 4.4102", "  step 1/20  loss"]
    assert lines[-2:] == ["gained     general", "a library's line"]
    assert len(lines) == 25


def test_quiet_leaves_warnings_and_results(tmp_path: Path) -> None:
    out, _ = piped(command(tmp_path, "quiet"))
    assert out.splitlines() == ["odd rows", "gained     general", "a library's line"]


def test_json_is_one_object_a_line_whatever_a_library_prints(tmp_path: Path) -> None:
    out, err = piped(command(tmp_path, "json"))
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["event"] for row in rows[:3]] == ["line", "warning", "score"]
    assert rows[2] | {"time": 0} == {"event": "score", "time": 0, "suite": "general", "value": 4.4102}
    assert [row["step"] for row in rows if row["event"] == "step"] == [*range(1, 21)]
    assert rows[-1]["text"] == "gained     general"
    assert err == "a library's line\n"


@pytest.mark.slow
@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_terminal_has_live_lines_that_fit(tmp_path: Path, columns: int) -> None:
    terminal = Terminal(command(tmp_path, "auto", 0.1), columns)
    assert terminal.end() == 0
    text = terminal.text
    assert ("tokenizing [bold]rows" if columns > 40 else "token") in text
    assert re.search(r"1[5-9]0/200", text)
    assert ("prose (pretrain" if columns > 40 else "pros") in text
    assert "12,448 tokens/s" in text
    assert "▁" in text
    assert "step 1/20" not in text  # the live lines have it
    assert max(map(len, text.splitlines())) <= columns
    assert "gained     general\na library's line" in text
    assert "2.5932" in text
    assert "\x1b[?25l" not in terminal.raw  # a process that is killed would leave the cursor hidden


@pytest.mark.slow
def test_verbose_has_every_line_too(tmp_path: Path) -> None:
    terminal = Terminal(command(tmp_path, "verbose", 0.05))
    assert terminal.end() == 0
    assert terminal.text.count("step 20/20") == 1


@pytest.mark.slow
def test_no_color_and_a_plain_terminal_are_heeded(tmp_path: Path) -> None:
    settings = ({}, {"NO_COLOR": "1"}, {"TERM": "dumb"}, {"PYTHONIOENCODING": "ascii"})
    line = command(tmp_path, "auto", 0.05)
    coloured, plain, dumb, letters = terminals = [Terminal(line, **words) for words in settings]
    assert [terminal.end() for terminal in terminals] == [0, 0, 0, 0]
    assert "\x1b" not in letters.raw
    assert "\x1b[33m" in coloured.raw
    assert "\x1b[33m" not in plain.raw
    assert "\x1b" not in dumb.raw


@pytest.mark.slow
def test_a_resize_and_a_fork_do_no_harm(tmp_path: Path) -> None:
    child = 'pid = os.fork()\nif pid == 0:\n    print("the child speaks")\n    os._exit(0)\nos.waitpid(pid, 0)'
    terminal = Terminal(command(tmp_path, "auto", 0.05, last=child), 120)
    time.sleep(1)
    terminal.resize(50)
    assert terminal.end() == 0
    assert "the child speaks" in terminal.text or "gained" in terminal.text


def test_a_sparkline_is_the_way_of_a_number() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"
    assert sparkline([1, 1, 9, 9], 2) == "▁█"
    assert sparkline([1.0], 8) == sparkline([], 8) == ""
    assert sparkline([2, float("nan"), 1, float("inf")], 8) == "█▁"
    assert len(sparkline([*range(1000)], 60)) == 60


def test_a_time_is_told_as_a_clock_does() -> None:
    assert [clock(5), clock(65), clock(3725)] == ["0:05", "1:05", "1:02:05"]


FIRST_SCORES = """
from hfpipe.core import display
from hfpipe.pipeline.context import show_scores
from hfpipe.scores.scorecard import Score
display.start("auto")
show_scores([Score("head", "held-out", "accuracy", 0.8, 0.1, 40, True)], "head")
display.close()
"""


@pytest.mark.slow
def test_a_first_score_has_no_empty_columns_beside_it(tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text(FIRST_SCORES)
    terminal = Terminal([str(tmp_path / "command.py")])
    assert terminal.end() == 0, terminal.text
    assert re.search(r"suite +metric +score", terminal.text)
    assert "80.0 %" in terminal.text
    assert "before" not in terminal.text
