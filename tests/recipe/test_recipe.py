"""A recipe is checked whole: every fault at once, each with its line, its key, what is allowed, the nearest word."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from hfpipe.core.errors import RecipeError
from hfpipe.recipe import Recipe, dump_recipe, hash_of, load_recipe

GOOD = """\
name: law-chat
model:
  id: me/small
stages:
  - name: law
    kind: pretrain
    data:
      - {path: me/web, streaming: true, weight: 0.8}
      - {path: json, data_files: "law/*.jsonl", weight: 0.2}
    training: {max_steps: 2000, learning_rate: 2e-4, max_length: 2048}
  - name: chat
    kind: sft
    data: [{path: me/talk, name: all}]
    quantization: nf4
    lora: {r: 16, lora_alpha: 32, target_modules: all-linear, init_lora_weights: orthogonal}
    replay: {stage: law, share: 5%}
    training: {num_train_epochs: 1, lr_scheduler_type: cosine, eval_strategy: no}
evaluate:
  general: {data: {path: me/web, split: test, take: 500}, metrics: [bits_per_byte], budget: 3%}
  chat: {data: {path: me/talk, name: all}, metrics: [rougeL], generation: {max_new_tokens: 20}}
push: {repo_id: me/law-chat}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def faults_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)
    return str(caught.value)


