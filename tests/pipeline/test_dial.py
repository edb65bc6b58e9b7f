"""The dial through the command line: both ends to the digit, every kind on the straight line, and what a run does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from classifying import written
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from hfpipe.cli import main
from hfpipe.model.interpolate import open_dial
from hfpipe.model.load import ModelRef, load_model
from hfpipe.model.tokenizer import load_tokenizer
from hfpipe.recipe import load_recipe

KINDS = {
    "lora": {"lora": {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "embed_tokens"]}},
    "pissa": {"lora": {"r": 4, "init_lora_weights": "pissa", "modules_to_save": ["lm_head"]}},
    "dora": {"lora": {"r": 4, "use_dora": True, "trainable_token_indices": [1, 2]}},
    "ia3": {"peft": {"type": "ia3"}},
    "vera": {"peft": {"type": "vera", "r": 8, "target_modules": ["q_proj"]}},
    "full": {},
}
IDS = torch.arange(5, 25)[None]


def points(run: Path, stage: str) -> dict[float, dict]:
    found = json.loads((run / "stages" / stage / "dial.json").read_text())
    return {one["strength"]: one for one in found["points"]}


def values(scores: list[dict]) -> dict:
    return {(score["suite"], score["metric"]): score["value"] for score in scores}


def forgetful(folder: Path, **suite: object) -> dict:
    """A recipe whose second stage learns its task, and forgets more of the prose than its budget."""
    content = tiny.recipe(folder, shift=False, energy=False, merge=False)
    content["evaluate"]["general"] |= {"budget": "9%", **suite}
    content["evaluate"]["sounds"]["metrics"] = ["accuracy", "bits_per_byte"]
    content["stages"][1]["training"] |= {"learning_rate": 0.05, "save_strategy": "no"}
    return content


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a stage for every kind that has strengths, all from the base; nothing is scored."""
    folder = tmp_path_factory.mktemp("kinds")
    tiny.write_data(folder)
    content = tiny.recipe(folder, merge=False, shift=False, energy=False, evaluate={})
    content["stages"] = [
        {
            **{key: value for key, value in content["stages"][1].items() if key != "lora"},
            "name": name,
            "parent": "base",
            "training": {"max_steps": 4, "learning_rate": 0.05, "max_length": 64, "save_strategy": "no"},
            **block,
        }
        for name, block in KINDS.items()
    ]
    assert main(["run", str(tiny.write(folder, content))]) == 0
    return folder / "run"


def whole(ref: ModelRef) -> dict[str, torch.Tensor]:
    """The weights of a model, or of an adapter merged into its base."""
    model = load_model(ref)
    return (model.merge_and_unload() if ref.is_adapter else model).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_strength_is_on_the_straight_line_between_the_weights(kinds: Path, tmp_path: Path, name: str) -> None:
    options = load_recipe(kinds / "recipe.yaml").model
    base, trained = (ModelRef(str(kinds / "stages" / stage / "model"), options) for stage in ("base", name))
    dial = open_dial(trained, base, load_tokenizer(base.path), ["The cat sat.", "The owl said hoot."])
    start, end = whole(base), whole(trained)
    assert max((end[key] - start[key]).abs().max() for key in start) > 0.005
    with torch.no_grad():
        for strength, ref in ((0.0, base), (1.0, trained)):
            torch.testing.assert_close(dial.at(strength)(IDS).logits, load_model(ref)(IDS).logits, atol=1e-5, rtol=0)
    saved = tmp_path / "saved"
    saved.mkdir()
    dial.save(saved, 0.3)
    found = whole(ModelRef(str(saved), options))
    for key in start:
        torch.testing.assert_close(found[key], torch.lerp(start[key], end[key], 0.3), atol=1e-5, rtol=1e-4, msg=key)
    assert not any(path.suffix == ".bin" for path in saved.iterdir())


