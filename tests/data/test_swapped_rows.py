"""A row of tokens and its swapped form: what is swapped, and the places where both say the same."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from tokenizer_families import FAMILIES, make

from hfpipe.data.counterfactual import PLACES, SWAPPED, Swapper, matching_places, with_swapped
from hfpipe.data.dataloader import collate

TEXT = "The cow said moo, and the fox said yelp to the cow."


def test_the_places_in_common_are_in_order_and_say_the_same() -> None:
    chance = random.Random(0)
    for _ in range(200):
        one = [chance.randrange(9) for _ in range(chance.randrange(1, 60))]
        other: list[int] = []
        for token in one:
            other += {0: [100, 101], 1: [], 2: [102]}.get(chance.randrange(12), [token])
        places = matching_places(one, other)
        assert all(one[first] == other[second] for first, second in places)
        assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(places))
    assert matching_places([1, 2, 3, 4, 5, 6], [1, 2, 9, 9, 4, 5, 6]) == [(0, 0), (1, 1), (3, 4), (4, 5), (5, 6)]
    assert matching_places([1, 2], [1, 3]) == [(0, 0)]
    assert matching_places([1, 2, 7], [1, 3, 7]) == [(0, 0), (2, 2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_swapped_by_every_tokenizer(family: str) -> None:
    """All but the listed words are in common; a text without one has no swapped form."""
    tokenizer = make(family)
    swapper = Swapper(tokenizer, [["cow", "fox"]])
    ids = tokenizer(TEXT)["input_ids"]
    found = swapper.of(ids)
    assert found is not None
    read = tokenizer.decode(found, skip_special_tokens=True)
    text = "The fox said moo, and the cow said yelp to the fox."
    expected = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
    assert read.strip() == expected.strip()
    assert len(matching_places(ids, found)) >= len(ids) - 3 * len(
        tokenizer("cow fox", add_special_tokens=False)["input_ids"]
    )
    assert swapper.of(tokenizer("Question: what")["input_ids"]) is None


def test_a_batch_holds_the_swapped_forms_and_the_places_that_are_trained_on() -> None:
    tokenizer = make("tiktoken's")
    ids: Any = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (TEXT, "def x", "the fox said yelp")]
    rows = [{"input_ids": one, "labels": one} for one in ids]
    rows[2]["labels"] = [-100, -100, *ids[2][2:]]
    batch = with_swapped(collate, Swapper(tokenizer, [["cow", "fox"]]))(rows, 0, 1)
    forms = batch[SWAPPED]
    assert batch["input_ids"].shape[0] == 3
    assert forms["input_ids"].shape[0] == 2
    assert {row for row, *_ in forms[PLACES].tolist()} == {0, 2}
    for row, place, other, there in forms[PLACES].tolist():
        assert batch["input_ids"][row, place + 1] == forms["input_ids"][other, there + 1]
        assert batch["labels"][row, place + 1] != -100
    assert SWAPPED not in with_swapped(collate, Swapper(tokenizer, [["hen", "owl"]]))(rows, 0, 1)


def test_each_document_of_a_packed_row_is_swapped_for_itself() -> None:
    tokenizer = make("tiktoken's")
    one, two = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (TEXT, "the end of it"))
    ids, positions = [*one, *two, *one, 0, 0], [*range(len(one)), *range(len(two)), *range(len(one)), 0, 1]
    labels = [*[-100], *one[1:], *[-100], *two[1:], *[-100], *one[1:], -100, -100]
    found = Swapper(tokenizer, [["cow", "fox"]]).row({"input_ids": ids, "labels": labels, "position_ids": positions})
    assert found is not None
    made, places = found
    other = Swapper(tokenizer, [["cow", "fox"]]).of(one)
    assert other is not None
    assert made["input_ids"] == [*other, *two, *other]
    assert made["position_ids"] == [*range(len(other)), *range(len(two)), *range(len(other))]
    assert all(ids[first] == made["input_ids"][second] for first, second in places)
