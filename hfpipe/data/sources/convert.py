"""Rows of other people's formats as rows of ours: alpaca, ShareGPT, questions and answers, OpenAI's messages.

Each converter takes a row under the column names of the table in `hfpipe/recipe/row_formats.py`. A value that is
missing makes what is built of it missing, and the row counts as dirty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json, List, Value

from hfpipe.recipe.row_formats import BESIDE_MESSAGES, SAID_KEYS, SPEAKER_KEYS, RowFormat

Row = dict[str, Any]

# https://github.com/tatsu-lab/stanford_alpaca#data-release, with a line of its own for the response as in axolotl.
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request."
)
# Who speaks in ShareGPT's and LLaMA-Factory's files, by the names of chat templates.
SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter", "customer", "client"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "bard", "bing", "ai", "agent"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "function", "ipython"), "tool"),
    "function_call": "assistant",
    "system": "system",
}


def alpaca(row: Row) -> Row:
    """Stanford's prompt and its response; a part that is empty is left out, and the history stands before."""
    instruction, extra, output = row["instruction"], row.get("input"), row["output"]
    if instruction is None:
        return {"prompt": None, "completion": output}
    parts = [row.get("system") or (ALPACA_INPUT if _filled(extra) else ALPACA)]
    for asked, said in row.get("history") or ():
        parts += [f"### Instruction:\n{asked}", f"### Response:\n{said}"]
    parts += [f"### Instruction:\n{instruction}", *([f"### Input:\n{extra}"] if _filled(extra) else [])]
    return {"prompt": "\n\n".join([*parts, "### Response:\n"]), "completion": output}


def alpaca_chat(row: Row) -> Row:
    """The same as turns, for the model's own chat template."""
    if row["instruction"] is None or row["output"] is None:
        return {"messages": None}
    turns = [{"role": "system", "content": row["system"]}] if _filled(row.get("system")) else []
    for asked, said in row.get("history") or ():
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    asked = row["instruction"] + (f"\n{row['input']}" if _filled(row.get("input")) else "")
    turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
    return {"messages": turns}


def question_answer(row: Row) -> Row:
    """A question and its answer, as lm-eval's tasks put them."""
    question, answer = row["question"], row["answer"]
    return {
        "prompt": None if question is None else f"Question: {question}\nAnswer:",
        "completion": None if answer is None else f" {answer}",
    }


def messages(row: Row) -> Row:
    """Turns with `role` and `content`, the system's first where it has a column of its own."""
    turns = row["messages"] if "messages" in row else row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return {"messages": None}
    said = [plain_turn(turn) for turn in turns]
    if _filled(row.get("system")) and not (said and said[0]["role"] == "system"):
        said = [{"role": "system", "content": row["system"]}, *said]
    return {"messages": said}


def preference(row: Row) -> Row:
    """A prompt and two answers to it, all as texts or all as turns, as TRL has them.

    Without a prompt, it is what both answers begin with: their first turns, or their first characters. Answers that
    begin with the prompt's turns, or with turns in place of a prompt that is a text, are those behind it.
    """
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if None in (chosen, rejected) or ("prompt" in row and prompt is None):
        return {"prompt": None, "chosen": chosen, "rejected": rejected}
    if all(isinstance(side, str) for side in (chosen, rejected, prompt or "")):
        shared = 0 if "prompt" in row else _shared_text(chosen, rejected)
        given = prompt if "prompt" in row else chosen[:shared]
        return {"prompt": given, "chosen": chosen[shared:], "rejected": rejected[shared:]}
    given, better, worse = _turns_of(prompt, "user"), _turns_of(chosen, "assistant"), _turns_of(rejected, "assistant")
    shared = len(given) if isinstance(prompt, list) else _shared(better, worse)
    if shared and (not isinstance(prompt, list) or given == better[:shared] == worse[:shared]):
        given, better, worse = better[:shared], better[shared:], worse[shared:]
    return {"prompt": given, "chosen": better, "rejected": worse}


def _shared_text(one: str, other: str) -> int:
    """Counts the characters that two texts begin with; a space before the first that differs goes to the answer."""
    size = _shared(one, other)
    return size - 1 if size and one[size - 1] == " " and one[size] != other[size] else size


def _shared(one: Any, other: Any) -> int:
    """Counts what two texts, or two conversations, begin with; at most all but the last of the shorter one."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), max(0, min(len(one), len(other)) - 1))


def _turns_of(value: Any, speaker: str) -> list[Row]:
    """Returns the turns of a value: a conversation, one turn, or the words of a speaker."""
    if isinstance(value, str):
        return [{"role": speaker, "content": value}]
    turns = value if isinstance(value, list) else [value] if isinstance(value, dict) else []
    return [plain_turn(turn) if isinstance(turn, dict) else {"role": speaker, "content": turn} for turn in turns]


def hh_rlhf(row: Row) -> Row:
    """Anthropic's dialogues, two texts of turns that begin with `Human:` and `Assistant:`, as turns.

    Source: https://huggingface.co/datasets/Anthropic/hh-rlhf
    """
    return preference({side: _dialogue(row[side]) for side in ("chosen", "rejected")})


def _dialogue(text: str | None) -> list[Row] | None:
    if text is None:
        return None
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    speakers = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": speakers[who], "content": said.strip()} for who, said in pairs]


def ranking(row: Row) -> Row:
    """An instruction and two answers, LLaMA-Factory's ranking of its alpaca form, as turns."""
    asked = alpaca_chat({**row, "output": ""})["messages"]
    return preference({"prompt": asked and asked[:-1], "chosen": row["chosen"], "rejected": row["rejected"]})


