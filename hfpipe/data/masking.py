"""Masked language modelling (Devlin et al. 2019): how rows are framed, and which of their tokens are hidden.

Rows are RoBERTa's FULL-SENTENCES (Liu et al. 2019, arXiv:1907.11692): documents one after the other with a separator
between them, across which a model may look. Positions do not keep documents apart where attention goes both ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling

from hfpipe.core.errors import RecipeError
from hfpipe.core.upstream import mask_whole_words_in_linear_time
from hfpipe.data.dataloader import collate

WORD = 1 << 28  # the bit of a token that begins a word, above the tokens of any vocabulary


@dataclass(frozen=True)
class Frame:
    """The special tokens that a tokenizer puts around a text: [CLS] and [SEP], or <s> and </s>.

    Args:
        before: Tokens in front.
        after: Tokens behind, which part two documents of a row too.
        words: Whether tokens that begin a word carry the bit `WORD`.
    """

    before: list[int]
    after: list[int]
    words: bool = False

    @property
    def size(self) -> int:
        return len(self.before) + len(self.after)

    def row(self, body: np.ndarray) -> np.ndarray:
        """A row of tokens with its frame."""
        return np.concatenate([self.before, body, self.after]).astype(np.int64)


def frame_of(tokenizer: Any, *, words: bool = False) -> Frame:
    """The frame of a tokenizer.

    Raises:
        RecipeError: It has no mask token, puts no separator behind a text, or does not know words and is asked to.
    """
    ids = tokenizer("")["input_ids"]
    before = [tokenizer.cls_token_id] if ids[:1] == [tokenizer.cls_token_id] else []
    after = ids[len(before) :] or [tokenizer.sep_token_id]
    if tokenizer.mask_token is None or after == [None]:
        lacking = "mask token" if tokenizer.mask_token is None else "separator"
        raise RecipeError(
            f"objective: masked needs a tokenizer with a {lacking}, and this one has none. Take an encoder's tokenizer "
            "(model.tokenizer.id), or train one with the model: `tokenizer: {train: {vocab_size: ...}}`."
        )
    if words and len(set(tokenizer.backend_tokenizer.encode("two words", add_special_tokens=False).word_ids)) < 2:
        raise RecipeError(
            "masking.whole_word_mask: this tokenizer does not divide a text into words before it makes tokens, so "
            "there are no whole words to mask. Remove it."
        )
    return Frame(before, after, words)


def tokens_of_texts(texts: Sequence[str], backend: Any, words: bool) -> Iterator[list[int]]:
    """Yields the tokens of each text without its frame; one call of the Rust tokenizer.

    Args:
        texts: Texts.
        backend: The Rust tokenizer.
        words: Whether tokens that begin a word of the tokenizer carry the bit `WORD`, which takes longer.
    """
    if words:
        yield from map(_marked_words, backend.encode_batch(texts, add_special_tokens=False))
    else:
        for encoding in backend.encode_batch_fast(texts, add_special_tokens=False):
            yield encoding.ids


def _marked_words(encoding: Any) -> list[int]:
    words = np.array([-1 if word is None else word for word in encoding.word_ids])
    begins = np.diff(words, prepend=-2) != 0
    return (np.array(encoding.ids, dtype=np.int64) | begins * WORD).tolist()


class Masking:
    """Hides tokens by transformers' own collator, each row with a generator of its own.

    What is hidden in row n of a run follows from the seed and n alone: it is the same after a resume, on any number of
    ranks and in any batch, and another each time a document comes again (RoBERTa's dynamic masking).

    Args:
        tokenizer: Has a mask token.
        options: Fields of DataCollatorForLanguageModeling.
        seed: Seed of the run.

    Raises:
        RecipeError: The collator refuses the options.
    """

    def __init__(self, tokenizer: Any, options: dict[str, Any], seed: int) -> None:
        try:
            self.collator = DataCollatorForLanguageModeling(tokenizer, **options)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"masking: transformers refuses it: {error}") from error
        mask_whole_words_in_linear_time(self.collator)
        self.seed = seed

    @cached_property
    def _special(self) -> torch.Tensor:
        return torch.tensor(self.collator.tokenizer.all_special_ids)

    def row(self, tokens: Sequence[int] | np.ndarray, number: int) -> dict[str, torch.Tensor]:
        """`input_ids` (L,) with tokens hidden, and `labels` (L,) with what was there, -100 elsewhere.

        Args:
            tokens: (L,) tokens with their frame; with the bit `WORD` where whole words are masked.
            number: Number of the row in the run.
        """
        marked = torch.as_tensor(np.asarray(tokens, dtype=np.int64))[None]
        ids = marked & (WORD - 1)
        special = torch.isin(ids, self._special)
        offsets = None
        if self.collator.whole_word_mask:  # a gap before it tells the collator that a token begins a word
            ends = torch.arange(1, 2 * ids.shape[1], 2)
            begins = (marked & WORD).bool() | special
            offsets = torch.stack([torch.where(begins, ends - 1, ends - 2), ends.expand_as(ids)], dim=-1)
        seed = np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)[0]
        self.collator.generator = torch.Generator().manual_seed(int(seed >> np.uint64(1)))
        hidden, labels = self.collator.torch_mask_tokens(ids, special_tokens_mask=special, offset_mapping=offsets)
        return {"input_ids": hidden[0], "labels": labels[0]}

    def collate(self, rows: Sequence[dict[str, Any]], pad_token_id: int, multiple: int = 1) -> dict[str, torch.Tensor]:
        """A batch of the rows of a stream; see `data.loader.collate`."""
        return collate([self.row(row["input_ids"], row["number"]) for row in rows], pad_token_id, multiple)