def test_a_good_recipe_is_read(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    law, chat = recipe.stages
    assert (law.kind, law.training["learning_rate"], law.training["max_length"]) == ("pretrain", 2e-4, 2048)
    assert law.data[0].passed_through == {"streaming": True}
    assert chat.quantized is not None
    assert chat.quantized.type == "nf4"
    assert chat.training["eval_strategy"] == "no"
    assert chat.replay is not None
    assert chat.replay.share == 0.05
    assert recipe.evaluate["general"].budget == 0.03


# What is changed in the good recipe, the line of the fault, the path it names, and words of its message.
WRONG = [
    ("eval_strategy: no", "eval_strategy: steps", 17, "stages.chat.training.eval_strategy", ["`early_stopping: {"]),
    (
        "type: cosine",
        "type: reduce_lr_on_plateau",
        17,
        "stages.chat.training.lr_scheduler_type",
        ["`early_stopping: {"],
    ),
    ("name: law-chat", "name: law chat", 1, "name", ["letters, digits"]),
    ("name: law-chat", "nmae: law-chat", 1, "nmae", ["unknown key", "Did you mean name?"]),
    ("  id: me/small", "  id: 5", 3, "model.id", ["found the number 5", "text", "'5' in quotes"]),
    ("  id: me/small", "  revision: x", 2, "model", ["`id`", "`architecture`"]),
    ("  id: me/small", "  architecture: {model_type: lama}", 3, "model.architecture.model_type", ["mean llama?"]),
    ("  id: me/small", "  architecture: {model_type: 2}", 3, "model.architecture.model_type", ["the number 2"]),
    ("  id: me/small", "  architecture: {model_type: gpt2}", 2, "model.tokenizer", ["missing", "train"]),
    (
        "  id: me/small",
        "  architecture: {model_type: llama, hiden_size: 8}\n  tokenizer: {id: x}",
        3,
        "model.architecture.hiden_size",
        ["llama", "Did you mean hidden_size?"],
    ),
    (
        "  id: me/small",
        "  architecture: {model_type: gpt2, layer_norm_epsilon: 1}\n  tokenizer: {id: x}",
        3,
        "model.architecture.layer_norm_epsilon",
        ["Did you mean 1.0?"],
    ),
    ("  id: me/small", "  id: x\n  tokenizer: {train: {vocab_size: 999}}", 4, "model.tokenizer.train", ["embeddings"]),
    (
        "  id: me/small",
        "  architecture: {model_type: gpt2}\n  tokenizer: {train: {vocab_size: 1000000000000}}",
        4,
        "model.tokenizer.train.vocab_size",
        ["at most 4e+06"],
    ),
    ("kind: pretrain", "kind: pretrian", 6, "stages.law.kind", ["pretrain, sft", "Did you mean pretrain?"]),
    ("    kind: sft\n", "", 11, "stages.chat.kind", ["missing", "pretrain, sft"]),
    ("kind: sft", "kind: qlora", 12, "stages.chat.kind", ["kind: sft", "`lora:`"]),
    ("name: law\n", "name: base\n", 5, "stages.base.name", ["before any training"]),
    ("name: chat", "name: law", 11, "stages.1.name", ["another stage"]),
    ("learning_rate", "learing_rate", 10, "stages.law.training.learing_rate", ["mean learning_rate?"]),
    ("max_steps: 2000", "max_steps: 2.5", 10, "stages.law.training.max_steps", ["2.5", "a whole number"]),
    ("max_steps: 2000", "max_steps: true", 10, "stages.law.training.max_steps", ["true", "a whole number"]),
    ("max_steps: 2000", "num_train_epochs: 1", 10, "stages.law.training.max_steps", ["streaming: true"]),
    ("max_steps: 2000", "packing: true", 10, "stages.law.training.packing", ["TrainingArguments", "kind: sft"]),
    ("learning_rate: 2e-4", "learning_rate: '2e-4'", 10, "stages.law.training.learning_rate", ["without quotes"]),
    ("learning_rate: 2e-4", "output_dir: x", 10, "stages.law.training.output_dir", ["recipe's `output_dir`"]),
    ("learning_rate: 2e-4", "seed: 1", 10, "stages.law.training.seed", ["recipe's `seed`"]),
    ("learning_rate: 2e-4", "hub_token: x", 10, "stages.law.training.hub_token", ["HF_TOKEN"]),
    ("learning_rate: 2e-4", "bf16: yes", 10, "stages.law.training.bf16", ["Did you mean true?"]),
    ("learning_rate: 2e-4", "optim: adamw_torh", 10, "stages.law.training.optim", ["Did you mean adamw_torch?"]),
    (
        "streaming: true, weight: 0.8",
        "streming: true, weight: 0.8",
        8,
        "stages.law.data.0.streming",
        ["mean streaming?"],
    ),
    ("streaming: true, weight: 0.8", "streaming: true", 8, "stages.law.data.0", ["`weight`"]),
    ("weight: 0.8", "weight: 0", 8, "stages.law.data.0.weight", ["above 0"]),
    ("weight: 0.8", "weight: .inf", 8, "stages.law.data.0.weight", ["finite"]),
    ("data_files:", "data_file:", 9, "stages.law.data.1.data_file", ["Did you mean data_files?"]),
    ("data_files:", "sep: x, data_files:", 9, "stages.law.data.1.sep", ["unknown key"]),
    ("name: all}]", "token: hf_x}]", 13, "stages.chat.data.0.token", ["HF_TOKEN"]),
    ("name: all}]", "columns: {promt: x}}]", 13, "stages.chat.data.0.columns.promt", ["Did you mean prompt?"]),
    ("name: all}]", "template: {prompt: x}}]", 13, "stages.chat.data.0.template.prompt", ["`completion`"]),
    ("name: all}]", "columns: 5}]", 13, "stages.chat.data.0.columns", ["a mapping", "a list"]),
    ("path: me/talk, name: all}]", "path: builtin, name: txt}]", 13, "stages.chat.data.0.name", ["mean text?"]),
    ("path: me/talk, name: all}]", "path: builtin, sep: x}]", 13, "stages.chat.data.0.sep", ["builtin"]),
    (
        "quantization: nf4",
        "quantization: nf5",
        14,
        "stages.chat.quantization",
        ["nf4, int8, none", "Did you mean nf4?"],
    ),
    (
        "quantization: nf4",
        "quantization: {type: nf4, load_in_4bits: true}",
        14,
        "stages.chat.quantization.load_in_4bits",
        ["unknown key"],
    ),
    ("    lora: {r: 16", "    lroa: {r: 16", 15, "stages.chat.lroa", ["Did you mean lora?"]),
    ("lora: {r: 16", "lora: {r: 16.0", 15, "stages.chat.lora.r", ["16.0", "a whole number"]),
    ("lora: {r: 16", "lora: {learning_rate: 1", 15, "stages.chat.lora.learning_rate", ["below `training:`"]),
    ("orthogonal", "pisa", 15, "stages.chat.lora.init_lora_weights", ["Did you mean pissa?"]),
    ("stage: law, share: 5%", "stage: lwa, share: 5%", 16, "stages.chat.replay.stage", ["Did you mean law?"]),
    ("replay: {stage: law, share: 5%}", "parent: chat", 16, "stages.chat.parent", ["earlier stage", "base, law"]),
    ("replay: {stage: law, share: 5%}", "learning_rate: 1", 16, "stages.chat.learning_rate", ["below `training:`"]),
    ("replay: {stage: law, share: 5%}", "lanes: 8", 16, "stages.chat.lanes", ["streaming: true"]),
    (
        "lr_scheduler_type: cosine",
        "lr_scheduler_type: cosin",
        17,
        "stages.chat.training.lr_scheduler_type",
        ["cosine?"],
    ),
    ("budget: 3%", "budget: 3", 19, "evaluate.general.budget", ["300%", "Did you mean 3%?"]),
    ("budget: 3%", "budget: -3%", 19, "evaluate.general.budget", ["at least 0"]),
    ("budget: 3%", "budget: some", 19, "evaluate.general.budget", ["some", "such as 3%"]),
    ("metrics: [rougeL]", "metrics: []", 20, "evaluate.chat.metrics", ["at least one"]),
    ("metrics: [rougeL]", "metrics: rougeL", 20, "evaluate.chat.metrics", ["a list"]),
    ("max_new_tokens", "max_new_token", 20, "evaluate.chat.generation.max_new_token", ["Did you mean max_new_tokens?"]),
    ("{path: me/talk, name: all},", "{path: me/talk, weight: 1},", 20, "evaluate.chat.data.weight", ["Remove it"]),
    (
        "{path: me/talk, name: all},",
        "{path: me/talk, name: all, split: train},",
        20,
        "evaluate.chat.data",
        ["stages.chat"],
    ),
    ("repo_id: me/law-chat", "repo_id: a/b/c", 21, "push.repo_id", ["a/b/c"]),
    ("repo_id: me/law-chat", "repo_id: a/b, what: adaptor", 21, "push.what", ["Did you mean adapter?"]),
    ("repo_id: me/law-chat", "repo_id: a/b, stage: caht", 21, "push.stage", ["Did you mean chat?"]),
    ("repo_id: me/law-chat", "repo_id: a/b, stage: law", 21, "push.what", ["`what: model`"]),
    ("push: {repo_id", "merge: true\nname: again\npush: {repo_id", 22, "name", ["given twice", "line 1"]),
]


@pytest.mark.parametrize(
    ("before", "after", "line", "path", "words"), WRONG, ids=[row[1].strip()[:40] for row in WRONG]
)
def test_a_wrong_recipe_names_line_key_and_remedy(
    tmp_path: Path, before: str, after: str, line: int, path: str, words: list[str]
) -> None:
    assert GOOD.count(before) == 1
    message = faults_of(tmp_path, GOOD.replace(before, after))
    own = [text for text in message.splitlines() if text.startswith(f"{tmp_path / 'recipe.yaml'}:{line}: {path}: ")]
    assert len(own) == 1, message
    assert all(word in own[0] for word in words), own[0]


def test_all_faults_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = GOOD
    for before, after in [
        ("name: law-chat", "nmae: law-chat"),  # a word of ours
        ("kind: pretrain", "kind: pretrian"),  # the kind, which must not hide the rest of its stage
        ("weight: 0.8", "weight: 0"),
        ("max_steps: 2000", "max_step: 2000"),  # a word of the trainer's
        ("lora: {r: 16", "lora: {r: x"),
        ("share: 5%", "share: 500%"),
        ("stage: law,", "stage: lwa,"),  # a rule
        ("metrics: [rougeL]", "metric: [rougeL]"),
    ]:
        text = text.replace(before, after)
    message = faults_of(tmp_path, text, "stages.chat.training.warmup_stpes=3")
    names = [
        "nmae",
        "law.kind",
        "law.data.0.weight",
        "max_step:",
        "lora.r",
        "share",
        "replay.stage",
        "chat.metric:",
        "warmup_stpes",
    ]
    assert [name for name in names if name not in message] == []
    lines = [int(number) for number in re.findall(r"recipe\.yaml:(\d+): ", message)]
    assert lines == sorted(lines)
    assert message.startswith(f"{len(lines) + 1} faults in ")
    assert message.endswith("run the same command again.")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["is empty"]),
        ("# nothing\n", ["is empty"]),
        ("- a\n- b\n", [":1", "a list", "a mapping"]),
        ("just words\n", [":1", "text", "a mapping"]),
        ("name: x\nmodel:\n\tid: y\n", [":3", "spaces"]),
        ("name: x\nmodel: {id: y\nstages: []\n", ["not YAML"]),
        ("name: a: b\n", [":1", "quotes"]),
        ("name: *x\n", [":1", "anchor"]),
        ("name: x\nmodel: {{ id }}\n", [":2", "a key must be a word"]),
        ("name: x\n---\nname: y\n", ["one document"]),
        ("name: !!python/object:os.system x\n", [":1", "tag"]),
        ("name: &a [*a]\n", [":1", "alias"]),
        ("name: \x01\n", [":1", "control character"]),
    ],
)
def test_what_is_no_recipe_is_one_clear_paragraph(tmp_path: Path, text: str, words: list[str]) -> None:
    message = faults_of(tmp_path, text)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_missing_file_a_folder_and_another_encoding(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    with pytest.raises(RecipeError, match=re.escape(f"Did you mean {path}?")):
        load_recipe(tmp_path / "recpie.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)
    path.write_bytes(b"name: x\nmodel: \xff\n")
    with pytest.raises(RecipeError, match=r":2: .*UTF-8"):
        load_recipe(path)


def test_numbers_and_truth_values_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    text = GOOD.replace(
        "learning_rate: 2e-4", "learning_rate: 1.e-3, weight_decay: 1e5, logging_steps: 1_000, bf16: true"
    )
    training = load_recipe(write(tmp_path, text)).stages[0].training
    assert [training[key] for key in ("learning_rate", "weight_decay", "logging_steps")] == [1e-3, 1e5, 1000]
    assert training["bf16"] is True


def test_anchors_and_merges_keep_the_line_of_the_block_they_take_in(tmp_path: Path) -> None:
    text = GOOD.replace("training: {max_steps: 2000,", "training: &shared {max_steps: 2000, warmup_stpes: 1,")
    text = text.replace("training: {num_train", "training: {<<: *shared, num_train")
    message = faults_of(tmp_path, text)
    assert "recipe.yaml:10: stages.law.training.warmup_stpes" in message
    assert "recipe.yaml:10: stages.chat.training.warmup_stpes" in message


def test_a_dumped_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    text = GOOD.replace("name: all}]", "name: '1e5', columns: {text: 'no'}}]").replace(
        "push:", "output_dir: '2'\npush:"
    )
    text = text.replace("target_modules: all-linear", "target_modules: all-linear, alpha_pattern: {1: 2.5e-7}")
    recipe = load_recipe(write(tmp_path, text))
    again = load_recipe(write(tmp_path, dump_recipe(recipe)))
    assert again == recipe
    assert hash_of(again) == hash_of(recipe)
    assert dump_recipe(again) == dump_recipe(recipe)


def test_a_hash_knows_values_and_not_the_order_of_keys(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    swapped = GOOD.replace("{r: 16, lora_alpha: 32,", "{lora_alpha: 32, r: 16,")
    assert hash_of(recipe) == hash_of(load_recipe(write(tmp_path, swapped)))
    assert hash_of(recipe) != hash_of(load_recipe(write(tmp_path, GOOD), ["stages.chat.lora.r=8"]))
    assert hash_of({"a": recipe.stages[0], 1: (1, 2)}) == hash_of({1: [1, 2], "a": recipe.stages[0]})
    assert re.fullmatch("[0-9a-f]{64}", hash_of(recipe))


def loaded(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(write(folder, GOOD), overrides)


def test_overrides_reach_every_key(tmp_path: Path) -> None:
    recipe = loaded(
        tmp_path,
        "stages.chat.lora.r=8",
        "stages.0.training.max_steps=5",
        "stages.law.training.learning_rate=1e-5",
        "evaluate.general.budget=2%",
        "model.id=me/other",
        "model.tokenizer.id=me/tokens",
        "stages.law.data.1.take=7",
        "stages.chat.lora.rank_pattern={q_proj: 4}",
        "push=null",
    )
    law, chat = recipe.stages
    assert chat.lora is not None
    assert (chat.lora["r"], chat.lora["rank_pattern"]) == (8, {"q_proj": 4})
    assert (law.training["max_steps"], law.training["learning_rate"], law.data[1].take) == (5, 1e-5, 7)
    assert recipe.evaluate["general"].budget == 0.02
    assert recipe.model.tokenizer is not None
    assert (recipe.model.id, recipe.model.tokenizer.id, recipe.push) == ("me/other", "me/tokens", None)


def test_a_metric_that_is_no_text_is_told_beside_early_stopping(tmp_path: Path) -> None:
    text = GOOD.replace("metrics: [rougeL]", "metrics: [{rougeL: 1}]")
    message = faults_of(
        tmp_path, text, "stages.chat.early_stopping={suite: chat}", "stages.chat.training.eval_strategy=null"
    )
    assert "evaluate.chat.metrics" in message


def test_an_override_can_drop_a_whole_stage_and_later_lines_stay_right(tmp_path: Path) -> None:
    text = GOOD.replace("replay: {stage: law, share: 5%}", "global_batch_size: 8")
    assert [stage.name for stage in load_recipe(write(tmp_path, text), ["stages.law=null"]).stages] == ["chat"]
    message = faults_of(tmp_path, text.replace("r: 16", "r: x"), "stages.law=null")
    assert "recipe.yaml:15: stages.chat.lora.r" in message


def test_a_stage_with_dots_in_its_name_can_be_overridden(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD.replace("name: chat", "name: chat.v1.0")), ["stages.chat.v1.0.lora.r=4"])
    assert recipe.stages[1].lora is not None
    assert recipe.stages[1].lora["r"] == 4


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.chat.lora.r=x", ["stages.chat.lora.r:", "the text 'x'", "a whole number"]),
        ("stages.chat.lora.rr=8", ["stages.chat.lora.rr:", "unknown key of LoraConfig"]),
        ("stages.caht.lora.r=8", ["no stage 'caht'", "law, chat", "Did you mean chat?"]),
        ("stages.law.data.2.take=8", ["no item '2'", "0, 1"]),
        ("modle.id=x", ["modle:", "unknown key", "Did you mean model?"]),
        ("name.x=1", ["name:", "no keys below it"]),
        ("pusch=null", ["no such key", "Did you mean push?"]),
        ("seed", ["path=value"]),
        ("seed=", ["null"]),
        ("seed=[1", ["not YAML"]),
        ("stages.chat.lora=null", ["4-bit"]),
    ],
)
def test_a_wrong_override_is_reported_as_such(tmp_path: Path, override: str, words: list[str]) -> None:
    message = faults_of(tmp_path, GOOD, override)
    assert all(word in message for word in words), message
    if override != "stages.chat.lora=null":  # what is wrong then stands in the file: a quantization without an adapter
        assert f"\n--set {override}: " in message


@pytest.mark.parametrize(
    ("trained", "held_out", "shared"),
    [
        ("{path: a}", "{path: a}", False),  # train and test
        ("{path: a}", "{path: a, split: train}", True),
        ("{path: a}", "{path: a, split: 'train[:5%]'}", True),
        ("{path: a, split: 'train[:90%]'}", "{path: a, split: 'train[90%:]'}", False),
        ("{path: a, split: 'train[:90%]'}", "{path: a, split: 'train[80%:]'}", True),
        ("{path: a, skip: 500}", "{path: a, split: train, take: 500}", False),
        ("{path: a, skip: 499}", "{path: a, split: train, take: 500}", True),
        ("{path: a, name: x}", "{path: a, name: y, split: train}", False),
        ("{path: json, data_files: [a, ./b]}", "{path: json, data_files: b}", True),
        ("{path: json, data_files: a}", "{path: json, data_files: b}", False),
        ("{path: json, data_files: {train: a, test: b}}", "{path: json, data_files: {train: a, test: b}}", False),
        ("{path: builtin}", "{path: builtin, name: text, split: train}", True),
        ("{path: builtin, split: test}", "{path: builtin}", True),
        ("{path: a, fold: {of: 9, leave: 1}}", "{path: a, split: train, fold: {of: 9, keep: 1}}", False),
        ("{path: a, fold: {of: 9, leave: 1}}", "{path: a, split: train, take: 9, fold: {of: 9, keep: 1}}", True),
    ],
)
def test_nothing_is_trained_on_what_a_suite_holds(tmp_path: Path, trained: str, held_out: str, shared: bool) -> None:
    text = dedent(
        f"""\
        name: x
        model: {{id: x}}
        stages:
          - {{name: a, kind: sft, data: [{trained}]}}
        evaluate:
          general: {{data: {held_out}, metrics: [bits_per_byte]}}
        """
    )
    if not shared:
        assert load_recipe(write(tmp_path, text))
        return
    message = faults_of(tmp_path, text)
    assert "recipe.yaml:6: evaluate.general.data: " in message
    assert "stages.a.data.0" in message
    assert ("Give both folds the same" in message) == ("fold" in held_out)
    assert load_recipe(write(tmp_path, text + "overlap: report\n"))


def test_checking_a_recipe_imports_no_heavy_library(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    code = f"""
import sys
from hfpipe.recipe import load_recipe
load_recipe({str(path)!r})
heavy = {{"torch", "transformers", "trl", "datasets", "peft", "numpy", "huggingface_hub"}}
print(sorted(heavy & {{name.split(".")[0] for name in sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
