"""A run on a terminal, as JSON and quiet; and what is told as it happens: waits for data, a rising loss, a plateau."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
import tiny
from terminal import Terminal

from hfpipe.cli import main
from hfpipe.stages.progress import Watch


def told(losses: list[float], wait: float = 0.0, seconds: float = 10.0, rate: float = 1e-4) -> list[str]:
    """The warnings about a stage with such a log."""
    watch = Watch()
    rows = [
        {"step": 10 * number, "loss": loss, "data_wait": wait, "learning_rate": rate}
        for number, loss in enumerate(losses, 1)
    ]
    return [warning for row in rows for warning in watch.look(row, seconds)]


def falling(count: int, noise: float = 0.02) -> list[float]:
    chance = random.Random(0)
    return [2 + 3 * 0.97**place + chance.gauss(0, noise) for place in range(count)]


def test_a_good_training_is_told_nothing() -> None:
    assert told(falling(100)) == []
    assert told(falling(100, noise=0.1)) == []
    assert told([2.0, 2.5, 1.8, 4.0, 1.9, 2.2, 2.1, 3.5, 1.8, 2.0, 2.2, 1.9, 2.4, 2.1]) == []


def test_waiting_for_data_is_told_once_after_a_while() -> None:
    [warning] = told(falling(30), wait=0.3)
    assert warning.startswith("30% of the time is spent waiting for data")
    assert "hfpipe prepare" in warning
    assert told(falling(4), wait=0.3, seconds=1.0) == []
    assert told(falling(30), wait=0.05) == []


def test_a_rising_loss_is_told_once_and_one_hard_batch_is_not() -> None:
    [warning] = told([*falling(50), *(3 + 0.2 * place for place in range(20))])
    assert warning.startswith("the loss rises")
    assert "learning_rate" in warning
    spiked = falling(50)
    spiked[40] = 9.0
    assert told(spiked) == []


def test_a_plateau_is_told_unless_the_learning_rate_has_decayed() -> None:
    flat = [*falling(20), *(2.0 + 0.01 * (place % 3) for place in range(60))]
    [warning] = told(flat)
    assert warning.startswith("the loss has not fallen since step")
    watch = Watch()
    rows = [
        {"step": place, "loss": loss, "data_wait": 0.0, "learning_rate": 1e-4 * (1 - place / len(flat)) ** 2}
        for place, loss in enumerate(flat)
    ]
    assert [warning for row in rows for warning in watch.look(row, 1.0)] == []


@pytest.mark.slow
@pytest.mark.long
def test_json_tells_stages_steps_scores_and_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_data(tmp_path)
    path = str(tiny.write(tmp_path, tiny.recipe(tmp_path, merge=False)))
    assert main(["run", path, "--json", "--set", "stages.prose.training.logging_steps=2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows if row["event"] == "stage"] == ["prose", "sounds"]
    steps = [row for row in rows if row["event"] == "step" and row["stage"] == "prose"]
    assert [(row["step"], row["max_steps"]) for row in steps] == [(2, 6), (4, 6), (6, 6)]
    logged = (tmp_path / "run/stages/prose/log.jsonl").read_text().splitlines()
    assert [json.loads(row)["max_steps"] for row in logged] == [6, 6, 6]
    assert steps[0].keys() >= {"loss", "max_steps", "seconds_left", "tokens_per_second", "data_wait", "peak_memory"}
    trained = {row["stage"]: row for row in rows if row["event"] == "trained"}
    for name in ("prose", "sounds"):
        total = json.loads((tmp_path / f"run/stages/{name}/cost.json").read_text())["total"]
        keys = ("steps", "tokens", "training_seconds", "peak_memory", "predicted_memory")
        assert {key: trained[name][key] for key in keys} == {key: total[key] for key in keys}
    assert trained["prose"]["peak_memory"] >= steps[-1]["peak_memory"] > 0
    scores = {(row["stage"], row["suite"], row["metric"]): row["value"] for row in rows if row["event"] == "score"}
    assert scores == tiny.scores(tmp_path / "run")
    assert rows[-1]["event"] == "end"
    assert rows[-1]["exit_code"] == 0
    assert main(["run", path, "--json", "--set", "evaluate.general.metrics=[nonsense]"]) == 2
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["event"] for row in rows[-2:]] == ["error", "end"]
    assert "nonsense" in rows[-2]["text"]
    assert main(["run", path, "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not any("skipped" in line for line in lines)
    assert any(line.startswith("gained") for line in lines)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_on_a_terminal_is_live_and_ctrl_c_saves(tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, merge=False)
    content["stages"] = content["stages"][:1]
    content["stages"][0]["training"] |= {"logging_steps": 1, "max_steps": 2000}
    path = str(tiny.write(tmp_path, content))
    terminal = Terminal(["-m", "hfpipe", "run", path])
    begin = time.monotonic()
    while "loss" not in terminal.text and time.monotonic() - begin < 60:
        time.sleep(0.2)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 75, terminal.text
    text = terminal.text
    assert "prose (pretrain, stage 1 of 1)" in text
    assert "step 1/2000" not in text
    assert "bits_per_byte ↓" in text
    last = [line for line in text.splitlines() if line.strip()]
    assert any(line.startswith("hfpipe: stopped by a signal at step") for line in last[-4:]), last[-6:]
    assert "Traceback" not in text
