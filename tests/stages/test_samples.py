"""`samples:` of a stage: answers to its prompts at steps, kept beside each other, without changing what is trained."""

import json
from pathlib import Path
from typing import Any

import pages
import pytest
import tiny

from hfpipe.cli import main
from hfpipe.core.files import hash_of_file

PROMPT = "what does the <b>cat</b> say?"


def recipe(folder: Path, samples: dict[str, Any] | None, name: str = "run", **training: Any) -> str:
    """Two stages, of which the first keeps samples, and asks for a plain text."""
    content = tiny.recipe(folder, merge=False, output_dir=str(folder / name))
    rows = [
        {"prompt": f"what does the {animal} say?", "completion": f" {tiny.SOUNDS[animal]}"} for animal in tiny.ANIMALS
    ]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 20))
    content["stages"][1]["data"] = [{"path": str(folder / "asked.jsonl")}]
    content["evaluate"] = {"general": content["evaluate"]["general"]}
    for stage in content["stages"]:
        stage["training"] |= training
        if samples is not None:
            stage["samples"] = samples
    return str(tiny.write(folder, content, f"{name}.yaml"))


def samples(folder: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "stages" / stage / "samples.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.long
def test_samples_stand_beside_each_other_and_change_no_weight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_data(tmp_path)
    asked = {"prompts": [PROMPT, "The dog sat"], "every": 4, "max_new_tokens": 5}
    assert main(["run", recipe(tmp_path, asked)]) == 0
    said = capsys.readouterr().out
    assert f"sample at step 4: {PROMPT} -> " in said
    assert [row["step"] for row in samples(tmp_path / "run", "prose")] == [0, 0, 4, 4, 6, 6]
    assert {row["prompt"] for row in samples(tmp_path / "run", "sounds")} == {PROMPT, "The dog sat"}
    page = pages.read(tmp_path / "run" / "report.html")
    table = page.tables["Samples while prose trained"]
    assert table[0] == ["step", PROMPT, "The dog sat"]
    assert [row[0] for row in table[1:]] == ["0", "4", "6"]
    assert main(["run", recipe(tmp_path, None, "without")]) == 0
    for stage in ("prose/model/model.safetensors", "sounds/model/adapter_model.safetensors"):
        one, other = (hash_of_file(tmp_path / name / "stages" / stage) for name in ("run", "without"))
        assert one == other
    capsys.readouterr()
    assert main(["run", recipe(tmp_path, {"prompts": ["Others"]})]) == 0  # the same stages, done before
    assert "sounds: done before, skipped" in capsys.readouterr().out


def test_prompts_that_make_no_row_are_refused_by_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path)
    content["stages"][1]["samples"] = {"prompts": ["cat"]}  # its template is made of two columns
    assert main(["check", str(tiny.write(tmp_path, content))]) == 2
    assert (
        "stages.sounds.samples: the stage's template builds a prompt of the columns note, animal"
        in capsys.readouterr().err
    )


def test_samples_of_what_writes_no_text_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = tiny.recipe(tmp_path)
    content["model"]["architecture"] = tiny.ENCODER
    content["stages"] = [{**content["stages"][0], "objective": "masked", "samples": {"prompts": ["cat"]}}]
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    assert "a model of masked tokens writes none" in capsys.readouterr().err
    content["stages"][0] |= {"samples": {"prompts": [], "evry": 3}}
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    assert "every" in capsys.readouterr().err
