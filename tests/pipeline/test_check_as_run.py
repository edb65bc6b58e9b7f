"""`check` finds what `run` would: both end with one exit code and one paragraph, on every case of a table of faults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from hfpipe.cli import main
from hfpipe.model.create import create_model, train_tokenizer

Fault = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("whole")
    tiny.write_data(home)
    texts = [json.loads(line)["text"] for line in (home / "prose.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer(texts, 320, 128)
    create_model(tiny.recipe(home)["model"]["architecture"], tokenizer, 0).save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    return home


def rows(name: str, *lines: object, encoding: str = "utf-8") -> Fault:
    """Trains on a file of these lines; a line that is no text is written as JSON."""

    def change(recipe: dict[str, Any]) -> None:
        text = "".join(f"{line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)}\n" for line in lines)
        Path(name).write_bytes(text.encode(encoding))
        recipe["stages"][0]["data"] = [{"path": name}]

    return change


def suite_of(*lines: object) -> Fault:
    """Scores a file of these rows."""

    def change(recipe: dict[str, Any]) -> None:
        Path("suite.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        recipe["evaluate"] = {"held": {"data": {"path": "suite.jsonl"}, "metrics": ["exact_match"]}}

    return change


def source(**words: Any) -> Fault:
    return lambda recipe: recipe["stages"][0]["data"][0].update(words)


def stage(**words: Any) -> Fault:
    return lambda recipe: recipe["stages"][0].update(words)


def training(**words: Any) -> Fault:
    return lambda recipe: recipe["stages"][0]["training"].update(words)


def suite(**words: Any) -> Fault:
    return lambda recipe: recipe["evaluate"]["held"].update(words)


def files(change: Callable[[], object]) -> Fault:
    return lambda recipe: change() and None


def both(*changes: Fault) -> Fault:
    return lambda recipe: [change(recipe) for change in changes] and None


def chat_template(text: str) -> Fault:
    return lambda recipe: recipe["model"].update(tokenizer={"chat_template": text})


def output_dir(name: str) -> Fault:
    def change(recipe: dict[str, Any]) -> None:
        Path("a-file").write_text("")
        recipe["output_dir"] = name

    return change


def sees_past_positions(recipe: dict[str, Any]) -> None:
    texts = [json.loads(line)["text"] for line in Path("prose.jsonl").read_text().splitlines()]
    architecture = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 2}
    tokenizer = train_tokenizer(texts, 320, 128)
    create_model(architecture, tokenizer, 0).save_pretrained("bloom")
    tokenizer.save_pretrained("bloom")
    recipe["model"]["id"] = "./bloom"
    recipe["stages"][0] = {"name": "s", "kind": "pretrain", "data": [{"path": "prose.jsonl"}]}
    recipe["stages"][0]["training"] = {"max_steps": 1, "max_length": 64}


def in_full(recipe: dict[str, Any]) -> None:
    del recipe["stages"][0]["lora"]


def no_classifier(recipe: dict[str, Any]) -> None:
    architecture = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    tokenizer = train_tokenizer(["a b c d"], 300, 128)
    create_model(architecture, tokenizer, 0).save_pretrained("mamba")
    tokenizer.save_pretrained("mamba")
    recipe["model"]["id"] = "./mamba"
    source = {"path": "sounds.jsonl", "columns": {"sentence": "note", "label": "sound"}}
    recipe["stages"][0] = {"name": "s", "kind": "classification", "data": [source], "training": {"max_steps": 1}}
    recipe["evaluate"] = {}


def row(number: int) -> dict[str, Any]:
    return {"prompt": f"What is {number}?", "completion": f" It is {number}."}


def said(number: int) -> dict[str, Any]:
    return {"prompt": f"这是第{number}个问题吗?", "completion": f" 是的,这是第{number}个。"}


MANY = [row(number) for number in range(50)]
TEMPLATE = "{{ raise_exception('no system role') if messages[0].role == 'system' }}{{ messages[-1].content }}"
CHAT = {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}
CHAT["messages"].append({"role": "assistant", "content": "c"})
CASES: dict[str, tuple[Fault, int]] = {
    "nothing wrong": (rows("a.jsonl", *MANY), 0),
    "blank lines": (rows("a.jsonl", *MANY[:20], "", "", *MANY[20:]), 0),
    "GBK": (rows("a.jsonl", *map(said, range(50)), encoding="gbk"), 0),
    "broken JSON in one line of 50": (rows("a.jsonl", *MANY[:30], '{"prompt": "x"', *MANY[31:]), 5),
    "an empty file": (rows("a.jsonl"), 5),
    "JSON that is null": (rows("a.json", "null"), 5),
    "JSON that is a number": (rows("a.json", "3"), 5),
    "no such column": (rows("a.jsonl", {"a": "x", "b": "y"}), 5),
    "all rows empty": (rows("a.jsonl", *[{"prompt": "", "completion": ""}] * 9), 5),
    "rows longer than any token": (training(max_length=2), 5),
    "a stream of empty rows": (
        both(rows("a.jsonl", *[{"prompt": "", "completion": ""}] * 9), source(streaming=True)),
        5,
    ),
    "a stream of rows without a token": (both(source(streaming=True), training(max_length=2)), 5),
    "where keeps nothing": (source(where="note == 'nothing'"), 5),
    "a column of `where` that is not there": (source(where="nothing > 3"), 5),
    "where that is no condition": (source(where="note ="), 2),
    "a column of the template that is not there": (
        source(template={"prompt": "{nothing}", "completion": "{sound}"}),
        5,
    ),
    "a file that is not there": (source(data_files="nothing.jsonl"), 2),
    "a split that is not there": (source(split="test"), 2),
    "skip beyond the end": (source(skip=5000), 5),
    "more folds than rows": (source(fold={"of": 10**12, "keep": 1}), 5),
    "a base that is not there": (lambda recipe: recipe["model"].update(id="./nowhere"), 2),
    "a base without weights": (files(lambda: Path("base/model.safetensors").unlink()), 2),
    "a base without a tokenizer": (files(lambda: [path.unlink() for path in Path("base").glob("tokenizer*")]), 2),
    "a base with a cut config": (files(lambda: Path("base/config.json").write_text("{")), 2),
    "a loss of routers without routers": (training(router_aux_loss_coef=0.01), 2),
    "a block of an adapter that is none": (stage(lora={"r": 4, "velora_config": 3}), 2),
    "a pattern of an adapter that is null": (stage(lora={"r": 4, "alpha_pattern": None}), 2),
    "an answer of a text's length": (suite(generation={"max_new_tokens": "x"}), 2),
    "an adapter of the head": (stage(lora={"r": 4, "target_modules": ["lm_head"]}), 2),
    "checkpointing of no layer": (
        training(activation_checkpointing=True, activation_checkpointing_kwargs={"every_n_layers": 0}),
        2,
    ),
    "a word that checkpointing has not": (
        training(activation_checkpointing=True, activation_checkpointing_kwargs={"x": 1}),
        2,
    ),
    "selective checkpointing that is off": (
        training(activation_checkpointing=False, activation_checkpointing_kwargs={"selective": True}),
        2,
    ),
    "selective checkpointing": (both(in_full, training(activation_checkpointing_kwargs={"selective": True})), 0),
    "selective checkpointing of an adapter": (training(activation_checkpointing_kwargs={"selective": True}), 2),
    "no DeepSpeed file": (training(deepspeed="nothing.json"), 2),
    "modules that the model has not": (stage(lora={"r": 4, "target_modules": ["q_prj"]}), 2),
    "an unknown optimizer": (training(optim="best"), 2),
    "more layers than there are": (stage(lora={"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [9]}), 2),
    "an output_dir that is a file": (output_dir("a-file"), 4),
    "an output_dir below a file": (output_dir("a-file/run"), 4),
    "an output_dir with a long name": (output_dir("n" * 300), 4),
    "a suite of nothing": (suite_of(), 5),
    "a suite of other columns": (suite_of({"a": 1}), 5),
    "a suite whose file is not there": (suite(data={"path": "nothing.jsonl"}), 2),
    "accuracy without choices": (suite(metrics=["accuracy"], data={"path": "one.jsonl"}), 2),
    "a metric of the Hub that is not there": (suite(metrics=["nobody/nothing"]), 4),
    "a metric that is a slash": (suite(metrics=["/"]), 2),
    "a metric script that is not there": (suite(metrics=["./nothing.py"]), 2),
    "a template that raises": (both(rows("c.jsonl", *[CHAT] * 9), chat_template(TEMPLATE)), 5),
    "a suite's own rows in the training": (both(rows("a.jsonl", *MANY), suite_of(*MANY[:20])), 5),
    "generation beyond the model": (suite(generation={"max_new_tokens": 4000}), 2),
    "modules that are no pattern": (stage(lora={"r": 4, "target_modules": "(q_proj"}), 2),
    "documents that would see each other": (sees_past_positions, 2),
    "a base that is no classifier": (no_classifier, 2),
    "a number beyond its range": (training(learning_rate=1e300), 2),
    "words that an optimizer passes over": (training(optim="sgd", adam_beta1=0.5), 2),
    "a damaged run folder": (files(lambda: (Path("run").mkdir(), Path("run/scorecard.json").write_text("3"))), 5),
}


def paragraphs(text: str) -> list[str]:
    """Returns the output of a command, without what libraries say in between."""
    return [line for line in text.splitlines() if line.startswith("hfpipe: ")]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_check_and_run_say_the_same(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    Path("one.jsonl").write_text(
        "".join(json.dumps(row(number) | {"completion": " It."}) + "\n" for number in range(9))
    )
    recipe = tiny.recipe(Path(), output_dir="run", model={"id": "./base"}, merge=False, overlap="refuse")
    recipe["stages"] = [recipe["stages"][1] | {"training": {"max_steps": 1, "max_length": 64}, "global_batch_size": 4}]
    recipe["evaluate"] = {"held": recipe["evaluate"]["sounds"] | {"metrics": ["exact_match"]}}
    change, code = CASES[name]
    change(recipe)
    path = str(tiny.write(tmp_path, recipe, "recipe.yaml"))
    told = []
    for command in ("check", "run"):
        found = main([command, path])
        page = capsys.readouterr()
        assert "Traceback" not in page.err
        told.append((found, paragraphs(page.err)))
    assert told[0] == told[1]
    assert told[0][0] == code, told[0][1]
    assert len(told[0][1]) == (1 if code else 0)
