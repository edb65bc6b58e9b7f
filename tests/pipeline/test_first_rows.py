"""Parts of the data that a chat template leaves out are told before they are missed."""

import json
from pathlib import Path

import pytest
import tiny

from hfpipe.cli import main

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "today's", "parameters": {}}}
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{{ eos_token }}{% endfor %}"
WITH_CALLS = PLAIN.replace("{{ eos", "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ eos")
WITH_ALL = "{% if tools %}{{ tools | tojson }}{% endif %}" + WITH_CALLS


def write(folder: Path, template: str) -> Path:
    turns = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    turns += [{"role": "tool", "content": "sun"}, {"role": "assistant", "content": "Sunny."}]
    rows = [{"messages": turns, "tools": [TOOL]}, {"messages": [turns[0], turns[3]]}]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny.write_data(folder)
    recipe = tiny.recipe(folder, merge=False, evaluate={})
    recipe["model"]["tokenizer"]["chat_template"] = template
    chats = {"name": "chats", "kind": "sft", "data": [{"path": str(folder / "chats.jsonl")}]}
    training = {"max_steps": 1, "learning_rate": 1e-3, "max_length": 512}
    return tiny.write(folder, {**recipe, "stages": [{**chats, "training": training}]})


@pytest.mark.parametrize(
    ("template", "missing"), [(PLAIN, {"tools", "tool_calls"}), (WITH_CALLS, {"tools"}), (WITH_ALL, set())]
)
def test_check_names_what_the_chat_template_leaves_out(
    template: str, missing: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(write(tmp_path, template))]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in ("tools", "tool_calls"):
        told = f"50% of the sampled rows have `{part}` that the chat template leaves out" in said
        assert told == (part in missing)


@pytest.mark.slow
def test_run_says_so_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(write(tmp_path, WITH_CALLS))]) == 0
    said = capsys.readouterr().out
    assert "50% of the first rows have `tools` that the chat template leaves out" in said
    assert "tool_calls" not in said


def test_preview_of_rows_that_are_all_dirty_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sentences.csv").write_bytes(b"sentence,label\none \xc3S,even\n,odd\n")
    tiny.write_data(tmp_path)
    stage = {"name": "kinds", "kind": "classification", "data": [{"path": str(tmp_path / "sentences.csv")}]}
    stage["training"] = {"max_steps": 1, "learning_rate": 1e-3, "max_length": 32}
    path = tiny.write(tmp_path, {**tiny.recipe(tmp_path, merge=False, evaluate={}), "stages": [stage]})
    assert main(["preview", str(path)]) == 5
    assert "2 of 2 rows read are dirty" in capsys.readouterr().err