@pytest.fixture(scope="module")
def dialled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a recipe whose budget the second stage exceeds, with `budget_action: dial`, and a third stage."""
    folder = tmp_path_factory.mktemp("dialled")
    tiny.write_data(folder)
    content = forgetful(folder, budget_action="dial")
    content["merge"] = True
    after = content["stages"][1] | {
        "name": "after",
        "training": {"max_steps": 1, "learning_rate": 1e-5, "warmup_steps": 0},
    }
    content["stages"].append(after)
    assert main(["run", str(tiny.write(folder, content))]) == 0
    return folder / "run"


@pytest.mark.slow
def test_a_run_goes_on_at_the_best_strength_inside_the_budget(dialled: Path) -> None:
    done = json.loads((dialled / "stages" / "sounds" / "done.json").read_text())
    strength = done["dialled"]["strength"]
    at = points(dialled, "sounds")
    assert 0 < strength < 1
    assert at[1.0]["over"] == ["general bits_per_byte"]
    inside = {key: one["gain"] for key, one in at.items() if one["inside"] and key > 0}
    assert strength == max(inside, key=inside.__getitem__)
    card = json.loads((dialled / "scorecard.json").read_text())
    assert values([row for row in card if row["stage"] == "sounds"]) == values(at[strength]["scores"])
    assert all("prose" in row["paired"] for row in card if row["stage"] == "sounds")
    merged = load_file(next((dialled / "stages" / "sounds" / "merged").glob("*.safetensors")))
    options = load_recipe(dialled / "recipe.yaml").model
    expected = whole(ModelRef(str(dialled / "stages" / "sounds" / "dial"), options))
    assert all(torch.allclose(merged[key], expected[key], atol=1e-5) for key in merged), "the next stage starts there"


@pytest.mark.slow
def test_both_ends_are_the_scores_of_parent_and_stage_to_the_digit(dialled: Path) -> None:
    at, card = points(dialled, "sounds"), json.loads((dialled / "scorecard.json").read_text())
    assert values(at[0.0]["scores"]) == values([row for row in card if row["stage"] == "prose"])
    own = json.loads((dialled / "stages" / "sounds" / "scores.json").read_text())
    assert values(at[1.0]["scores"]) == values([row for suite in own.values() for row in suite["scores"]])
    assert (at[0.0]["gain"], at[0.0]["gain_stderr"], at[0.0]["inside"]) == (0.0, 0.0, True)


@pytest.mark.slow
def test_plain_peft_gives_the_logits_of_the_dialled_model(dialled: Path) -> None:
    stage, options = dialled / "stages" / "sounds", load_recipe(dialled / "recipe.yaml").model
    strength = json.loads((stage / "dial" / "strength.json").read_text())["strength"]
    trained = ModelRef(str(stage / "model"), options)
    dial = open_dial(trained, trained.base, load_tokenizer(trained.path), ["The cat sat."])
    plain = AutoPeftModelForCausalLM.from_pretrained(stage / "dial", dtype=torch.float32).eval()
    with torch.no_grad():
        full, ours = dial.at(1.0)(IDS).logits, dial.at(strength)(IDS).logits
        torch.testing.assert_close(plain(IDS).logits, ours, atol=1e-5, rtol=0)
    assert (full - ours).abs().max() > 1e-3


@pytest.mark.slow
def test_what_is_scored_is_not_scored_again(dialled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (dialled / "stages" / "sounds" / "dial.json").read_text()
    assert main(["dial", str(dialled), "--stage", "sounds", "--strengths", "0.25,0.5"]) == 0
    output = capsys.readouterr().out
    assert "sounds at" not in output
    assert "gains most inside the budgets" in output
    assert (dialled / "stages" / "sounds" / "dial.json").read_text() == before
    assert main(["run", str(dialled.parent / "tiny.yaml")]) == 0
    assert capsys.readouterr().out.count("done before, skipped") == 3


@pytest.mark.slow
@pytest.mark.long
def test_a_dial_that_was_interrupted_ends_as_one_that_was_not(dialled: Path, tmp_path: Path) -> None:
    shutil.copytree(dialled, tmp_path / "run")
    stage = tmp_path / "run" / "stages" / "sounds"
    dial, done = (json.loads((stage / name).read_text()) for name in ("dial.json", "done.json"))
    first = dial["points"][1]  # at 0.1; killed before its second suite, and nothing was handed on yet
    first["scores"], first["keys"] = first["scores"][:1], {"general": first["keys"]["general"]}
    (stage / "dial.json").write_text(json.dumps({"hash": dial["hash"], "points": [first]}))
    shutil.rmtree(stage / "strengths" / "0.5")
    shutil.rmtree(stage / "dial")
    del done["dialled"]
    (stage / "done.json").write_text(json.dumps(done))
    assert main(["run", str(dialled.parent / "tiny.yaml"), "--set", f"output_dir={tmp_path / 'run'}"]) == 0
    for name in ("dial.json", "done.json", "strengths/0.5/general.jsonl"):
        assert (stage / name).read_text() == (dialled / "stages" / "sounds" / name).read_text(), name
    assert tiny.scores(tmp_path / "run") == tiny.scores(dialled)
    one, other = (
        load_file(folder / "dial" / "adapter_model.safetensors") for folder in (stage, dialled / "stages/sounds")
    )
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.slow
def test_the_budget_decides_anew_without_a_score_anew(
    dialled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(dialled, tmp_path / "run")
    command = ["run", str(dialled.parent / "tiny.yaml"), "--set", f"output_dir={tmp_path / 'run'}", "--set"]
    done = tmp_path / "run" / "stages" / "sounds" / "done.json"
    assert main([*command, "evaluate.general.budget=0.1%"]) == 3
    said = capsys.readouterr()
    assert "No strength is inside the budgets, not even 0.1: general bits_per_byte." in said.out
    assert "at every strength that was tried" in said.err
    assert "dialled" not in json.loads(done.read_text())
    assert main([*command, "evaluate.general.budget=80%"]) == 0
    said = capsys.readouterr()
    assert "after: the recipe has changed" in said.out, (
        "it started from the dialled adapter, and now from the whole one"
    )
    assert "sounds: general" not in said.out
    card = json.loads((tmp_path / "run" / "scorecard.json").read_text())
    assert values([row for row in card if row["stage"] == "sounds"]) == values(points(dialled, "sounds")[1.0]["scores"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget_action": "dial"}, "no `budget` to exceed"),
        ({"budget": "3%", "budget_action": "dail"}, "fail, dial"),
        ({"budget": "3%", "budget_action": "dial"}, "has no strengths between 0 and 1"),
    ],
)
def test_what_cannot_be_dialled_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, message: str
) -> None:
    content = tiny.recipe(tmp_path, merge=False)
    del content["stages"][1]["lora"]
    content["stages"][1]["peft"] = {"type": "oft"}
    content["evaluate"]["general"] |= change
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_a_quantized_base_and_a_classifier_are_dialled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    content = written(tmp_path, "one", lora={"r": 4})
    usual = tiny.recipe(tmp_path)
    short = {"max_steps": 4, "learning_rate": 0.05, "max_length": 64, "save_strategy": "no"}
    quantized = {**usual["stages"][1], "name": "quantized", "parent": "base", "quantization": "nf4", "training": short}
    content["stages"] = [quantized, content["stages"][0] | {"parent": "base", "training": short}]
    content["evaluate"] |= {"sounds": usual["evaluate"]["sounds"] | {"metrics": ["bits_per_byte"]}}
    content |= {"merge": False, "shift": False, "energy": False}
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    run = tmp_path / "run"
    card = json.loads((run / "scorecard.json").read_text())
    for name, suite in (("quantized", "sounds"), ("kinds", "kinds")):
        capsys.readouterr()
        assert main(["dial", str(run), "--stage", name, "--strengths", "0.5"]) == 0
        assert "no suite has a budget" in capsys.readouterr().out
        at = points(run, name)
        assert {key[0] for one in at.values() for key in values(one["scores"])} == {suite}
        assert values(at[1.0]["scores"]) == values([row for row in card if row["stage"] == name])
        assert list(at) == [0.0, 0.5, 1.0]
        assert all(len(one["scores"][0]["paired"]) for one in at.values() if one["strength"] > 0)
    assert values(points(run, "quantized")[0.0]["scores"]) == values([row for row in card if row["stage"] == "base"])
    assert json.loads((run / "stages" / "kinds" / "dial" / "config.json").read_text())["id2label"]
