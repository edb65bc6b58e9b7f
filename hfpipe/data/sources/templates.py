"""Columns that a recipe builds by template: texts with columns in them, several choices, turns of a conversation.

A text with `{% ... %}` in it is a Jinja template, as chat templates are, and rendered in Jinja's sandbox; of others a
column in braces alone is replaced.

TRL's conversational `prompt` and `completion`, two lists of turns, are read as one conversation.
"""

from __future__ import annotations

import json
import re
import string
from functools import lru_cache
from typing import Any, TypeAlias

from datasets import Dataset, Features, IterableDataset, Json, List, Value
from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hfpipe.core.errors import DataError, RecipeError
from hfpipe.data.sources.decoding import HANDLER
from hfpipe.recipe import Source
from hfpipe.recipe.jinja_text import parsed_jinja
from hfpipe.recipe.row_formats import BESIDE_MESSAGES, COMPLETION_TURNS

Form: TypeAlias = str | list[str] | list[tuple[str, str]]  # a text, choices, or turns as (role, content)
COLUMN = r"[^\[\]]+(\[\w+\])*"  # in a template
_STATEMENT = re.compile(r"(?<!\{)\{%")


def _said(value: Any) -> Any:
    """Returns a value of a column as a text; nothing of what is missing."""
    if isinstance(value, bytes):
        return value.decode(errors=HANDLER)
    return "" if value is None else value


# White space as in the chat templates of transformers: none is left of a line that holds a statement alone.
_JINJA = ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=StrictUndefined,
    finalize=_said,
    optimized=False,  # or a text such as {{ 9 ** 9 ** 9 }} would be computed when it is read
)
_JINJA.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)  # Jinja's own escapes < and & for HTML


@lru_cache(maxsize=256)
def _compiled(text: str) -> Template:
    return _JINJA.from_string(text)


def is_jinja(text: str) -> bool:
    """Says whether a template is one of Jinja."""
    return _STATEMENT.search(text) is not None


def form_of(template: Any) -> Form:
    """A template of a recipe as plain values, which `datasets` can hash."""
    if isinstance(template, str) or isinstance(template[0], str):
        return template
    return [(turn.role, turn.content) for turn in template]


def template_texts(form: Form) -> list[str]:
    """The texts of a template."""
    return [form] if isinstance(form, str) else [one if isinstance(one, str) else one[1] for one in form]


def fields_of(text: str, role: str, source: Source) -> list[str]:
    """The columns that a template names."""
    if is_jinja(text):
        try:
            names = meta.find_undeclared_variables(parsed_jinja(_JINJA, text))
        except ValueError as error:
            raise RecipeError(
                f"source {source.path!r}: template.{role}: {error} A text with {{% in it is a Jinja template: "
                "{% if column %}...{% endif %}, {% for turn in column %}...{% endfor %}, {{ column }}."
            ) from error
        return sorted(names - _JINJA.globals.keys())
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise RecipeError(
            f"source {source.path!r}: template.{role}: {error}. A column is written {{column}}; braces of the text "
            "itself are doubled: {{ and }}."
        ) from error
    fields = []
    for _, field, form, conversion in parsed:
        if field is None:
            continue
        if form or conversion or ".__" in field or not re.fullmatch(COLUMN, field):
            raise RecipeError(
                f"source {source.path!r}: template.{role}: {field!r} is not the plain name of a column. A column is "
                "written {column}, one inside of another {column.inner}, and a part of a list {column[0]}, without "
                "format; braces of the text are doubled: {{ and }}."
            )
        fields.append(_column(field))
    return fields


def _column(field: str) -> str:
    """The column of a template's field: `choices` of `choices[0]`."""
    return field.partition("[")[0]


def build(
    rows: Dataset | IterableDataset, columns: list[str], taken: dict[str, str], built: dict[str, Form]
) -> Dataset | IterableDataset:
    """Builds roles by template, in batches.

    Args:
        rows: Rows.
        columns: All their columns.
        taken: Column by role, of those that stay as they are.
        built: Template by role.
    """
    arguments: dict[str, Any] = {"batched": True, "fn_kwargs": {"taken": taken, "built": built}}
    if isinstance(rows, Dataset):
        arguments["desc"] = "template"
    if rows.features is not None:
        kept = {role: rows.features[column] for role, column in taken.items()}
        arguments["features"] = Features({**kept, **{role: feature_of(form) for role, form in built.items()}})
    return rows.map(_fill, remove_columns=columns, **arguments)


