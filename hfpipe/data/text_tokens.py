"""Texts to tokens in one call of the Rust tokenizer, and which of the tokens stand for a part of the text."""

from __future__ import annotations

import copy
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unicodedata import category

import numpy as np

from hfpipe.data.chat import Span

IGNORED = -100  # the label of a token that is not trained on
_NEAR = 32  # characters on each side of a place that say whether the tokenizer divides there


def untrimmed(tokenizer: Any) -> Any:
    """Returns the Rust tokenizer with offsets that hold white space too, without truncation and padding.

    `tokenizers.processors.ByteLevel` takes the spaces out of the offsets unless it is told not to, and a token of
    nothing but spaces has an empty one then. The tokens are the same. The tokenizer itself stays as it is.
    """
    backend = tokenizer.backend_tokenizer
    processor = json.loads(backend.post_processor.__getstate__()) if backend.post_processor is not None else {}
    if backend.truncation is None and backend.padding is None and not _trims(processor):
        return backend
    backend = copy.deepcopy(backend)
    backend.no_truncation()
    backend.no_padding()
    if _trims(processor):
        whole = json.loads(backend.to_str())
        whole["post_processor"] = _not_trimming(processor)
        backend = type(backend).from_str(json.dumps(whole))
    return backend


def _trims(processor: Any) -> bool:
    if isinstance(processor, dict):
        return processor.get("trim_offsets") is True or any(map(_trims, processor.values()))
    return isinstance(processor, list) and any(map(_trims, processor))


def _not_trimming(processor: Any) -> Any:
    if isinstance(processor, dict):
        return {key: key != "trim_offsets" and _not_trimming(value) for key, value in processor.items()}
    return [_not_trimming(one) for one in processor] if isinstance(processor, list) else processor


@dataclass(frozen=True)
class TokenRows:
    """Tokens of many rows, one after the other.

    Args:
        ids: (T,) int32 tokens.
        trained: (T,) True where a token is trained on.
        starts: (N + 1,) where each row begins, and the end.
        untrained: Rows left out since nothing of them is trained on.
        long: Rows longer than max_length, which were cut, split or dropped.
        refused: Of each row that the chat template refuses, its number among the rows given and the template's word.
    """

    ids: np.ndarray
    trained: np.ndarray
    starts: np.ndarray
    untrained: int = 0
    long: int = 0
    refused: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def tokens(self) -> int:
        """All tokens."""
        return len(self.ids)

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        """Yields `{"input_ids": [L], "labels": [L]}` of each row."""
        labels = np.where(self.trained, self.ids, IGNORED)
        for begin, end in pairwise(self.starts):
            yield {"input_ids": self.ids[begin:end].tolist(), "labels": labels[begin:end].tolist()}


@dataclass(frozen=True)
class Text:
    """A row as one text.

    Args:
        text: All of it.
        prompt: What is given, where the rest is trained on.
        spans: What is trained on alone, in characters.
    """

    text: str
    prompt: str | None = None
    spans: Sequence[Span] | None = None


@dataclass(frozen=True)
class _Places:
    """The place of each token in the text of its row.

    Args:
        begins: (T,) its first byte, or character where the row is not `in_bytes`.
        ends: (T,) the one after its last.
        in_bytes: (N,) the unit of each row.
        encodings: Of rows that are not in bytes, what the tokenizer said of them.
    """

    begins: np.ndarray
    ends: np.ndarray
    in_bytes: np.ndarray
    encodings: dict[int, Any]


