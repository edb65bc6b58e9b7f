"""Encoder-decoder models: a source is read and a target is said. Tokens of pairs, likelihood of targets, generation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hfpipe.core.errors import RecipeError
from hfpipe.data.tokenize import IGNORED
from hfpipe.recipe import Source
from hfpipe.recipe.faults import did_you_mean


@dataclass(frozen=True)
class EncodedPair:
    """One row as an encoder-decoder model sees it.

    Args:
        input_ids: Tokens of the source.
        labels: Tokens of the target, with the marks that the tokenizer puts around it.
        scored: (L,) True where a label stands for text of the target, and is no mark.
        cut: Whether the source or the target was too long.
    """

    input_ids: list[int]
    labels: list[int]
    scored: np.ndarray
    cut: bool


def set_languages(tokenizer: Any, source: Source) -> None:
    """Tells a tokenizer of many languages (NLLB, mBART, M2M100) which of them the rows of a source are in.

    Raises:
        RecipeError: The tokenizer needs languages and the source names none, or names one that is not known.
    """
    given = {"src_lang": source.src_lang, "tgt_lang": source.tgt_lang}
    named, place = type(tokenizer).__name__, f"source {source.path!r}"
    if not hasattr(tokenizer, "src_lang"):
        if any(given.values()):
            raise RecipeError(
                f"{place}: `src_lang` and `tgt_lang` are for tokenizers with language codes, and {named} has none. "
                "Remove them; a T5 is told the task in words before the source (`template:`), and a Marian model of "
                "several languages by a mark such as >>deu<<."
            )
        return
    marks = getattr(tokenizer, "lang_code_to_id", None) or tokenizer.added_tokens_encoder  # M2M100, and the others
    codes = [str(mark) for mark in marks if "_" in str(mark) or marks is not tokenizer.added_tokens_encoder]
    for key, code in given.items():
        if code is None:
            raise RecipeError(
                f"{place}: `{key}` is missing; {named} marks every text with its language. Write `src_lang:` and "
                f"`tgt_lang:` into the source, such as {codes[0] if codes else 'eng_Latn'}."
            )
        if code not in codes:
            raise RecipeError(
                f"{place}: `{key}` is {code!r}, which is none of the {len(codes)} languages of {named}."
                f"{did_you_mean(code, codes)}"
            )
        setattr(tokenizer, key, code)


def target_marks(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and behind a target: a language code, EOS. It ends in EOS at least."""
    ids, end = tokenizer(text_target="")["input_ids"], end_token(tokenizer)
    if end not in ids:
        return ids, [end]
    return ids[: ids.index(end)], ids[ids.index(end) :]


def end_token(tokenizer: Any) -> int:
    return tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def encode_pairs(
    tokenizer: Any, sources: Sequence[str], targets: Sequence[str], max_length: int, max_target_length: int
) -> list[EncodedPair]:
    """Tokenizes pairs by the tokenizer's own words for source and target, cut to length before the closing marks.

    Args:
        tokenizer: Fast or not; its languages are set, see `set_languages`.
        sources: Texts to read.
        targets: Texts to say.
        max_length: Tokens to keep of a source, its marks included.
        max_target_length: Tokens to keep of a target, its marks included.
    """
    before, behind = target_marks(tokenizer)
    inputs, cut = encode_cut(tokenizer, "text", sources, max_length)
    labels, target_cut = encode_cut(tokenizer, "text_target", targets, max_target_length)
    pairs = []
    for ids, said, too_long, target_too_long in zip(inputs, labels, cut, target_cut, strict=True):
        if behind[0] not in said:  # a tokenizer that does not end a text
            said = [*said[: max_target_length - 1], behind[0]]
        scored = np.arange(len(said)) >= len(before)
        scored[len(said) - len(behind) :] = False
        pairs.append(EncodedPair(ids or [behind[0]], said, scored, too_long or target_too_long))
    return pairs


def encode_cut(tokenizer: Any, word: str, texts: Sequence[str], limit: int) -> tuple[list[list[int]], list[bool]]:
    """Tokens of texts, and which of them were cut; only those are tokenized again, to have their marks."""
    if not texts:  # of a rank that has no row, which tokenizers do not take
        return [], []
    ids = tokenizer(**{word: list(texts)}, return_attention_mask=False)["input_ids"]
    too_long = [len(row) > limit for row in ids]
    if any(too_long):
        long = [text for text, is_long in zip(texts, too_long, strict=True) if is_long]
        arguments = {word: long, "truncation": True, "max_length": limit, "return_attention_mask": False}
        cut = iter(tokenizer(**arguments)["input_ids"])
        ids = [next(cut) if is_long else row for row, is_long in zip(ids, too_long, strict=True)]
    return ids, too_long


def most_tokens(model: Any) -> float:
    """The most tokens that a model takes; infinite for one with relative positions, such as T5."""
    return getattr(model.config, "max_position_embeddings", None) or math.inf


def decoder_input(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """Labels (B, L), padded with -100, shifted right by one place: the decoder's input (teacher forcing).

    The model's own way of it, which for mBART turns the language code round. M2M100, and so NLLB, has no such method.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(inner, "prepare_decoder_input_ids_from_labels"):
        return inner.prepare_decoder_input_ids_from_labels(labels=labels)
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = inner.config.decoder_start_token_id
    return shifted.masked_fill(shifted == IGNORED, inner.config.pad_token_id)


def padded(rows: Sequence[Sequence[int]], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as one tensor (B, L), filled on the right, and a mask of what is not filler."""
    longest = max(map(len, rows))
    padded = torch.full((len(rows), longest), filler)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = torch.as_tensor(row)
        mask[place, : len(row)] = 1
    return padded, mask
