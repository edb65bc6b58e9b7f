"""Conversations as text: a tokenizer's chat template, and where in the text each turn stands.

A template says what a whole conversation looks like, and nothing of its turns. Where a turn begins is found as a model
meets it: the turns before it are rendered with the generation prompt, and what follows that prompt in the whole is
said by the model. Some templates write earlier turns in another way once later ones follow (Qwen3 takes their
reasoning out). So each message gets a mark at its end, one character that no text has, and two renderings are compared
from the same mark on. The rendering with all marks, marks taken out, has to be the plain one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from hfpipe.core.errors import DataError, RecipeError, UserError

Messages = Sequence[dict[str, Any]]
Span = tuple[int, int]  # characters [begin, end) of a text

_FIRST_MARK = 0xF0000  # a plane of Unicode for private use
_MARK = re.compile("([\U000f0000-\U000ffffd])")
_TOKEN = re.compile(r"<[^<>\s]{1,40}>")  # <|end|>, </s>, <end_of_turn>
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_LOOKED_AT, _CHECKED_EVERY = 20, 50  # conversations whose turns are rendered alone: the first, and some of the others


def conversation(row: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the turns of a row, and what its chat template is given beside them.

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
    """Returns a value without the keys, at any depth, that hold None."""
    if isinstance(value, dict):
        return {key: _without_gaps(inner) for key, inner in value.items() if inner is not None}
    return [_without_gaps(inner) for inner in value] if isinstance(value, list) else value


def chat_text(tokenizer: Any, messages: Messages, **options: Any) -> str:
    """Renders a conversation by the tokenizer's own chat template.

    Raises:
        DataError: The tokenizer has none.
        RecipeError: It is no Jinja template.
    """
    if tokenizer.chat_template is None and options.get("chat_template") is None:
        raise DataError(
            "the data holds `messages`, but the tokenizer has no chat template. Give one in the recipe "
            "(model.tokenizer.chat_template), take an instruct model's tokenizer, or build prompt and completion with "
            "`template:`."
        )
    with _compiled():
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)


@contextmanager
def _compiled() -> Iterator[None]:
    """Tells a chat template that is no Jinja apart from one that does not take a row."""
    try:
        yield
    except TemplateSyntaxError as error:
        raise RecipeError(
            f"the chat template of the tokenizer is no Jinja template: {error.message} (line {error.lineno} of it). "
            "Mend it (chat_template.jinja in the model's folder), or give another: `model.tokenizer.chat_template`."
        ) from error


def generation_marked_template(tokenizer: Any) -> str:
    """Returns the chat template with `{% generation %}` marks, which tell the assistant's tokens apart.

    Raises:
        DataError: The template has none and TRL knows no marked form of it.
    """
    from trl.chat_template_utils import get_training_chat_template

    if tokenizer.chat_template and _GENERATION.search(str(tokenizer.chat_template)):
        return tokenizer.chat_template
    try:
        return get_training_chat_template(tokenizer) or tokenizer.chat_template
    except ValueError as error:
        raise DataError(
            "assistant_only_loss needs a chat template with {% generation %} ... {% endgeneration %} around the "
            "assistant's text, and this model's has none. Put a marked one into model.tokenizer.chat_template, leave "
            "assistant_only_loss out, or write `train_on: assistant`, which needs no marks."
        ) from error


def is_trained(message: dict[str, Any], row: dict[str, Any]) -> bool:
    """Says whether a message may be trained on: its own `train` (true or false) and `weight` (1 or 0) are honoured.

    Raises:
        DataError: They hold something else.
    """
    for key in ("train", "weight"):
        value = message.get(key)
        if value is not None and value not in (0, 1):  # True is 1
            raise DataError(
                f"`{key}` of a message of the row {row.get('id', 'without an id')} is {value!r}; allowed are "
                f"{'true and false' if key == 'train' else '1 (trained on) and 0 (not)'}."
            )
        if value is not None and not value:
            return False
    return True


_PARTS = ("tool_calls", "reasoning_content", "reasoning", "thinking")  # of a turn, which some templates know nothing of


def left_out(tokenizer: Any, row: dict[str, Any]) -> list[str]:
    """Names the parts of a conversation without which the chat template renders the same text.

    Args:
        tokenizer: Has a chat template.
        row: A row; one without `messages` has no such part.

    Returns:
        `tools`, and keys of the turns such as `tool_calls`.
    """
    if "messages" not in row:
        return []
    turns, options = conversation(row)
    parts = [part for part in _PARTS if any(turn.get(part) for turn in turns)] + ["tools"] * bool(options.get("tools"))
    text = chat_text(tokenizer, turns, **options) if parts else ""

    def is_left_out(part: str) -> bool:
        less = [{key: value for key, value in turn.items() if key != part} for turn in turns]
        try:
            return chat_text(tokenizer, less, **{key: one for key, one in options.items() if key != part}) == text
        except Exception:  # a template that needs the part may raise anything
            return False

    return [part for part in parts if is_left_out(part)]


class Chats:
    """Renders conversations and finds their turns in the text.

    Args:
        tokenizer: Has a chat template.
        template: Another template in its place.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._tails: dict[Any, str] = {}  # by the shape of the turns: what follows the words of one
        self._seen = 0  # conversations
        self._trusts_shapes = True

    def text(self, messages: Messages, options: dict[str, Any], *, prompt: bool = False) -> str:
        """Renders a conversation, with the generation prompt behind it if `prompt`."""
        more = {} if self._template is None else {"chat_template": self._template}
        return chat_text(self._tokenizer, messages, add_generation_prompt=prompt, **more, **options)

    def has_marks(self, options: dict[str, Any]) -> bool:
        """Says whether the template has `{% generation %}` marks."""
        return _GENERATION.search(self._source(options)) is not None

    def _source(self, options: dict[str, Any]) -> str:
        if self._tokenizer.chat_template is None and self._template is None:
            chat_text(self._tokenizer, [])  # complains
        return self._tokenizer.get_chat_template(self._template, options.get("tools"))

    def marked(self, messages: Messages, options: dict[str, Any]) -> tuple[str, list[Span]]:
        """Renders a conversation and returns what stands between the template's generation marks."""
        turns = [{key: value for key, value in turn.items() if value is not None} for turn in messages]
        more = {**self._tokenizer.special_tokens_map, **options}
        with _compiled():
            rendered: Any = render_jinja_template(
                [turns], chat_template=self._source(options), return_assistant_tokens_mask=True, **more
            )
        return rendered[0][0], rendered[1][0]

    def turns(self, messages: Messages, options: dict[str, Any], wanted: Iterable[int]) -> tuple[str, list[Span]]:
        """Renders a conversation and finds some of its turns.

        Args:
            messages: The turns.
            options: What the template is given beside them.
            wanted: Numbers of the turns to find, in order.

        Returns:
            The text, and of each wanted turn the characters that stand for it: of an assistant's what a model has to
            say after the generation prompt, the end of the turn included; of others all from the turn before on.
        """
        text, wanted = self.text(messages, options), list(wanted)
        asked = (bool(options.get("tools")), repr(sorted((k, v) for k, v in options.items() if k != "tools")))
        shape = [asked, *map(_shape_of, messages)]
        self._seen += 1
        fresh = not self._trusts_shapes or self._seen <= _LOOKED_AT or not self._seen % _CHECKED_EVERY
        found = self._looked_up(text, messages, shape, wanted)
        if found is not None and not fresh:
            return text, found
        spans = self._rendered(text, messages, options, shape, wanted, fresh)
        self._trusts_shapes = self._trusts_shapes and found in (None, spans)
        return text, spans

    def _looked_up(self, text: str, messages: Messages, shape: list[Any], wanted: list[int]) -> list[Span] | None:
        """Finds turns by their words and by what followed turns of the same shape; None where something is new."""
        places: dict[int, tuple[int, str, str]] = {}  # of a turn's words: their end, the prompt and the rest behind
        place = 0
        needed = {number - (messages[number]["role"] == "assistant") for number in wanted} | set(wanted)
        for number in sorted(needed - {len(messages) - 1}):
            prompt, rest = (self._tails.get((*shape[: number + 2], number, kind), "") for kind in (True, False))
            content = messages[number].get("content") if number >= 0 else None
            followed = rest if number in wanted else prompt
            if not followed or not isinstance(content, str) or not content.strip():
                return None
            said = content.strip()
            for _ in range(5):
                place = text.find(said, place)
                if place < 0 or text.startswith(followed, place + len(said)):
                    break
                place += 1
            else:
                return None
            if place < 0:
                return None
            place += len(said)
            places[number] = (place, prompt, rest)
        spans = []
        for number in wanted:
            if messages[number]["role"] != "assistant":
                return None
            before, prompt, _ = places[number - 1]
            if not prompt or not text.startswith(prompt, before):
                return None
            last = len(text) if number == len(messages) - 1 else places[number][0] + len(places[number][2])
            spans.append((before + len(prompt), last))
        return spans

    def _rendered(
        self, text: str, messages: Messages, options: dict[str, Any], shape: list[Any], wanted: list[int], fresh: bool
    ) -> list[Span]:
        """Finds turns by rendering the turns up to them alone."""
        marked = [_with_mark(message, number) for number, message in enumerate(messages)]
        plain, places = _without_marks(self.text(marked, options))
        if plain != text or _MARK.search(text):
            return _by_content(text, messages, wanted)

        def place(count: int, before: int, prompt: bool) -> int:
            """Returns how far the first `count` turns, rendered alone, agree with the whole."""
            anchor = max((number for number in places if number < before), default=-1)
            key = (*shape[: count + 1], anchor, prompt)
            if fresh or key not in self._tails:
                self._tails[key] = self._tail(marked[:count], options, anchor, prompt)
            tail, start = self._tails[key], places.get(anchor, 0)
            return start + _shared(tail, text[start : start + len(tail)])

        def begin(number: int) -> int:
            if messages[number]["role"] != "assistant":
                return end(number - 1) if number else 0
            found = place(number, number, prompt=True)
            return next((mark.start() for mark in _around(text, found)), found)

        def end(number: int) -> int:
            if number == len(messages) - 1:
                return len(text)
            found = place(number + 1, number + 1, prompt=False)
            for mark in _around(text, found):  # the last turn of a conversation may end in another token (gpt-oss)
                ended = _TOKEN.search(text, places.get(number, 0), mark.start())
                found = mark.start() if ended else mark.end()
            return found

        spans = [(begin(number), end(number)) for number in wanted]
        return [(first, max(first, last)) for first, last in spans]

    def _tail(self, marked: Messages, options: dict[str, Any], anchor: int, prompt: bool) -> str:
        """Renders turns alone and returns what follows the mark `anchor`: template, and the same for all of a shape."""
        try:
            plain, places = _without_marks(self.text(marked, options, prompt=prompt)) if marked else ("", {})
        except UserError:
            raise
        except Exception:  # a template may refuse a part of what it takes as a whole
            return ""
        return plain[places.get(anchor, len(plain)) :] if anchor >= 0 else plain


