"""Rows of text to tokens and labels: what is trained on, and what is scored.

A row has one of three forms: `text`, `prompt` + `completion`, or `messages`. A row becomes one text, as a model will
meet it, and is tokenized as a whole; the places of its tokens in the text tell which of them are trained on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from hfpipe.core.errors import DataError, UserError
from hfpipe.data.chat import Chats, Span, chat_text, conversation, generation_marked_template, is_trained
from hfpipe.data.text_tokens import IGNORED, Text, TextTokenizer, TokenRows, untrimmed
from hfpipe.recipe import Sft, Source
from hfpipe.recipe.row_formats import COMPLETION_TURNS

__all__ = ["IGNORED", "Encoded", "RowTokenizer", "TokenRows", "encode"]

TrainOn = Literal["assistant", "last", "completion", "all"]
TooLong = Literal["cut", "split", "drop"]


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
    """Returns the two texts of a row: what is given and what is to be said.

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


def encode(
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    *,
    max_length: int | None,
    append_eos: bool,
    score_prompt: bool = False,
) -> list[Encoded]:
    """Tokenizes rows for scoring, in one call of the Rust tokenizer.

    Args:
        rows: Rows with `text`, `prompt` + `completion`, or `messages`.
        tokenizer: A fast tokenizer.
        max_length: Tokens to keep of the beginning of each row; None for all.
        append_eos: Whether an EOS token follows the text.
        score_prompt: Whether the prompt's tokens are targets too.

    Returns:
        One `Encoded` a row. The first token is never a target: nothing stands before it. A row's targets may be none.
    """
    pairs = [prompt_and_completion(row, tokenizer) for row in rows]
    chat = bool(rows) and "messages" in rows[0]  # the template has written the special tokens already
    backend = untrimmed(tokenizer)
    found = backend.encode_batch([prompt + completion for prompt, completion in pairs], add_special_tokens=not chat)
    encoded = []
    for (prompt, completion), encoding in zip(pairs, found, strict=True):
        text, ids = prompt + completion, encoding.ids
        spans = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
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
    """Counts the bytes of the text from the first scored token to the last: the targets are one run."""
    where = np.flatnonzero(scored)
    if not len(where):
        return 0
    # A character of several bytes may be cut into several tokens, which then share its span: begin after the last
    # unscored one.
    first = max(spans[where[0], 0], spans[where[0] - 1, 1] if where[0] else 0)
    return len(text[first : spans[where[-1], 1]].encode("utf-8", "surrogatepass"))


def sft_tokenizer(
    stage: Sft, tokenizer: Any, max_length: int | None, source: Source, unended: Collection[str] = ()
) -> RowTokenizer:
    """Returns what tokenizes the rows of an sft stage; all of a text that it replays is trained on.

    Args:
        stage: The stage.
        tokenizer: The run's tokenizer.
        max_length: Tokens of a row.
        source: Where the rows are from: one of the stage's own, or of a stage that it replays.
        unended: Texts that go on where nobody knows them, so that no EOS follows.
    """
    training = stage.training
    return RowTokenizer(
        tokenizer,
        max_length,
        stage.train_on,
        training.get("completion_only_loss"),
        training.get("assistant_only_loss", False),
        stage.too_long,
        refuse_texts=any(source is own for own in stage.data),
        unended=unended,
    )


