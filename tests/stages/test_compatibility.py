"""A fault of the third stage of a chain is refused by `check`, and by `run` before the first one is trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hfpipe.cli import main
from hfpipe.model.create import train_tokenizer


def chain(folder: Path, *, kinds: dict | None = None, held: dict | None = None, **changes: Any) -> dict:
    """Text, then instructions, then a classifier: a recipe whose third stage and its suite a test spoils."""
    tiny.write_data(folder)
    content = tiny.recipe(folder, merge=False, **changes)
    roles = {"template": {"sentence": "{note}: a {animal}"}, "columns": {"label": "sound"}}

    def source(name: str) -> dict:
        return {"path": "json", "data_files": str(folder / f"{name}.jsonl"), "split": "train", **roles}

    stage = {"name": "kinds", "kind": "classification", "data": [source("sounds")], "training": {"max_steps": 2}}
    content["stages"].append({**stage, **(kinds or {})})
    content["evaluate"]["kinds"] = {"data": source("asked"), "metrics": ["accuracy"], **(held or {})}
    return content


def numbers(folder: Path, name: str) -> dict:
    """A source of sentences with numbers that have a point."""
    rows = [{"sentence": f"{number} cats", "label": number + 0.5} for number in range(20)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": "json", "data_files": str(folder / name), "split": "train"}


def refused(folder: Path, content: dict, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and message, which are those of `check` and of `run`; nothing is scored or trained."""
    path = str(tiny.write(folder, content))
    found = []
    for command in ("check", "run"):
        capsys.readouterr()
        found.append((main([command, path]), capsys.readouterr().err))
    assert found[0] == found[1]
    assert not [*folder.glob("run/stages/*/scores.json"), *folder.glob("run/stages/*/stage.json")]
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "held", "code", "words"),
    [
        ({"labels": ["mew", "bark"]}, {}, 5, ["stages.kinds", "the labels cluck, hoot, moo, yelp"]),
        ({"data": "numbers", "class_weights": "balanced"}, {}, 2, ["stages.kinds.class_weights", "hold numbers"]),
        ({"data": "numbers"}, {}, 5, ["makes a regression", "suite kinds has classes"]),
        ({}, {"data": "numbers", "metrics": ["mse"]}, 5, ["suite kinds", "numbers with a point"]),
        ({"data": "text"}, {}, 5, ["`sentence` with `label`"]),
        ({"training": {"max_steps": 2, "max_length": 100_000}}, {}, 2, ["max_length is 100000", "positions for 128"]),
        (
            {"early_stopping": {"suite": "general"}},
            {},
            2,
            ["early_stopping.suite", "'general' can be asked of a model"],
        ),
    ],
)
def test_a_third_stage_is_refused_before_the_first(
    kinds: dict, held: dict, code: int, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = chain(tmp_path, kinds=kinds, held=held)
    content["model"]["architecture"] = {
        "model_type": "gpt2",
        **{"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128},
    }
    stage, suite = content["stages"][2], content["evaluate"]["kinds"]
    if stage["data"] == "text":
        stage["data"] = content["stages"][0]["data"]
    if stage["data"] == "numbers":
        stage["data"] = [numbers(tmp_path, "numbers.jsonl")]
    if suite["data"] == "numbers":
        suite["data"] = numbers(tmp_path, "held-numbers.jsonl")
    found, message = refused(tmp_path, content, capsys)
    assert found == code
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("drop", "metrics", "words"),
    [
        (
            True,
            ["accuracy"],
            ["evaluate.kinds", "of a classifier alone", "would never be scored", "kind: classification"],
        ),
        (False, None, ["evaluate.general", "of a model of masked tokens alone", "objective: masked"]),
    ],
)
def test_a_suite_that_no_model_of_the_run_can_answer_is_refused(
    drop: bool, metrics: list | None, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = chain(tmp_path)
    if drop:
        del content["stages"][2]
    if metrics is None:
        content["evaluate"]["general"]["metrics"] = ["masked_accuracy"]
    code, message = refused(tmp_path, content, capsys)
    assert code == 2
    for word in words:
        assert word in message


def test_a_suite_of_classes_that_no_stage_has_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = chain(tmp_path)
    again = {**content["stages"][2], "name": "again", "parent": "sounds"}
    content["stages"].append(again)  # of two classifiers, neither has these
    content["evaluate"]["kinds"]["data"]["columns"] = {"label": "animal"}
    code, message = refused(tmp_path, content, capsys)
    assert code == 2
    assert "no stage has the classes of its rows, such as 'c" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "words"),
    [
        ({"metrics": ["f1"], "metric_options": {"f1": {"average": "binary", "pos_label": "woof"}}}, ["class 'woof'"]),
        ({"metrics": ["accuracy", "f1", "calibration_error", "matthews_correlation"]}, []),
    ],
)
def test_metrics_that_refuse_the_right_answers_are_told_before_training(
    suite: dict, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = chain(tmp_path, held=suite)
    if not words:
        assert main(["check", str(tiny.write(tmp_path, content))]) == 0
        return
    code, message = refused(tmp_path, content, capsys)
    assert code == 2
    for word in ("evaluate.kinds: f1", *words):
        assert word in message


def test_ter_of_thai_is_refused_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = chain(tmp_path)
    rows = [{"prompt": "moon", "completion": " พระจันทร์"}, {"prompt": "sun", "completion": " พระอาทิตย์"}]
    (tmp_path / "th.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": "json", "data_files": str(tmp_path / "th.jsonl"), "split": "train"}
    content["evaluate"] = {"thai": {"data": data, "metrics": ["ter"]}}
    code, message = refused(tmp_path, content, capsys)
    assert code == 2
    assert "evaluate.thai: " in message


@pytest.mark.parametrize("family", ["causal", "masked", "seq2seq"])
def test_ids_beyond_the_embeddings_are_refused(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = chain(tmp_path)
    texts = [json.loads(line)["text"] for line in (tmp_path / "prose.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer(texts, 300, 128, family)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    models: dict[str, Any] = {
        "causal": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)),
        "masked": lambda: BertForMaskedLM(BertConfig(vocab_size=300, **sizes)),
        "seq2seq": lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1)
        ),
    }
    models[family]().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["model"]["vocab"]["e"] = 4000  # a gap between the ids, as only a tokenizer of another model has
    path.write_text(json.dumps(stored))
    content["model"] = {"id": str(tmp_path / "base")}
    content["stages"] = [content["stages"][2]]
    del content["evaluate"]["general"], content["evaluate"]["sounds"]
    code, message = refused(tmp_path, content, capsys)
    assert code == 2
    assert "'e' is 4,000" in message
    assert "do not belong together" in message
    assert main(["evaluate", str(tmp_path / "base"), str(tmp_path / "tiny.yaml")]) == 2


