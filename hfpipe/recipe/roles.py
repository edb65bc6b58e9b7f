"""Rules on a source: which roles its rows have together, and what of it a recipe may say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hfpipe.recipe.faults import Fault, did_you_mean, found, listed
from hfpipe.recipe.raw import Block, mapping

FORMS = (  # the roles that a row may have together
    ("text",),
    ("prompt", "completion"),
    ("messages", "tools", "chat_template_kwargs"),
    ("sentence", "label"),
    ("source", "target"),
)
TOGETHER = (("prompt", "completion"), ("source", "target"))
SUITE_FORMS = (  # and what only a suite's may
    ("prompt", "choices", "answer"),
    ("good", "bad"),
    ("more", "less"),
    ("stereotype", "anti_stereotype", "unrelated", "term"),
    ("context", "sentences", "target"),
    (
        *("prompt", "context", "question", "ans0", "ans1", "ans2", "label"),
        *("answer_info", "additional_metadata", "context_condition", "question_polarity"),
    ),
)
BUILTIN_TABLES = ("text", "package", "summary", "numbers")
BUILTIN_SPLITS = ("train", "test")
_TURNS = 'is a list of turns: `messages: [{role: user, content: "{asked}"}, {role: assistant, content: "{said}"}]`.'


def check_source(source: Block, forms: tuple[tuple[str, ...], ...] = FORMS) -> Iterator[Fault]:
    """Yields what is wrong with a source, whose rows may have the roles of `forms`."""
    if "token" in source.data:
        text = "a token does not belong in a file. Log in with `hf auth login`, or set HF_TOKEN."
        yield Fault((*source.steps, "token"), text)
    if source.data.get("path") == "builtin":
        for key, allowed in (("name", BUILTIN_TABLES), ("split", BUILTIN_SPLITS)):
            value = source.data.get(key)
            if value is not None and value not in allowed:
                text = f"found {found(value)}; allowed with `path: builtin` is one of {listed(allowed)}."
                yield Fault((*source.steps, key), text + did_you_mean(value, allowed))
    yield from _check_roles(source, forms)


def _are_turns(template: Any) -> bool:
    return isinstance(template, list) and any(isinstance(turn, dict) for turn in template)


def _check_roles(source: Block, forms: tuple[tuple[str, ...], ...]) -> Iterator[Fault]:
    roles = list(dict.fromkeys(role for form in forms for role in form))
    given: dict[Any, str] = {}
    for key in ("columns", "template"):
        for role, column in mapping(source.data.get(key)).items():
            steps = (*source.steps, key, role)
            if role not in roles:
                only = any(role in form for form in SUITE_FORMS)
                text = f"unknown role; the roles are {listed(roles)}.{did_you_mean(role, roles)}"
                yield Fault(steps, f"is a role of a suite's rows: nothing is trained on it. {text}" if only else text)
            elif role in given:
                yield Fault(steps, f"`{given[role]}` gives this role already. Keep one.")
            elif key == "template" and (role == "messages") != _are_turns(column):
                yield Fault(steps, _TURNS if role == "messages" else "is a text, and has no turns.")
            elif isinstance(column, list) and role not in ("choices", "messages"):
                yield Fault(steps, "is one text, not a list; a row has several `choices` only.")
            given[role] = key
    for role, other in (*TOGETHER, *(pair[::-1] for pair in TOGETHER)):
        is_choice = role in ("prompt", "target") and forms != FORMS  # the rest may be columns as they stand
        if role in given and other not in given and not is_choice:
            text = f"`{role}` is given without `{other}`, and the two go together. Add it: `{other}: <column>`."
            yield Fault((*source.steps, given[role], role), text)
    known = [role for role in roles if role in given]
    if not any(set(known) <= set(form) for form in forms):
        text = f"the source gives {listed(known)}; a row is "
        text += ", or ".join(" and ".join(form) for form in forms if len(form) < 6)
        yield Fault(source.steps, f"{text}. Keep one of them.")
