"""Formats of rows: recognized by their columns, said by `check`, asked about when two fit, and read as one would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import IterableDataset

from hfpipe.cli import main
from hfpipe.core.errors import DataError, RecipeError
from hfpipe.data.chat import is_trained
from hfpipe.data.sources.load import load_rows, open_source
from hfpipe.recipe import Source
from hfpipe.recipe.row_formats import ROW_FORMATS, TEXT_KINDS, texts_of

ASKED = {"role": "user", "content": "Two plus two?"}
SAID = {"role": "assistant", "content": "Four."}
WEATHER = {"name": "weather", "arguments": {"place": "Rome"}}
CALL = {"type": "function", "function": WEATHER}
streamed = pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def read(*rows: dict[str, Any], kinds: tuple[str, ...] = TEXT_KINDS, **words: Any) -> list[dict[str, Any]]:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = Source(path="json", data_files=str(tmp_path / "rows.jsonl"), **words)
        return list(load_rows(source, kinds=kinds))

    return read


@streamed
def test_alpaca_has_no_empty_section_and_keeps_history_and_system(read: Any, streaming: bool) -> None:
    rows = [
        {"instruction": "Add.", "input": "2 and 2", "output": "4", "id": "a"},
        {"instruction": "Greet.", "input": "", "output": "Hello.", "id": "b"},
    ]
    whole, short = read(*rows, streaming=streaming)
    assert whole["prompt"].endswith("### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n### Response:\n")
    assert short["prompt"].endswith("request.\n\n### Instruction:\nGreet.\n\n### Response:\n")
    assert "Input" not in short["prompt"]
    assert (short["completion"], short["id"]) == ("Hello.", "b")
    more = {"instruction": "And now?", "output": "6", "system": "You count.", "history": [["Start.", "4"]]}
    [row] = read(more, streaming=streaming)
    assert row["prompt"] == (
        "You count.\n\n### Instruction:\nStart.\n\n### Response:\n4\n\n### Instruction:\nAnd now?\n\n### Response:\n"
    )
    [row] = read(more, format="alpaca_chat", streaming=streaming)
    assert [(turn["role"], turn["content"]) for turn in row["messages"]] == [
        ("system", "You count."),
        ("user", "Start."),
        ("assistant", "4"),
        ("user", "And now?"),
        ("assistant", "6"),
    ]
    [gap] = read({"instruction": "Say.", "input": "", "output": None}, rows[0], streaming=streaming)[:1]
    assert gap["completion"] is None


@streamed
@pytest.mark.parametrize("column", ["conversations", "messages", "conversation"])
def test_sharegpt_under_any_of_its_names_becomes_messages(read: Any, column: str, streaming: bool) -> None:
    turns = [
        {"from": "human", "value": "Rome?"},
        {"from": "function_call", "value": json.dumps(WEATHER)},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "Sunny.", "weight": 0},
    ]
    tools = json.dumps([{"type": "function", "function": {"name": "weather"}}])
    [row] = read({column: turns, "system": "Be brief.", "tools": tools, "id": 7}, streaming=streaming)
    assert row["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Sunny.", "weight": 0},
    ]
    assert (row["tools"], row["id"]) == (tools, 7)
    assert [is_trained(turn, row) for turn in row["messages"]] == [True] * 4 + [False]
    [named] = read({"talk": turns[:1]}, columns={"messages": "talk"}, streaming=streaming)
    assert named["messages"] == [{"role": "user", "content": "Rome?"}]


@pytest.mark.parametrize(("speaker", "said"), [("author", "body"), ("sender", "text"), ("role", "message")])
def test_turns_with_other_keys_become_messages(read: Any, speaker: str, said: str) -> None:
    turns = [{speaker: "customer", said: "Where is it?", "at": "9:00"}, {speaker: "Agent", said: "On its way."}]
    [row] = read({"ticket": 7, "thread": turns})
    spoken = [(turn["role"], turn["content"]) for turn in row["messages"]]
    assert spoken == [("user", "Where is it?"), ("assistant", "On its way.")]


@streamed
def test_openai_messages_with_parts_calls_and_reasoning(read: Any, streaming: bool) -> None:
    parts = [{"type": "text", "text": "Rome"}, {"type": "text", "text": "?"}]
    called = {**CALL, "id": "c1", "function": {**WEATHER, "arguments": '{"place": "Rome"}'}}
    turns = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [called], "reasoning_content": "I must look."},
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Sunny.", "train": False},
    ]
    [row, plain] = read({"messages": turns}, {"messages": [ASKED, SAID]}, streaming=streaming)
    assert row["messages"][0] == {"role": "user", "content": "Rome?"}
    assert row["messages"][1]["tool_calls"] == [{**CALL, "id": "c1"}]
    assert row["messages"][1]["reasoning_content"] == "I must look."
    assert not is_trained(row["messages"][3], row)
    assert plain["messages"] == [ASKED, SAID]


@streamed
def test_questions_labels_and_pairs_are_recognized(read: Any, streaming: bool) -> None:
    [row] = read({"question": "Two plus two?", "answer": "Four."}, streaming=streaming)
    assert row == {"prompt": "Question: Two plus two?\nAnswer:", "completion": " Four."}
    [row] = read({"prompt": "Hi.", "response": "Hello."}, streaming=streaming)
    assert row == {"prompt": "Hi.", "completion": "Hello."}
    [row] = read({"input": "Two plus two?", "output": "Four."}, streaming=streaming)
    assert row == {"prompt": "Question: Two plus two?\nAnswer:", "completion": " Four."}
    [row] = read({"query": "q", "response": "a", "history": [["first", "then"]]}, streaming=streaming)
    assert row["completion"] == "a"
    assert row["prompt"].index("first") < row["prompt"].index("then") < row["prompt"].index("q\n")
    [row] = read({"text": "Fine.", "label": 1}, kinds=("classification",), streaming=streaming)
    assert row == {"sentence": "Fine.", "label": 1}
    [row] = read({"text": "Fine.", "label": 1}, kinds=("text",), streaming=streaming)
    assert row == {"text": "Fine."}
    [row] = read({"instruction": "a", "output": "b", "text": "ab"}, streaming=streaming)
    assert row["completion"] == "b"  # as the data set's page of Stanford's alpaca has it


def test_two_formats_that_fit_equally_are_asked_about(read: Any) -> None:
    row = {"prompt": "p", "completion": "c", "instruction": "i", "output": "o"}
    with pytest.raises(RecipeError, match="`format: prompt_completion` or `format: alpaca`"):
        read(row)
    assert read(row, format="prompt_completion") == [{"prompt": "p", "completion": "c"}]
    assert read(row, format="alpaca")[0]["completion"] == "o"
    assert read(row, format="alpaca", columns={"output": "completion"})[0]["completion"] == "c"
    with pytest.raises(DataError, match="needs instruction, output"):
        read({"a": "b"}, format="alpaca")
    with pytest.raises(RecipeError, match="which this does not take"):
        read({"text": "b", "label": 1}, format="text_label")


def test_pairs_of_preferences_are_no_rows_for_sft_and_the_better_ones_can_be(read: Any) -> None:
    row = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    with pytest.raises(DataError, match="taken for preference") as caught:
        read(row)
    assert '`template: {prompt: "{prompt}", completion: "{chosen}"}`' in str(caught.value)
    chat = {"chosen": [ASKED, SAID], "rejected": [ASKED, ASKED]}
    with pytest.raises(DataError, match=r"columns: \{messages: chosen\}"):
        read(chat)
    assert read(chat, columns={"messages": "chosen"})[0]["messages"] == [ASKED, SAID]


PROMPT, BETTER, WORSE = [ASKED], [SAID], [{"role": "assistant", "content": "Five."}]
IN_TURNS = {"prompt": PROMPT, "chosen": BETTER, "rejected": WORSE}
SYSTEM = {"role": "system", "content": "You count."}
EARLIER = [{"role": "user", "content": "Start."}, {"role": "assistant", "content": "One."}]
TURN = {side: {"from": "gpt", "value": IN_TURNS[side][0]["content"]} for side in ("chosen", "rejected")}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "turns": (IN_TURNS, IN_TURNS),
    "turns without a prompt": ({"chosen": PROMPT + BETTER, "rejected": PROMPT + WORSE}, IN_TURNS),
    "UltraFeedback's": (
        {
            "prompt": ASKED["content"],
            "prompt_id": "f0e3",
            "chosen": PROMPT + BETTER,
            "rejected": PROMPT + WORSE,
            "messages": PROMPT + BETTER,
            "score_chosen": 6.0,
        },
        IN_TURNS,
    ),
    "a prompt in turns that the answers repeat": (
        {"prompt": PROMPT, "chosen": PROMPT + BETTER, "rejected": PROMPT + WORSE},
        IN_TURNS,
    ),
    "HH-RLHF's": (
        {
            "chosen": "\n\nHuman: Start.\n\nAssistant: One.\n\nHuman: Two plus two?\n\nAssistant: Four.",
            "rejected": "\n\nHuman: Start.\n\nAssistant: One.\n\nHuman: Two plus two?\n\nAssistant: Five.",
        },
        {**IN_TURNS, "prompt": [*EARLIER, ASKED]},
    ),
    "LLaMA-Factory's ranking of alpaca": (
        {
            "instruction": "Two plus",
            "input": "two?",
            "chosen": "Four.",
            "rejected": "Five.",
            "system": "You count.",
            "history": [["Start.", "One."]],
        },
        {**IN_TURNS, "prompt": [SYSTEM, *EARLIER, {"role": "user", "content": "Two plus\ntwo?"}]},
    ),
    "LLaMA-Factory's ranking of sharegpt": (
        {"conversations": [{"from": "human", "value": "Two plus two?"}], **TURN},
        IN_TURNS,
    ),
    "questions with a system": (
        {"system": "You count.", "question": "Two plus two?", "chosen": "Four.", "rejected": "Five."},
        {**IN_TURNS, "prompt": [SYSTEM, ASKED]},
    ),
    "texts": ({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},) * 2,
    "texts without a prompt": (
        {"chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"},
        {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
    ),
}


@streamed
@pytest.mark.parametrize("form", PAIRS)
def test_pairs_of_every_form_become_a_prompt_and_two_answers(read: Any, form: str, streaming: bool) -> None:
    row, wanted = PAIRS[form]
    [found, other] = read({**row, "id": "a"}, {**row, "id": "b"}, kinds=("preference",), streaming=streaming)
    assert {name: found[name] for name in wanted} == wanted
    assert (found["id"], other["id"]) == ("a", "b")
    assert {*found} <= {"prompt", "chosen", "rejected", "id"}


def test_pairs_are_renamed_and_built_by_template(read: Any) -> None:
    row = {"asked": "Two plus two?", "good": "Four.", "bad": "Five."}
    renamed = {"prompt": "asked", "chosen": "good", "rejected": "bad"}
    [found] = read(row, kinds=("preference",), columns=renamed)
    assert found == {"prompt": "Two plus two?", "chosen": "Four.", "rejected": "Five."}
    turns = {
        "prompt": [{"role": "user", "content": "{asked}"}],
        "chosen": [{"role": "assistant", "content": "{good}"}],
        "rejected": [{"role": "assistant", "content": "{bad}"}],
    }
    source = Source.model_validate({"path": "json", "template": turns})
    [found] = read(row, kinds=("preference",), template=source.template)
    assert found == IN_TURNS
    with pytest.raises(DataError, match="holds int64, not text"):
        read({"prompt": "p", "chosen": 1, "rejected": 2}, kinds=("preference",))


def test_what_a_source_was_taken_for_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tiny.write_data(tmp_path)
    rows = [{"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = tiny.recipe(tmp_path, merge=False)
    content["stages"][1]["data"] = [{"path": "json", "data_files": str(tmp_path / "rows.jsonl")}]
    content["stages"][1]["training"]["max_length"] = 512  # alpaca's prompt is long in tokens of a tiny tokenizer
    assert main(["check", str(tiny.write(tmp_path, content))]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "taken for text (columns text)" in told
    assert "taken for alpaca (columns instruction, output, input), read as prompt_completion" in told
    content["stages"][1]["data"][0]["format"] = "alpacca"
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    assert "mean alpaca" in capsys.readouterr().err
    content["stages"][1]["data"][0] |= {"format": "alpaca", "columns": {"prompt": "instruction"}}
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    assert "instruction, output" in capsys.readouterr().err


def test_every_format_says_its_texts_once() -> None:
    for format in ROW_FORMATS.values():
        assert not format.texts or {name for names in format.texts for name in names} <= {*format.all_columns}
    assert texts_of({"prompt": "a", "completion": "b", "id": 1}) == ["ab"]
    assert texts_of({"good": "a", "bad": "b"}) == ["a", "b"]
    assert texts_of({"prompt": "a", "chosen": "b", "rejected": "c"}) == ["ab", "ac"]
    assert texts_of({"prompt": [ASKED], "chosen": [SAID], "rejected": [ASKED]})[0] == "Two plus two?\nFour."
    assert texts_of({"messages": [ASKED, SAID]}) == ["Two plus two?\nFour."]
    assert texts_of({"prompt": "a", "choices": ["b"], "answer": 0}) == ["a"]


def test_a_stream_of_a_recognized_format_resumes(tmp_path: Path) -> None:
    rows = [{"conversations": [{"from": "human", "value": str(n)}]} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(path="json", data_files=str(tmp_path / "rows.jsonl"), streaming=True)
    stream = open_source(source).rows
    assert isinstance(stream, IterableDataset)
    begun = iter(stream)
    first = [next(begun)["messages"][0]["content"] for _ in range(7)]
    again = load_rows(source)
    again.load_state_dict(stream.state_dict())
    assert [*first, *(row["messages"][0]["content"] for row in again)] == [str(n) for n in range(20)]


def test_every_format_is_documented_with_a_row_or_a_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert [name for name in ROW_FORMATS if f"`{name}`" not in page] == []
