"""The code of a model card: every name in it is there before it is used, for every kind of model."""

from __future__ import annotations

import ast
import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from hfpipe.recipe import load_recipe
from hfpipe.report.usage import Usage, code, vllm_command

STAGES: dict[str, dict[str, Any]] = {
    "sft": {},
    "pretrain": {"objective": "masked", "training": {"max_steps": 1}},
    "classification": {},
    "translation": {"data": [{"path": "team/pairs", "src_lang": "eng_Latn", "tgt_lang": "deu_Latn"}]},
}


@pytest.mark.parametrize("what", ["adapter", "merged"])
@pytest.mark.parametrize("kind", STAGES)
def test_the_code_of_a_card_uses_what_it_has_loaded(tmp_path: Path, kind: str, what: str) -> None:
    stage = {"name": "s", "kind": kind, "data": [{"path": "team/data"}], "lora": {"r": 4}} | STAGES[kind]
    recipe = {"name": "toy", "model": {"id": "me/base", "tokenizer": {"add_tokens": ["<x>"]}}, "stages": [stage]}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    usage = Usage("me/toy", what, "s", base="me/base", chat=True)
    known = set(dir(builtins))
    for statement in ast.parse(code(usage, load_recipe(tmp_path / "r.yaml"))).body:
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        stored = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        assert {name.id for name in names if isinstance(name.ctx, ast.Load)} <= known | stored, ast.unparse(statement)
        known |= stored
        known |= {alias.name for alias in getattr(statement, "names", ())}
    assert "model" in known


@pytest.mark.parametrize(
    ("lora", "served"),
    [({"r": 4, "bias": "none"}, True), ({"use_dora": True}, False), ({"modules_to_save": ["lm_head"]}, False)],
)
def test_vllm_is_named_for_the_adapters_that_it_takes(tmp_path: Path, lora: dict[str, Any], served: bool) -> None:
    stage = {"name": "s", "kind": "sft", "data": [{"path": "team/data"}], "lora": lora}
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "toy", "model": {"id": "me/base"}, "stages": [stage]}))
    recipe = load_recipe(tmp_path / "r.yaml")
    command = vllm_command(Usage("me/toy", "adapter", "s", base="me/base"), recipe)
    assert command == ("vllm serve me/base --max-lora-rank 8 --enable-lora --lora-modules toy=me/toy" if served else "")
    branch = vllm_command(Usage("me/toy", "adapter", "s", base="me/base", revision="dev"), recipe)
    assert not branch, "it takes adapters of main"