class RowTokenizer:
    """Tokenizes rows for fine-tuning, many at a time, and says which of their tokens are trained on.

    The tokens are those of TRL, and so are the labels where `train_on` means what TRL does: `all`, or the completion of
    a prompt, which begins where the tokens of the prompt alone and those of the whole part.

    Args:
        tokenizer: A fast tokenizer.
        max_length: Tokens of a row; None for all.
        train_on: `assistant` (every assistant's turn), `last` (the last of them), `completion`, or `all`. When absent,
            the completion where a row has one, the assistant's turns of a conversation, and all of a text.
        completion_only: TRL's `completion_only_loss`; where it or `assistant_only` is given, all is as in TRL.
        assistant_only: TRL's `assistant_only_loss`.
        too_long: What becomes of rows beyond `max_length`: `cut` at its end, `split` into rows, or `drop`.
        refuse_texts: Whether a plain text is refused where `train_on` asks for a part of a row.
        unended: Texts that no EOS follows.

    Raises:
        DataError: The data holds messages and there is no chat template, or not the marks that TRL needs, or the
            template takes none of them; or plain texts, of which no part can be told apart.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int | None,
        train_on: TrainOn | None = None,
        completion_only: bool | None = None,
        assistant_only: bool = False,
        too_long: TooLong = "cut",
        refuse_texts: bool = True,
        unended: Collection[str] = (),
    ) -> None:
        assert train_on in (None, *get_args(TrainOn))
        self._tokenizer, self._max_length, self._too_long = tokenizer, max_length, too_long
        self._refuse_texts, self._unended = refuse_texts, unended
        self._as_trl = completion_only is not None or assistant_only
        self._train_on, self._whole, self._assistant_only = train_on, completion_only is False, assistant_only
        self._texts = TextTokenizer(tokenizer)
        self._chats: Chats | None = None

    def anew(self) -> RowTokenizer:
        """Returns one that has seen no rows, for another thread or process: what turns look like is remembered."""
        other = copy(self)
        other.forget()
        return other

    def forget(self) -> None:
        """Forgets what turns look like."""
        self._chats = None

    def encode(self, rows: Sequence[dict[str, Any]], *, refuse: bool = True) -> TokenRows:
        """Tokenizes rows of one form.

        Args:
            rows: The rows.
            refuse: Whether it is an error if the chat template takes none of them.
        """
        made: list[Text] = []
        refused: list[tuple[int, str]] = []
        for number, row in enumerate(rows):
            if "messages" not in row:
                made.append(self._of_pair(row))
                continue
            try:
                made.append(self._of_chat(row))
            except UserError:
                raise
            except Exception as error:  # a template raises whatever it likes, for a row that it does not foresee
                refused.append((number, f"{type(error).__name__}: {error}"))
        if refused and not made and refuse:
            raise DataError(
                f"the chat template takes none of {len(refused)} conversations; of the first it says: "
                f"{refused[0][1].rstrip('.')}. "
                "Look at the roles and the order of the turns, or give another template."
            )
        if not made:
            return TokenRows(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(1, np.int64), refused=tuple(refused))
        found = self._texts.encode(made, special="messages" not in rows[0])
        return self._fitted(found, tuple(refused))

    def _of_pair(self, row: dict[str, Any]) -> Text:
        eos = self._tokenizer.eos_token
        prompt = row.get("prompt")
        text = row["text"] if prompt is None else row["completion"]
        if eos and not text.endswith(eos) and text not in self._unended:
            text += eos
        if prompt is None:
            if self._train_on in ("assistant", "last", "completion") and self._refuse_texts:
                raise DataError(
                    f"`train_on: {self._train_on}` needs rows with messages, or with prompt and completion; this "
                    "source holds plain texts, of which all is trained on. Leave `train_on` out, or name the columns "
                    "of prompt and completion (`columns:`, `template:`)."
                )
            return Text(text)
        everything = self._whole or self._train_on == "all"
        return Text(prompt + text, prompt=None if everything else prompt)

    def _of_chat(self, row: dict[str, Any]) -> Text:
        messages, options = conversation(row)
        said = row.get(COMPLETION_TURNS)
        if self._chats is None:
            template = generation_marked_template(self._tokenizer) if self._assistant_only else None
            self._chats = Chats(self._tokenizer, template)
        chats = self._chats
        prompt = None
        if said and (not self._whole if self._as_trl else self._train_on in (None, "completion")):
            prompt = chats.text(messages[:-said], options, prompt=True)
        if self._as_trl:
            text, spans = chats.marked(messages, options) if self._assistant_only else (None, None)
            return Text(chats.text(messages, options) if text is None else text, prompt, spans)
        untrained = [number for number, one in enumerate(messages) if not is_trained(one, row)]
        if prompt is not None or self._train_on == "all":
            if not untrained:
                return Text(chats.text(messages, options), prompt)
            text, gone = chats.turns(messages, options, untrained)
            ends = [0, *(place for span in gone for place in span), len(text)]
            return Text(text, prompt, [*zip(ends[::2], ends[1::2], strict=True)])
        return Text(*self._answers(chats, messages, options, untrained))

    def _answers(
        self, chats: Chats, messages: list[dict[str, Any]], options: dict[str, Any], untrained: list[int]
    ) -> tuple[str, None, list[Span]]:
        """Returns the text of a conversation, and the assistant's turns that are trained on."""
        answers = [number for number, one in enumerate(messages) if one["role"] == "assistant"]
        wanted = [number for number in answers if number not in untrained]
        if self._train_on in ("last", "completion"):
            wanted = wanted[-1:] if wanted[-1:] == answers[-1:] else []
        if not chats.has_marks(options):
            text, spans = chats.turns(messages, options, wanted)
            return text, None, spans
        text, marked = chats.marked(messages, options)
        if wanted == answers:
            return text, None, marked
        if len(marked) == len(answers):
            return text, None, [marked[answers.index(number)] for number in wanted]
        _, turns = chats.turns(messages, options, wanted)
        parts = [(max(a, first), min(b, last)) for a, b in marked for first, last in turns]
        return text, None, [(first, last) for first, last in parts if first < last]

    def _fitted(self, found: TokenRows, refused: tuple[tuple[int, str], ...]) -> TokenRows:
        """Cuts, splits or drops what is too long, and leaves out what has no token to train on."""
        ids, trained, lengths = found.ids, found.trained, np.diff(found.starts)
        long = 0
        if self._max_length is not None and (over := lengths > self._max_length).any():
            long = int(over.sum())
            places = np.arange(len(ids)) - np.repeat(found.starts[:-1], lengths)
            if self._too_long == "split":
                pieces = -(-lengths // self._max_length)
                rest = lengths - (pieces - 1) * self._max_length
                lengths = np.full(pieces.sum(), self._max_length)
                lengths[np.cumsum(pieces) - 1] = rest
                trained = trained & (places % self._max_length > 0)  # nothing stands before the first of a row
            else:
                keep = places < self._max_length if self._too_long == "cut" else np.repeat(~over, lengths)
                ids, trained = ids[keep], trained[keep]
                lengths = np.minimum(lengths, self._max_length) if self._too_long == "cut" else lengths[~over]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        counts = np.diff(np.concatenate([[0], np.cumsum(trained)])[starts])
        has = counts > 0
        if not has.all():
            keep = np.repeat(has, lengths)
            ids, trained, lengths = ids[keep], trained[keep], lengths[has]
            starts = np.concatenate([[0], np.cumsum(lengths)])
        return TokenRows(ids, trained, starts.astype(np.int64), int((~has).sum()), long, refused)
