"""The report from made-up run folders: every number is one of the JSON files, and any text looks as it is."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest
import tiny
from pages import read, require_scores_of

from hfpipe.cli import main
from hfpipe.recipe import dump_recipe, load_recipe
from hfpipe.scores.scorecard import Change, Score, write_scorecard
from hfpipe.scores.wording import change_words, describe

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
        ((1.20, 0.8), (1.02, 0.6), r"learned 20.0 % \(.*?\) less", r"forgot 18.0 % \(.*?\) less", True),
        ((1.02, 0.6), (1.20, 0.8), r"learned 20.0 % \(.*?\) more", r"forgot 18.0 % \(.*?\) more", False),
        ((1.20, 0.8), (1.10, 0.799), "learned as much, within the noise", r"forgot 10.0 % \(.*?\) less", False),
        ((1.020, 0.8), (1.021, 0.6), r"learned 20.0 % \(.*?\) less", "forgot as much, within the noise", False),
    ],
)
@pytest.mark.parametrize("order", [("full", "lora"), ("lora", "full")])
def test_two_stages_from_one_parent_are_compared_beyond_the_noise(
    tmp_path: Path, full: tuple, lora: tuple, learned: str, forgot: str, known: bool, order: tuple[str, str]
) -> None:
    ends = {"full": dict(zip(("general", "sounds"), full, strict=True))}
    ends["lora"] = dict(zip(("general", "sounds"), lora, strict=True))
    run = made_up(tmp_path, START | {name: ends[name] for name in order})
    assert main(["report", str(run)]) == 0
    for name in ("report.md", "report.html"):
        text = unescape((run / name).read_text())
        sentence = text[text.index("From the same start as full (all weights), lora (LoRA)") :][:400]
        assert re.search(learned, sentence)
        assert re.search(forgot, sentence)
        assert ("(Biderman et al. 2024)" in sentence) == known, "nothing is called known that this run does not show"
    require_scores_of(run)
    page = (run / "report.html").read_text()
    assert f'aria-label="Gain against forgetting. {order[0]}: gain ' in page, "both in one plot"


def test_without_a_budget_the_scores_say_what_was_forgotten(tmp_path: Path) -> None:
    run = made_up(tmp_path, START | {"full": {"general": 1.2, "sounds": 0.8}, "lora": {"general": 1.02, "sounds": 0.6}})
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("budget: 5%", "budget: null"))
    assert main(["report", str(run)]) == 0
    report = (run / "report.md").read_text()
    assert "full (all weights), lora (LoRA) learned 20.0 %" in report
    assert "Biderman" in report
    assert "| full | none |" in report
    done = {
        "hash": "x",
        "parent": "prose",
        "steps": 6,
        "data": {},
        "dialled": {"strength": 0.25, "over_budget": "general"},
    }
    (run / "stages/full").mkdir(parents=True)
    (run / "stages/full/done.json").write_text(json.dumps(done))
    assert main(["report", str(run)]) == 0
    report = (run / "report.md").read_text()
    assert "From the same start as full (all weights, dialled to 0.25), lora (LoRA) learned 20.0 %" in report
    assert "Biderman" not in report, "that is about models as they were trained"


def test_where_nothing_changed_the_suites_that_could_say_so_are_named(tmp_path: Path) -> None:
    run = made_up(tmp_path, START | {"full": {"general": 1.0, "sounds": 0.8}, "lora": {"general": 1.0, "sounds": 0.8}})
    scores = [row for row in json.loads((run / "scorecard.json").read_text()) if row["suite"] == "sounds"]
    (run / "scorecard.json").write_text(json.dumps(scores))
    assert main(["report", str(run)]) == 0
    report = (run / "report.md").read_text()
    assert "**Forgotten by lora:** nothing beyond the noise on sounds\n" in report


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
    assert "| bbq bias_ambiguous | full | 0.1000 → 0.1000 | unchanged |" in after
    assert "| bbq bias_ambiguous | lora | 0.1000 → -0.1000 | as far from 0 |" in after


def test_a_change_from_zero_is_told_in_the_metrics_own_unit() -> None:
    before, after = (Score(stage, "s", "bleu", value, 0.1, 50, True) for stage, value in (("base", 0.0), ("one", 3.25)))
    assert str(change_words(Change(before, after))) == "s bleu 0.0000 → 3.2500: 3.25 better (2.97 to 3.53)"


def test_few_rows_have_no_interval_and_tell_nothing() -> None:
    for metric in ("bits_per_byte", "exact_match"):
        before, after = (
            Score(stage, "s", metric, value, 0.0, 4, True, low=value, high=value)
            for stage, value in (("base", 0.25), ("one", 0.75))
        )
        text = str(change_words(Change(before, after)))
        assert text.endswith("better, 4 rows are too few to tell")
        assert "±" not in text + describe(after)
        assert "to" not in describe(after), describe(after)


def test_numbers_of_the_price_are_those_of_the_scorecard(tmp_path: Path) -> None:
    run = made_up(tmp_path, START | {"full": {"general": 1.2, "sounds": 0.8}, "lora": {"general": 1.02, "sounds": 0.6}})
    assert main(["report", str(run)]) == 0
    # gain: 0.8 - 0.2 of 1; forgetting: (1.2 - 1.0) / 1.0; lora on the same scales; of prose, 1.4 to 1.0 is no loss
    for name in ("report.html", "report.md"):
        head, *cells = read(run / name).tables["Gain against forgetting"]
        assert head[:4] == ["stage", "budget", "gain", "forgetting"]
        assert cells[0][:2] == ["prose", "inside"]
        cells = [[cell.replace("(", "").replace(")", "") for cell in row] for row in cells]
        assert cells[0][3] == "none, 28.6 % better 28.0 to 29.1 %"
        assert cells[1][2:] == ["60.0 % 59.2 to 60.8 %", "20.0 % 19.2 to 20.8 %", "all weights", "prose"]
        assert cells[1][1] == "over ▼ general bits_per_byte"
        assert cells[2] == ["lora", "inside", "40.0 % 39.2 to 40.8 %", "2.0 % 1.2 to 2.8 %", "LoRA", "prose"]


def test_a_change_has_one_interval_wherever_it_stands(tmp_path: Path) -> None:
    """Also where the interval is wider on one side, and Student's t is wider than the normal."""
    run = made_up(tmp_path, START | {"full": {"general": 1.2, "sounds": 0.8}, "lora": {"general": 1.02, "sounds": 0.6}})
    rows = json.loads((run / "scorecard.json").read_text())
    for row in rows:
        row["n"] = 20
        for stage in row["paired"]:
            before = next(r["value"] for r in rows if (r["stage"], r["suite"]) == (stage, row["suite"]))
            ends = {"low": row["value"] - before - 0.021, "high": row["value"] - before + 0.013}
            row["paired"][stage] = {"stderr": 0.004, "p": 0.001, **ends}
    (run / "scorecard.json").write_text(json.dumps(rows))
    assert main(["report", str(run)]) == 0
    for name in ("report.html", "report.md"):
        tables = read(run / name).tables
        changes = {(row[0].split()[0], row[1]): row[3] for row in tables["What each stage did"][1:]}
        for stage, _, gain, forgetting, *_ in tables["Gain against forgetting"][1:]:
            if stage != "prose":
                assert re.findall(r"[\d.]+", gain) == re.findall(r"[\d.]+", changes["sounds", stage])
                assert re.findall(r"[\d.]+", forgetting) == re.findall(r"[\d.]+", changes["general", stage])


