"""Pairs of a context and what may follow it, to tokens: how choices, last words and sentences are scored.

The rules are those of the Language Model Evaluation Harness (lm-eval 0.4: `_encode_pair`, `loglikelihood`), so
that the numbers are comparable: both texts are tokenized together and cut at the length of the context alone; white
space at the end of the context goes to the continuation; an empty context is the BOS token, or EOS where there is none;
what is too long loses its beginning.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from hfpipe.core.errors import DataError
from hfpipe.data.tokenize import Encoded

Pair = tuple[str, str]  # context, continuation


def special_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and behind a text, such as BOS, or [CLS] and [SEP]."""
    whole = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(place for place in range(len(whole) + 1) if whole[place : place + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]


def encode_continuations(pairs: Sequence[Pair], tokenizer: Any, max_length: int | None) -> list[Encoded]:
    """Tokenizes contexts and continuations for a causal model; the tokens of the continuation are the targets.

    Args:
        pairs: Context and continuation; the context may be empty.
        tokenizer: A tokenizer.
        max_length: Tokens that the model takes; a row may have one more, its last, which is a target only.

    Returns:
        One `Encoded` a pair.
    """
    if not pairs:
        return []
    before = special_ends(tokenizer)[0]
    moved = [(context.rstrip(), context[len(context.rstrip()) :] + continuation) for context, continuation in pairs]

    def ids_of(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]

    contexts = list(dict.fromkeys(context for context, _ in moved))  # choices share theirs
    lengths = dict(zip(contexts, map(len, ids_of(contexts)), strict=True))
    encoded = []
    for (context, continuation), ids in zip(moved, ids_of(["".join(pair) for pair in moved]), strict=True):
        # A token that joins the end of the context and all of the continuation is scored rather than nothing.
        given = min(lengths[context], len(ids) - 1)
        first = before if before or given > 0 else beginning(tokenizer)
        given += len(first)
        ids = [*first, *ids]
        scored = np.arange(len(ids)) >= given
        if max_length is not None:
            ids, scored = ids[-max_length - 1 :], scored[-max_length - 1 :]
        scored[:1] = False
        encoded.append(Encoded(ids, scored, len(continuation.encode("utf-8", "surrogatepass"))))
    return encoded


def encode_whole(pairs: Sequence[Pair], tokenizer: Any, max_length: int) -> list[Encoded]:
    """The same for an encoder: both special ends stand round the text, and what is too long loses its beginning."""
    before, behind = special_ends(tokenizer)
    room = max_length - len(before) - len(behind)
    encoded = []
    for context, continuation in pairs:
        ids = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        given = len(tokenizer(context, add_special_tokens=False)["input_ids"]) if context else 0
        scored = np.arange(len(ids)) >= min(given, len(ids) - 1)
        ends = np.zeros(len(before), bool), np.zeros(len(behind), bool)
        encoded.append(Encoded([*before, *ids[-room:], *behind], np.concatenate([ends[0], scored[-room:], ends[1]]), 0))
    return encoded


def encode_sentence(text: str, tokenizer: Any, max_length: int | None) -> list[Encoded]:
    """A sentence for a causal model, in the parts of StereoSet's script: the likelihoods of all targets are its own.

    There the first token follows the BOS token, and the rest follow the first without it; a tokenizer that puts BOS in
    front of a text itself has it in front of all.
    """
    [whole] = encode_continuations([("", text)], tokenizer, max_length)
    if special_ends(tokenizer)[0] or len(whole.input_ids) < 3 or not beginning(tokenizer):
        return [whole]
    ids, scored = whole.input_ids, whole.scored
    rest = np.concatenate([[False], scored[2:]])
    return [Encoded(ids[:2], scored[:2], 0), Encoded(ids[1:], rest, 0)]


def encode_blank(context: str, text: str, tokenizer: Any) -> list[Encoded]:
    """Encodes the word that fills the blank of a sentence, for an encoder: a text for each of its tokens, as in
    StereoSet's script.

    The word at the blank, without punctuation, is filled in from the left, one token more each time; the next token is
    the target.

    Raises:
        DataError: The context has no `BLANK`, or the sentence no word there.
    """
    blanks = [place for place, word in enumerate(context.split(" ")) if "BLANK" in word]
    words = text.split(" ")
    if not blanks or blanks[-1] >= len(words):
        raise DataError(f"StereoSet: {text!r} does not fill a BLANK in {context!r}.")
    word = words[blanks[-1]].translate(str.maketrans("", "", string.punctuation))
    ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    found = []
    for place, token in enumerate(ids):
        filled = context.replace("BLANK", tokenizer.decode(ids[:place]).strip() + tokenizer.mask_token)
        whole = np.array(tokenizer(filled)["input_ids"])
        masked = whole == tokenizer.mask_token_id
        found.append(Encoded(np.where(masked, token, whole).tolist(), masked, 0))
    return found


def in_common(one: Encoded, other: Encoded) -> tuple[Encoded, Encoded]:
    """Two texts with the tokens as targets that both have, in order: those that CrowS-Pairs scores."""
    blocks = SequenceMatcher(None, one.input_ids, other.input_ids, autojunk=False).get_matching_blocks()
    both = []
    for side, row in enumerate((one, other)):
        held = np.zeros(len(row.input_ids), bool)
        for block in blocks:
            held[block[side] : block[side] + block.size] = True
        both.append(replace(row, scored=row.scored & held))
    return both[0], both[1]


def beginning(tokenizer: Any) -> list[int]:
    """The token that stands for an empty context: BOS, else EOS; none where a tokenizer has neither."""
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [] if token is None else [token]
