"""A trained model in use: `hfpipe generate` and `hfpipe chat` say what plain transformers says of the saved model."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import talking
import tiny
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfpipe.cli import main

pytestmark = pytest.mark.slow

NEW = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("use")
    assert main(["run", str(tiny.write(folder, talking.recipe(folder)))]) == 0
    return folder / "run"


def plain_answer(run: Path, stage: str, prompt: str | list[dict[str, str]]) -> str:
    """The answer that transformers and PEFT give by themselves."""
    place = run / "stages" / stage / "model"
    tokenizer = AutoTokenizer.from_pretrained(place)
    if stage == "chat":
        base = json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"]
        model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), place)
    else:
        model = AutoModelForCausalLM.from_pretrained(place)
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    else:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_is_answered_as_by_plain_transformers_with_the_base_beside_it(run: Path, tmp_path: Path) -> None:
    texts = ["3: the cow?", "40: the hen?", "a longer prompt than the others: the fox?"]
    (tmp_path / "asked.txt").write_text("\n".join(texts) + "\n\n")
    words = ["--base", "--batch-size", "2", "--set", f"max_new_tokens={NEW}"]
    assert main(["generate", str(run), str(tmp_path / "asked.txt"), *words]) == 0
    found = answers(tmp_path / "asked-answers.jsonl")
    assert [row["given"]["text"] for row in found] == texts
    turns = [[{"role": "user", "content": text}] for text in texts]
    assert [row["answer"] for row in found] == [plain_answer(run, "chat", turn) for turn in turns]
    assert [row["base_answer"] for row in found] == [plain_answer(run, "prose", row["prompt"]) for row in found]
    assert found[0]["prompt"].endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "the cow?"},
        {"instruction": "the cow?", "output": "moo"},
        {"question": "the cow?", "answer": "moo"},
        {"messages": [{"role": "user", "content": "the cow?"}, {"role": "assistant", "content": "moo"}]},
        {"conversations": [{"from": "human", "value": "the cow?"}, {"from": "gpt", "value": "moo"}]},
    ],
)
def test_rows_of_every_format_are_asked_without_their_answers(run: Path, tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "asked.jsonl").write_text(json.dumps(row) + "\n")
    output = tmp_path / "said.jsonl"
    command = ["generate", str(run), str(tmp_path / "asked.jsonl"), "-o", str(output), "--set", "max_new_tokens=1"]
    assert main(command) == 0
    (found,) = answers(output)
    assert found["prompt"] == "<|im_start|>user\nthe cow?<|im_end|>\n<|im_start|>assistant\n"
    assert found["given"] == row


def test_a_stage_trained_by_a_template_is_asked_by_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False, shift=False)
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    run, file = str(tmp_path / "run"), tmp_path / "asked.csv"
    file.write_text("note,animal\nnumber 7,cow\n")
    output = tmp_path / "said.jsonl"
    assert main(["generate", run, str(file), "-o", str(output), "--set", "max_new_tokens=3", "--strength", "0.5"]) == 0
    assert [row["prompt"] for row in answers(output)] == ["number 7: what does the cow say?"]
    (tmp_path / "lines.txt").write_text("what does the cow say?\n")
    capsys.readouterr()
    assert main(["generate", run, str(tmp_path / "lines.txt")]) == 2
    assert "the columns note, animal" in capsys.readouterr().err
    assert main(["generate", run, str(tmp_path / "sounds.jsonl"), "--stage", "prose"]) == 5
    assert "found no prompt in the columns" in capsys.readouterr().err


def test_strength_goes_from_the_parent_to_the_trained_model(run: Path, tmp_path: Path) -> None:
    (tmp_path / "asked.txt").write_text("3: the cow?\n")
    said = {}
    for strength in ("0", "1"):
        output = tmp_path / f"{strength}.jsonl"
        command = ["generate", str(run), str(tmp_path / "asked.txt"), "-o", str(output), "--strength", strength]
        assert main([*command, "--base", "--set", f"max_new_tokens={NEW}"]) == 0
        (said[strength],) = answers(output)
    assert said["0"]["answer"] == said["0"]["base_answer"] == said["1"]["base_answer"]
    assert said["1"]["answer"] == plain_answer(run, "chat", [{"role": "user", "content": "3: the cow?"}])


def piped(monkeypatch: pytest.MonkeyPatch, text: str, *, terminal: bool = False) -> None:
    stream = io.StringIO(text)
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", stream)


def test_a_prompt_on_standard_input_is_answered_by_both(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(monkeypatch, "3: the cow?\n")
    assert main(["chat", str(run), "--base", "--set", f"max_new_tokens={NEW}"]) == 0
    turns = [{"role": "user", "content": "3: the cow?"}]
    tokenizer = AutoTokenizer.from_pretrained(run / "stages" / "chat" / "model")
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    said = capsys.readouterr().out
    assert said == f"[chat] {plain_answer(run, 'chat', turns)}\n[base] {plain_answer(run, 'prose', prompt)}\n"


def test_a_conversation_goes_on_until_it_is_ended(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {"role": "user", "content": "3: the cow?"}
    said = plain_answer(run, "chat", [first])
    second = plain_answer(run, "chat", [first, {"role": "assistant", "content": said}, first])
    piped(monkeypatch, "3: the cow?\n3: the cow?\n/new\n3: the cow?\n/exit\n", terminal=True)
    assert main(["chat", str(run), "--set", f"max_new_tokens={NEW}"]) == 0
    page = capsys.readouterr().out
    assert "/exit or Ctrl-D ends it" in page
    assert page.split("Ctrl-D ends it.\n")[1] == (f"> {said}\n> {second}\n> (a new conversation)\n> {said}\n> ")


def test_a_conversation_that_grows_too_long_loses_its_beginning(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(monkeypatch, "one two three four\n" * 5, terminal=True)
    assert main(["chat", str(run), "--set", "max_new_tokens=20"]) == 0
    assert "no longer fits" in capsys.readouterr().out
    piped(monkeypatch, "one two three four " * 40)
    assert main(["chat", str(run)]) == 5
    assert "and the model reads 128 at once" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--set", "max_new_token=3"], 2, "Did you mean max_new_tokens?"),
        (["--set", "max_new_tokens"], 2, "NAME=VALUE"),
        (["--stage", "chit"], 2, "Did you mean chat?"),
        (["--strength", "2"], 2, "from 0 (the parent) to 1"),
        (["--stage", "prose", "--base"], 2, "started from fresh weights"),
    ],
)
def test_what_cannot_be_is_refused(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    told: str,
) -> None:
    piped(monkeypatch, "hello")
    assert main(["chat", str(run), *words]) == code
    assert told in capsys.readouterr().err


def test_an_unfinished_run_and_an_empty_prompt_are_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(monkeypatch, " \n")
    assert main(["chat", str(run)]) == 5
    assert "holds no prompt" in capsys.readouterr().err
    other = tmp_path / "run"
    shutil.copytree(run, other)
    for done in (other / "stages").glob("*/done.json"):
        done.unlink()
    assert main(["chat", str(other)]) == 2
    assert "has no finished stage yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("chat RUN --stage chit", "Did you mean chat?"),
        ("chat RUN --strength 2", "from 0 (the parent) to 1"),
        ("chat RUN --set max_new_token=3", "Did you mean max_new_tokens?"),
        ("generate RUN nowhere.jsonl", "there is no such file or folder here"),
        ("generate RUN asked.jsonl --stage chit", "Did you mean chat?"),
        ("serve RUN --stage chit", "Did you mean chat?"),
        ("serve RUN", "is an adapter. Merge it first"),
        ("export RUN --to gguf --stage chit", "Did you mean chat?"),
        ("export RUN --to gguf --quant q4", "there is no such form"),
        ("export RUN --to onnx", "is an adapter. Merge it first"),
        ("merge RUN --stage chit", "Did you mean chat?"),
        ("dial RUN --stage chit", "Did you mean chat?"),
        ("push RUN --repo-id me/it --stage chit", "is not a stage"),
        ("evaluate RUN SUITES --stage chit", "Did you mean chat?"),
        ("evaluate NOWHERE SUITES", "Did you mean run?"),
        ("evaluate RUN SUITES --against NOWHERE", "Did you mean run?"),
        ("cure RECIPE --stage chit", "Did you mean chat?"),
        ("run LOST", "there is no such file or folder here; near it"),
        ("check LOST", "there is no such file or folder here; near it"),
        ("preview LOST", "there is no such file or folder here; near it"),
    ],
)
def test_a_wrong_word_is_refused_before_torch_is_imported(run: Path, words: str, told: str) -> None:
    suites = run.parent / "suites.yaml"
    suites.write_text("evaluate:\n  held: {data: {path: held.jsonl}, metrics: [bits_per_byte]}\n")
    lost = run.parent / "lost.yaml"
    lost.write_text(
        (run / "recipe.yaml").read_text().replace("chats.jsonl", "chat.jsonl").replace("name: tiny", "name: lost")
    )
    lost.write_text(re.sub("(?m)^output_dir: .*\n", "", lost.read_text()))
    places = {
        "NOWHERE": str(run.parent / "rum"),
        "LOST": str(lost),
        "RUN": str(run),
        "SUITES": str(suites),
        "RECIPE": str(run / "recipe.yaml"),
    }
    code = (
        "import sys; from hfpipe.cli import main; code = main(sys.argv[1:]); "
        "print(*(name for name in ('torch', 'transformers', 'trl') if name in sys.modules)); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *(places.get(word, word) for word in words.split())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=run.parent)
    assert (done.returncode, done.stdout.strip()) == (2, "")
    assert told in done.stderr
