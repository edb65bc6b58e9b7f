"""The JSON schema takes what `load_recipe` takes, and refuses what an editor should underline."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import yaml

from hfpipe.recipe import json_schema
from hfpipe.recipe.document import Loader

RECIPE = """
name: small
seed: 1
model:
  architecture: {model_type: llama, hidden_size: 64}
  tokenizer: {train: {vocab_size: 1000}}
stages:
  - name: web
    kind: pretrain
    data: [{path: me/web, streaming: true, weight: 1}, {path: csv, data_files: x.csv, sep: ";", weight: 0.5}]
    training: {max_steps: 10, learning_rate: 2e-4, max_length: 64, lr_scheduler_type: cosine}
  - name: chat
    kind: sft
    data: [{path: builtin, name: package, template: {prompt: "{name}", completion: "{summary}"}}]
    lora: {r: 8, target_modules: all-linear, init_lora_weights: pissa_niter_4}
    quantization: {type: none}
    replay: {stage: web, share: 5%}
    training: {packing: true, max_length: null, report_to: [tensorboard]}
evaluate:
  one: {data: {path: builtin}, metrics: [bits_per_byte], budget: 3 %, generation: {max_new_tokens: 5}}
  two: {data: {path: parquet, data_files: x, columns: [text]}, metrics: [accuracy], budget: 0.03, choices: [a, b]}
  three: {lm_eval: arc_easy, limit: 20, num_fewshot: 5}
  four: {data: {path: me/two, columns: {choices: [a, b], answer: right, prompt: q}}, metrics: [accuracy], blank: _}
  five:
    data: {path: me/two, template: {prompt: "{q}", choices: ["{one}", "{other}"]}}
    metrics: [flip_rate, squad]
    swap: {name: {women: [Anna], men: [Ali]}}
push: {repo_id: me/small, what: merged}
"""


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def read(text: str) -> Any:
    return yaml.load(text, Loader=Loader)


def test_a_good_recipe_is_valid(validator: jsonschema.Draft202012Validator) -> None:
    assert [error.message for error in validator.iter_errors(read(RECIPE))] == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("learning_rate", "learing_rate"),
        ("lr_scheduler_type: cosine", "lr_scheduler_type: cosin"),
        ("max_steps: 10", "max_steps: ten"),
        ("max_steps: 10", "packing: true"),
        ("r: 8", "rank: 8"),
        ("kind: sft", "kind: dpo"),
        ("streaming", "streming"),
        ("share: 5%", "share: five"),
        ("what: merged", "what: all"),
        ("budget: 3 %", "budget: 3"),
        ("max_new_tokens", "max_new_token"),
        ("limit: 20", "limit: all"),
        ("swap: {name: {women: [Anna], men: [Ali]}}", "swap: he"),
    ],
)
def test_a_wrong_recipe_is_not(validator: jsonschema.Draft202012Validator, before: str, after: str) -> None:
    assert RECIPE.count(before) == 1
    assert not validator.is_valid(read(RECIPE.replace(before, after)))


def test_the_same_recipe_loads(tmp_path: Any) -> None:
    from hfpipe.recipe import load_recipe

    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    assert load_recipe(path).name == "small"
