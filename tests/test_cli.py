"""Commands beside `run`: help, check, preview, evaluate, merge, report, schema; the exit codes of mistakes."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pages
import pytest
import tiny

from hfpipe.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    tiny.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    assert main(["run", str(tiny.write(folder, tiny.recipe(folder, merge=False)))]) == 0
    return folder / "run"


@pytest.mark.parametrize(("arguments", "limit"), [(["--help"], 3), (["check", "--fast", "RECIPE"], 12)])
def test_what_should_be_instant_is(folder: Path, arguments: list[str], limit: float) -> None:
    """The limit is in imports of pydantic and yaml, about 0.1 s each time on a machine that is not slow."""
    recipe = str(tiny.write(folder, tiny.recipe(folder)))
    command = [sys.executable, "-m", "hfpipe", *(recipe if word == "RECIPE" else word for word in arguments)]
    assert processor_seconds(command) < limit * processor_seconds([sys.executable, "-c", "import pydantic, yaml"])


def processor_seconds(command: list[str]) -> float:
    """Returns those of the fastest of five runs: a busy machine may delay any one of them."""
    seconds = []
    for _ in range(5):
        begin = os.times()
        subprocess.run(command, check=True, capture_output=True)
        end = os.times()
        seconds.append(end.children_user + end.children_system - begin.children_user - begin.children_system)
    return min(seconds)


def test_letters_that_the_terminal_has_not_are_written_out(tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    recipe = tiny.write(tmp_path, tiny.recipe(tmp_path), "größe.yaml")
    command = [sys.executable, "-m", "hfpipe", "check", "--fast", str(recipe)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    found = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert found.returncode == 0, found.stderr
    assert rb"gr\xf6\xdfe.yaml: no fault found" in found.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_behind_the_output_is_told_in_a_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "hfpipe", "recipes"]
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert found.returncode == 4
    assert found.stderr.startswith("hfpipe: the disk is full")
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chekc", "x.yaml"], "hfpipe: there is no command 'chekc'. Did you mean check? `hfpipe --help` lists them."),
        (["eval", "x.yaml"], "hfpipe: there is no command 'eval'. Did you mean evaluate? `hfpipe --help` lists them."),
        (["run", "x.yaml", "--overide"], "hfpipe run: there is no option --overide. `hfpipe run --help` lists"),
        (["check", "x.yaml", "--verbos"], "hfpipe check: there is no option --verbos. `hfpipe check --help` lists"),
        (["new", "--taks", "chat"], "hfpipe new: there is no option --taks. Did you mean --task? `hfpipe new --help` "),
        (
            ["run", "x.yaml", "y.yaml"],
            "hfpipe run: there is no place for y.yaml. `hfpipe run --help` lists what it takes.",
        ),
        (["recipes", "--copy", "smollm"], "Did you mean preference-smollm2 or smollm2-fineweb?"),
        (["run", "rows.jsonl"], "holds rows, not a recipe. A recipe for them: hfpipe new --data rows"),
    ],
)
def test_a_word_that_is_none_is_told_in_a_paragraph_with_what_is_meant(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    try:
        code = main(words)
    except SystemExit as error:  # as argparse ends
        code = error.code  # type: ignore[assignment]
    assert code == 2
    told = capsys.readouterr().err.strip()
    assert said in told
    assert "\n" not in told


def test_five_mistakes_are_told_at_once_and_nothing_is_begun(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = tiny.recipe(folder, output_dir=str(folder / "never"))
    content["stages"][0]["training"]["learing_rate"] = 1e-3
    content["stages"][1]["lora"]["rank"] = 4
    content["stages"][1]["kind"] = "stf"
    content["evaluate"]["general"]["budget"] = "lots"
    content["model"]["architecture"]["hiden_size"] = 3
    assert main(["run", str(tiny.write(folder, content, "wrong.yaml"))]) == 2
    message = capsys.readouterr().err
    for word in ("learning_rate", "rank", "sft", "budget", "hidden_size"):
        assert word in message
    assert "wrong.yaml:" in message
    assert "Traceback" not in message
    assert not (folder / "never").exists()


@pytest.mark.slow
def test_check_tells_rows_tokens_steps_memory_and_disk(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tiny.write(folder, tiny.recipe(folder)))]) == 0
    page = capsys.readouterr().out
    for line in (
        "115,008 parameters",
        "300 rows",
        "97 rows",
        "6 steps of 4 rows",
        "7 steps of 16 rows",
        "GiB",
        "general: 40 rows",
    ):
        assert line in page


@pytest.mark.slow
def test_the_end_of_a_run_names_the_merge_before_what_needs_it(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(finished.parent / "tiny.yaml")]) == 0
    told = capsys.readouterr().out.split("use it:")[1]
    assert told.index("hfpipe merge") < told.index("hfpipe export")


def test_preview_shows_what_is_trained_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", str(tiny.write(folder, tiny.recipe(folder))), "--rows", "1"]) == 0
    page = capsys.readouterr().out
    assert "number 0: what does the cat say?[[ mew" in page


def test_preview_writes_a_page_token_by_token(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = tiny.recipe(folder)
    row = {"animal": "<img src=x onerror=alert(1)>", "sound": "<b>mew</b>", "note": "number 0"}
    (folder / "hostile.jsonl").write_text(json.dumps(row) + "\n")
    content["stages"][1]["data"][0]["data_files"] = str(folder / "hostile.jsonl")
    page = folder / "preview.html"
    recipe = str(tiny.write(folder, content, "hostile.yaml"))
    assert main(["preview", recipe, "--rows", "1", "--html", str(page)]) == 0
    assert "preview.html" in capsys.readouterr().out
    shown = pages.read(page)
    assert {tag for tag, _ in shown.elements} <= {
        "html",
        "head",
        "meta",
        "title",
        "body",
        "header",
        "h1",
        "p",
        "span",
    } | {
        "main",
        "section",
        "h2",
    }
    spans = re.findall(r'<span class="(trained|read)" title="\d+">(.*?)</span>', page.read_text(), re.DOTALL)
    trained = "".join(html.unescape(text) for kind, text in spans if kind == "trained")
    assert "<b>mew</b>" in trained
    assert "what does the" not in "".join(text for kind, text in spans[-30:] if kind == "trained")


def test_preview_tells_of_rows_without_a_token_to_train_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = tiny.recipe(folder)
    content["stages"][1]["training"]["max_length"] = 4
    assert main(["preview", str(tiny.write(folder, content, "short.yaml")), "--rows", "3"]) == 0
    assert "3 of 3 rows have no token to train on within max_length (4)" in capsys.readouterr().out


def test_preview_shows_the_label_of_a_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = tiny.recipe(folder)
    source = {"path": str(folder / "sounds.jsonl"), "columns": {"sentence": "note", "label": "sound"}}
    content["stages"] = [{"name": "class", "kind": "classification", "data": [source], "training": {"max_steps": 1}}]
    content |= {"evaluate": {}, "merge": False}
    assert main(["preview", str(tiny.write(folder, content, "class.yaml")), "--rows", "2"]) == 0
    page = capsys.readouterr().out
    assert "label 'mew'" in page
    assert "label 'bark'" in page
    assert "number 0" in page


@pytest.mark.slow
def test_evaluate_gives_the_scores_of_the_run(finished: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(tiny.write(folder, tiny.recipe(folder, merge=False)))
    assert main(["evaluate", str(finished), recipe, "--output", str(folder / "scores.json")]) == 0
    again = {(row["suite"], row["metric"]): row["value"] for row in json.loads((folder / "scores.json").read_text())}
    for (stage, suite, metric), value in tiny.scores(finished).items():
        if stage == "sounds":
            assert again[suite, metric] == pytest.approx(value, abs=1e-6)


@pytest.mark.slow
def test_merge_and_report_work_on_a_finished_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "report.md").read_text()
    (finished / "report.md").unlink()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.md").read_text() == before
    assert main(["merge", str(finished)]) == 0
    assert (finished / "stages" / "sounds" / "merged" / "model.safetensors").is_file()
    assert main(["merge", str(finished), "--stage", "prose"]) == 2
    assert "finished adapters: sounds" in capsys.readouterr().err


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["stages"]


def test_not_a_run_folder_is_told_in_one_paragraph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"data_files": "nowhere.jsonl"}, 2, "nowhere.jsonl"),
        ({"template": {"prompt": "{nothing}", "completion": "{sound}"}}, 5, "nothing"),
        ({"split": "validation"}, 2, "train"),
    ],
)
def test_wrong_data_ends_with_its_code(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], change: dict, code: int, words: str
) -> None:
    content = tiny.recipe(folder, output_dir=str(tmp_path / "run"), evaluate={}, merge=False)
    content["stages"] = content["stages"][1:]
    content["stages"][0]["data"][0] |= change
    assert main(["run", str(tiny.write(tmp_path, content))]) == code
    message = capsys.readouterr().err
    assert words in message
    assert "Traceback" not in message


SHARED_LETTERS = """
import datasets
import evaluate