def _around(text: str, place: int) -> list[re.Match[str]]:
    """Finds the special token, as templates write them, in the middle of which a place lies."""
    return [mark for mark in _TOKEN.finditer(text, max(0, place - 60), place + 60) if mark.start() < place < mark.end()]


def _with_mark(message: dict[str, Any], number: int) -> dict[str, Any]:
    """Returns a message with a mark at the end of what it says, and in the name of the last tool that it calls."""
    mark, marked = chr(_FIRST_MARK + number), dict(message)
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, str) and content.strip():
        marked["content"] = _marked_text(content, mark)
    elif isinstance(content, list):
        places = [place for place, part in enumerate(content) if isinstance(part, dict) and part.get("text")]
        if places:
            marked["content"] = list(content)
            part = content[places[-1]]
            marked["content"][places[-1]] = {**part, "text": _marked_text(part["text"], mark)}
    if isinstance(calls, list) and calls and isinstance(calls[-1], dict):
        inner = calls[-1].get("function", calls[-1])
        if isinstance(inner, dict) and isinstance(inner.get("name"), str):
            inner = {**inner, "name": inner["name"] + mark}
            marked["tool_calls"] = [*calls[:-1], {**calls[-1], "function": inner} if "function" in calls[-1] else inner]
    return marked


def _marked_text(text: str, mark: str) -> str:
    """Puts a mark before the white space at the end of a text, which templates may strip."""
    said = text.rstrip()
    return said + mark + text[len(said) :]


