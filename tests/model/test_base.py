"""A model that cannot be loaded as a recipe asks is refused before any weight, with remedy and exit code."""

import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hfpipe.cli import main

STEPS = {"max_steps": 4, "learning_rate": 0.02, "max_length": 64, "save_strategy": "no", "warmup_steps": 0}


def lora(folder: Path, base: Path | None = None, **changes: object) -> dict:
    """One LoRA stage, on a tiny Llama from nothing or on a folder."""
    content = tiny.recipe(folder, merge=False, shift=False, energy=False)
    content["stages"] = [content["stages"][1] | {"parent": "base", "training": STEPS} | changes]
    content["evaluate"] = {"sounds": content["evaluate"]["sounds"] | {"metrics": ["bits_per_byte"]}}
    if base is not None:
        content["model"] = {"id": str(base)}
    return content


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a LoRA stage on a base in 8 bits."""
    folder = tmp_path_factory.mktemp("int8")
    tiny.write_data(folder)
    assert main(["run", str(tiny.write(folder, lora(folder, quantization="int8")))]) == 0
    return folder / "run"


def pickled(source: Path, weights: str, folder: Path, name: str) -> Path:
    """A copy of a model or adapter whose weights are a pickle."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(source / weights), folder / name)
    return folder


@pytest.mark.slow
def test_an_adapter_trains_on_8_bits_on_a_cpu(finished: Path) -> None:
    found = tiny.scores(finished)
    assert found["sounds", "sounds", "bits_per_byte"] < found["base", "sounds", "bits_per_byte"] - 0.05


@pytest.mark.parametrize("command", ["run", "check"])
def test_pickles_are_not_read(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    base = pickled(finished / "stages/base/model", "model.safetensors", tmp_path / "base", "pytorch_model.bin")
    assert main([command, str(tiny.write(tmp_path, lora(tmp_path, base)))]) == 2
    assert "has no weights as safetensors" in capsys.readouterr().err


def test_pickles_of_a_model_or_an_adapter_are_not_scored(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(finished.parent / "tiny.yaml")
    adapter = finished / "stages/sounds/model"
    base = pickled(finished / "stages/base/model", "model.safetensors", tmp_path / "base", "pytorch_model.bin")
    other = pickled(adapter, "adapter_model.safetensors", tmp_path / "adapter", "adapter_model.bin")
    for folder in (base, other):
        assert main(["evaluate", str(folder), recipe]) == 2
        assert f"{str(folder)!r} has no weights as safetensors" in capsys.readouterr().err


def test_an_adapter_is_no_base(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = finished / "stages/sounds/model"
    assert main(["run", str(tiny.write(tmp_path, lora(tmp_path, adapter)))]) == 2
    message = capsys.readouterr().err
    assert "It is an adapter and not a whole model: name its base, or merge it" in message
    assert "Traceback" not in message


def test_a_model_that_quantization_would_leave_as_it_is_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields = sizes | {"num_key_value_heads": 2, "num_local_experts": 8, "vocab_size": 300}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **fields)).save_pretrained(tmp_path / "experts")
    path = tiny.write(tmp_path, lora(tmp_path, tmp_path / "experts", quantization="nf4"))
    assert main(["run", str(path)]) == 2
    assert "the weights of" in (message := capsys.readouterr().err)
    assert "(mixtral) are in one" in message
    assert "Remove `quantization`" in message


@pytest.mark.parametrize("command", ["run", "check"])
def test_without_bitsandbytes_a_quantized_stage_is_refused_before_the_stages_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    content = lora(tmp_path, quantization="nf4")
    content["stages"].insert(0, tiny.recipe(tmp_path)["stages"][0])
    assert main([command, str(tiny.write(tmp_path, content))]) == 4
    assert "pip install 'hfpipe[quantization]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_fields_that_peft_fills_in_and_then_refuses_are_one_paragraph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_data(tmp_path)
    content = lora(tmp_path, peft={"type": "ia3", "target_modules": ["q_proj"]}) | {"evaluate": {}}
    del content["stages"][0]["lora"]
    assert main(["run", str(tiny.write(tmp_path, content))]) == 2
    assert "ia3: peft refuses it on this model: `feedforward_modules`" in capsys.readouterr().err
    content["stages"][0]["peft"] = {"type": "trainable_tokens"}
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    assert "peft.token_indices: missing" in capsys.readouterr().err
