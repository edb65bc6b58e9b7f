"""`hfpipe diff A B`: keys, scores, answers and cost of two made-up runs, each paired where it can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from hfpipe.cli import main
from hfpipe.evaluation.metrics import load_metric
from hfpipe.scores.scorecard import Score, write_scorecard

ROWS = 40
HOSTILE = "\x1b[2Jgone"


def made_up(folder: Path, name: str, right: int, *, rank: int = 4, bits: float = 1.5, **changes: Any) -> Path:
    """A run whose stage `sounds` answers the first `right` of its rows rightly; its data lie in `folder`."""
    content = tiny.recipe(folder, **changes)
    del content["output_dir"]
    content["name"] = name
    content["stages"][1]["lora"]["r"] = rank
    content["evaluate"]["sounds"]["metrics"] = ["exact_match"]
    run = folder / name
    place = run / "stages" / "sounds"
    (place / "predictions").mkdir(parents=True)
    tiny.write(run, content, "recipe.yaml")
    records = []
    for row in range(ROWS):
        answer = {"prediction": "mew" if row < right else HOSTILE, "reference": "mew"}
        records.append(
            {"row": row, "asked": f"number {row}", "generation": answer, "values": {"exact_match": float(row < right)}}
        )
    (place / "predictions" / "sounds.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    result = load_metric("exact_match").compute(
        predictions=[one["generation"]["prediction"] for one in records], references=["mew"] * ROWS
    )
    ends = {key: result[key] for key in ("stderr", "low", "high", "n")}
    base = Score("base", "sounds", "exact_match", 0.0, 0.0, ROWS, True)
    scores = [
        base,
        Score("sounds", "sounds", "exact_match", right / ROWS, higher_is_better=True, **ends),
        Score("sounds", "general", "bits_per_byte", bits, 0.1, ROWS, False),
    ]
    write_scorecard(scores, run / "scorecard.json")
    cost = {
        "attempts": 1,
        "measured": 0,
        "energy_by": None,
        "country": None,
        "device": "CPU",
        "tokens": 1000 * rank,
        "seconds": 60.0,
    }
    cost["peak_memory"] = rank * 2**30
    (place / "cost.json").write_text(json.dumps({"stage": "x", "attempts": [], "total": cost}))
    facts = {"hardware": {"gpus": [], "cpus": 2, "system": "Linux"}, "launch": {"processes": 1}}
    facts |= {"packages": {"torch": f"2.{rank}"}, "python": "3.11", "hfpipe": "0", "trust_remote_code": False}
    facts |= {"base": {"id": str(run), "revision": None}}
    (run / "environment.json").write_text(json.dumps(facts))
    return run


def test_two_runs_are_told_apart_by_keys_paired_scores_answers_and_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = made_up(tmp_path, "one", 10), made_up(tmp_path, "two", 30, rank=8, bits=1.6)
    assert main(["diff", str(a), str(b)]) == 0
    page = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in page.splitlines()]
    assert f"A {a}, stage sounds" in lines
    assert "stages.sounds.lora.r 4 → 8" in lines
    assert "name one → two" not in lines, "every two runs differ in it"
    paired = next(line for line in lines if line.startswith("sounds exact_match"))
    # 20 of 40 rows changed, all one way: a paired error of 8 points, where two independent shares have 10
    assert paired == "sounds exact_match 25.0 % → 75.0 %: 50.0 points better (33.8 to 66.2)"
    assert "independent" in next(line for line in lines if line.startswith("general bits_per_byte 1.5000 → 1.6000"))
    assert lines.count("sounds row 10: better (exact_match 0 → 1)") == 1
    assert "tokens 4,000 → 8,000" in lines
    assert "peak memory 4.00 GiB → 8.00 GiB" in lines
    assert "packages.torch 2.4 → 2.8" in lines
    assert "\x1b" not in page, "what a model says does not steer the terminal"
    assert r"A \x1b[2Jgone" in lines


def test_suites_that_differ_are_not_compared_and_rows_that_changed_are_not_paired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = made_up(tmp_path, "one", 10), made_up(tmp_path, "two", 30)
    file = b / "stages" / "sounds" / "predictions" / "sounds.jsonl"
    kept = file.read_text()
    file.write_text(kept.replace("number 7", "number seven"))
    assert main(["diff", str(a), str(b)]) == 0
    assert "50.0 points better" in (told := capsys.readouterr().out)
    assert "taken as independent" in told
    assert "answers" not in told
    file.write_text(kept)
    recipe = b / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("asked.jsonl", "other.jsonl"))
    assert main(["diff", str(a), str(b)]) == 0
    told = capsys.readouterr().out
    assert "points better" not in told
    assert "A alone, as the suites differ: sounds exact_match 25.0 %" in told
    assert "evaluate.sounds.data.data_files" in told


def test_a_run_beside_itself_has_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_up(tmp_path, "one", 10)
    assert main(["diff", str(run), str(run)]) == 0
    told = capsys.readouterr().out
    assert "recipe: no key differs" in told
    assert "sounds exact_match 25.0 % → 25.0 %: unchanged" in told
    assert "answers" not in told


def test_a_folder_without_scores_or_such_a_stage_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = made_up(tmp_path, "one", 10), made_up(tmp_path, "two", 30)
    assert main(["diff", str(a), str(b), "--stage", "sound"]) == 2
    assert "Did you mean sounds?" in capsys.readouterr().err
    (b / "scorecard.json").unlink()
    assert main(["diff", str(a), str(b)]) == 2
    assert "has no scores yet" in capsys.readouterr().err
    assert main(["diff", str(a), str(tmp_path / "three")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