def feature_of(form: Form) -> Any:
    """The type of the values that a template builds."""
    if isinstance(form, str):
        return Value("string")
    text = Value("string")
    return List(text) if isinstance(form[0], str) else List({"role": text, "content": text})


def _fill(batch: dict[str, list[Any]], taken: dict[str, str], built: dict[str, Form]) -> dict[str, list[Any]]:
    """Returns the roles of a batch; where a value is missing, so is the text built of it, and the row counts as empty.

    A Jinja template says itself what stands for a missing value. A turn of which it makes nothing is left out.
    """
    filled = {role: batch[column] for role, column in taken.items()}
    for role, form in built.items():
        if isinstance(form, str):
            filled[role] = filled_texts(batch, form)
            continue
        speakers = [None if isinstance(one, str) else one[0] for one in form]
        texts = zip(*(filled_texts(batch, text) for text in template_texts(form)), strict=True)
        may_be_empty = [
            who is not None and is_jinja(text) for who, text in zip(speakers, template_texts(form), strict=True)
        ]
        filled[role] = [None if None in row else _together(speakers, row, may_be_empty) for row in texts]
    return filled


def _together(speakers: list[str | None], texts: tuple[Any, ...], may_be_empty: list[bool]) -> list[Any]:
    """Returns choices, or the turns of those who speak."""
    return [
        text if who is None else {"role": who, "content": text}
        for who, text, gone in zip(speakers, texts, may_be_empty, strict=True)
        if text.strip() or not gone
    ]


def filled_texts(batch: dict[str, list[Any]], template: str) -> list[str | None]:
    """A template with each row's values in it."""
    if is_jinja(template):
        return _rendered(batch, template)
    parts = [(text, field) for text, field, _, _ in string.Formatter().parse(template)]
    fields = {_column(field) for _, field in parts if field}
    rows = zip(*(batch[field] for field in fields), strict=True) if fields else ((),) * len(next(iter(batch.values())))
    try:
        return [
            None if any(value is None for value in row) else _text_of(parts, dict(zip(fields, row, strict=True)))
            for row in rows
        ]
    except (IndexError, KeyError, TypeError) as error:
        raise DataError(f"the template {template!r} names a part that a row does not have: {error}.") from error


def _rendered(batch: dict[str, list[Any]], template: str) -> list[str | None]:
    """Returns a Jinja template with each row's values in it."""
    made = _compiled(template)
    try:
        return [made.render(dict(zip(batch, row, strict=True))) for row in zip(*batch.values(), strict=True)]
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"the template {template!r} cannot be filled with a row: {error}.") from error


def _text_of(parts: list[tuple[str, str | None]], row: dict[str, Any]) -> str:
    """The text of one row; `str.format` would take the dot of `translation.en` for an attribute."""
    said = []
    for text, field in parts:
        said.append(text)
        if field:
            value = row[_column(field)]
            for part in re.findall(r"\[(\w+)\]", field):
                value = value[int(part) if part.isdigit() else part]
            said.append(value.decode(errors=HANDLER) if isinstance(value, bytes) else str(value))
    return "".join(said)


def turn_of(feature: Any) -> Any:
    """Returns the type of a list's items, for a conversation that of a turn, a mapping; None for anything else."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)


def is_conversation(feature: Any) -> bool:
    """Returns True if a column holds turns with `role` and `content`."""
    turn = turn_of(feature)
    return isinstance(turn, dict) and {"role", "content"} <= set(turn)


def as_conversation(rows: Any, features: Features, prompt: str, completion: str) -> Dataset | IterableDataset:
    """Rows with `messages`, and with the number of turns of it that are the completion.

    Args:
        rows: A `Dataset` or an `IterableDataset`.
        features: Its columns and their types.
        prompt: The column with the turns that are given.
        completion: The column with the turns that are said.
    """
    types = [turn_of(features[prompt]), turn_of(features[completion])]
    turn = None if any(isinstance(one, Json) for one in types) else {**types[0], **types[1]}
    kept = {name: features[name] for name in ("id", *BESIDE_MESSAGES) if name in features}

    def joined(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pairs = list(zip(batch[prompt], batch[completion], strict=True))
        whole = [None if None in pair else [*pair[0], *pair[1]] for pair in pairs]
        turns = [row and [{key: said.get(key) for key in turn or said} for said in row] for row in whole]
        counts = [len(said or ()) for _, said in pairs]
        return {"messages": turns, COMPLETION_TURNS: counts, **{name: batch[name] for name in kept}}

    made = Features({"messages": List(turn or Json()), COMPLETION_TURNS: Value("int32"), **kept})
    return rows.map(joined, batched=True, remove_columns=list(features), features=made)
