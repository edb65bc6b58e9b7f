"""The main promises, through the command line and the run folder: one run, run again, killed, divided, merged."""

import json
import re
import signal
import time
from pathlib import Path

import pytest
import tiny
import torch
from pages import require_scores_of
from safetensors.torch import load_file

from hfpipe.cli import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, the recipe, and its finished run."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_data(folder)
    assert main(["run", str(tiny.write(folder, tiny.recipe(folder)))]) == 0
    return folder


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    folder = run / "stages" / stage / "model"
    return load_file(next(path for path in folder.glob("*.safetensors")))


def assert_same_weights(one: Path, other: Path, tolerance: float = 0.0) -> None:
    for stage in ("prose", "sounds"):
        first, second = weights(one, stage), weights(other, stage)
        assert first.keys() == second.keys()
        for name in first:
            assert (first[name] - second[name]).abs().max() <= tolerance, f"{stage}: {name}"


@pytest.mark.slow
def test_the_run_folder_holds_what_the_design_says(finished: Path) -> None:
    run = finished / "run"
    for name in ("recipe.yaml", "environment.json", "scorecard.json", "report.md"):
        assert (run / name).is_file()
    for stage in ("prose", "sounds"):
        folder = run / "stages" / stage
        assert (folder / "model").is_dir()
        assert not list(folder.glob("checkpoint-*"))
        assert (folder / "done.json").is_file()
        assert all(json.loads(line)["loss"] > 0 for line in (folder / "log.jsonl").read_text().splitlines())
    assert not [path for path in run.rglob("*") if path.suffix in {".bin", ".pt"}], "only safetensors leave a run"


@pytest.mark.slow
def test_the_scorecard_holds_every_suite_for_every_stage_and_shows_learning(finished: Path) -> None:
    found = tiny.scores(finished / "run")
    assert [key[0] for key in found] == [s for s in ("base", "prose", "sounds") for _ in range(4)]
    assert found["prose", "general", "bits_per_byte"] < found["base", "general", "bits_per_byte"] - 0.1
    rows = json.loads((finished / "run" / "scorecard.json").read_text())
    assert {(row["suite"], row["n"]) for row in rows} == {("general", 40), ("sounds", 30)}
    assert all(row["stderr"] >= 0 for row in rows)


@pytest.mark.slow
def test_the_report_says_what_the_scorecard_holds(finished: Path) -> None:
    require_scores_of(finished / "run")


@pytest.mark.slow
def test_the_lines_that_say_how_to_use_a_model_work_as_they_are(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(finished / "tiny.yaml")]) == 0
    told = capsys.readouterr().out.split("use it:\n")[1].split("\nnext:")[0]
    stages = finished / "run/stages"
    commands, code = told.split("  or in Python:\n")
    assert all(f"hfpipe {command} {finished / 'run'}" in commands for command in ("chat", "generate", "export"))
    codes = {"the terminal": "\n".join(line.removeprefix("  ") for line in code.splitlines())}
    for place in ("prose/model", "sounds/model", "sounds/merged"):
        card = (stages / place / "README.md").read_text()
        assert "More Information Needed" not in card
        codes[place] = card.split("```python\n")[1].split("```")[0]
    answers = {}
    for place, code in codes.items():
        exec(code.replace("max_new_tokens=200", "max_new_tokens=8"), {})
        answers[place] = capsys.readouterr().out
        assert answers[place].strip(), place
    assert answers["sounds/model"] == answers["sounds/merged"] == answers["the terminal"] != answers["prose/model"]


@pytest.mark.slow
def test_a_second_run_skips_everything_and_says_so(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished / "run"
    before = {path: path.stat().st_mtime_ns for path in run.glob("stages/*/model/*.safetensors")}
    assert main(["run", str(finished / "tiny.yaml")]) == 0
    assert {path: path.stat().st_mtime_ns for path in run.glob("stages/*/model/*.safetensors")} == before
    assert capsys.readouterr().out.count("done before, skipped") == 2


@pytest.mark.slow
def test_the_resolved_recipe_reproduces_the_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(finished / "run" / "recipe.yaml")]) == 0
    assert capsys.readouterr().out.count("done before, skipped") == 2


