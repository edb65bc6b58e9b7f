"""Folders of models and adapters that the libraries cannot load: one paragraph with the file, by `check` and `run`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from hfpipe.cli import main
from hfpipe.model.create import create_model, train_tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("broken")
    tiny.write_data(home)
    texts = [json.loads(line)["text"] for line in (home / "prose.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer(texts, 320, 128)
    create_model(tiny.recipe(home)["model"]["architecture"], tokenizer, 0).save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    return home


def edit(name: str, **changes: object) -> Callable[[Path], None]:
    """Gives fields of a JSON file other values."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def remove(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (remove("model.safetensors"), "has no weights"),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "has no tokenizer"),
    "a config that is cut": (write("config.json", b'{"model_type": "lla'), "config.json"),
    "a config of a list": (write("config.json", b"[1, 2]"), "damaged"),
    "a config with an activation that is none": (edit("config.json", hidden_act="best"), "best"),
    "a config with a text for a number": (edit("config.json", num_hidden_layers="many"), "num_hidden_layers"),
    "a tokenizer that is cut": (write("tokenizer.json", b'{"version": '), "tokenizer"),
    "a tokenizer of other types": (edit("tokenizer.json", model=3), "tokenizer"),
    "a token that is a number": (edit("tokenizer_config.json", eos_token=1), "eos_token"),
    "a longest text of another type": (edit("tokenizer_config.json", model_max_length="x"), "model_max_length"),
    "a stop token by its name": (edit("generation_config.json", eos_token_id=[2, "</s>"]), "eos_token_id"),
    "a padding token by its name": (edit("generation_config.json", pad_token_id="<pad>"), "damaged"),
    "a generation config of a number": (write("generation_config.json", b"0"), "damaged"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_base_is_told_alike_by_check_and_run(
    name: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    breaks, word = BROKEN[name]
    folder = tmp_path / "base"
    shutil.copytree(home / "model", folder)
    breaks(folder)
    recipe = tiny.recipe(home, model={"id": str(folder)}, output_dir=str(tmp_path / "run"))
    path = str(tiny.write(tmp_path, recipe))
    told = []
    for command in ("check", "run"):
        assert main([command, path]) == 2
        told.append(capsys.readouterr().err)
    assert told[0] == told[1]
    assert word in told[0]
    assert str(folder) in told[0]
    assert "Traceback" not in told[0]
    assert "Hub" not in told[0] or "Hub id" in told[0]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"{", "no JSON"),
        (b"[]", "no JSON"),
        (b"{}", "that names a base"),
        (b'{"base_model_name_or_path": null}', "base_model_name_or_path"),
        (b'{"base_model_name_or_path": "x", "peft_type": "LORA", "alora_invocation_tokens": "3%"}', "alora_invocation"),
    ],
)
def test_a_broken_adapter_config_is_told(
    content: bytes, word: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(content)
    assert main(["evaluate", str(folder), str(tiny.write(tmp_path, tiny.recipe(home)))]) == 2
    said = capsys.readouterr().err
    assert word in said
    assert "adapter_config.json is damaged" in said


def test_weights_that_are_cut_are_told_before_a_step(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(home / "model", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    recipe = tiny.recipe(home, model={"id": str(folder)}, output_dir=str(tmp_path / "run"))
    assert main(["run", str(tiny.write(tmp_path, recipe))]) == 2
    assert "damaged" in capsys.readouterr().err


def test_a_generation_config_of_wrong_types_is_told(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(home / "model", folder)
    edit("generation_config.json", top_k="many")(folder)
    assert main(["evaluate", str(folder), str(tiny.write(tmp_path, tiny.recipe(home)))]) == 2
    assert "generation_config.json" in (said := capsys.readouterr().err)
    assert "top_k" in said


def test_a_padding_token_of_no_letters_is_none(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(home / "model", folder)
    edit("tokenizer_config.json", pad_token="")(folder)
    assert main(["evaluate", str(folder), str(tiny.write(tmp_path, tiny.recipe(home)))]) == 0
