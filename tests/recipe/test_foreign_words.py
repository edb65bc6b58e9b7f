"""Words of other tools, and words in a wrong place, are answered with ours and with the right place."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hfpipe.cli import main
from hfpipe.convert.axolotl import TABLE as AXOLOTL
from hfpipe.convert.llama_factory import TABLE as LLAMA_FACTORY
from hfpipe.convert.ms_swift import TABLE as MS_SWIFT
from hfpipe.convert.trl import TABLE as TRL
from hfpipe.recipe.foreign_words import FOREIGN_WORDS
from hfpipe.recipe.shipped import shipped_recipes

STAGE = {"name": "s", "kind": "sft", "data": [{"path": "json", "data_files": "a.jsonl"}]}


def told(tmp_path: Path, capsys: pytest.CaptureFixture[str], **changes: object) -> str:
    """Returns the output of `check --fast` for a recipe with these changes."""
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"name": "r", "model": {"id": "a/b"}, "stages": [STAGE]} | changes))
    assert main(["check", "--fast", str(path)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "ours"),
    [
        ("lora_r", 8, "`r` below the stage's `lora:`"),
        ("datasets", [{"path": "a"}], "the stage's `data:`"),
        ("cutoff_len", 512, "`max_length` below the stage's `training:`"),
        ("val_size", 0.1, "`evaluate:`"),
        ("warmup_ratio", 0.1, "`warmup_steps`"),
        ("learning_rate", 1e-4, "belongs to a stage, below `training:`"),
        ("train_on", "all", "belongs to a stage, beside its `kind:`"),
    ],
)
def test_a_word_of_another_tool_at_the_top_is_answered_with_ours(
    key: str, value: object, ours: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = told(tmp_path, capsys, **{key: value})
    assert f"{key}: unknown key of a recipe" in page
    assert ours in page


@pytest.mark.parametrize(
    ("place", "key", "ours"),
    [
        ("data", "labels", "to the stage, beside `data:`"),
        ("data", "max_length", "to the stage, below `training:`"),
        ("data", "max_samples", "`take` of the source"),
        ("training", "cutoff_len", "`max_length` below the stage's `training:`"),
        ("training", "labels", "to the stage, beside `training:`"),
        ("training", "lora_dropout", "below `lora:`"),
        ("lora", "rank", "`r` below the stage's `lora:`"),
        ("lora", "learning_rate", "below `training:`"),
    ],
)
def test_a_word_in_a_wrong_block_is_told_its_place(
    place: str, key: str, ours: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = STAGE | {"kind": "classification"}
    stage |= {"data": [STAGE["data"][0] | {key: ["a"]}]} if place == "data" else {place: {key: 1}}  # type: ignore[index]
    assert ours in told(tmp_path, capsys, stages=[stage])


@pytest.mark.parametrize("table", [AXOLOTL, LLAMA_FACTORY, MS_SWIFT, TRL])
def test_what_is_said_of_a_word_is_where_convert_puts_it(table: dict[str, object]) -> None:
    """The message names the key to which `hfpipe convert` moves a value as it is."""
    compared = 0
    for key, rule in table.items():
        if key in FOREIGN_WORDS and isinstance(rule, str):
            assert rule.rpartition(".")[2] in FOREIGN_WORDS[key], key
            compared += 1
    assert compared


def test_words_of_axolotl_and_llama_factory_that_have_a_place_are_known() -> None:
    for table in (AXOLOTL, LLAMA_FACTORY):
        moved = {key for key, rule in table.items() if isinstance(rule, str) and rule.rpartition(".")[2] != key}
        assert moved - {"revision_of_model", "chat_template_jinja", "model_revision"} <= FOREIGN_WORDS.keys()


def test_a_name_that_is_no_recipe_s_lists_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("")
    assert main(["check", "--fast", "zzz.yaml"]) == 2
    told = capsys.readouterr().err
    assert all(name in told for name in ("mine.yaml", *shipped_recipes()))
    assert main(["check", "--fast", "quikstart.yaml"]) == 2
    assert "quickstart.yaml?" in capsys.readouterr().err
    assert main(["check", "--fast", "min.yaml"]) == 2
    assert "Did you mean mine.yaml?" in capsys.readouterr().err
