"""Counterfactual rows: the same text with other names or groups in it, and what a swap did taken back in the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hfpipe.data.swaps import replaced
from hfpipe.recipe.row_formats import format_of

Row = dict[str, Any]
Words = dict[str, str]  # a word and what takes its place


def families(row: Row, swap: Sequence[Sequence[str]] | Mapping[str, Mapping[str, Sequence[str]]]) -> list[list[Row]]:
    """Rows that differ in the swapped words only; the first of each family is the one that the rest is compared with.

    Args:
        row: A row with `prompt`, `sentence` or `messages`.
        swap: Lists of words that take each other's place, each the next one's, all lists at once: `[[he, she], [his,
            her]]`; or, for each mark such as `{name}` in the text, groups with words of the same number:
            `{name: {women: [Anna], men: [Ali]}}`. One family is made of the first words of all groups, one of the
            second.

    Returns:
        One family for lists; none where the row has none of the words. `swapped` of a row says what became of them.
    """
    if isinstance(swap, Mapping):
        return _filled(row, swap)
    longest = max(map(len, swap))
    family = [{**row, "swapped": {}}]
    for step in range(1, longest):
        words = {one: words[(place + step) % len(words)] for words in swap for place, one in enumerate(words)}
        other = _with(row, lambda text, words=words: replaced(text, words))
        if other != row:
            family.append({**other, "swapped": words})
    return [family] if len(family) > 1 else []


def _filled(row: Row, swap: Mapping[str, Mapping[str, Sequence[str]]]) -> list[list[Row]]:
    marks = [mark for mark in swap if any(f"{{{mark}}}" in text for text in _texts(row))]
    if not marks:
        return []
    found = []
    groups = list(swap[marks[0]])
    for place in range(max(len(words) for mark in marks for words in swap[mark].values())):
        family = []
        for group in groups:
            filling = {f"{{{mark}}}": _at(swap[mark][group], place) for mark in marks}
            first = {_at(swap[mark][groups[0]], place): _at(swap[mark][group], place) for mark in marks}
            other = _with(row, lambda text, filling=filling: _fill(text, filling))
            family.append({**other, "swapped": first if group != groups[0] else {}})
        found.append(family)
    return found


def _at(words: Sequence[str], place: int) -> str:
    return words[place % len(words)]


def _fill(text: str, filling: Words) -> str:
    for mark, word in filling.items():
        text = text.replace(mark, word)
    return text


def taken_back(answer: Any, swapped: Words) -> Any:
    """An answer to a swapped row with the swap undone, so that a name that is repeated is no other answer."""
    if isinstance(answer, str) and swapped:
        return replaced(answer, {new: old for old, new in swapped.items()})
    return answer


def _texts(row: Row) -> list[str]:
    asked = [row[column] for column in format_of(row).asked]
    return [text for one in asked for text in ([one] if isinstance(one, str) else [turn["content"] for turn in one])]


def _with(row: Row, change: Any) -> Row:
    """The row with the texts that are put to the model changed; of a conversation all but the last message."""
    new = dict(row)
    for column in format_of(row).asked:
        if isinstance(row[column], str):
            new[column] = change(row[column])
        else:
            *asked, last = row[column]
            new[column] = [*({**turn, "content": change(turn["content"])} for turn in asked), last]
    return new
