"""`qat`: a stage trains for a quantization, is scored with its rounding, and saves weights that it rounds so."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TorchAoConfig

from hfpipe.cli import main
from hfpipe.model.fake_quantized import quantization_of
from hfpipe.model.load import ModelRef, load_model
from hfpipe.recipe import Model, Qat

INT4 = {"weights": "int4", "activations": "int8", "group_size": 32}


def write(folder: Path, qat: dict[str, Any] | None, *, kind: str = "prose", **training: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_data(folder)
    recipe = tiny.recipe(folder, merge=False, evaluate={})
    recipe["stages"] = [one for one in recipe["stages"] if one["name"] == kind]
    recipe["stages"][0]["training"] |= {"save_strategy": "no", "lr_scheduler_type": "constant", **training}
    if qat is not None:
        recipe["stages"][0]["qat"] = qat
    return tiny.write(folder, recipe)


def trained(folder: Path, kind: str = "prose") -> dict[str, torch.Tensor]:
    model = folder / "run/stages" / kind / "model"
    adapter = model / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else model / "model.safetensors")


def run(folder: Path, qat: dict[str, Any] | None, *, kind: str = "prose", **training: Any) -> dict[str, torch.Tensor]:
    assert main(["run", str(write(folder, qat, kind=kind, **training))]) == 0
    return trained(folder, kind)


def differs(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_what_is_trained_and_scored_is_what_torchao_quantizes(tmp_path: Path) -> None:
    rounded = run(tmp_path / "rounded", INT4, max_steps=2)
    assert differs(rounded, run(tmp_path / "plain", None, max_steps=2))
    folder = tmp_path / "rounded/run/stages/prose/model"
    block = Qat(**INT4)
    scored = load_model(ModelRef(str(folder), Model(id=str(folder)), qat=block))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert not torch.allclose(scored(ids).logits, model(ids).logits, atol=1e-4)
        quantized = TorchAoConfig(quantization_of(block))  # all linear layers but the head
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantized)
        assert torch.allclose(scored(ids).logits, model(ids).logits, atol=1e-4)


@pytest.mark.slow
def test_an_adapter_learns_on_a_base_that_rounds(tmp_path: Path) -> None:
    rounded = run(tmp_path / "rounded", INT4, kind="sounds", max_steps=2)
    assert differs(rounded, run(tmp_path / "plain", None, kind="sounds", max_steps=2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prose", "sounds"])
def test_the_head_rounds_where_it_is_asked_to(kind: str, tmp_path: Path) -> None:
    """The fast forms of the loss multiply by the head's weights themselves."""
    head = {**INT4, "target_modules": ["lm_head"]}
    assert differs(
        run(tmp_path / "head", head, kind=kind, max_steps=2), run(tmp_path / "plain", None, kind=kind, max_steps=2)
    )


@pytest.mark.slow
@pytest.mark.long
def test_an_interrupted_stage_rounds_from_the_same_step(tmp_path: Path) -> None:
    words = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    late = {**INT4, "after_steps": 5}
    whole = run(tmp_path / "whole", late, **words)
    path = write(tmp_path / "cut", late, **words)
    tiny.run_interrupted(path, tmp_path / "cut/run/stages/prose/checkpoint-2/manifest.json")
    assert not differs(whole, trained(tmp_path / "cut"))
    assert differs(whole, run(tmp_path / "never", None, **words))
    assert differs(whole, run(tmp_path / "always", INT4, **words))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"activations": "nvfp4"}, "leave it out, or write int8"),
        ({"weights": "nvfp4", "activations": None, "group_size": 16}, "write nvfp4"),
        ({"weights": "int3"}, "int4"),
        ({"group_sise": 8}, "Did you mean group_size?"),
    ],
)
def test_words_that_cannot_be(
    change: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, {**INT4, **change})
    assert main(["check", "--fast", str(path)]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("qat", "code", "told"),
    [
        ({**INT4, "group_size": 48}, 2, "no whole groups"),
        ({**INT4, "target_modules": ["no_such"]}, 2, "no linear layer is named no_such"),
        ({"weights": "nvfp4", "activations": "nvfp4"}, 4, "torchao cannot round to nvfp4 on this machine (cpu)"),
    ],
)
def test_what_the_model_or_the_machine_cannot_do(
    qat: dict[str, Any], code: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, qat)
    for command in ("check", "run"):
        assert main([command, str(path)]) == code
        said = capsys.readouterr()
        assert told in " ".join((said.out + said.err).split())
