"""Rows of the bias benchmarks in the forms of their authors (StereoSet, BBQ), and counterfactual rows.

A counterfactual row is the same text with other names or groups in it; a swap is taken back in the answer to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hfpipe.core.errors import DataError
from hfpipe.data.swaps import Words, replaced
from hfpipe.recipe.row_formats import format_of

Row = dict[str, Any]
GOLD = ("anti-stereotype", "stereotype", "unrelated")  # the order of the Hub's ClassLabel
CONTEXTS = {"ambig": "ambiguous", "disambig": "disambiguated"}
BBQ_PROMPT = "{context}\n\nQ: {question}\nA:"  # lm-eval's
JOINED = re.compile(r"(m|f|lowses|highses)[-_](.+)")  # groups of two traits: F-Black, lowSES-African
SPELLINGS = {
    **{"lowses": "low ses", "highses": "high ses"},
    **dict.fromkeys(("woman", "women", "girl", "girls"), "f"),
    **dict.fromkeys(("man", "men", "boy", "boys"), "m"),
    **dict.fromkeys(("transgender women", "transgender men", "trans_f", "trans_m"), "trans"),  # as in BBQ's own script
}


def stereoset_rows(rows: Sequence[Row]) -> list[Row]:
    """StereoSet's rows, `sentences` with a `gold_label`, as its three sentences, its `context` and `term`."""
    found = []
    for row in rows:
        sentences = row["sentences"]
        if isinstance(sentences, dict):
            pairs = list(zip(sentences["sentence"], sentences["gold_label"], strict=True))
        else:
            pairs = [(one["sentence"], one["gold_label"]) for one in sentences]
        named = {label if isinstance(label, str) else GOLD[label]: text for text, label in pairs}
        if set(named) != set(GOLD):
            raise DataError(
                f"StereoSet: a row has the labels {sorted(named)}; it needs one of each: {', '.join(GOLD)}."
            )
        if "BLANK" not in row["context"]:
            raise DataError(
                f"StereoSet: the context {row['context'][:100]!r} has no BLANK. Only its `intrasentence` part, "
                "whose sentences fill one, is scored: take that configuration."
            )
        found.append(
            {
                **({"id": row["id"]} if "id" in row else {}),
                "stereotype": named["stereotype"],
                "anti_stereotype": named["anti-stereotype"],
                "unrelated": named["unrelated"],
                "context": row["context"],
                "term": row["target"],
            }
        )
    return found


def bbq_rows(rows: Sequence[Row]) -> list[Row]:
    """BBQ's rows as a choice among three answers, with what each stands for.

    Returns:
        Rows with `prompt`, `choices`, `answer`, and `bbq`: the kind of `context` and, for each choice, whether it is
        `biased` and whether it is `named`, that is not `unknown`.
    """
    found = []
    for row in rows:
        groups = [_groups(row["answer_info"][f"ans{place}"], row[f"ans{place}"]) for place in range(3)]
        stereotyped = {_spelled(group) for group in row["additional_metadata"]["stereotyped_groups"]}
        named = ["unknown" not in group for group in groups]
        # In a question that is not negative, the bias is to name the other group.
        negative = row["question_polarity"] == "neg"
        biased = [known and bool(group & stereotyped) == negative for group, known in zip(groups, named, strict=True)]
        if (condition := row["context_condition"]) not in CONTEXTS:
            raise DataError(f"BBQ: a row has the context_condition {condition!r}; allowed: {', '.join(CONTEXTS)}.")
        found.append(
            {
                **({"id": row["id"]} if "id" in row else {}),
                "prompt": row.get("prompt") or BBQ_PROMPT.format(context=row["context"], question=row["question"]),
                "choices": [row[f"ans{place}"] for place in range(3)],
                "answer": int(row["label"]),
                "bbq": {"context": CONTEXTS[condition], "biased": biased, "named": named},
            }
        )
    return found


def _groups(info: Sequence[str], answer: str) -> set[str]:
    """The names of the groups that an answer stands for; a few rows lack them, and then its own words serve."""
    groups = set()
    for name in [part for part in info if part] or answer.split():
        joined = JOINED.fullmatch(name.lower())
        groups |= {_spelled(part) for part in (name, *(joined.groups() if joined else ()))}
    return groups


def _spelled(group: str) -> str:
    return SPELLINGS.get(group.lower(), group.lower())


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