def _without_marks(rendered: str) -> tuple[str, dict[int, int]]:
    """Takes the marks out of a text, and says where each stood first."""
    pieces, places, length = _MARK.split(rendered), dict[int, int](), 0
    for piece, mark in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
        length += len(piece)
        if mark:
            places.setdefault(ord(mark) - _FIRST_MARK, length)
    return "".join(pieces[::2]), places


def _shape_of(message: dict[str, Any]) -> tuple[Any, ...]:
    """Returns all of a message on which what follows its words depends, and none of the words."""
    content = message.get("content")
    said = (bool(content.strip()), content[len(content.rstrip()) :]) if isinstance(content, str) else None
    others = tuple(sorted(key for key in message if key not in ("role", "content", "tool_calls", "train", "weight")))
    return message["role"], said, others, len(message.get("tool_calls") or ())


def _by_content(text: str, messages: Messages, wanted: Iterable[int]) -> list[Span]:
    """Finds turns by their words alone, one after the other, where a template looks at the ends of what it is given."""
    spans, place = {}, 0
    for number, message in enumerate(messages):
        content = message.get("content")
        said = content.strip() if isinstance(content, str) else ""
        begin = text.find(said, place)
        if said and begin >= 0:
            place = begin + len(said)
            spans[number] = (begin, place)
    last = len(messages) - 1
    if last in spans:
        spans[last] = (spans[last][0], len(text))
    return [spans.get(number, (0, 0)) for number in wanted]


def _shared(one: str, other: str) -> int:
    """Counts the characters at the beginning that two texts share."""
    if other.startswith(one):
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
