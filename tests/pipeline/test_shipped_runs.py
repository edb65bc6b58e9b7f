"""Every shipped recipe for the Hub runs to a scored, reported end, on stand-ins of the models and data that it names.

Nothing of a recipe is changed but sizes. See stand_ins.py for what is true of the stand-ins, and what is not.
"""

import contextlib
import io
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from hub_server import HubServer
from stand_ins import add_data, add_models

from hfpipe.cli import main
from hfpipe.core import ranks
from hfpipe.core.errors import RecipeError
from hfpipe.recipe import load_recipe
from hfpipe.recipe.shipped import shipped_recipes
from hfpipe.stages.trainer import divide_batch

RECIPES = {name: path for name, path in shipped_recipes().items() if "quickstart" not in name}
SIZES = {
    "fineweb-to-chat": {"push.repo_id": "me/fineweb-to-chat"},
    "preference-smollm2": {"evaluate.answers.generation.max_new_tokens": 8},
    "law-chat": {"evaluate.law.generation.max_new_tokens": 8},
    "medicine": {"evaluate.notes.generation.max_new_tokens": 8},
    "small-data": {"seeds": [1, 2], "stages.sst2.training.eval_steps": 1},
    "t5-summarization": {"evaluate.news.generation.max_new_tokens": 8},
    "t5-translation": {"evaluate.opus.generation.max_new_tokens": 8},
    "keep-chat": {"stages.maths.keep": "{replay: {rows: 8}}"},
    "keep-8b": {"stages.maths.keep.replay.rows": 8},
    "chat-translation": {f"evaluate.{suite}.generation": "{max_new_tokens: 8}" for suite in ("chinese", "german")},
}
Command = Callable[..., tuple[int, str]]


def said(*arguments: str) -> tuple[int, str]:
    """Exit code and output of a command."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
        code = main(list(arguments))
    return code, output.getvalue()


@pytest.fixture(scope="module")
def hfpipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """Commands in one other process, whose libraries have found our Hub when they were imported."""
    folder = tmp_path_factory.mktemp("hub")
    with HubServer() as hub, ProcessPoolExecutor(1, get_context("spawn")) as process:
        add_models(hub, folder)
        add_data(hub, folder)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in hub.env(folder / "home").items():
                patch.setenv(name, value)
            process.submit(said, "recipes").result()
        yield lambda *arguments: process.submit(said, *arguments).result()


def sizes(name: str, folder: Path) -> list[str]:
    recipe = load_recipe(RECIPES[name])
    changes = {"output_dir": folder, "shift": "false", **SIZES.get(name, {})}
    for stage in recipe.stages:
        changes[f"stages.{stage.name}.training.max_steps"] = 2
        if stage.kind in ("pretrain", "translation"):
            changes[f"stages.{stage.name}.training.max_length"] = 64
    if name == "my-files":
        file = folder.parent / "my.jsonl"
        turns = [
            [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": f"{n + 1}"}] for n in range(80)
        ]
        file.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
        changes["stages.chat.data"] = f"[{{path: json, data_files: {file}, fold: {{of: 20, leave: 1}}}}]"
        changes["evaluate.held-out.data.data_files"] = file
    return [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_as_it_is_shipped(name: str, hfpipe: Command, tmp_path: Path) -> None:
    folder, recipe, words = tmp_path / "run", str(RECIPES[name]), sizes(name, tmp_path / "run")
    code, output = hfpipe("check", recipe, *words)
    assert code == 0, output
    code, output = hfpipe("run", recipe, *words)
    assert code == 0, output
    assert "Traceback" not in output
    run = folder / "seed-2" if name == "small-data" else folder
    planned = load_recipe(RECIPES[name])
    rows = json.loads((run / "scorecard.json").read_text())
    last = [row for row in rows if row["stage"] == planned.stages[-1].name]
    found = {(row["suite"], row["metric"]) for row in last}
    assert found == {(suite, metric) for suite, block in planned.evaluate.items() for metric in block.metrics}
    assert all(math.isfinite(row["value"]) and row["n"] > 0 for row in last)
    assert planned.name in (run / "report.md").read_text()
    code, output = hfpipe("evaluate", str(run), recipe, *words, "--output", str(tmp_path / "scores.json"))
    assert code == 0, output
    again = {(row["suite"], row["metric"]): row["value"] for row in json.loads((tmp_path / "scores.json").read_text())}
    assert again == {(row["suite"], row["metric"]): pytest.approx(row["value"], abs=1e-4) for row in last}


@pytest.mark.slow
def test_an_adapter_of_one_step_learns_and_one_without_a_learning_rate_is_refused(
    hfpipe: Command, tmp_path: Path
) -> None:
    recipe = str(RECIPES["sentiment"])
    words = [*sizes("sentiment", tmp_path / "run"), "--set", "merge=false", "--set", "evaluate=null"]
    code, output = hfpipe("run", recipe, *words, "--set", "stages.sst2.training.max_steps=1")
    assert code == 0, output
    words += ["--set", f"output_dir={tmp_path / 'none'}", "--set", "stages.sst2.training.learning_rate=0.0"]
    code, output = hfpipe("run", recipe, *words)
    assert code == 2, output
    assert "stage sst2: the adapter learned nothing" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_step_of_every_recipe_is_the_same_on_so_many_ranks(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "ranks", lambda: count)
    for path in RECIPES.values():
        for stage in load_recipe(path).stages:
            per_device, accumulation = divide_batch(stage)
            assert per_device * accumulation * count == stage.global_batch_size, path.name
            assert per_device <= stage.training["per_device_train_batch_size"], path.name


def test_a_step_of_very_many_rows_is_divided_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = load_recipe(RECIPES["sentiment"]).stages[0]
    training = {**stage.training, "per_device_train_batch_size": None}
    huge = stage.model_copy(update={"training": training, "global_batch_size": 2 * 10**12})
    monkeypatch.setattr(ranks, "ranks", lambda: 3)
    with pytest.raises(RecipeError, match="divides over 1, 2, 4, 5 ranks") as told:
        divide_batch(huge)
    assert len(str(told.value)) < 400
    monkeypatch.setattr(ranks, "ranks", lambda: 2)
    assert divide_batch(huge.model_copy(update={"global_batch_size": 2 * 999_999_999_989})) == (1, 999_999_999_989)
