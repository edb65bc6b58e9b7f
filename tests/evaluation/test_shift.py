"""Distribution shift: the numbers are those of the definitions, and a run keeps, reads and shows them."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tiny
from pages import read
from scipy.spatial.distance import jensenshannon

from hfpipe.cli import main
from hfpipe.evaluation.shift import domain_auc, jensen_shannon, reading

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "by",
    "on",
    "hill",
    "river",
    "house",
    "tree",
    "and",
    "then",
    "it",
    "was",
    "not",
    "very",
    "old",
    "new",
]
OTHER = [
    "import",
    "return",
    "def",
    "class",
    "self",
    "value",
    "index",
    "error",
    "raise",
    "yield",
    "lambda",
    "print",
    "range",
    "list",
    "dict",
]


def texts(words: list[str], count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(words, k=30)) for _ in range(count)]


def test_the_divergence_is_scipys_squared_distance_and_lies_between_0_and_1() -> None:
    generator = np.random.default_rng(0)
    one, other = generator.integers(0, 50, 300), generator.integers(0, 9, 300)
    expected = jensenshannon(one / one.sum(), other / other.sum(), base=2) ** 2
    assert jensen_shannon(one, other) == pytest.approx(expected, abs=1e-12)
    assert jensen_shannon(one, one * 7) == pytest.approx(0, abs=1e-12)
    assert jensen_shannon(np.array([1, 0]), np.array([0, 5])) == 1


@pytest.mark.slow
def test_a_classifier_tells_other_text_apart_and_not_the_same() -> None:
    same = domain_auc(texts(WORDS, 80, 1), texts(WORDS, 60, 2), seed=0)
    other = domain_auc(texts(WORDS, 80, 1), texts(OTHER, 60, 2), seed=0)
    assert same is not None
    assert other is not None
    assert same["low"] <= 0.5 <= same["high"]
    assert other["low"] > 0.99
    assert domain_auc(texts(WORDS, 80, 1), texts(WORDS, 60, 2), seed=0) == same
    assert domain_auc(texts(WORDS, 80, 1), texts(WORDS, 5, 2), seed=0) is None


@pytest.mark.parametrize(
    ("trained", "said"),
    [
        ((2.0, 2.1), "expect forgetting. Keep more"),
        ((0.9, 1.5), "some may be forgotten"),
        ((0.4, 0.5), "little forgetting"),
    ],
)
def test_how_much_the_base_has_to_learn_decides_the_advice(trained: tuple[float, float], said: str) -> None:
    bits = [dict(zip(("low", "high"), ends, strict=True)) for ends in (trained, (1.0, 1.2))]
    auc = {"value": 0.99, "low": 0.98, "high": 1.0}
    far = {"auc": auc, "jsd": 0.5, "jsd_noise": 0.1, "about": "general", "bits_per_byte": bits}
    assert said in reading(far)


@pytest.mark.slow
def test_a_run_says_what_is_near_and_what_is_far(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, words, count, seed in (("train", WORDS, 120, 1), ("near", WORDS, 40, 2), ("far", OTHER, 40, 3)):
        rows = [json.dumps({"text": text}) for text in texts(words, count, seed)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))

    def source(name: str) -> dict:
        return {"path": "json", "data_files": str(tmp_path / f"{name}.jsonl"), "split": "train"}

    content = tiny.recipe(tmp_path, merge=False, shift={"rows": 60})
    content["stages"] = [{**content["stages"][0], "data": [source("train")]}]
    content["evaluate"] = {name: {"data": source(name), "metrics": ["bits_per_byte"]} for name in ("near", "far")}
    path, run = tiny.write(tmp_path, content), tmp_path / "run"
    assert main(["run", str(path), "--set", "stages.prose.training.max_steps=1"]) == 0

    near, far = json.loads((run / "shift.json").read_text())["pairs"]
    assert near["rows"] == far["rows"] == [60, 40]
    assert near["jsd"] < near["jsd_noise"] < far["jsd"], "noise is not read as shift, and shift is not read as noise"
    assert near["reading"].startswith("No shift beyond the noise")
    assert far["reading"].startswith("Far apart")
    assert "so expect little forgetting" in far["reading"], "this base finds the other words harder than the stage's"
    assert near["bits_per_byte"][0]["low"] < near["bits_per_byte"][1]["value"] < near["bits_per_byte"][0]["high"]
    for page in ("report.md", "report.html"):
        text = " ".join(read(run / page).text.split())
        assert all(f"{pair['jsd']:.3f} ({pair['jsd_noise']:.3f})" in text for pair in (near, far))
        assert far["reading"].replace("`", "") in text

    written = (run / "shift.json").stat().st_mtime_ns
    assert main(["run", str(path), "--set", "stages.prose.training.max_steps=1"]) == 0
    assert (run / "shift.json").stat().st_mtime_ns == written, "measured once"
    capsys.readouterr()
    assert main(["check", "--fast", str(path), "--set", "shift={row: 5}"]) == 2
    assert "Did you mean rows?" in capsys.readouterr().err
