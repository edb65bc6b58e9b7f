"""A model from nothing in the shape of another: `architecture: {from: FOLDER}`."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from hfpipe.cli import main


def base(folder: Path, architecture: dict[str, Any]) -> dict[str, torch.Tensor]:
    folder.mkdir()
    tiny.write_data(folder)
    recipe = tiny.recipe(folder, merge=False, evaluate={})
    recipe["model"]["architecture"] = architecture
    recipe["stages"] = recipe["stages"][:1]
    recipe["stages"][0]["training"] |= {"max_steps": 1, "save_strategy": "no"}
    assert main(["run", str(tiny.write(folder, recipe))]) == 0
    return load_file(folder / "run/stages/base/model/model.safetensors")


@pytest.mark.slow
def test_the_config_of_another_model_gives_its_shape_and_no_weight(tmp_path: Path) -> None:
    fields = tiny.recipe(tmp_path)["model"]["architecture"]
    AutoConfig.for_model(**fields, vocab_size=320).save_pretrained(tmp_path / "shape")
    spelled = base(tmp_path / "spelled", fields)
    named = base(tmp_path / "named", {"from": str(tmp_path / "shape")})
    assert all(torch.equal(spelled[name], named[name]) for name in spelled)
    smaller = base(tmp_path / "smaller", {"from": str(tmp_path / "shape"), "num_hidden_layers": 1})
    assert len(smaller) < len(spelled)


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        ({"from": "a/b", "model_type": "llama"}, "Keep one of the two"),
        ({"hidden_size": 64}, "`from`: a model whose config is taken"),
        ({"from": 3}, "text, such as"),
    ],
)
def test_words_that_cannot_be(
    architecture: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.recipe(tmp_path)
    recipe["model"]["architecture"] = architecture
    assert main(["check", "--fast", str(tiny.write(tmp_path, recipe))]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_field_that_the_other_model_has_not_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_data(tmp_path)
    recipe = tiny.recipe(tmp_path)
    AutoConfig.for_model(**recipe["model"]["architecture"]).save_pretrained(tmp_path / "shape")
    recipe["model"]["architecture"] = {"from": str(tmp_path / "shape"), "num_hidden_layer": 1}
    path = tiny.write(tmp_path, recipe)
    for command in ("check", "run"):
        assert main([command, str(path)]) == 2
        said = capsys.readouterr()
        assert "Did you mean num_hidden_layers?" in " ".join((said.out + said.err).split())
