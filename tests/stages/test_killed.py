"""A run on a streamed source, stopped and continued: by `kill -9` at moments of chance, and on fewer ranks."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from datasets import Dataset, disable_progress_bars
from safetensors.torch import load_file

from hfpipe.cli import main

STEPS, KILLS = 60, 3


def recipe(folder: Path) -> Path:
    """One pretrain stage on three Parquet files of several row groups and a table, a step logged at a time."""
    disable_progress_bars()
    folder.mkdir()
    tiny.write_data(folder)
    rows = [json.loads(line) for line in (folder / "prose.jsonl").read_text().splitlines()]
    for number in range(3):
        Dataset.from_list(rows[number::3]).to_parquet(folder / f"{number}.parquet", batch_size=17)
    content = tiny.recipe(folder, evaluate={}, merge=False)
    content["stages"] = content["stages"][:1]
    source = {"path": "parquet", "data_files": str(folder / "*.parquet"), "streaming": True, "weight": 0.7}
    table = {"path": "json", "data_files": str(folder / "held.jsonl"), "weight": 0.3}
    training = {"max_steps": STEPS, "learning_rate": "2e-3", "max_length": 64, "save_steps": 4, "logging_steps": 1}
    content["stages"][0] |= {"data": [source, table], "training": training}
    return tiny.write(folder, content)


def steps_of(folder: Path) -> list[dict]:
    """The whole lines of the log."""
    path = folder / "run" / "stages" / "prose" / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in steps_of(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "stages" / "prose" / "model" / "model.safetensors")


def data(folder: Path) -> dict:
    return json.loads((folder / "run" / "stages" / "prose" / "done.json").read_text())["data"]


def wait_for(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Until a step is in the log."""
    deadline = time.monotonic() + 200
    while process.poll() is None and not any(row["step"] >= step for row in steps_of(folder)):
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("never") / "stopped"
    assert main(["run", str(recipe(folder))]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.long
def test_killed_at_random_moments_a_run_ends_with_the_same_weights_and_losses(whole: Path, tmp_path: Path) -> None:
    seed = time.time_ns() % 100_000
    print(f"seed {seed}")  # shown when the test fails
    chance = random.Random(seed)
    folder = tmp_path / "killed"
    path = recipe(folder)
    continued = []
    for goal in sorted(chance.sample(range(2, STEPS - 6), KILLS)):
        process = tiny.start("run", str(path))
        wait_for(process, folder, goal)
        time.sleep(chance.uniform(0, 0.05))  # between two lines, while a checkpoint is written, anywhere
        process.send_signal(signal.SIGKILL)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == -signal.SIGKILL, output
        continued.append("continuing from checkpoint-" in output)
        print(f"killed at step {steps_of(folder)[-1]['step']}")
    assert main(["run", str(path)]) == 0
    assert any(continued), "no run was continued"
    assert losses(folder) == losses(whole)
    assert [step for step, _ in losses(whole)] == list(range(1, STEPS + 1))
    assert data(folder) == data(whole)
    assert data(whole)["tokens"] == STEPS * 4 * 64
    shares = [source["token_share"] for source in data(whole)["sources"].values()]
    assert shares == pytest.approx([0.7, 0.3], abs=0.01)
    one, other = weights(whole), weights(folder)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].equal(other[name]), name


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks_that_were_stopped_are_continued_by_one(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    path = recipe(folder)
    config = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu.yaml"
    process = tiny.start("run", str(path), launch=("accelerate.commands.launch", "--config_file", str(config)))
    wait_for(process, folder, 7)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=100)[0]
    assert process.returncode != 0, output
    stopped = len(steps_of(folder))
    assert 7 <= stopped < STEPS
    assert main(["run", str(path)]) == 0
    assert [step for step, _ in losses(folder)] == list(range(1, STEPS + 1))
    assert [loss for _, loss in losses(folder)] == pytest.approx([loss for _, loss in losses(whole)], abs=2e-3)
    assert data(folder) == data(whole)
    for name, weight in weights(whole).items():
        assert (weight - weights(folder)[name]).abs().max() < 1e-2, name


@pytest.mark.slow
@pytest.mark.long
def test_minutes_bound_what_a_kill_costs_and_the_log_stays_that_of_one_run(tmp_path: Path) -> None:
    """Checkpoints between two lines of the log: the mean of the line after them is over all of its steps."""

    def short(name: str, **training: object) -> tuple[Path, Path]:
        path = recipe(tmp_path / name)
        content = yaml.safe_load(path.read_text())
        words = {"save_steps": 1000, "logging_steps": 25, "learning_rate": "2e-3", **training}
        content["stages"][0]["training"] |= words
        return tmp_path / name, tiny.write(tmp_path / name, content)

    plain, path = short("plain")
    assert main(["run", str(path)]) == 0
    folder, path = short("minutes", save_minutes=0.001)
    process = tiny.start("run", str(path))
    deadline = time.monotonic() + 200
    while not (found := list((folder / "run").glob("stages/prose/checkpoint-*/manifest.json"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert int(found[0].parent.name.rpartition("-")[2]) % 25
    assert main(["run", str(path)]) == 0
    assert losses(folder) == losses(plain)
