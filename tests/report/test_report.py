"""The report from made-up run folders: every number is one of the JSON files, and any text looks as it is."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest
import tiny

from hfpipe.cli import main
from hfpipe.recipe import load_recipe
from hfpipe.report.price import comparisons
from hfpipe.report.samples import samples_of
from hfpipe.scores.scorecard import Change, Score, write_scorecard
from hfpipe.scores.wording import describe

HOSTILE = "<script>alert(1)</script> & `co|de`\n```\n# مرحبا بالعالم 你好世界 " + "w" * 900


def made_up(folder: Path, values: dict[str, dict[str, float]], stderr: float = 0.004) -> Path:
    """A run folder of `base`, `prose`, and the stages `full` and `lora` that start from it, with no model in it."""
    content = tiny.recipe(folder, merge=False)
    content["evaluate"]["general"]["budget"] = "5%"
    content["evaluate"]["sounds"]["metrics"] = ["exact_match"]
    one = content["stages"][1]
    both = [{**one, "name": name, "parent": "prose"} for name in ("full", "lora")]
    del both[0]["lora"]
    content["stages"] = [content["stages"][0], *both]
    run = folder / "run"
    run.mkdir()
    tiny.write(run, content, "recipe.yaml")
    scores: list[Score] = []
    for stage, of_suite in values.items():
        for suite, value in of_suite.items():
            metric = "bits_per_byte" if suite == "general" else "exact_match"
            paired = {score.stage: stderr for score in scores}
            ends = {"low": value - 0.01, "high": value + 0.01, "paired": paired}
            scores.append(Score(stage, suite, metric, value, 0.01, 300, metric == "exact_match", **ends))
    write_scorecard(scores, run / "scorecard.json")
    facts = {"hardware": {"gpus": [], "cpus": 2, "system": "Linux"}, "launch": {"processes": 1}, "packages": {}}
    facts |= {"python": "3.11", "hfpipe": "0", "base": {"id": "me/base", "revision": None}, "trust_remote_code": False}
    (run / "environment.json").write_text(json.dumps(facts))
    return run


START = {"base": {"general": 1.4, "sounds": 0.1}, "prose": {"general": 1.0, "sounds": 0.2}}


@pytest.mark.parametrize(
    ("full", "lora", "learned", "forgot", "known"),
    [
        ((1.20, 0.8), (1.02, 0.6), "learned less", "forgot less", "This is the known result"),
        ((1.02, 0.6), (1.20, 0.8), "learned more", "forgot more", "This does not show"),
        ((1.20, 0.8), (1.10, 0.799), "learned as much, within the noise", "forgot less", "This does not show"),
        ((1.020, 0.8), (1.021, 0.6), "learned less", "forgot as much, within the noise", "This does not show"),
    ],
)
@pytest.mark.parametrize("order", [("full", "lora"), ("lora", "full")])
def test_two_stages_from_one_parent_are_compared_beyond_the_noise(
    tmp_path: Path, full: tuple, lora: tuple, learned: str, forgot: str, known: str, order: tuple[str, str]
) -> None:
    ends = {"full": dict(zip(("general", "sounds"), full, strict=True))}
    ends["lora"] = dict(zip(("general", "sounds"), lora, strict=True))
    run = made_up(tmp_path, START | {name: ends[name] for name in order})
    assert main(["report", str(run)]) == 0
    for name in ("report.md", "report.html"):
        text = unescape((run / name).read_text())
        sentence = text[text.index("From the same start as full (all weights), lora (LoRA)") :][:400]
        assert learned in sentence
        assert forgot in sentence
        assert f"{known} " in sentence
    page = (run / "report.html").read_text()
    assert f'aria-label="Gain against forgetting. {order[0]}: gain ' in page, "both in one plot"


def test_without_a_budget_the_scores_say_what_was_forgotten(tmp_path: Path) -> None:
    run = made_up(tmp_path, START | {"full": {"general": 1.2, "sounds": 0.8}, "lora": {"general": 1.02, "sounds": 0.6}})
    recipe = load_recipe(run / "recipe.yaml", ["evaluate.general.budget=null"])
    scores = [Score(**row) for row in json.loads((run / "scorecard.json").read_text())]
    [told] = comparisons(recipe, scores, {"full": None})
    assert "learned less" in told
    assert "This is the known result" in told
    [told] = comparisons(recipe, scores, {"full": 0.25})
    assert "From the same start as full (all weights, dialled to 0.25), lora (LoRA) learned less" in told
    assert "known result" not in told, "that is about models as they were trained"


def test_bias_is_nothing_to_gain_on_and_rounding_is_no_change(tmp_path: Path) -> None:
    run = made_up(tmp_path, START | {"full": {"general": 1.2, "sounds": 0.8}, "lora": {"general": 1.02, "sounds": 0.6}})
    assert main(["report", str(run)]) == 0
    before = (run / "report.md").read_text()
    assert "**Gained by lora:**" in before
    scores = [Score(**row) for row in json.loads((run / "scorecard.json").read_text())]
    bias = {"base": (0.9, 0.1), "prose": (0.9, 0.1), "full": (0.1, 0.1 + 2**-55), "lora": (0.9, -0.1)}
    for stage, (lms, ambiguous) in bias.items():
        scores.append(Score(stage, "stereotypes", "lms", lms, 0.01, 300, True))
        scores.append(Score(stage, "bbq", "bias_ambiguous", ambiguous, 0.01, 300, True, ideal=0.0))
    write_scorecard(scores, run / "scorecard.json")
    assert main(["report", str(run)]) == 0
    after = (run / "report.md").read_text()
    table = before[before.index("## Gain against forgetting") :].split("\n\n")[1]
    assert table in after
    assert "bbq bias_ambiguous 0.1000 ± 0.0100 -> 0.1000 ± 0.0100 (unchanged)" in after
    assert "bbq bias_ambiguous 0.1000 ± 0.0100 -> -0.1000 ± 0.0100 (as far from 0)" in after


def test_a_change_from_zero_is_told_in_the_metrics_own_unit() -> None:
    before, after = (Score(stage, "s", "bleu", value, 0.1, 50, True) for stage, value in (("base", 0.0), ("one", 3.25)))
    assert describe(Change(before, after)) == "s bleu 0.0000 ± 0.1000 -> 3.2500 ± 0.1000 (3.25 better)"


def test_numbers_of_the_price_are_those_of_the_scorecard(tmp_path: Path) -> None:
    run = made_up(tmp_path, START | {"full": {"general": 1.2, "sounds": 0.8}, "lora": {"general": 1.02, "sounds": 0.6}})
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    table = page[page.index("<h2>Gain against forgetting</h2>") :]
    rows = re.findall(r"<tr>(.*?)</tr>", table[: table.index("</table>")])[1:]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]
    # gain: 0.8 - 0.2 of 1; forgetting: (1.2 - 1.0) / 1.0; lora on the same scales
    assert cells[1] == ["full", "all weights", "prose", "60.0% ± 0.4%", "20.0% ± 0.4%", "over: general bits_per_byte"]
    assert cells[2] == ["lora", "LoRA", "prose", "40.0% ± 0.4%", "2.0% ± 0.4%", "inside"]


def dial_of(best: float | None) -> dict:
    """A dial.json of three strengths."""
    points = []
    for strength, gain, loss in ((0.0, 0.0, 0.0), (0.5, 0.412, 0.031), (1.0, 0.633, 0.1234567)):
        score = {"suite": "general", "metric": "bits_per_byte", "value": 1 + loss}
        over = ["general bits_per_byte"] if loss > 0.05 else []
        one = {"strength": strength, "gain": gain, "gain_stderr": 0.01, "forgetting": loss, "forgetting_stderr": 0.002}
        points.append({**one, "over": over, "inside": not over, "scores": [score]})
    facts = {"stage": "lora", "parent": "prose", "method": "adapter", "kept": ["general"], "best": best}
    return {**facts, "points": points, "verdict": "Strength 0.5 gains most inside the budgets."}


def test_the_dial_on_the_page_is_the_dial_in_its_file(tmp_path: Path) -> None:
    run = made_up(tmp_path, START | {"lora": {"general": 1.02, "sounds": 0.6}})
    folder = run / "stages" / "lora"
    folder.mkdir(parents=True)
    dial = dial_of(0.5)
    (folder / "dial.json").write_text(json.dumps(dial))
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    section = page[page.index("<h2>The dial: lora</h2>") :]
    for one in dial["points"]:
        for key in ("gain", "forgetting"):
            assert f"{one[key]:.1%} ± {one[f'{key}_stderr']:.1%}" in section
        assert f"{one['scores'][0]['value']:.4f}" in section
    assert "over: general bits_per_byte" in section
    assert section.count('<svg role="img"') >= 2
    assert "Strength 0.5 gains most" in (run / "report.md").read_text()
    (folder / "dial.json").write_text(json.dumps({"hash": "x", "points": []}))  # a dial that was interrupted
    assert main(["report", str(run)]) == 0
    assert "The dial" not in (run / "report.html").read_text()


def test_samples_are_rows_of_the_predictions_and_hostile_text_is_only_text(tmp_path: Path) -> None:
    run = made_up(tmp_path, START | {"lora": {"general": 1.02, "sounds": 0.6}})
    said = {"prose": ["no", "yes", HOSTILE, "no", "no"], "lora": ["yes", "no", HOSTILE, "yes", "yes"]}
    for stage, answers in said.items():
        folder = run / "stages" / stage / "predictions"
        folder.mkdir(parents=True)
        rows = [
            {"row": n, "id": f"r{n}", "asked": HOSTILE, "values": {"exact_match": float(answer == "yes")}}
            | {"generation": {"prediction": answer, "reference": "yes"}}
            for n, answer in enumerate(answers)
        ]
        (folder / "sounds.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    recipe = load_recipe(run / "recipe.yaml")
    scores = [Score(**row) for row in json.loads((run / "scorecard.json").read_text())]
    found = [(sample.row, sample.sort, sample.values) for sample in samples_of(run, recipe, scores)]
    assert found == [
        ("r0", "better", (0.0, 1.0)),
        ("r3", "better", (0.0, 1.0)),
        ("r1", "worse", (1.0, 0.0)),
        ("r2", "the same", (0.0, 0.0)),
    ]
    assert main(["report", str(run)]) == 0
    page, report = (run / "report.html").read_text(), (run / "report.md").read_text()
    assert "<script>" not in page
    assert '<div class="text" dir="auto">&lt;script&gt;' in page
    assert "你好世界" in page
    assert f"({len(HOSTILE):,} characters)" in page
    assert report.count("````text\n") == 4, "a fence that the text cannot close"