def ranking_chat(row: Row) -> Row:
    """A conversation and two answers to its end, LLaMA-Factory's ranking of its sharegpt form, as turns."""
    asked = messages({name: value for name, value in row.items() if name not in ("chosen", "rejected")})["messages"]
    return preference({"prompt": asked, "chosen": row["chosen"], "rejected": row["rejected"]})


CONVERTERS: dict[str, Callable[[Row], Row]] = {
    "alpaca": alpaca,
    "alpaca_chat": alpaca_chat,
    "question_answer": question_answer,
    "sharegpt": messages,
    "messages": messages,
    "preference": preference,
    "hh_rlhf": hh_rlhf,
    "ranking": ranking,
    "ranking_chat": ranking_chat,
}


def plain_turn(turn: Mapping[str, Any]) -> Row:
    """A turn as chat templates know it: `role`, `content` as text, and calls of tools; its other keys stay.

    A content of several parts is joined where all are text. A call of a function (`function_call` of ShareGPT) and the
    arguments of `tool_calls` are JSON texts in many files; templates write them out themselves, so they are parsed.
    """
    kept = {key: value for key, value in turn.items() if value is not None}
    speaker, content = str(_taken(kept, SPEAKER_KEYS)), _taken(kept, SAID_KEYS)
    if isinstance(content, list) and all(map(_is_text, content)):
        content = "".join(part["text"] for part in content)
    new = {"role": SPEAKERS.get(speaker.lower(), speaker), "content": content}
    if speaker.lower() == "function_call" and (calls := _calls_in(content)):
        new |= {"content": "", "tool_calls": calls}
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = [_with_arguments(call) for call in kept["tool_calls"]]
    return new | kept


def _taken(turn: Row, keys: Sequence[str]) -> Any:
    """Takes the value of the first of some keys out of a turn; of the two common ones, both go."""
    known = [key for key in keys[:2] if key in turn] or [key for key in keys[2:] if key in turn][:1]
    return next(iter([turn.pop(key) for key in known]), "")


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def _calls_in(text: Any) -> list[Row]:
    """The calls that a text holds as JSON, one or a list; none where it holds something else."""
    found = _parsed(text)
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        return []
    functions = [{"name": call["name"], "arguments": _parsed(call.get("arguments", {}))} for call in calls]
    return [{"type": "function", "function": function} for function in functions]


def _with_arguments(call: Any) -> Any:
    """A call with its arguments as a mapping."""
    if not isinstance(call, dict):
        return call
    inner = call["function"] if isinstance(call.get("function"), dict) else call
    if not isinstance(inner.get("arguments"), str):
        return call
    parsed = {**inner, "arguments": _parsed(inner["arguments"])}
    return {**call, "function": parsed} if inner is not call else parsed


def _parsed(text: Any) -> Any:
    """The value of a JSON text; what is none stays as it is."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _filled(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def converted(
    rows: Any, features: Features, format: RowFormat, columns: Mapping[str, str]
) -> Dataset | IterableDataset:
    """Rows of a format as rows of the one that it becomes, in batches.

    Args:
        rows: A `Dataset` or an `IterableDataset`.
        features: Its columns and their types.
        format: The format of the rows, a key of `CONVERTERS`.
        columns: The column of the rows for each of the format's.
    """
    beside = {name: columns[name] for name in BESIDE_MESSAGES if name in columns}
    kept = {**({"id": "id"} if "id" in features else {}), **beside}
    text = Value("string")
    end = format.becomes or format.name
    made = {"messages": List(Json())} if end == "messages" else {"prompt": text, "completion": text}
    if end == "preference":
        sides = [features[columns[name]] for name in ("prompt", "chosen", "rejected") if name in columns]
        are_texts = format.name == end and all(isinstance(side, Value) for side in sides)
        made = dict.fromkeys(("prompt", "chosen", "rejected"), text if are_texts else List(Json()))
    made |= {name: features[column] for name, column in kept.items()}
    arguments: dict[str, Any] = {"desc": format.name} if isinstance(rows, Dataset) else {}
    return rows.map(
        _convert,
        batched=True,
        remove_columns=list(features),
        features=Features(made),
        fn_kwargs={"format": format.name, "columns": dict(columns), "kept": kept},
        **arguments,
    )


def _convert(
    batch: dict[str, list[Any]], format: str, columns: dict[str, str], kept: dict[str, str]
) -> dict[str, list[Any]]:
    values = zip(*(batch[column] for column in columns.values()), strict=True)
    rows = [CONVERTERS[format](dict(zip(columns, row, strict=True))) for row in values]
    made = {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}
    return made | {name: batch[column] for name, column in kept.items()}