class TextTokenizer:
    """Tokenizes texts, and tells which tokens are trained on.

    The tokens of a byte-level tokenizer say themselves how many bytes of the text they stand for, so the quicker call
    of the Rust tokenizer will do, which works out no offsets. Rows whose bytes do not add up are tokenized again.

    Args:
        tokenizer: A fast tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = untrimmed(tokenizer)
        marks = self._backend.encode("a").special_tokens_mask
        self._before = next((place for place, mark in enumerate(marks) if not mark), 0)
        self._behind = next((place for place, mark in enumerate(reversed(marks)) if not mark), 0)
        self._sizes = self._sizes_of_bytes()
        self._parts_at_spaces = all(self._divides(*pair) for pair in (("ab", " cd"), ("a:", " b"), ("1", " 2")))
        self._parts_at_lines = all(self._divides(*pair) for pair in (("ab\n", "cd"), ("a:\n", "1"), ("1\n", "(")))

    def _sizes_of_bytes(self) -> np.ndarray | None:
        """Returns (V,) bytes of each token of a byte-level tokenizer."""
        decoder = self._backend.decoder
        if decoder is None or json.loads(decoder.__getstate__()).get("type") != "ByteLevel":
            return None
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
        for token, number in vocabulary.items():
            sizes[number] = len(token)  # each byte is written as one character
        for number, added in self._backend.get_added_tokens_decoder().items():
            sizes[number] = len(added.content.encode("utf-8", "surrogatepass"))
        return sizes

    def encode(self, rows: Sequence[Text], *, special: bool) -> TokenRows:
        """Tokenizes texts; the first token of a row is never trained on, since nothing stands before it.

        Args:
            rows: The texts.
            special: Whether the tokenizer puts its own special tokens around them.
        """
        in_parts = any(row.prompt is not None or row.spans is not None for row in rows)
        exact = in_parts and self._sizes is None
        call = self._backend.encode_batch if exact else self._backend.encode_batch_fast
        found = call([row.text for row in rows], add_special_tokens=special)
        tokens, lengths = array("i"), np.empty(len(rows), dtype=np.int64)
        for number, encoding in enumerate(found):
            ids = encoding.ids
            tokens.fromlist(ids)
            lengths[number] = len(ids)
        ids = np.frombuffer(tokens, dtype=np.int32)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        trained = np.ones(len(ids), dtype=bool)
        if in_parts:
            trained = self._trained(rows, ids, starts, self._places(rows, ids, starts, found, special), special)
        trained[starts[:-1][lengths > 0]] = False
        return TokenRows(ids, trained, starts)

    def ids(self, text: str, *, special: bool) -> list[int]:
        """Returns the tokens of one text."""
        return self._backend.encode(text, add_special_tokens=special).ids

    def _places(
        self, rows: Sequence[Text], ids: np.ndarray, starts: np.ndarray, found: Sequence[Any], special: bool
    ) -> _Places:
        """Finds the places of all tokens."""
        lengths = np.diff(starts)
        before, behind = (self._before, self._behind) if special else (0, 0)
        begins, ends, odd = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64), np.arange(len(rows))
        if self._sizes is not None:
            sizes = self._sizes[ids]
            for first, last in pairwise(starts) if before or behind else ():
                sizes[first : first + before] = 0
                sizes[last - behind : last] = 0
            summed = np.concatenate([[0], np.cumsum(sizes)])
            ends = summed[1:] - np.repeat(summed[starts[:-1]], lengths)
            begins = ends - sizes
            sums = summed[starts[1:]] - summed[starts[:-1]]
            odd = np.flatnonzero(sums != [_bytes_before(row.text) for row in rows])
            if len(odd):
                found = self._backend.encode_batch([rows[int(n)].text for n in odd], add_special_tokens=special)
        in_bytes = np.ones(len(rows), dtype=bool)
        in_bytes[odd] = False
        encodings = dict(zip(odd.tolist(), found, strict=True)) if len(odd) else {}
        for number, encoding in encodings.items():
            first, last, size = starts[number], starts[number + 1], len(rows[number].text)
            spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            spans[len(spans) - behind :] = size
            begins[first:last] = np.maximum.accumulate(spans[:, 0])
            ends[first:last] = np.maximum.accumulate(spans[:, 1])
        return _Places(begins, ends, in_bytes, encodings)

    def _trained(
        self, rows: Sequence[Text], ids: np.ndarray, starts: np.ndarray, places: _Places, special: bool
    ) -> np.ndarray:
        """Says of each token whether it is trained on."""
        lengths = np.diff(starts)
        most = np.array(
            [4 * len(row.text) + 1 for row in rows]
        )  # a base for each row, so that all are searched at once
        bases = np.concatenate([[0], np.cumsum(most)])[:-1]
        begins, ends = places.begins + np.repeat(bases, lengths), places.ends + np.repeat(bases, lengths)

        def unit(number: int, place: int) -> int:
            text = rows[number].text
            return int(bases[number]) + (_bytes_before(text, place) if places.in_bytes[number] else place)

        given = [number for number, row in enumerate(rows) if row.prompt is not None]
        wanted = [unit(number, len(rows[number].prompt or "")) for number in given]
        firsts = starts[:-1].copy()
        found = np.searchsorted(ends, wanted, "right")
        unclear = []
        for number, place, first in zip(given, wanted, found, strict=True):
            firsts[number] = first
            aligned = first == starts[number] or ends[first - 1] == place or places.ends[first - 1] == 0
            aligned = aligned and (first == starts[number + 1] or begins[first] >= place)
            if not aligned or not self._parts(rows[number], places.encodings.get(number), int(first - starts[number])):
                unclear.append(number)
        prompts = [rows[number].prompt for number in unclear]
        for number, prompt in zip(
            unclear, self._backend.encode_batch_fast(prompts, add_special_tokens=special), strict=True
        ):
            firsts[number] = starts[number] + shared_tokens(prompt.ids, ids[starts[number] : starts[number + 1]])
        parts = [(number, span) for number, row in enumerate(rows) if row.spans is not None for span in row.spans]
        chosen = np.array([number for number, _ in parts], dtype=np.int64)
        begin = np.searchsorted(ends, [unit(number, first) for number, (first, _) in parts], "right")
        end = np.searchsorted(begins, [unit(number, last) for number, (_, last) in parts], "left")
        whole = np.array([number for number, row in enumerate(rows) if row.spans is None], dtype=np.int64)
        begin = np.concatenate([np.maximum(begin, firsts[chosen]), firsts[whole]])
        end = np.concatenate([end, starts[1:][whole]])
        steps = np.zeros(len(ids) + 1, dtype=np.int64)
        np.add.at(steps, begin[begin < end], 1)
        np.add.at(steps, end[begin < end], -1)
        return np.cumsum(steps[:-1]) > 0

    def _parts(self, row: Text, encoding: Any, token: int) -> bool:
        """Says whether the tokenizer divides a text where its prompt ends, whatever follows.

        Args:
            row: The text.
            encoding: What the tokenizer said of it, where its tokens are no bytes.
            token: Number of the first token behind the prompt.
        """
        prompt = row.prompt or ""
        if not row.text.startswith(prompt):  # a template that rewrites earlier turns
            return False
        left, right = prompt[-_NEAR:], row.text[len(prompt) : len(prompt) + _NEAR]
        if not left or not right:
            return True
        if category(right[0]).startswith("M"):  # an accent, which normalization joins to the letter before it
            return False
        if encoding is not None:
            if self._sizes is not None:  # the text is not what the tokens stand for
                return False
            word, other = (encoding.token_to_word(place) if place >= 0 else None for place in (token - 1, token))
            return word is None or other is None or word != other
        if self._parts_at_spaces and right[0] == " " and not left[-1].isspace():
            return True
        if self._parts_at_lines and left[-1] == "\n" and not right[0].isspace():
            return True
        return (len(left) < _NEAR and self._divides(left, right)) or (not left.isalnum() and self._divides(left, right))

    def _divides(self, left: str, right: str) -> bool:
        """Says whether the tokenizer makes tokens of two texts apart, where one follows the other."""
        pre_tokenizer = self._backend.pre_tokenizer
        if pre_tokenizer is None or self._sizes is None:
            return False
        pieces = pre_tokenizer.pre_tokenize_str(left + right)
        return any(first == len(left) for _, (first, _) in pieces)


def _bytes_before(text: str, place: int | None = None) -> int:
    """Counts the bytes of a text up to a character, or all."""
    if text.isascii():
        return len(text) if place is None else min(place, len(text))
    return len(text[:place].encode("utf-8", "surrogatepass"))


def shared_tokens(one: Sequence[int], other: np.ndarray) -> int:
    """Counts the tokens at the beginning that two rows share."""
    size = min(len(one), len(other))
    differing = np.flatnonzero(np.asarray(one[:size]) != other[:size])
    return int(differing[0]) if len(differing) else size
