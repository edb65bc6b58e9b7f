"""Rows of text to tokens and labels: what is trained on, and what is scored.

A row has one of three forms: `text`, `prompt` + `completion`, or `messages`. Text and prompt are joined before they are
tokenized, as a model will meet them; offsets tell which tokens belong to the completion.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfpipe.core.errors import DataError
from hfpipe.data.sources.templates import COMPLETION_TURNS

IGNORED = -100  # the label of a token that is not trained on


@dataclass(frozen=True)
class Encoded:
    """One row as the model sees it.

    Args:
        input_ids: (L,) tokens.
        scored: (L,) True where a token is a target (trained on, or scored).
        scored_bytes: UTF-8 bytes of text that the targets stand for; EOS and template marks that carry no text count 0.
    """

    input_ids: list[int]
    scored: np.ndarray
    scored_bytes: int

    @property
    def labels(self) -> list[int]:
        return np.where(self.scored, self.input_ids, IGNORED).tolist()


def prompt_and_completion(row: dict[str, Any], tokenizer: Any) -> tuple[str, str]:
    """The two texts of a row: what is given and what is to be said.

    A plain text has an empty prompt. The last message of a conversation is the completion, or all that its data had in
    the column of that name.
    """
    if "messages" in row:
        messages, options = conversation(row)
        said = row.get(COMPLETION_TURNS) or 1
        earlier, last = messages[:-said], messages[-1]
        if last["role"] != "assistant" or not earlier:
            raise DataError(
                f"a conversation must end with an assistant's message after another one, and this one ends with "
                f"{last['role']!r} (row {row.get('id', 'without an id')})."
            )
        prompt = chat_text(tokenizer, earlier, add_generation_prompt=True, **options)
        whole = chat_text(tokenizer, messages, **options)
        if whole.startswith(prompt):
            return prompt, whole[len(prompt) :]
        return prompt, last["content"]  # a template that rewrites earlier turns
    if "prompt" in row:
        return row["prompt"], row["completion"]
    return "", row["text"]


def conversation(row: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The turns of a row, and what its chat template is given beside them.

    As in TRL these are the columns `tools`, JSON schemas as a list or as JSON text, and `chat_template_kwargs`. The
    tools and calls of a table have the keys of all others, and None where they have none of their own: those are taken
    out, or a template would write them.

    Raises:
        DataError: `tools` is a text and not JSON.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            name = row.get("id", "without an id")
            raise DataError(f"`tools` of the row {name} is a text and not JSON: {error}.") from error
    else:
        tools = _without_gaps(tools)
    turns = [
        {key: _without_gaps(value) for key, value in turn.items() if value is not None or key == "content"}
        for turn in row["messages"]
    ]
    return turns, {"tools": tools or None, **_without_gaps(row.get("chat_template_kwargs") or {})}


def _without_gaps(value: Any) -> Any:
    """A value without the keys, at any depth, that hold None."""
    if isinstance(value, dict):
        return {key: _without_gaps(inner) for key, inner in value.items() if inner is not None}
    return [_without_gaps(inner) for inner in value] if isinstance(value, list) else value


def chat_text(tokenizer: Any, messages: Sequence[dict[str, Any]], **options: Any) -> str:
    """A conversation through the tokenizer's own chat template, as text."""
    if tokenizer.chat_template is None:
        raise DataError(
            "the data holds `messages`, but the tokenizer has no chat template. Give one in the recipe "
            "(model.tokenizer.chat_template), take an instruct model's tokenizer, or build prompt and completion with "
            "`template:`."
        )
    return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)


