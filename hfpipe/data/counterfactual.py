"""Rows of tokens with their swapped forms, and the places in which both say the same.

A row's text is read from its tokens, its listed words are swapped (see `data.swaps`), and it is tokenized again. So
what is compared follows from the row alone: nothing is stored, and a run that is continued compares the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from hfpipe.data.dataloader import collate
from hfpipe.data.swaps import swapped
from hfpipe.data.text_tokens import IGNORED

SWAPPED = "swapped"  # of a batch: the swapped forms of its rows
PLACES = "places"  # of these, (P, 4): row, place, row of the swapped forms, place there
AGAIN = 3  # tokens that have to agree behind a difference, so that the texts count as together again
FARTHEST = 48  # tokens of a difference, on both sides together

Batch = dict[str, Any]
Collated = Callable[[Sequence[dict[str, Any]], int, int], Batch]


def matching_places(one: Sequence[int], other: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the places of the tokens that two rows have in common, in order.

    Behind a difference they are together again where `AGAIN` tokens agree, or both end; what is never together again is
    left out.
    """
    places: list[tuple[int, int]] = []
    first, second = 0, 0
    while first < len(one) and second < len(other):
        if one[first] == other[second]:
            places.append((first, second))
            first, second = first + 1, second + 1
            continue
        together = _together(one[first : first + FARTHEST], other[second : second + FARTHEST])
        if together is None:
            break
        first, second = first + together[0], second + together[1]
    return places


def _together(one: Sequence[int], other: Sequence[int]) -> tuple[int, int] | None:
    """Returns how far two rows that differ go on until they are together again; None where they are not."""
    for gap in range(1, FARTHEST):
        for skipped in range(gap + 1):
            ahead = [*one[skipped : skipped + AGAIN]]
            if ahead and ahead == [*other[gap - skipped : gap - skipped + AGAIN]]:
                return skipped, gap - skipped
    return None


class Swapper:
    """Makes the swapped forms of rows.

    Args:
        tokenizer: The run's tokenizer.
        swap: What is swapped, see `data.swaps.swapped`.
        longest: Tokens that the model has positions for; None for any.
    """

    def __init__(self, tokenizer: Any, swap: str | Sequence[Sequence[str]], longest: int | None = None) -> None:
        self._tokenizer, self._swap, self._longest = tokenizer, swap, longest

    def of(self, ids: Sequence[int]) -> list[int] | None:
        """Returns the tokens of the swapped form of a text; None where no listed word is in it."""
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        new = swapped(text, self._swap)
        if new == text:
            return None
        found: list[int] = self._tokenizer(new, add_special_tokens=False)["input_ids"]
        return found[: self._longest]

    def row(self, row: dict[str, Any]) -> tuple[dict[str, list[int]], list[tuple[int, int]]] | None:
        """Returns the swapped form of a row and the places in common; None where no listed word is in it.

        Each document of a packed row is swapped for itself, and its positions begin anew.
        """
        ids = np.asarray(row["input_ids"])
        trained = np.flatnonzero(np.asarray(row["labels"]) != IGNORED)
        size = int(trained[-1]) + 1 if len(trained) else 0  # behind it is padding, or nothing to learn
        positions = np.asarray(row.get("position_ids", np.arange(len(ids))))[:size]
        begins = [*np.flatnonzero(positions == 0).tolist(), size] if size else []
        begins = begins if begins[:1] == [0] else [0, *begins]  # a document goes on from the row before
        made: dict[str, list[int]] = {"input_ids": []}
        if "position_ids" in row:
            made["position_ids"] = []
        places: list[tuple[int, int]] = []
        changed = False
        for begin, end in pairwise(begins):
            document = ids[begin:end].tolist()
            other = self.of(document)
            changed = changed or other is not None
            start, other = len(made["input_ids"]), document if other is None else other
            places += [(begin + one, start + two) for one, two in matching_places(document, other)]
            made["input_ids"] += other
            if "position_ids" in made:
                made["position_ids"] += range(len(other))
        return (made, places) if changed else None


def with_swapped(collated: Collated, swapper: Swapper) -> Collated:
    """Returns what makes a batch of rows of next tokens, with the swapped forms of those that have one.

    A place is one from which a token is predicted that is trained on and stands in both forms.
    """

    def collate_both(rows: Sequence[dict[str, Any]], pad_token_id: int, multiple: int = 1) -> Batch:
        made: list[dict[str, Any]] = []
        places: list[tuple[int, int, int, int]] = []
        for number, row in enumerate(rows):
            found = swapper.row(row)
            if found is None:
                continue
            labels = row["labels"]
            together = [(one, two) for one, two in found[1] if one and two and int(labels[one]) != IGNORED]
            places += [(number, one - 1, len(made), two - 1) for one, two in together]
            made.append({**found[0], "labels": found[0]["input_ids"]})
        return _joined(collated(rows, pad_token_id, multiple), made, places, pad_token_id, multiple)

    return collate_both


def with_swapped_sentences(collated: Collated, swapper: Swapper) -> Collated:
    """Returns what makes a batch of sentences with a label, with the swapped forms of those that have one."""

    def collate_both(rows: Sequence[dict[str, Any]], pad_token_id: int, multiple: int = 1) -> Batch:
        made: list[dict[str, Any]] = []
        places: list[tuple[int, int, int, int]] = []
        for number, row in enumerate(rows):
            ids = None if row.get("is_padding") else swapper.of(row["input_ids"])
            if ids is not None:
                places.append((number, 0, len(made), 0))
                made.append({"input_ids": ids, "labels": ids})
        return _joined(collated(rows, pad_token_id, multiple), made, places, pad_token_id, multiple)

    return collate_both


def _joined(batch: Batch, made: list[dict[str, Any]], places: list[Any], pad_token_id: int, multiple: int) -> Batch:
    if not places:
        return batch
    forms = collate(made, pad_token_id, multiple)
    del forms["labels"]
    return {**batch, SWAPPED: {**forms, PLACES: torch.tensor(places)}}
