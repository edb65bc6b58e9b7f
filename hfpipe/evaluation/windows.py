"""Rows of text to tokens, and long rows to windows: how the likelihood of text is scored.

The rules are those of lm-eval's `loglikelihood_rolling` and `loglikelihood` (0.4.13): a text follows the BOS token, or
EOS where a tokenizer has no BOS; every token is scored once; a text longer than the window is read in windows that do
not share a scored token, the last of them full. One difference: where the tokenizer itself puts BOS in front of a text,
lm-eval puts another one before it and scores the first; here there is one, and it is not scored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from hfpipe.data.tokenize import Encoded
from hfpipe.evaluation.continuations import beginning, special_ends
from hfpipe.evaluation.row_text import RowText


def encode_texts(texts: Sequence[RowText], tokenizer: Any) -> list[Encoded]:
    """Tokenizes rows whole; the targets are the tokens of the scored characters.

    Prompt and completion are tokenized together. Special tokens of a completion are marks: neither their bits nor their
    bytes count. Those of a plain text count as they stand in it.

    Args:
        texts: Rows, all of one format.
        tokenizer: A fast tokenizer.
    """
    if not texts:
        return []
    before = [] if texts[0].chat else special_ends(tokenizer)[0]
    batch = tokenizer(
        [row.prompt + row.completion for row in texts],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    return [
        _encoded(row, ids, np.asarray(offsets, dtype=np.int64).reshape(-1, 2), before, tokenizer)
        for row, ids, offsets in zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True)
    ]


def _encoded(row: RowText, ids: list[int], offsets: np.ndarray, before: list[int], tokenizer: Any) -> Encoded:
    text, given = row.prompt + row.completion, len(row.prompt)
    # White space has an empty offset at its end where a tokenizer trims offsets.
    starts, ends = np.minimum(offsets[:, 0], offsets[:, 1] - 1), offsets[:, 1]
    scored, size = np.zeros(len(ids), bool), 0
    for start, end in ((given + first, given + last) for first, last in row.spans):
        inside = (ends > start) & (starts < end)
        scored |= inside
        where = np.flatnonzero(inside)
        if len(where) and not row.chat and where[0]:  # a token that joins the prompt's end and the completion
            start = min(start, max(int(offsets[where[0], 0]), int(ends[where[0] - 1])))
        size += _size(text[start:end])
    if given:
        marks = scored & np.isin(ids, tokenizer.all_special_ids)
        size -= sum(_size(text[first:last]) for first, last in offsets[marks])
        scored &= ~marks
    prefix = before or ([] if given else beginning(tokenizer))
    if ids[:1] == prefix[-1:]:  # the text brings its own BOS
        prefix = prefix[:-1]
    if not prefix and scored[:1].any():  # nothing stands before the first token
        size -= _size(text[offsets[0, 0] : offsets[0, 1]])
        scored[:1] = False
    scored = np.concatenate([np.zeros(len(prefix), bool), scored])
    return Encoded([*prefix, *ids], scored, size if scored.any() else 0)


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def windows(row: Encoded, size: int) -> list[Encoded]:
    """Cuts a row into windows that score each of its targets once.

    A completion that fits into a window has one, in which the prompt loses its beginning if need be. Else the first
    window is the row's beginning (or, where the prompt fills more than half of it, ends half a window behind the
    prompt), and each further one scores up to `size` targets with what stands before them in the window.

    Args:
        row: A row.
        size: Tokens that the model reads; a window has one more, its last, which is a target only.
    """
    targets = np.flatnonzero(row.scored)
    if not len(targets):
        return []
    first, last = int(targets[0]), int(targets[-1]) + 1
    end = last
    if last - first > size:
        end = size + 1 if 2 * first <= size else first + size // 2
    parts = []
    while True:
        start = max(0, end - size - 1)
        scored = row.scored[start:end].copy()
        scored[: max(0, first - start)] = False
        if scored.any():
            parts.append(Encoded(row.input_ids[start:end], scored, 0))
        if end == last:
            return parts
        first, end = end, min(last, end + size)


def words_of(row: RowText) -> int:
    """Words as white space divides them; of plain texts as lm-eval counts them, white space at an end one more."""
    if row.prompt:
        return len(row.scored.split())
    return len(re.split(r"\s+", row.completion))
