"""A preference stage is priced like any other: held-out pairs, forgetting, bias, length of answers, cures, the dial."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfpipe.cli import main
from hfpipe.data.preference import PairTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.long]

PREFERRED = (
    *("preference_accuracy", "preference_accuracy_per_token", "preference_margin", "preference_margin_per_token"),
    *("length_ratio", "bits_per_byte"),
)


def pair(number: int) -> dict[str, Any]:
    animal, other = tiny.ANIMALS[number % 6], tiny.ANIMALS[(number + 1 + number // 6 % 5) % 6]
    sounds = tiny.SOUNDS[animal], tiny.SOUNDS[other] + " it says" * (number % 3)
    return {"prompt": f"{number}: the {animal} said", "chosen": f" {sounds[0]}", "rejected": f" {sounds[1]}"}


def bias(number: int) -> dict[str, str]:
    one, other = tiny.ANIMALS[number % 6], tiny.ANIMALS[(number + 1) % 6]
    return {"sent_more": f"The {one} sat by the hill.", "sent_less": f"The {other} sat by the hill."}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe(folder: Path) -> dict[str, Any]:
    """Prose, then preferences as an adapter that keeps its parent."""
    tiny.write_data(folder)
    content = tiny.recipe(folder, merge=False)
    pairs = write_rows(folder / "pairs.jsonl", [pair(n) for n in range(64)])
    held = write_rows(folder / "held_pairs.jsonl", [pair(n) for n in range(100, 124)])
    biased = write_rows(folder / "biased.jsonl", [bias(n) for n in range(12)])
    content["stages"][1] = {
        "name": "liked",
        "kind": "preference",
        "data": [{"path": pairs}],
        "lora": {"r": 4, "target_modules": "all-linear"},
        "keep": {"replay": {"share": 0.25}, "kl": {}},
        "global_batch_size": 8,
        "training": {"num_train_epochs": 2, "learning_rate": "2e-3", "max_length": 64},
    }
    content["evaluate"] = {
        "general": {**content["evaluate"]["general"], "budget": 0.5},
        "preferred": {
            "data": {"path": held, "format": "preference"},
            "metrics": list(PREFERRED),
            "generation": {"max_new_tokens": 8},
        },
        "bias": {
            "data": {"path": biased, "columns": {"more": "sent_more", "less": "sent_less"}},
            "metrics": ["stereotype_score"],
        },
    }
    return content


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preference")
    assert main(["run", str(tiny.write(folder, recipe(folder)))]) == 0
    return folder


def log_probabilities(model: Any, tokenizer: Any) -> torch.Tensor:
    """Log-probabilities of the held-out pairs (N, 2), summed over the answer, and the answers' tokens (N, 2)."""
    found = PairTokenizer(tokenizer, None).encode([pair(n) for n in range(100, 124)])
    sums = []
    for begin, sides in zip(found.begins, found.sides, strict=True):
        for side in sides:
            ids = torch.tensor(side[None].astype("int64"))
            with torch.no_grad():
                said = model(ids).logits[0, :-1].double().log_softmax(-1)
            each = said[torch.arange(len(said)), ids[0, 1:]][begin - 1 :]
            sums.append((float(each.sum()), len(each)))
    return torch.tensor(sums).reshape(-1, 2, 2)


def test_held_out_pairs_are_scored_as_the_model_scores_them_whole_and_per_token(finished: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(finished / "run/stages/prose/model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "run/stages/prose/model")
    scores = tiny.scores(finished / "run")
    for stage in ("prose", "liked"):
        model = (
            base if stage == "prose" else PeftModel.from_pretrained(base, finished / "run/stages/liked/model").eval()
        )
        sums = log_probabilities(model, tokenizer)
        whole, each = sums[..., 0], sums[..., 0] / sums[..., 1]
        for name, values in (("", whole), ("_per_token", each)):
            margins = values[:, 0] - values[:, 1]
            accuracy, margin = (scores[stage, "preferred", f"preference_{of}{name}"] for of in ("accuracy", "margin"))
            assert accuracy == pytest.approx(float((margins > 0).double().mean()))
            assert margin == pytest.approx(float(margins.mean()), abs=1e-4)
    assert scores["liked", "preferred", "preference_margin"] > scores["prose", "preferred", "preference_margin"] + 0.05


def test_the_length_of_answers_is_reported(finished: Path) -> None:
    lines = (finished / "run/stages/liked/predictions/preferred.jsonl").read_text().splitlines()
    said = [json.loads(line)["generation"] for line in lines]
    sizes = [sum(len(one[side].strip()) for one in said) for side in ("prediction", "reference")]
    assert tiny.scores(finished / "run")["liked", "preferred", "length_ratio"] == pytest.approx(sizes[0] / sizes[1])
    assert "preferred length_ratio" in (finished / "run/report.md").read_text()


def test_forgetting_and_bias_of_a_preference_stage_stand_in_the_report(finished: Path) -> None:
    scores, page = tiny.scores(finished / "run"), (finished / "run/report.md").read_text()
    assert {stage for stage, suite, _ in scores if suite in ("general", "bias")} == {"base", "prose", "liked"}
    assert "| liked |" in page
    assert "The parent's own texts" in page


def test_a_preference_stage_keeps_its_parent_by_own_texts(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = json.loads((finished / "run/stages/liked/done.json").read_text())["data"]["sources"]
    pairs, own = sources.values()
    assert own["replayed"]
    assert own["parents_own"]
    assert own["token_share"] == pytest.approx(0.25, abs=0.05)  # of few and long texts
    assert main(["check", str(finished / "tiny.yaml")]) == 0
    told = capsys.readouterr().out
    assert "liked: 25.0% of the trained tokens from texts that prose makes of itself first" in told
    assert "liked: kl: the parent is the model with its adapter off" in told
    assert "liked: 16 steps of 8 rows" in told
    assert pairs["rows"] == 64


def test_the_dial_scores_strengths_of_a_preference_stage(finished: Path) -> None:
    assert main(["dial", str(finished / "run"), "--strengths", "0.5"]) == 0
    points = json.loads((finished / "run/stages/liked/dial.json").read_text())["points"]
    margins = {
        one["strength"]: next(row["value"] for row in one["scores"] if row["metric"] == "preference_margin")
        for one in points
    }
    assert margins[0] < margins[0.5] < margins[1]


def test_a_preference_stage_is_cured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = recipe(tmp_path)
    content["stages"][1].pop("keep")
    path = tiny.write(tmp_path, content)
    assert main(["cure", str(path), "--steps", "4"]) == 0
    told = capsys.readouterr().out
    assert "cures of liked, against prose:" in told
    assert all(f"  {how}: gain " in told for how in ("no cure", "self", "self-kl", "lower rate"))
    assert math.isfinite(tiny.scores(tmp_path / "run/cure")["liked-self", "general", "bits_per_byte"])


def test_pairs_are_tokenized_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = recipe(tmp_path)
    write_rows(tmp_path / "pairs.jsonl", [pair(n) for n in range(300, 340)])
    content["stages"][1].pop("keep")
    content["evaluate"] = {}
    path = str(tiny.write(tmp_path, content))
    assert main(["prepare", path]) == 0
    assert "pairs.jsonl: 40 rows" in (told := capsys.readouterr().out)
    assert "tokens, tokenized\n" in told
    assert main(["run", path]) == 0
    assert "tokens, tokenized before" in capsys.readouterr().out
