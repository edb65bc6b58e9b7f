"""A chat template by its name, path or text; the words of tokenizers and configs pass through to the saved model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import trl
import yaml
from transformers import AutoConfig, AutoTokenizer

from hfpipe.cli import main
from hfpipe.model.create import create_model, train_tokenizer
from hfpipe.recipe import load_recipe

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    tiny.write_data(folder)
    texts = [json.loads(line)["text"] for line in (folder / "prose.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer(texts, 320, 128)
    create_model(tiny.recipe(folder)["model"]["architecture"], tokenizer, 0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "mine.jinja").write_text(TEMPLATE)
    return folder


def written(folder: Path, model: dict[str, Any]) -> Path:
    chat = [{"role": "user", "content": "{animal}"}, {"role": "assistant", "content": "{sound}"}]
    source = {"path": "json", "data_files": str(folder / "sounds.jsonl"), "template": {"messages": chat}}
    stage = {"name": "chat", "kind": "sft", "data": [source], "training": {"max_steps": 1, "max_length": 64}}
    content = {"name": "w", "output_dir": str(folder / "run"), "model": {"id": str(folder / "base"), **model}}
    path = folder / "words.yaml"
    path.write_text(yaml.safe_dump(content | {"stages": [stage], "shift": False}, sort_keys=False))
    return path


@pytest.mark.parametrize("given", ["llama3", "qwen3_training", "chatml", "FILE", TEMPLATE])
def test_a_template_is_named_or_lies_in_a_file_or_is_written_out(given: str, folder: Path) -> None:
    given = str(folder / "mine.jinja") if given == "FILE" else given
    text = load_recipe(written(folder, {"tokenizer": {"chat_template": given}})).model.tokenizer.chat_template
    shipped = Path(trl.__file__).parent / "chat_templates" / f"{given}.jinja"
    if shipped.is_file():
        assert text == shipped.read_text()
    elif given == "chatml":
        assert "<|im_start|>" in text
    else:
        assert text == TEMPLATE


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ("lama3", "llama3"),
        ("no/such/file.jinja", "path of a file"),
        ("plain words", "{{ }}"),
        ("{% for m in messages %}", "no Jinja template"),
        ("{{ 1 +", "no Jinja template"),
        ("{{ messages | tojsn }}", "there is no filter 'tojsn' (line 1 of it). Did you mean tojson?"),
        ("{% if messages[0].tools %}{{ messages | nothing }}{% endif %}", "there is no filter 'nothing'"),
        ("{% if messages is strung %}{% endif %}", "there is no test 'strung'"),
        ("{% trans %}{{ messages }}{% endtrans %}", "unknown tag 'trans'"),
        ("{% break %}{{ messages }}", "nested too deep"),
        ("{% include 'other.jinja' %}", "asks for another file"),
        ("{{ 9 ** 9 ** 9 ** 9 }}{{", "no Jinja template"),
        ("{% if a %}" * 400 + "{% endif %}" * 400, "nested too deep"),
    ],
)
def test_a_text_without_a_mark_is_refused(
    given: str, word: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--fast", str(written(folder, {"tokenizer": {"chat_template": given}}))]) == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "word"),
    [
        ({"tokenizer": {"eos_tokn": "x"}}, "eos_token"),
        ({"tokenizer": {"eos_token": 3}}, "text"),
        ({"tokenizer": {"padding_side": "top"}}, "left"),
        ({"config": {"max_position_embedings": 64}}, "max_position_embeddings"),
        ({"config": {"max_position_embeddings": "long"}}, "whole number"),
        ({"config": {"model_type": "gpt2"}}, "cannot be changed"),
    ],
)
def test_a_word_that_transformers_does_not_know_is_refused(
    model: dict[str, Any], word: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--fast", str(written(folder, model))]) == 2
    assert word in capsys.readouterr().err


def test_a_template_may_ask_for_a_filter_first(folder: Path) -> None:
    asked = "{% if 'markdown' is filter %}{{ messages | markdown }}{% endif %}{{ messages[0].content }}"
    assert main(["check", "--fast", str(written(folder, {"tokenizer": {"chat_template": asked}}))]) == 0


@pytest.mark.parametrize("command", ["check", "preview", "run"])
def test_a_template_of_the_base_that_is_no_jinja_is_refused(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").write_text("{{ messages | nothing }}")
    recipe = written(folder, {"id": str(tmp_path / "base")})
    assert main([command, str(recipe), "--set", f"output_dir={tmp_path / 'run'}"]) == 2
    told = capsys.readouterr().err
    assert "the chat template of the tokenizer is no Jinja template: No filter named 'nothing'" in told
    assert "model.tokenizer.chat_template" in told


@pytest.mark.slow
def test_the_saved_model_has_them(folder: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    words = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "padding_side": "left", "chat_template": "chatml"}
    words["add_special_tokens"] = ["<|im_start|>"]
    changes = {"max_position_embeddings": 512, "rope_scaling": rope}
    assert main(["run", str(written(folder, {"tokenizer": words, "config": changes}))]) == 0
    saved = folder / "run/stages/chat/model"
    tokenizer, config = AutoTokenizer.from_pretrained(saved), AutoConfig.from_pretrained(saved)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == ("<|im_end|>", "<|pad|>", "left")
    assert tokenizer.convert_ids_to_tokens(config.eos_token_id) == "<|im_end|>"
    assert config.max_position_embeddings == 512
    assert config.rope_parameters | rope == config.rope_parameters
    assert config.rope_parameters["rope_theta"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).startswith("<|im_start|>")