def test_no_column_stands_empty_for_a_fine_tuned_stage(tmp_path: Path) -> None:
    run = made_up(tmp_path, START | {"full": {"general": 1.2, "sounds": 0.8}, "lora": {"general": 1.02, "sounds": 0.6}})
    facts = {"rows": 50, "dirty": {"empty": 2}, "untrained": 3, "epochs": 2.0, "token_share": 1.0}
    done = {"hash": "x", "parent": "prose", "steps": 6, "last_loss": 1.5, "data": {"sources": {"0: my.jsonl": facts}}}
    (run / "stages/full").mkdir(parents=True)
    (run / "stages/full/done.json").write_text(json.dumps(done))
    assert main(["report", str(run)]) == 0
    for name in ("report.html", "report.md"):
        for title in ("Training", "Data"):
            _, row = read(run / name).tables[title]
            assert all(row), (title, row)
        for title, (_, *rows) in read(run / name).tables.items():
            assert all(any(column) for column in zip(*rows, strict=True)), title
        assert "90" in read(run / name).tables["Data"][1]  # documents trained on: 45 of them, twice


def dial_of(best: float | None) -> dict:
    """A dial.json of three strengths."""
    points = []
    for strength, gain, loss in ((0.0, 0.0, 0.0), (0.5, 0.412, 0.031), (1.0, 0.633, 0.1234567)):
        score = vars(Score("lora", "general", "bits_per_byte", 1 + loss, 0.01, 300, False))
        over = ["general bits_per_byte"] if loss > 0.05 else []
        one = {"strength": strength, "gain": gain, "gain_stderr": 0.01, "forgetting": loss, "forgetting_stderr": 0.002}
        points.append({**one, "over": over, "inside": not over, "scores": [score]})
    facts = {"hash": "x", "stage": "lora", "parent": "prose", "method": "adapter", "kept": ["general"], "best": best}
    return {**facts, "points": points, "verdict": "Strength 0.5 gains most inside the budgets."}