def test_a_base_that_is_a_classifier_is_asked_its_own_classes(tmp_path: Path) -> None:
    content = chain(tmp_path)
    content["stages"] = [content["stages"][2]]
    content["stages"][0]["data"][0]["columns"] = {"label": "animal"}  # the suite keeps the sounds
    content["evaluate"] = {"kinds": content["evaluate"]["kinds"]}
    content["evaluate"]["kinds"]["data"] = {**content["evaluate"]["kinds"]["data"], "columns": {"label": "sound"}}
    again = {**content["stages"][0], "name": "again", "parent": "base"}
    content["stages"].append(again)
    names = dict(enumerate(sorted(tiny.SOUNDS.values())))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=300, **sizes, id2label=names, label2id={name: n for n, name in names.items()})
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    train_tokenizer(names.values(), 300, 128, "masked").save_pretrained(tmp_path / "base")
    content["model"] = {"id": str(tmp_path / "base")}
    assert main(["check", str(tiny.write(tmp_path, content))]) == 0


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("words", [{"where": "id == 'nobody'"}, {"skip": 1000}])
def test_a_second_stage_without_a_row_is_refused_before_the_first_is_trained(
    tmp_path: Path, words: dict, streaming: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False)
    first = content["stages"][0]
    content["stages"] = [first, {**first, "name": "empty", "data": [{**first["data"][0], **words}]}]
    content["stages"][1]["data"][0]["streaming"] = streaming
    code, message = refused(tmp_path, content, capsys)
    assert code == 5
    for told in ("stages.empty", "`where`, `skip` and `take`"):
        assert told in message


def test_what_a_pretrain_stage_lacks_is_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False)
    content["stages"] = content["stages"][:1]
    content["stages"][0]["data"][0]["data_files"] = str(tmp_path / "sounds.jsonl")
    code, message = refused(tmp_path, content, capsys)
    assert code == 5
    assert "has the columns id, animal, sound, note: no `text`." in message
