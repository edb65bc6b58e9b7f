"""The text of a suite's row: the prompt, the right answer as the chat template writes it, and which of it is scored."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from hfpipe.core.errors import DataError
from hfpipe.data.sources.templates import COMPLETION_TURNS
from hfpipe.data.tokenize import chat_text, conversation

Span = tuple[int, int]  # first character, and the one behind the last


@dataclass(frozen=True)
class RowText:
    """A row as text.

    Args:
        prompt: What the model is given; of a conversation with the generation prompt of its chat template.
        completion: The right answer; of a conversation all that the template writes for it, closing marks included.
        spans: Characters of `completion` whose likelihood is scored: of a conversation the assistant's content, without
            the marks around it.
        chat: Whether a chat template wrote the text, special tokens included.
    """

    prompt: str
    completion: str
    spans: tuple[Span, ...]
    chat: bool = False

    @property
    def scored(self) -> str:
        """The scored characters; those of several turns in one line each."""
        return "\n".join(self.completion[start:end] for start, end in self.spans)


def text_of_prompt(row: dict[str, Any], tokenizer: Any) -> RowText:
    """The text that is put to the model.

    Raises:
        DataError: The chat template does not take the conversation, or there is none.
    """
    if "messages" not in row:
        return RowText(row["prompt"], "", ())
    turns, options = conversation(row)
    try:
        return RowText(chat_text(tokenizer, turns, add_generation_prompt=True, **options), "", (), chat=True)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise DataError(f"the chat template of the model does not take this conversation: {error}.") from error


def row_text(row: dict[str, Any], tokenizer: Any) -> RowText:
    """Returns the text of a row with `messages`, `prompt` + `completion` or `text`; a plain text has no prompt.

    Raises:
        DataError: A conversation does not end with an answer, or its chat template cannot write it.
    """
    if "chosen" in row:  # of a pair the chosen answer is the right one
        if isinstance(row["prompt"], list):
            turns = {"messages": [*row["prompt"], *row["chosen"]], COMPLETION_TURNS: len(row["chosen"])}
            return _conversation_text({**row, **turns}, tokenizer)
        row = {**row, "completion": row["chosen"]}
    if "messages" in row:
        return _conversation_text(row, tokenizer)
    prompt, completion = (row["prompt"], row["completion"]) if "prompt" in row else ("", row["text"])
    return RowText(prompt, completion, ((0, len(completion)),))


def _conversation_text(row: dict[str, Any], tokenizer: Any) -> RowText:
    messages, options = conversation(row)
    turns = row.get(COMPLETION_TURNS) or 1
    earlier, answer = messages[:-turns], messages[-turns:]
    name = row.get("id", "without an id")
    if answer[-1]["role"] != "assistant" or not earlier:
        raise DataError(
            f"a conversation must end with an assistant's message after another one, and this one ends with "
            f"{answer[-1]['role']!r} (row {name})."
        )
    try:
        prompt = chat_text(tokenizer, earlier, add_generation_prompt=True, **options)
        asked = chat_text(tokenizer, earlier, **options)
        whole = chat_text(tokenizer, messages, **options)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"the chat template cannot write a conversation of the suite (row {name}): {error}. Correct or drop the "
            "row (`where`), or give a template that takes it: `model.tokenizer.chat_template`."
        ) from error
    if whole.startswith(prompt):
        completion = whole[len(prompt) :]
    elif whole.startswith(asked):  # the generation prompt opens the answer in other words, such as `<think>`
        completion = whole[_shared(prompt, whole) :]
    else:  # a template that writes earlier turns anew once they are answered
        completion = _content(answer[-1]) or ""
    return RowText(prompt, completion, _spans(completion, answer, tokenizer), chat=True)


def _shared(one: str, other: str) -> int:
    """Characters at the beginning that two texts share."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _content(turn: dict[str, Any]) -> str | None:
    """The text of a turn; None where its content is not text alone, or the turn calls a tool."""
    content = turn.get("content")
    if isinstance(content, list):  # parts of several kinds
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = None if None in texts else "".join(str(text) for text in texts)
    return None if turn.get("tool_calls") or not isinstance(content, str) else content


def _spans(completion: str, answer: list[dict[str, Any]], tokenizer: Any) -> tuple[Span, ...]:
    """Finds the contents of the assistant's turns in what the template wrote for them.

    Where it wrote something else (a tool call, or a content that it changes), all of it but the closing marks counts.
    """
    end = len(completion) - len(closing_marks(completion, tokenizer))
    contents = [_content(turn) for turn in answer if turn["role"] == "assistant"]
    spans, start = [], 0
    for number, content in enumerate(contents):
        text = (content or "").strip()  # as most templates do
        last = number == len(contents) - 1
        place = completion.rfind(text, start, end) if last else completion.find(text, start, end)
        if content is None or place < 0:
            return ((0, end),)
        if text:
            spans.append((place, place + len(text)))
        start = place + len(text)
    return tuple(spans)


def special_texts(tokenizer: Any) -> list[str]:
    """The special tokens of a tokenizer as text, the longest first."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added}, key=lambda text: (-len(text), text))


def closing_marks(text: str, tokenizer: Any) -> str:
    """The special tokens at the very end of a text, with the white space around them."""
    marks = "|".join(map(re.escape, special_texts(tokenizer)))
    found = re.search(rf"(?:\s*(?:{marks}))+\s*\Z", text) if marks else None
    return found.group() if found else ""


# Opening and closing marks of reasoning: Qwen, DeepSeek and most; Magistral; Cohere; gpt-oss; Gemma 4; Seed; Kimi.
_REASONING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
    ("<|channel>thought", "<channel|>"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
)
_FINAL = re.compile(r"(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>")  # gpt-oss, before the answer itself


def without_reasoning(text: str, prompt: str = "") -> str:
    """Takes the reasoning blocks off an answer, with the white space behind them; a block that never ends takes all.

    Args:
        text: The answer.
        prompt: What stood before it: some templates open the block there.
    """
    for opening, closing in _REASONING:
        if prompt.rstrip().endswith(opening):
            text = opening + text
        text = re.sub(rf"{re.escape(opening)}.*?(?:{re.escape(closing)}\s*|\Z)", "", text, flags=re.DOTALL)
        if closing.startswith(("</", "[/")):  # closed, and opened by nobody
            text = text.rpartition(closing)[2].lstrip() if closing in text else text
    return _FINAL.sub("", text)