def encode(
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    *,
    max_length: int | None,
    append_eos: bool,
    score_prompt: bool = False,
) -> list[Encoded]:
    """Tokenizes rows in one call of the Rust tokenizer.

    Args:
        rows: Rows with `text`, `prompt` + `completion`, or `messages`.
        tokenizer: A fast tokenizer.
        max_length: Tokens to keep of the beginning of each row; None for all.
        append_eos: Whether an EOS token follows the text (training) or not (scoring).
        score_prompt: Whether the prompt's tokens are targets too.

    Returns:
        One `Encoded` a row. The first token is never a target: nothing stands before it. A row's targets may be none.
    """
    pairs = [prompt_and_completion(row, tokenizer) for row in rows]
    chat = bool(rows) and "messages" in rows[0]  # the template has written the special tokens already
    batch = tokenizer(
        [prompt + completion for prompt, completion in pairs],
        add_special_tokens=not chat,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    encoded = []
    for (prompt, completion), ids, offsets in zip(pairs, batch["input_ids"], batch["offset_mapping"], strict=True):
        text = prompt + completion
        spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        if append_eos and not (ids and ids[-1] == tokenizer.eos_token_id):
            ids = [*ids, tokenizer.eos_token_id]
            spans = np.concatenate([spans, [[len(text), len(text)]]])
        if max_length is not None:
            ids, spans = ids[:max_length], spans[:max_length]
        ends_text = spans[:, 1] > (0 if score_prompt else len(prompt))
        is_mark = spans[:, 1] == spans[:, 0]  # BOS at the front, EOS at the end
        scored = ends_text | (is_mark & (np.arange(len(ids)) > 0) & append_eos)
        scored[:1] = False
        encoded.append(Encoded(ids, scored, _bytes_of(text, spans, scored & ~is_mark)))
    return encoded


def _bytes_of(text: str, spans: np.ndarray, scored: np.ndarray) -> int:
    """Bytes of the text from the first scored token to the last: the targets are one run."""
    where = np.flatnonzero(scored)
    if not len(where):
        return 0
    # A character of several bytes may be cut into several tokens, which then share its span: begin after the last
    # unscored one.
    first = max(spans[where[0], 0], spans[where[0] - 1, 1] if where[0] else 0)
    return len(text[first : spans[where[-1], 1]].encode("utf-8", "surrogatepass"))


def encode_for_training(
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    *,
    max_length: int | None,
    completion_only: bool | None,
    assistant_only: bool,
) -> list[dict[str, list[int]]]:
    """Tokens and labels for fine-tuning, in TRL's meaning of `completion_only_loss` and `assistant_only_loss`.

    Args:
        rows: Rows with `text`, `prompt` + `completion`, or `messages`.
        tokenizer: A fast tokenizer.
        max_length: Tokens to keep of each row.
        completion_only: None trains on the completion where there is one, and else on all.
        assistant_only: Train on the assistant's turns only, which needs a chat template with generation marks.

    Returns:
        `{"input_ids": [L], "labels": [L]}` for each row that has a token to train on.
    """
    if rows and "messages" in rows[0]:
        whole = completion_only is False
        encoded = [_encode_chat(row, tokenizer, max_length, assistant_only, whole) for row in rows]
    else:
        encoded = encode(rows, tokenizer, max_length=max_length, append_eos=True, score_prompt=completion_only is False)
    return [{"input_ids": row.input_ids, "labels": row.labels} for row in encoded if row.scored.any()]


def _encode_chat(
    row: dict[str, Any], tokenizer: Any, max_length: int | None, assistant_only: bool, whole: bool
) -> Encoded:
    """A conversation; of one with a prompt and a completion the targets are the completion's, unless `whole`."""
    messages, options = conversation(row)
    if assistant_only:
        options["chat_template"] = generation_marked_template(tokenizer)
        both = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **options)
        ids, scored = both["input_ids"], np.asarray(both["assistant_masks"], dtype=bool)
    else:
        chat_text(tokenizer, messages, **options)  # complains where there is no template
        ids = tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]
        scored = np.ones(len(ids), dtype=bool)
    first, said = 1, row.get(COMPLETION_TURNS)
    if said and not whole:
        given = tokenizer.apply_chat_template(messages[:-said], return_dict=True, add_generation_prompt=True, **options)
        first = max(first, _shared(given["input_ids"], ids))  # as TRL divides them
    scored[:first] = False
    return Encoded(ids[:max_length], scored[:max_length], 0)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the beginning that two sequences share."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def generation_marked_template(tokenizer: Any) -> str:
    """The chat template with `{% generation %}` marks, which tell the assistant's tokens apart.

    Raises:
        DataError: The template has none and TRL knows no marked form of it.
    """
    from trl.chat_template_utils import get_training_chat_template

    if tokenizer.chat_template and "{% generation" in tokenizer.chat_template.replace("{%-", "{%"):
        return tokenizer.chat_template
    try:
        return get_training_chat_template(tokenizer) or tokenizer.chat_template
    except ValueError as error:
        raise DataError(
            "assistant_only_loss needs a chat template with {% generation %} ... {% endgeneration %} around the "
            "assistant's text, and this model's has none. Put a marked one into model.tokenizer.chat_template, or "
            "leave assistant_only_loss out to train on whole conversations."
        ) from error