@pytest.mark.slow
def test_merged_is_adapter_for_plain_transformers_and_peft(finished: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stage = finished / "run" / "stages" / "sounds"
    adapter = AutoPeftModelForCausalLM.from_pretrained(stage / "model", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(stage / "merged", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(stage / "merged")("The fox sat by the hill", return_tensors="pt").input_ids
    with torch.no_grad():
        trained, plain = adapter(ids).logits, merged(ids).logits
        with adapter.disable_adapter():
            base = adapter(ids).logits
    assert torch.allclose(trained, plain, atol=1e-4)
    assert not torch.allclose(trained, base, atol=1e-3)


def killed_and_continued(folder: Path, stage: str, step: int, number: signal.Signals, code: int) -> str:
    """Sends a signal to a run when a checkpoint is whole, runs it again, and returns the second output."""
    path = tiny.write(folder, tiny.recipe(folder))
    process = tiny.start("run", str(path))
    manifest = folder / "run" / "stages" / stage / f"checkpoint-{step}" / "manifest.json"
    deadline = time.monotonic() + 120
    while not manifest.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    again = tiny.start("run", str(path))
    output = again.communicate(timeout=180)[0]
    assert again.returncode == 0, output
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "step", "number", "code"),
    [("prose", 2, signal.SIGKILL, -9), pytest.param("sounds", 3, signal.SIGTERM, 75, marks=pytest.mark.long)],
    ids=["kill -9", "SIGTERM"],
)
def test_interrupted_is_uninterrupted(
    finished: Path, tmp_path: Path, stage: str, step: int, number: signal.Signals, code: int
) -> None:
    tiny.write_data(tmp_path)
    output = killed_and_continued(tmp_path, stage, step, number, code)
    assert "continuing from checkpoint-" in output
    assert_same_weights(finished / "run", tmp_path / "run")
    assert tiny.scores(finished / "run") == tiny.scores(tmp_path / "run")


@pytest.mark.slow
def test_two_ranks_are_one_rank(finished: Path, tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    path = tiny.write(tmp_path, tiny.recipe(tmp_path))
    config = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu.yaml"
    launch = ("accelerate.commands.launch", "--config_file", str(config))
    process = tiny.start("run", str(path), launch=launch)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["launch"]["processes"] == 2
    one, two = tiny.scores(finished / "run"), tiny.scores(tmp_path / "run")
    assert one.keys() == two.keys()
    assert two == pytest.approx(one, abs=2e-4)


@pytest.mark.slow
def test_division_of_a_global_batch_does_not_matter(finished: Path, tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path)
    for stage in content["stages"]:
        stage["training"]["per_device_train_batch_size"] = 1
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    assert_same_weights(finished / "run", tmp_path / "run", tolerance=2e-4)


@pytest.mark.slow
def test_a_rotten_checkpoint_is_passed_over_and_a_changed_stage_is_moved_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, merge=False, evaluate={})
    del content["stages"][1]
    path = tiny.write(tmp_path, content)
    process = tiny.start("run", str(path))
    stage = tmp_path / "run" / "stages" / "prose"
    while not (stage / "checkpoint-4" / "manifest.json").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    process.kill()
    process.communicate()
    with (stage / "checkpoint-4" / "model.safetensors").open("r+b") as file:
        file.seek(2000)
        file.write(b"rotten")
    assert main(["run", str(path)]) == 0
    output = capsys.readouterr().out
    assert "checkpoint-4 was passed over: model.safetensors has other content" in output
    assert "continuing from checkpoint-2" in output
    assert main(["run", str(path), "--set", "stages.prose.training.learning_rate=1e-3"]) == 0
    assert "earlier work is now in" in capsys.readouterr().out
    assert len(list(stage.parent.glob("prose.*/model"))) == 1


@pytest.mark.slow
def test_qlora_trains_on_a_cpu_and_merges(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path)
    content["stages"][1]["quantization"] = "nf4"
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    run = tmp_path / "run"
    assert (run / "stages" / "sounds" / "merged" / "model.safetensors").is_file()
    moved = [tensor for name, tensor in weights(run, "sounds").items() if "lora_B" in name]
    assert moved
    assert all(tensor.abs().max() > 0 for tensor in moved)
    merge = json.loads((run / "stages" / "sounds" / "merge.json").read_text())
    whole, full = "dequantized", "in full precision"
    assert merge["base"] == min(merge["costs"], key=merge["costs"].get)
    assert merge["costs"][whole] < merge["costs"][full] / 3, "the adapter was trained on the rounded weights"
    assert f"| sounds | {whole} |" in (run / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.long
def test_a_merge_that_would_lose_too_much_ends_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In bfloat16 the sum of base and adapter is rounded, so a merge loses something."""
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, merge={"max_loss": 0.0})
    content["model"]["dtype"] = "bfloat16"
    content["stages"][1]["training"] |= {"learning_rate": 2.0, "max_grad_norm": 1000}  # a large adapter is rounded more
    assert main(["run", str(tiny.write(tmp_path, content))]) == 3
    assert "would lose more than merge.max_loss" in capsys.readouterr().err
    sounds = tmp_path / "run" / "stages" / "sounds"
    assert (sounds / "model" / "adapter_model.safetensors").is_file()
    assert not (sounds / "merged").exists()
    assert main(["run", str(tmp_path / "tiny.yaml"), "--set", "merge={max_loss: 10.0}"]) == 0
    assert (sounds / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_budget_that_is_exceeded_ends_with_3_and_merges_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path)
    content["evaluate"]["general"]["budget"] = "1%"
    sounds = content["stages"][1]
    beside = {**sounds, "name": "beside", "parent": "prose", "training": {**sounds["training"], "learning_rate": 1e-9}}
    content["stages"] += [{**sounds, "name": "after", "parent": "sounds"}, beside]
    sounds["training"] |= {"learning_rate": 0.5, "max_grad_norm": 1000}
    assert main(["run", str(tiny.write(tmp_path, content))]) == 3
    said = capsys.readouterr()
    message = said.err
    assert "after: not trained, as sounds is over a budget" in said.out
    assert not (tmp_path / "run" / "stages" / "after").exists()
    assert (tmp_path / "run" / "stages" / "beside" / "done.json").is_file()
    assert "stage sounds lost" in message
    assert "stage beside" not in message
    assert "budget of 1.0%" in message
    assert not (tmp_path / "run" / "stages" / "sounds" / "merged").exists()
    assert (tmp_path / "run" / "report.md").is_file()


@pytest.mark.slow
def test_a_batch_that_does_not_divide_says_what_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path)
    content["stages"][0]["training"]["per_device_train_batch_size"] = 3
    assert main(["run", str(tiny.write(tmp_path, content))]) == 2
    assert "3 or 6 would do" in capsys.readouterr().err


@pytest.mark.slow
def test_too_many_dirty_rows_end_the_run_with_their_names_and_exit_code_5(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_data(tmp_path)
    prose = tmp_path / "prose.jsonl"
    lines = prose.read_text().splitlines()
    for number in range(0, 300, 50):
        lines[number] = json.dumps({"id": f"bad{number}", "text": None if number else "  "})
    prose.write_text("\n".join(lines) + "\n")
    content = tiny.recipe(tmp_path, evaluate={}, merge=False)
    content["stages"] = content["stages"][:1]
    content["stages"][0]["training"]["max_steps"] = 40
    path = tiny.write(tmp_path, content)
    assert main(["run", str(path)]) == 5
    error = capsys.readouterr().err
    assert "bad50" in error
    assert "max_dirty_share" in error
    assert "Traceback" not in error
    assert main(["run", str(path), "--set", "stages.prose.max_dirty_share=2.5%"]) == 0
    facts = json.loads((tmp_path / "run" / "stages" / "prose" / "done.json").read_text())["data"]["sources"]["0: json"]
    assert set(facts["dirty"]) == {"missing", "empty"}
    assert "bad250" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.slow
def test_a_source_that_stops_is_read_once_and_ends_the_training(tmp_path: Path, capsys) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False)
    stage = content["stages"][0]
    content["stages"] = [stage]
    stage["exhausted"] = "stop"
    stage["training"] = {"max_steps": 1_000, "learning_rate": "2e-3", "max_length": 64, "save_strategy": "no"}
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    done = json.loads((tmp_path / "run" / "stages" / "prose" / "done.json").read_text())
    assert done["data"]["documents"] == 300
    assert done["data"]["sources"]["0: json"]["epochs"] == 1
    assert done["steps"] < 1_000
    assert f"the data ended at step {done['steps']} of 1,000" in capsys.readouterr().out


@pytest.mark.slow
def test_the_page_stands_alone_and_holds_the_numbers_of_the_scorecard(finished: Path) -> None:
    page = (finished / "run" / "report.html").read_text()
    body = re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
    assert not re.search(r"<(script|link|img|iframe)|@import|url\(http|src=", body)
    assert page.count(" by stage: ") == 4, "a plot for each score"
    assert page.count('<svg role="img" aria-label="Training loss of stage ') == 2
    require_scores_of(finished / "run")
    before = page
    (finished / "run" / "report.html").unlink()
    assert main(["report", str(finished / "run")]) == 0
    assert (finished / "run" / "report.html").read_text() == before, "the same run gives the same page"
