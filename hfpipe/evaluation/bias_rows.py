"""Rows of the bias benchmarks in the forms of their authors: StereoSet's sentences, BBQ's answers and groups."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hfpipe.core.errors import DataError

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