def test_the_dial_on_the_page_is_the_dial_in_its_file(tmp_path: Path) -> None:
    run = made_up(tmp_path, START | {"lora": {"general": 1.02, "sounds": 0.6}})
    folder = run / "stages" / "lora"
    folder.mkdir(parents=True)
    dial = dial_of(0.5)
    (folder / "dial.json").write_text(json.dumps(dial))
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    for name in ("report.html", "report.md"):
        _, *rows = read(run / name).tables["The dial: lora"]
        for one, cells in zip(dial["points"], rows, strict=True):
            assert cells[0].split()[0] == f"{one['strength']:g}"
            for key, cell in (("gain", cells[2]), ("forgetting", cells[3])):
                ends = (one[key] + side * 1.96 * one[f"{key}_stderr"] for side in (0, -1, 1))
                assert re.findall(r"-?[\d.]+", cell) == [f"{100 * end:.1f}" for end in ends]
            assert cells[4] == f"{one['scores'][0]['value']:.4f}"
        assert "general bits_per_byte" in rows[2][1]
    assert page.count('<svg role="img" aria-label="Gain against forgetting of lora') == 1
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
    assert main(["report", str(run)]) == 0
    page, report = (run / "report.html").read_text(), (run / "report.md").read_text()
    assert re.findall(r"^sounds, row (.*):$", report, re.MULTILINE) == [
        "r0, better (exact_match 0 → 1)",
        "r3, better (exact_match 0 → 1)",
        "r1, worse (exact_match 1 → 0)",
        "r2, the same (exact_match 0 → 0)",
    ]
    assert "<script>" not in page
    assert '<dd dir="auto">&lt;script&gt;' in page
    assert "你好世界" in page
    assert f"({len(HOSTILE):,} characters)" in page
    assert report.count("````text\n") == 4, "a fence that the text cannot close"


NAMES = (
    "<script>alert(1)</script>",
    "<img src=https://evil.example/x.png onerror=alert(1)>",
    "![seen](https://evil.example/x.png)",
    "[click](javascript:alert(1))",
    "https://evil.example/bare and www.evil.example",
    "a | b || c",
    "`code` ``two`` ```three```",
    "# heading",
    "- item",
    "1. item",
    "> quoted",
    "---",
    "*bold* _it_ ~~gone~~ $x^2$ __a__",
    "&lt;b&gt; &#124; \\| \\",
    "two\nlines\n\n## and a heading\n```\nfence",
    "{{ 7 * 7_000 }} {% raw %} {# no #}",
    "a \u2028 line",
)


