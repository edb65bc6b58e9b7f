"""`train_only`, `freeze` and `learning_rates`: a part of the weights is trained, and at rates of its own."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from hfpipe.cli import main


def run(folder: Path, stage: dict[str, Any], *, kind: str = "prose", **training: Any) -> dict[str, torch.Tensor]:
    """Trains one stage of the tiny recipe, and returns the weights or the adapter that it leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    path = write(folder, stage, kind=kind, **training)
    assert main(["run", str(path)]) == 0
    return weights(folder, kind)


def write(folder: Path, stage: dict[str, Any], *, kind: str = "prose", **training: Any) -> Path:
    tiny.write_data(folder)
    recipe = tiny.recipe(folder, merge=False, evaluate={})
    chosen = next(one for one in recipe["stages"] if one["name"] == kind)
    chosen["training"] |= {"save_strategy": "no", "lr_scheduler_type": "constant", **training}
    recipe["stages"] = [{**chosen, **stage}]
    return tiny.write(folder, recipe)


def weights(folder: Path, kind: str = "prose") -> dict[str, torch.Tensor]:
    model = folder / "run" / "stages" / kind / "model"
    adapter = model / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else model / "model.safetensors")


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, one in after.items() if not torch.equal(one, before[name])}


@pytest.mark.slow
def test_weights_outside_the_patterns_stay_as_they_are(tmp_path: Path) -> None:
    first = run(tmp_path / "first", {}, max_steps=1, learning_rate=1e-30)  # the weights of the beginning
    only = moved(first, run(tmp_path / "only", {"train_only": [r"layers\.1\.mlp"]}, max_steps=2))
    assert only == {name for name in first if "layers.1.mlp" in name}
    assert len(only) == 3
    rest = moved(first, run(tmp_path / "rest", {"freeze": ["embed_tokens", "lm_head"]}, max_steps=2))
    assert rest == {name for name in first if "embed_tokens" not in name and "lm_head" not in name}


@pytest.mark.slow
def test_learning_rates_of_parts(tmp_path: Path) -> None:
    """A first step of AdamW moves a weight by its learning rate, wherever its gradient is not tiny."""
    first = run(tmp_path / "first", {}, max_steps=1, learning_rate=1e-30)
    rates = {"learning_rates": {r"layers\.0\.": 1e-4, "layers": 3e-4}}
    after = run(tmp_path / "after", rates, max_steps=1, learning_rate=1e-3, weight_decay=0.0)
    for name, rate in (("layers.0.mlp.up_proj", 1e-4), ("layers.1.mlp.up_proj", 3e-4), ("embed_tokens", 1e-3)):
        (key,) = (one for one in after if name in one)
        assert (after[key] - first[key]).abs().max().item() == pytest.approx(rate, rel=2e-2)


@pytest.mark.slow
@pytest.mark.long
def test_one_rate_for_all_is_the_learning_rate(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", {}, kind="sounds", learning_rate=1e-3)
    named = run(tmp_path / "named", {"learning_rates": {"lora": 1e-3}}, kind="sounds", learning_rate=5e-2)
    assert not moved(plain, named)
    assert moved(plain, run(tmp_path / "plus", {"learning_rates": {"lora_B": 2e-3}}, kind="sounds", learning_rate=1e-3))


@pytest.mark.slow
@pytest.mark.long
def test_an_interrupted_stage_goes_on_with_its_rates(tmp_path: Path) -> None:
    stage = {"learning_rates": {"mlp": 4e-3}, "freeze": ["embed_tokens"]}
    words = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}
    whole = run(tmp_path / "whole", stage, **words)
    (tmp_path / "cut").mkdir()
    path = write(tmp_path / "cut", stage, **words)
    tiny.run_interrupted(path, tmp_path / "cut/run/stages/prose/checkpoint-2/manifest.json")
    assert not moved(whole, weights(tmp_path / "cut"))


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ({"train_only": ["no_such_layer"]}, "'no_such_layer' is found in no name"),
        ({"learning_rates": {"no_such_layer": 1e-3}}, "'no_such_layer' is found in no name"),
        ({"freeze": ["."]}, "nothing is left to train"),
        ({"freeze": ["("]}, "'(' is no regular expression"),
        ({"freeze": ["embed"], "lora": {"r": 2}}, "an adapter trains its own weights"),
        ({"learning_rates": {"embed": -1.0}}, "a number above 0"),
        ({"learning_rates": {"embed": 1e-3}, "training": {"max_steps": 1, "optim": "lomo"}}, "divides the weights"),
    ],
)
def test_patterns_that_cannot_be(
    stage: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, stage)
    for command in ("check", "run"):
        assert main([command, str(path)]) == 2
        captured = capsys.readouterr()
        assert told in " ".join((captured.out + captured.err).split())
