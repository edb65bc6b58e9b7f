"""Formats of rows: the columns of each, and how a source is brought to them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, cast

from datasets import Dataset, Features, IterableDataset, Json, Value

from hfpipe.core.errors import DataError, RecipeError
from hfpipe.data.sources.templates import (
    BESIDE_MESSAGES,
    Form,
    as_conversation,
    build,
    fields_of,
    form_of,
    is_conversation,
    texts_of,
    turn_of,
)
from hfpipe.recipe import Source, Stage
from hfpipe.recipe.faults import did_you_mean, listed

Rows: TypeAlias = Dataset | IterableDataset


Kind = Literal[
    "text",
    "prompt_completion",
    "messages",
    "classification",
    "translation",
    "choices",
    "answer",
    "minimal_pair",
    "stereotype_pair",
    "stereotypes",
    "stereoset",
    "bbq",
]


ROLES: dict[Kind, tuple[str, ...]] = {  # in order of precedence
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "classification": ("sentence", "label"),
    "translation": ("source", "target"),
    # What only suites have: see multiple_choice.py and bias_rows.py.
    "choices": ("prompt", "choices", "answer"),
    "answer": ("prompt", "answer"),
    "minimal_pair": ("good", "bad"),
    "stereotype_pair": ("more", "less"),
    "stereotypes": ("stereotype", "anti_stereotype", "unrelated"),
    "stereoset": ("context", "sentences", "target"),
    "bbq": (
        *("context", "question", "ans0", "ans1", "ans2", "label"),
        *("answer_info", "additional_metadata", "context_condition", "question_polarity"),
    ),
}


MAY_HAVE: dict[Kind, tuple[str, ...]] = {  # roles beside these
    "messages": BESIDE_MESSAGES,
    "stereotypes": ("term",),
    "bbq": ("prompt",),
}


NOT_TEXT = ("id", "label", "choices", "answer", "sentences", "answer_info", "additional_metadata", *BESIDE_MESSAGES)


TEXT_KINDS: tuple[Kind, ...] = ("messages", "prompt_completion", "text")  # what a language model is trained on


def kinds_of(stage: Stage) -> tuple[Kind, ...]:
    """The kinds of rows that a stage is trained on."""
    kinds: dict[str, tuple[Kind, ...]] = {"pretrain": ("text",), "sft": TEXT_KINDS}
    return kinds.get(stage.kind) or (cast(Kind, stage.kind),)


def roles_of(rows: Rows) -> Kind:
    """Which kind of rows `load_rows` gave."""
    columns = rows.column_names if rows.column_names is not None else next(iter(rows), {})
    return next(kind for kind, roles in ROLES.items() if set(roles) <= set(columns))


def _require(column: str, columns: Iterable[str], key: str, source: Source) -> None:
    if column not in columns:
        raise DataError(
            f"source {source.path!r}: {key} names the column {column!r}, which the data does not have; its columns are "
            f"{listed(columns)}.{did_you_mean(column, columns)}"
        )


def _with_roles(rows: Rows, features: Features, source: Source, allowed: tuple[Kind, ...]) -> Rows:
    """Only the columns of one role, as they are, renamed or built."""
    named_columns = dict(source.columns) if isinstance(source.columns, dict) else {}
    renamed = {role: column for role, column in named_columns.items() if isinstance(column, str)}
    templates: dict[str, Form] = {role: form_of(template) for role, template in (source.template or {}).items()}
    rows, features = _with_inner_columns(rows, features, source)
    columns = list(features)
    for role, listed_columns in named_columns.items():
        for column in [listed_columns] if isinstance(listed_columns, str) else listed_columns:
            _require(column, columns, f"columns.{role}", source)
        if isinstance(listed_columns, list):
            templates[role] = [f"{{{column}}}" for column in listed_columns]
    for role, template in templates.items():
        for text in texts_of(template):
            for field in fields_of(text, role, source):
                _require(field, columns, f"template.{role}", source)
                if f"{{{field}[" in text and isinstance(features[field], Value):
                    raise RecipeError(
                        f"source {source.path!r}: template.{role} asks for a part of {field!r}, which is one value. "
                        "Write its plain name."
                    )
    named = {*renamed, *templates}
    available = {*columns, *named}
    whole = {kind: {*roles, *MAY_HAVE.get(kind, ())} for kind, roles in ROLES.items()}
    asked = [kind for kind in ROLES if named & whole[kind]]  # what the recipe names comes first
    kinds = [kind for kind in asked or ROLES if kind in allowed and available >= set(ROLES[kind])]
    kinds.sort(key=lambda kind: not named <= whole[kind])
    if not kinds:
        wanted = [" with ".join(f"`{role}`" for role in ROLES[kind]) for kind in allowed[:4]]
        lacking = f"neither {' nor '.join(wanted)}" if len(wanted) > 1 else f"no {wanted[0]}"
        first = ROLES[allowed[:4][-1]]
        inner = [name for name in features.flatten() if name not in features]
        places = (inner[0], inner[-1]) if inner else ("SOME_COLUMN", "OTHER_COLUMN")
        example = ", ".join(f"{role}: {place}" for role, place in zip(first, places, strict=False))
        raise DataError(
            f"source {source.path!r} has the columns {listed(columns)}: {lacking}. Say what they mean: "
            f"`columns: {{{example}}}` renames, "
            '`template: {prompt: "Question: {some_column}", completion: " {other_column}"}` builds.'
        )
    beside = [role for role in ("id", *MAY_HAVE.get(kinds[0], ())) if role in available]
    turns = [renamed.get(role, role) for role in ROLES["prompt_completion"]]
    if kinds[0] == "prompt_completion" and not templates and all(is_conversation(features[name]) for name in turns):
        return as_conversation(rows, features, *turns)
    roles = [*ROLES[kinds[0]], *beside]
    taken = {role: renamed.get(role, role) for role in roles if role not in templates}
    built = {role: templates[role] for role in roles if role in templates}
    for role, column in taken.items():
        _check_type(features[column], role, column, source)
    swapped = any(column != role and column in taken for role, column in taken.items())  # a stream renames one by one
    if built or swapped or len(set(taken.values())) < len(taken):
        rows = build(rows, columns, taken, built)
    else:
        rows = rows.select_columns(list(taken.values()))
        if changed := {column: role for role, column in taken.items() if column != role}:
            rows = rows.rename_columns(changed)
    return _with_features(rows, roles)


def _with_inner_columns(rows: Rows, features: Features, source: Source) -> tuple[Rows, Features]:
    """Columns inside of columns as columns of their own, where the recipe names one: `translation.en`."""
    given = source.columns.values() if isinstance(source.columns, dict) else ()
    named = [name for names in given for name in ([names] if isinstance(names, str) else names)]
    for template in (source.template or {}).values():
        named += re.findall(r"{([^{}\[\]]+)", "".join(texts_of(form_of(template))))
    if all(name in features or name.partition(".")[0] not in features for name in named):
        return rows, features
    flat = features.flatten()
    if isinstance(rows, Dataset):
        return rows.flatten(), flat
    arguments = {"columns": list(flat)}
    return rows.map(_take_out, batched=True, remove_columns=list(features), features=flat, fn_kwargs=arguments), flat


def _take_out(batch: dict[str, list[Any]], columns: list[str]) -> dict[str, list[Any]]:
    taken = {}
    for column in columns:
        outer, *inner = [column] if column in batch else column.split(".")
        values = batch[outer]
        for key in inner:
            values = [None if value is None else value[key] for value in values]
        taken[column] = values
    return taken


def _check_type(feature: Any, role: str, column: str, source: Source) -> None:
    """A role is text, or a conversation; a number is not made text behind the user's back."""
    if role in NOT_TEXT:  # what a label may hold is said in labels.py, and the rest in multiple_choice.py
        return
    if isinstance(feature, Json):  # rows of several types: `text_rules.py` tells which of them are texts
        return
    if role != "messages":
        if not (isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view", "null")):
            raise DataError(
                f"source {source.path!r}: `{role}` is the column {column!r}, which holds {_kind(feature)}, not text. "
                f'Build text of it with `template: {{{role}: "{{{column}}}"}}`, or name a conversation `messages`.'
            )
        return
    turn = turn_of(feature)
    if isinstance(turn, dict) and not {"role", "content"} <= set(turn):
        raise DataError(
            f"source {source.path!r}: the turns of {column!r} have {listed(turn)}; a conversation is a list of turns "
            "with `role` and `content`."
        )
    if turn is None and isinstance(feature, Value) and feature.dtype != "null":
        raise DataError(
            f"source {source.path!r}: `messages` is the column {column!r}, which holds {feature.dtype} and not a list "
            "of turns with `role` and `content`. If it is text, name it `text`."
        )


def _kind(feature: Any) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def _with_features(rows: Rows, roles: list[str]) -> Rows:
    """Makes the columns of a stream known where the data does not tell; only of a conversation is the type unknown."""
    if rows.column_names is not None or "messages" in roles or set(roles) & {*NOT_TEXT[1:]}:
        return rows
    return rows.cast(Features({role: Value("string") for role in roles}))


def text_of(row: dict[str, Any]) -> str:
    """All that a row says, without its id and its label."""
    if "messages" in row:
        return "\n".join(str(turn.get("content") or "") for turn in row["messages"] or ())
    return "".join(value for key, value in row.items() if key not in ("id", "label") and isinstance(value, str))