ELEMENTS = """html head meta title style body header main nav section article div h1 h2 h3 p b strong span small ul ol
    li dl dt dd a code pre table thead tbody tr th td figure"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose labels, sources, ids, row texts, machine, training words and metrics are as in NAMES."""
    folder = tmp_path_factory.mktemp("hostile")
    run = made_up(folder, START | {"lora": {"general": 1.02, "sounds": 0.6}})
    for stage in ("prose", "lora"):
        (run / "stages" / stage / "predictions").mkdir(parents=True)
        (run / "stages" / stage / "model").mkdir()
        facts = {"rows": 3, "epochs": 1, "dirty": {name: 1 for name in NAMES}, "dirty_ids": list(NAMES)}
        done = {"hash": "x", "parent": "base", "steps": 1, "last_loss": 1.0}
        done["data"] = {"rows": 3, "sources": {f"{n}: {name}": facts for n, name in enumerate(NAMES)}}
        (run / "stages" / stage / "done.json").write_text(json.dumps(done))
        rows = [
            {"row": n, "id": name, "asked": name, "values": {"exact_match": 0.0}}
            | {"generation": {"prediction": name, "reference": name}, "choice": {"prediction": name, "reference": name}}
            for n, name in enumerate(NAMES)
        ]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (run / "stages" / stage / "predictions" / "sounds.jsonl").write_text("\n".join(lines) + "\n")
    environment = json.loads((run / "environment.json").read_text())
    environment |= {"remote_metrics": list(NAMES), "packages": {name: name for name in NAMES}}
    environment["hardware"]["gpus"] = list(NAMES)
    (run / "environment.json").write_text(json.dumps(environment))
    pairs = [{"stage": "prose", "source": name, "suite": "general", "which": list(NAMES)} for name in NAMES]
    counts = dict.fromkeys(("rows", "exact", "partly", "touched", "looked_at"), 3)
    (run / "overlap.json").write_text(json.dumps({"pairs": [pair | counts for pair in pairs]}))
    scores = [Score(**row) for row in json.loads((run / "scorecard.json").read_text())]
    scores += [Score(s, "sounds", f"me/{name}", 1.0, 0.1, 9, True) for name in NAMES for s in ("base", "prose", "lora")]
    write_scorecard(scores, run / "scorecard.json")
    recipe = load_recipe(run / "recipe.yaml")
    source = recipe.stages[0].data[0]
    source = type(source).model_validate(source.model_dump(exclude_defaults=True) | {"data_files": list(NAMES)})
    training = {"run_name": " ".join(NAMES)}
    stages = [
        stage.model_copy(update={"training": stage.training | training, "data": [source, *stage.data]})
        for stage in recipe.stages
    ]
    (run / "recipe.yaml").write_text(dump_recipe(recipe.model_copy(update={"stages": stages})))
    assert main(["report", str(run)]) == 0
    return run


@pytest.mark.parametrize("name", ["report.md", "report.html", "stages/lora/model/README.md"])
def test_whatever_data_holds_is_text_on_the_page(hostile: Path, name: str) -> None:
    page = read(hostile / name)
    assert {tag for tag, _ in page.elements} <= set(ELEMENTS.split())
    for tag, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on") or key in ("src", "style")] or tag in ("td", "th")
        assert not str(attributes.get("href", "#")).startswith(("http", "javascript")), attributes
    for title, (head, *rows) in page.tables.items():
        assert {len(row) for row in rows} == {len(head)}, title
    shown = " ".join(page.text.split())
    for text in NAMES:
        assert " ".join(text.split()) in shown or "README" in name, text


def test_code_in_prose_is_marked_and_not_written_with_backticks(tmp_path: Path) -> None:
    run = made_up(tmp_path, START)
    (run / "stages/prose").mkdir(parents=True)
    total = {"seconds": 3, "device": "CPU", "devices": 1, "device_hours": 0.1, "tokens": 9, "tokens_per_second": 3}
    total |= {"flops": 1e9, "kwh": 0.1, "kg_co2": None, "attempts": 1, "measured": 1, "country": None}
    (run / "stages/prose/cost.json").write_text(
        json.dumps({"attempts": [], "total": total | {"energy_by": "codecarbon"}})
    )
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "<code>energy: {country_iso_code: ...}</code>" in page
    assert "`" not in page
    assert "`energy: {country_iso_code: ...}`" in (run / "report.md").read_text()


def test_the_templates_are_in_the_wheel() -> None:
    import tomllib

    root = Path(__file__).parents[2]
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["hfpipe.report"]
    folder = root / "hfpipe/report"
    carried = {path for pattern in data for path in folder.glob(pattern)}
    assert carried == set((folder / "templates").iterdir())