class SharedLetters(evaluate.Metric):
    def _info(self):
        texts = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(texts))

    def _compute(self, predictions, references):
        shares = [len(set(p) & set(r)) / len(set(r)) for p, r in zip(predictions, references)]
        return {"shared_letters": sum(shares) / len(shares)}
"""


def test_any_other_metric_goes_to_evaluate_and_a_misspelt_one_is_refused_first(
    finished: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = folder / "shared_letters.py"
    script.write_text(SHARED_LETTERS)
    content = tiny.recipe(folder, merge=False)
    content["evaluate"]["sounds"]["metrics"] = [str(script)]
    path = str(tiny.write(folder, content, "metric.yaml"))
    assert main(["evaluate", str(finished), path, "--output", str(folder / "own.json")]) == 0
    row = next(row for row in json.loads((folder / "own.json").read_text()) if row["suite"] == "sounds")
    assert 0 <= row["value"] <= 1
    assert row["stderr"] > 0
    content["evaluate"]["sounds"]["metrics"] = ["acuracy"]
    content["output_dir"] = str(folder / "never")
    assert main(["run", str(tiny.write(folder, content, "metric.yaml"))]) == 2
    assert "Did you mean accuracy?" in capsys.readouterr().err
    assert not (folder / "never" / "stages").exists()
