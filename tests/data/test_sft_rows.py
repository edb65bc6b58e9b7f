"""Rows of `kind: sft` beside those that TRL's SFTTrainer makes of the same data, token by token."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import trl
from datasets import Dataset, load_dataset
from encoding import encode_for_training
from trl import SFTConfig, SFTTrainer

from hfpipe.cli import main
from hfpipe.data.sources.load import load_rows
from hfpipe.model.create import create_model, train_tokenizer
from hfpipe.recipe import Source

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Says {name}.",
            "parameters": {"type": "object", "properties": {key: {"type": "number"}}, "required": [key]},
        },
    }
    for name, key in (("times", "a"), ("plus", "b"))
]
CALL = {"type": "function", "function": {"name": "times", "arguments": {"a": 2}}}
TURNS = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "What does the fox say?"},
    {"role": "assistant", "content": "Yelp."},
    {"role": "user", "content": "And the cow? 牛呢"},
    {"role": "assistant", "content": "Moo."},
]
WITH_TOOLS = [
    *TURNS[:2],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "times", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = train_tokenizer(["The fox said yelp, and the cow said moo. Grüße! 牛呢"] * 5, 400, 512)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = (TEMPLATES / "qwen3.jinja").read_text()
    return made


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    fields = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return create_model({"model_type": "llama", **fields}, tokenizer, seed=0)


CASES: dict[str, tuple[list[dict], dict]] = {
    "text": ([{"text": "The fox said yelp."}, {"text": "Grüße 牛"}], {}),
    "prompt and completion": ([{"prompt": "The fox said", "completion": " yelp."}] * 2, {}),
    "a completion without a space": ([{"prompt": "The fo", "completion": "x said yelp"}] * 2, {}),
    "all of prompt and completion": ([{"prompt": "The", "completion": " cow"}], {"completion_only_loss": False}),
    "messages": ([{"messages": TURNS}], {}),
    "the assistant only": ([{"messages": TURNS}, {"messages": TURNS[1:3]}], {"assistant_only_loss": True}),
    "tools": ([{"messages": WITH_TOOLS, "tools": json.dumps(TOOLS)}], {}),
    "tools and the assistant only": (
        [{"messages": WITH_TOOLS, "tools": json.dumps(TOOLS)}],
        {"assistant_only_loss": True},
    ),
    "template options": ([{"messages": TURNS, "chat_template_kwargs": {"enable_thinking": False}}], {}),
    "turns of prompt and completion": ([{"prompt": TURNS[:2], "completion": TURNS[2:]}], {}),
    "turns of prompt and completion, the assistant only": (
        [{"prompt": TURNS[:2], "completion": TURNS[2:]}],
        {"assistant_only_loss": True},
    ),
    "all of the turns": ([{"prompt": TURNS[:4], "completion": TURNS[4:]}], {"completion_only_loss": False}),
    "cut": ([{"messages": TURNS}], {"max_length": 20}),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_trls_own(tokenizer: Any, model: Any, tmp_path: Path, case: str) -> None:
    rows, training = CASES[case]
    arguments = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
    batches = [trainer.data_collator([trainer.train_dataset[number]]) for number in range(len(rows))]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = load_rows(Source.model_validate({"path": "json", "data_files": str(file)}))
    as_trl = {name: training.get(f"{name}_loss") for name in ("completion_only", "assistant_only")}
    given = {"completion_only": as_trl["completion_only"], "assistant_only": bool(as_trl["assistant_only"])}
    if not any(value is not None for value in as_trl.values()):
        given["train_on"] = "completion" if "prompt" in rows[0] else "all"
    made = encode_for_training(list(read), tokenizer, max_length=training.get("max_length", 1024), **given)
    assert len(made) == len(rows)
    for ours, theirs in zip(made, batches, strict=True):
        assert ours["input_ids"] == theirs["input_ids"][0].tolist()
        assert ours["labels"][1:] == theirs["labels"][0].tolist()[1:]  # the first is never a target of the shifted loss
        assert any(label >= 0 for label in ours["labels"])


def test_tools_of_a_table_are_written_without_the_keys_of_other_rows(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": WITH_TOOLS, "tools": TOOLS}, {"messages": TURNS, "tools": TOOLS[:1]}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")  # Arrow gives every tool the keys of all
    raw = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train")
    assert raw[0]["tools"][0]["function"]["parameters"]["properties"] == {"a": {"type": "number"}, "b": None}
    read = load_rows(Source.model_validate({"path": "parquet", "data_files": str(tmp_path / "rows.parquet")}))
    made = encode_for_training(list(read), tokenizer, max_length=None, train_on="all")
    for ours, row in zip(made, rows, strict=True):
        said = tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False)
        assert tokenizer.decode(ours["input_ids"]) == said
        assert "null" not in said


def test_a_template_without_marks_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_data(tmp_path)
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": TURNS[1:]}) + "\n" for _ in range(8)))
    content = tiny.recipe(tmp_path, merge=False, evaluate={})
    content["model"]["tokenizer"]["chat_template"] = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    source = {"path": "json", "data_files": str(tmp_path / "chat.jsonl")}
    content["stages"] = [{**content["stages"][1], "data": [source]}]
    content["stages"][0]["training"]["assistant_only_loss"] = True
    path = tiny.write(tmp_path, content)
    for command in ("check", "run"):
        assert main([command, str(path)]) in (2, 5)
        message = capsys.readouterr().err
        assert "{% generation %}" in message
        assert "model.tokenizer.chat_template" in message
        assert "Traceback" not in message
    assert not (tmp_path / "run/stages/sounds/model").exists()


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"max_length": 129}, ["max_length is 129", "positions for 128"]),
        ({"warmup_steps": -3}, ["warmup_steps", "found -3; allowed is a number from 0"]),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"foo": 1}}, ["unexpected keyword argument 'foo'"]),
    ],
)
def test_values_that_a_library_or_the_model_refuses_get_one_paragraph(
    training: dict, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, merge=False, evaluate={})
    content["model"]["architecture"] = {
        "model_type": "gpt2",
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 128,
    }
    content["stages"] = [{**content["stages"][1], "training": training}]
    assert main(["run", str(tiny.write(tmp_path, content))]) == 2
    message = "".join(capsys.readouterr())
    assert all(word in message for word in words), message
    assert "Traceback" not in message


def test_check_tells_of_ends_that_teach_no_stop_and_of_rows_that_are_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_data(tmp_path)
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": TURNS[1:]}) + "\n" for _ in range(8)))
    content = tiny.recipe(tmp_path, merge=False, evaluate={})
    turn = "{{ turn.role }}: {{ turn.content }}"
    templates = {"no stop": f"{{% for turn in messages %}}{turn}\n{{% endfor %}}"}
    templates["stop"] = templates["no stop"].replace("\n", "<|endoftext|>\n")
    source = {"path": "json", "data_files": str(tmp_path / "chat.jsonl")}
    content["stages"] = [{**content["stages"][1], "data": [source]}]
    content["stages"][0]["training"]["max_length"] = 30
    said = {}
    for name, template in templates.items():
        content["model"]["tokenizer"]["chat_template"] = template
        assert main(["check", str(tiny.write(tmp_path, content))]) == 0
        said[name] = capsys.readouterr().out
        assert "100% of the sampled rows are longer than max_length (30)" in said[name]
    assert "100% of the sampled rows do not end with the EOS token (<|endoftext|>)" in said["no stop"]
    assert "EOS" not in said["stop"]


def test_who_is_trained_is_said_by_the_stage_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_data(tmp_path)
    said = [TURNS[1], {**TURNS[2], "weight": 0}, *TURNS[3:]]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": said}) + "\n" for _ in range(8)))
    content = tiny.recipe(tmp_path, merge=False, evaluate={})
    content["model"]["tokenizer"]["chat_template"] = (TEMPLATES / "qwen2_5.jinja").read_text()
    source = {"path": "json", "data_files": str(tmp_path / "chat.jsonl")}
    content["stages"] = [{**content["stages"][1], "data": [source], "training": {"max_steps": 1, "max_length": 500}}]
    content["model"]["architecture"]["max_position_embeddings"] = 512
    shares = {}
    for word in (None, "last", "all"):
        content["stages"][0] |= {} if word is None else {"train_on": word}
        path = str(tiny.write(tmp_path, content))
        assert main(["preview", path, "--rows", "1"]) == 0
        shown = capsys.readouterr().out
        assert "[[Moo.<|im_end|>\n]]" in shown or word == "all"
        assert "[[Yelp" not in shown  # its weight is 0
        assert main(["check", path]) == 0
        shares[word] = int(capsys.readouterr().out.partition("% of them trained on")[0].split()[-1])
    assert 0 < shares[None] == shares["last"] < shares["all"] < 100
    content["stages"][0]["training"]["assistant_only_loss"] = True
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    assert "train_on" in capsys.readouterr().err
    del content["stages"][0]["training"]["assistant_only_loss"]
    content["stages"][0] |= {"train_on": "assistant", "data": [{**source, "template": {"text": "{messages}"}}]}
    assert main(["run", str(tiny.write(tmp_path, content))]) == 5
    assert "plain texts" in capsys.readouterr().err


@pytest.mark.slow
def test_a_row_that_the_template_refuses_is_dirty_and_one_that_refuses_all_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_data(tmp_path)
    rows = [{"messages": TURNS[1:]}] * 40 + [{"messages": TURNS[2:]}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = tiny.recipe(tmp_path, merge=False, evaluate={})
    content["model"]["tokenizer"]["chat_template"] = (TEMPLATES / "gemma.jinja").read_text()
    source = {"path": "json", "data_files": str(tmp_path / "chat.jsonl")}
    stage = {**content["stages"][1], "data": [source], "max_dirty_share": "5%"}
    content["stages"] = [stage]
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    facts = json.loads((tmp_path / "run/stages/sounds/done.json").read_text())["data"]["sources"]
    (found,) = facts.values()
    assert "roles must alternate" in str(found["dirty"])
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(rows[-1]) + "\n" for _ in range(5)))
    content["output_dir"] = str(tmp_path / "other")
    for command in ("check", "run"):
        assert main([command, str(tiny.write(tmp_path, content))]) == 5
        assert "roles must alternate" in capsys.readouterr().err
