"""Recognizes the format of a source's rows, and brings them to the columns that are trained on or scored.

The formats are the table in `hfpipe/recipe/row_formats.py`. A source is taken for the format whose columns it has, by
their names and by what they hold; `columns:` and `template:` of the recipe say what other columns mean, and `format:`
says the format outright.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from datasets import Dataset, Features, IterableDataset, Json, Value

from hfpipe.core.errors import DataError, RecipeError
from hfpipe.data.sources.convert import CONVERTERS, converted
from hfpipe.data.sources.templates import (
    Form,
    as_conversation,
    build,
    feature_of,
    fields_of,
    form_of,
    is_conversation,
    template_texts,
    turn_of,
)
from hfpipe.recipe import Source
from hfpipe.recipe.faults import did_you_mean, listed
from hfpipe.recipe.row_formats import (
    BESIDE_MESSAGES,
    ENDS,
    ROW_FORMATS,
    SAID_KEYS,
    SPEAKER_KEYS,
    RowFormat,
    format_of,
)

Rows: TypeAlias = Dataset | IterableDataset
Kind: TypeAlias = str  # the name of a format that is trained on or scored as it stands

NOT_TEXT = ("id", "label", "choices", "answer", "sentences", "answer_info", "additional_metadata", *BESIDE_MESSAGES)
_NUMBER = re.compile(r"\s*[-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?\s*")
_DIALOGUE = re.compile(r"\s*Human:")  # as the dialogues of HH-RLHF begin
TEXT_TYPES = ("string", "large_string", "string_view", "null")


class UnknownColumns(DataError):
    """The columns of a source fit no format.

    Args:
        found: What is there, and what is wanted.
        example: What the recipe might say that the columns mean, by role.
        remedy: How it says so.
    """

    def __init__(self, found: str, example: dict[str, str], remedy: str) -> None:
        super().__init__(f"{found} {remedy}")
        self.found, self.example, self.remedy = found, example, remedy

    def __reduce__(self) -> tuple[type[UnknownColumns], tuple[str, dict[str, str], str]]:
        return type(self), (self.found, self.example, self.remedy)  # ranks tell each other


class SeveralFormats(RecipeError):
    """The columns of a source fit several formats equally.

    Args:
        found: The source, and the formats that it can be read as.
        names: Their names.
        remedy: How one says which is meant.
    """

    def __init__(self, found: str, names: tuple[str, ...], remedy: str) -> None:
        super().__init__(f"{found} {remedy}")
        self.found, self.names, self.remedy = found, names, remedy

    def __reduce__(self) -> tuple[type[SeveralFormats], tuple[str, tuple[str, ...], str]]:
        return type(self), (self.found, self.names, self.remedy)


@dataclass(frozen=True)
class Taken:
    """The format that a source was taken for, and why.

    Args:
        format: The format of its rows.
        columns: Its column for each of the format's, without those that a template builds.
        why: The reason, for a person.
        files: The files that it is read from, for a person, where their kinds were found out.
        others: The formats that other columns of it fit, and that come after this one.
    """

    format: RowFormat
    columns: Mapping[str, str]
    why: str
    files: str = ""
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        becomes = self.format.becomes
        how = f", read as {becomes}" if becomes and becomes != self.format.name else ""
        files = f"{self.files}, " if self.files else ""
        return f"{files}taken for {self.format.name} ({self.why}){how}"


def roles_of(rows: Rows) -> Kind:
    """The format of rows that `load_rows` gave."""
    columns = rows.column_names if rows.column_names is not None else next(iter(rows), {})
    return format_of(columns).name


def require_column(column: str, columns: Iterable[str], key: str, source: Source) -> None:
    """Raises a DataError where a column that `key` of the recipe names is not among the columns."""
    if column not in columns:
        raise DataError(
            f"source {source.path!r}: {key} names the column {column!r}, which the data does not have; its columns are "
            f"{listed(columns)}.{did_you_mean(column, columns)}"
        )


def to_format(rows: Rows, features: Features, source: Source, allowed: tuple[Kind, ...]) -> tuple[Rows, Taken]:
    """The rows with the columns of one format, as they are, renamed, built by template or converted.

    Args:
        rows: The rows of a source.
        features: Its columns and their types.
        source: The source, whose `format`, `columns` and `template` say what the columns mean.
        allowed: The formats that will do.

    Raises:
        RecipeError: Two formats fit equally, or `format` names one that will not do here.
        DataError: No format fits, or a column holds something else than its format wants.
    """
    rows, features = _with_inner_columns(rows, features, source)
    renamed, templates = _named(features, source)
    taken = _taken_for(rows, _Asked(features, source, renamed, templates, allowed))
    format, columns = taken.format, dict(taken.columns)
    if format.name == "preference":
        return _pairs(rows, features, source, columns, templates), taken
    if format.name in CONVERTERS and not templates and (format.becomes or _has_odd_turns(features, columns)):
        return converted(rows, features, format, columns), taken
    if format.becomes is not None:  # under other names only
        end = ENDS[format.becomes]
        columns = {new: columns[old] for new, old in zip(end.columns, format.columns, strict=True)}
        format = end
    if format.name == "prompt_completion" and not templates:
        pair = [columns[name] for name in format.columns]
        if all(_Turns(rows, features).keys_of(column) >= {"role", "content"} for column in pair):
            return as_conversation(rows, features, *pair), taken
    if "id" in (renamed.keys() | features.keys()) - templates.keys():
        columns["id"] = renamed.get("id", "id")
    built = {name: templates[name] for name in (*format.all_columns, "id") if name in templates}
    kept = {name: column for name, column in columns.items() if name != "system"}
    return _selected(rows, features, source, kept, built), taken


def _pairs(rows: Rows, features: Features, source: Source, columns: dict[str, str], templates: dict[str, Form]) -> Rows:
    """Returns rows with a prompt and two answers, all of them texts or all turns."""
    format = ROW_FORMATS["preference"]
    for name in ("prompt", *format.columns):
        if isinstance(feature := features.get(columns.get(name, "")), Value):
            _check_type(feature, name, columns[name], source)
    built = {name: templates[name] for name in (*format.all_columns, "id") if name in templates}
    if built:
        kept = columns | ({"id": "id"} if "id" in features and "id" not in built else {})
        rows = build(rows, list(features), kept, built)
        types = {name: features[column] for name, column in kept.items()}
        features = Features({**types, **{name: feature_of(form) for name, form in built.items()}})
        columns = {name: name for name in format.all_columns if name in features}
    return converted(rows, features, format, columns)


def _named(features: Features, source: Source) -> tuple[dict[str, str], dict[str, Form]]:
    """The columns that the recipe renames, and the templates it builds of others; checked against the data."""
    given = dict(source.columns) if isinstance(source.columns, dict) else {}
    renamed = {name: column for name, column in given.items() if isinstance(column, str)}
    templates: dict[str, Form] = {name: form_of(template) for name, template in (source.template or {}).items()}
    for name, columns in given.items():
        for column in [columns] if isinstance(columns, str) else columns:
            require_column(column, features, f"columns.{name}", source)
        if isinstance(columns, list):
            templates[name] = [f"{{{column}}}" for column in columns]
    for name, template in templates.items():
        for text in template_texts(template):
            for field in fields_of(text, name, source):
                require_column(field, features, f"template.{name}", source)
                if f"{{{field}[" in text and isinstance(features[field], Value):
                    raise RecipeError(
                        f"source {source.path!r}: template.{name} asks for a part of {field!r}, which is one value. "
                        "Write its plain name."
                    )
    return renamed, templates


class _Asked(NamedTuple):
    """Columns of a source and what its recipe says of them; see `to_format` and `_named`."""

    features: Features
    source: Source
    renamed: dict[str, str]
    templates: dict[str, Form]
    allowed: tuple[Kind, ...]


def _taken_for(rows: Rows, asked_for: _Asked) -> Taken:
    """The format that a source is taken for; see `to_format`."""
    features, source, renamed, templates, allowed = asked_for
    turns = _Turns(rows, features)
    named = {*renamed, *templates} - {"id"}
    if source.format is not None:
        return _as_said(ROW_FORMATS[source.format], asked_for)
    asked = [one for one in ENDS.values() if named & {*one.all_columns}]  # what the recipe names comes first
    if not any(named <= {*one.all_columns} for one in asked):  # such as a text with a label
        asked += [one for one in ROW_FORMATS.values() if one.becomes and {*one.columns} <= named <= {*one.all_columns}]
    fitting: dict[str, dict[str, str]] = {}
    for one in asked or ROW_FORMATS.values():
        end = one.becomes or one.name
        columns = _columns_of(one, features, renamed, templates)
        if end not in allowed or not one.is_recognized or columns is None:
            continue
        is_said = one.name == "messages" and "messages" in renamed  # turns of other keys are told when they are read
        if is_said or _fits(one, columns, features, turns):
            fitting[one.name] = columns
    if "messages" in named and "messages" in renamed and _has_other_keys(turns.keys_of(renamed["messages"])):
        columns = _columns_of(ROW_FORMATS["sharegpt"], features, {"conversations": renamed["messages"]}, {})
        fitting = {"sharegpt": columns or {}}
    if not fitting:
        raise _unknown(rows, features, source, allowed)
    best = min((not named <= {*ROW_FORMATS[name].all_columns}, ROW_FORMATS[name].rank) for name in fitting)
    equal = [
        name for name in fitting if (not named <= {*ROW_FORMATS[name].all_columns}, ROW_FORMATS[name].rank) == best
    ]
    equal = [name for name in equal if not any({*fitting[name].values()} < {*fitting[one].values()} for one in equal)]
    if len(equal) > 1 and not named:
        found = " and ".join(f"{name} ({listed(fitting[name].values())})" for name in equal)
        words = " or ".join(f"`format: {name}`" for name in equal)
        told = f"source {source.path!r} can be read as {found}, and both fit equally."
        raise SeveralFormats(told, tuple(equal), f"Write {words}.")
    name = equal[0]
    why = f"columns {listed(fitting[name].values())}" if not named else f"the recipe gives {listed(sorted(named))}"
    own = {*fitting[name].values()}
    others = tuple(one for one, columns in fitting.items() if not {*columns.values()} <= own)
    return Taken(ROW_FORMATS[name], fitting[name], why, others=others)


def _as_said(format: RowFormat, asked_for: _Asked) -> Taken:
    """The format that `format:` of the recipe names."""
    features, source, renamed, templates, allowed = asked_for
    end = format.becomes or format.name
    if end not in allowed:
        fits = [name for name, one in ROW_FORMATS.items() if (one.becomes or name) in allowed]
        raise RecipeError(
            f"source {source.path!r}: `format: {format.name}` gives rows of {end}, which this does not take; allowed "
            f"here is one of {listed(fits)}."
        )
    columns = _columns_of(format, features, renamed, templates)
    if columns is None:
        lacking = [name for name in format.columns if name not in (*features, *renamed, *templates)]
        raise DataError(
            f"source {source.path!r} has the columns {listed(features)}, and `format: {format.name}` needs "
            f"{listed(format.columns)}. Say which of them is meant: `columns: {{{lacking[0]}: SOME_COLUMN}}`."
        )
    return Taken(format, columns, "the recipe says so")


def _columns_of(
    format: RowFormat, features: Features, renamed: Mapping[str, str], templates: Mapping[str, Form]
) -> dict[str, str] | None:
    """The source's column for each of the format's; None where it lacks one that every row has."""
    columns: dict[str, str] = {}
    for name in format.all_columns:
        names = (renamed.get(name, name), *(format.aliases.get(name, ()) if name not in renamed else ()))
        if name in templates:
            continue
        if (column := next((one for one in names if one in features), None)) is not None:
            columns[name] = column
        elif name in format.columns:
            return None
    return None if any(column in features for column in format.unless) else columns


class _Turns:
    """The keys of the turns of a source's conversations; where the types do not tell, its first row is asked."""

    def __init__(self, rows: Rows, features: Features) -> None:
        self._rows, self._features = rows, features
        self._first: dict[str, Any] | None = None

    def first(self, column: str) -> Any:
        """Returns what the first row has in a column."""
        if self._first is None:
            self._first = next(iter(self._rows.take(1)), {})
        return self._first.get(column)

    def keys_of(self, column: str) -> set[str]:
        """The keys of the turns of a column; none where it holds no turns."""
        feature = self._features[column]
        turn = turn_of(feature)
        if isinstance(turn, dict):
            return {*turn}
        if not (isinstance(feature, Json) or isinstance(turn, Json)):
            return set()
        value = self.first(column)
        return {key for one in value if isinstance(one, dict) for key in one} if isinstance(value, list) else set()


def _fits(format: RowFormat, columns: Mapping[str, str], features: Features, turns: _Turns) -> bool:
    """Returns True if columns fit a format; columns under our names are judged later, with a message."""
    if format.name == "sharegpt":
        return _has_other_keys(turns.keys_of(columns["conversations"]))
    if format.name == "messages" and "messages" in columns:
        keys = turns.keys_of(columns["messages"])
        is_alias = columns["messages"] in format.aliases["messages"]
        return keys >= {"role", "content"} or not (is_alias or _has_other_keys(keys))
    if format.name == "hh_rlhf":
        sides = [turns.first(columns[name]) for name in format.columns]
        return all(isinstance(side, str) and _DIALOGUE.match(side) for side in sides)
    if (
        format.name == "ranking_chat"
    ):  # each answer is one turn; beside whole conversations the turns are something else
        return not any(isinstance(turns.first(columns[name]), list) for name in ("chosen", "rejected"))
    if format.becomes is None:
        return True
    return all(
        _is_text(features[column]) for name, column in columns.items() if name in format.columns and name != "label"
    )


def _has_other_keys(keys: set[str]) -> bool:
    """Returns True if turns say who speaks and what is said by other keys than `role` and `content`."""
    told = keys & {*SPEAKER_KEYS} and keys & {*SAID_KEYS}
    return bool(told) and not keys >= {"role", "content"}


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Json) or (isinstance(feature, Value) and feature.dtype in TEXT_TYPES)


def _has_odd_turns(features: Features, columns: Mapping[str, str]) -> bool:
    """Returns True if turns need a look, one by one: of mixed types, in parts, with calls, or with the system beside
    them.
    """
    turn = turn_of(features[columns["messages"]]) if "messages" in columns else None
    if isinstance(turn, Json):
        return True
    if not isinstance(turn, dict) or not {"role", "content"} <= {*turn}:
        return False
    return "system" in columns or "tool_calls" in turn or not isinstance(turn["content"], Value)


def _unknown(rows: Rows, features: Features, source: Source, allowed: tuple[Kind, ...]) -> DataError:
    """Returns the error for columns that fit no allowed format."""
    columns = listed(features)
    preference = ROW_FORMATS["preference"]
    if {*preference.columns} <= features.keys() and not isinstance(source.columns, dict):
        is_chat = is_conversation(features["chosen"])
        words = "`columns: {messages: chosen}`"
        if not is_chat:
            words = '`template: {prompt: "{prompt}", completion: "{chosen}"}`'
        return DataError(
            f"source {source.path!r} is taken for preference (columns chosen, rejected): pairs of a better and a worse "
            f"answer, which a stage of `kind: preference` is trained on. To train on the better ones, write {words}."
        )
    wanted = [" with ".join(f"`{name}`" for name in ENDS[kind].columns) for kind in allowed[:4]]
    lacking = f"neither {' nor '.join(wanted)}" if len(wanted) > 1 else f"no {wanted[0]}"
    kind = "prompt_completion" if "prompt_completion" in allowed else allowed[:4][-1]
    first = ENDS[kind].columns
    inner = [name for name in features.flatten() if name not in features]
    texts = _prose_first(rows, [name for name, feature in features.items() if _is_text(feature)])
    others = [name for name, feature in features.items() if isinstance(feature, Value) and name not in texts]
    places = (
        (inner[0], inner[-1]) if inner and len(texts) < len(first) else (*texts, *others, "SOME_COLUMN", "OTHER_COLUMN")
    )
    meant = dict(zip(first, places, strict=False))
    example = ", ".join(f"{name}: {place}" for name, place in meant.items())
    elsewhere = [
        name
        for name, one in ROW_FORMATS.items()
        if (one.becomes or name) not in allowed and {*one.columns} <= {*features} and one.name not in ("text",)
    ]
    told = f" They look like {listed(elsewhere)}, which this does not take." if elsewhere else ""
    sign = next((sign for sign in ("\t", ";", "|") if sign in next(iter(features), "")), None)
    if source.path == "csv" and len(features) == 1 and sign is not None:
        written = "\\t" if sign == "\t" else sign
        told = f' That is one column, so another sign seems to divide the cells: write `delimiter: "{written}"`.'
    return UnknownColumns(
        f"source {source.path!r} has the columns {columns}: {lacking}.{told}",
        meant,
        f"Say what they mean: `columns: {{{example}}}` renames, "
        f'`template: {{prompt: "Question: {{{places[0]}}}\\nAnswer:", completion: " {{{places[1]}}}"}}` builds.',
    )


def _prose_first(rows: Rows, columns: list[str]) -> list[str]:
    """Columns of text: those whose first values have several words stand before numbers of tickets and the like."""
    first = list(rows.take(LABELS_LOOKED_AT // 50))
    has_words = {name: sum(" " in str(row.get(name)).strip() for row in first) * 2 > len(first) for name in columns}
    return sorted(columns, key=lambda name: not has_words[name])


def _with_inner_columns(rows: Rows, features: Features, source: Source) -> tuple[Rows, Features]:
    """Columns inside of columns as columns of their own, where the recipe names one: `translation.en`."""
    given = source.columns.values() if isinstance(source.columns, dict) else ()
    named = [name for names in given for name in ([names] if isinstance(names, str) else names)]
    for template in (source.template or {}).values():
        named += re.findall(r"{([^{}\[\]]+)", "".join(template_texts(form_of(template))))
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


def _selected(rows: Rows, features: Features, source: Source, taken: dict[str, str], built: dict[str, Form]) -> Rows:
    """The rows with some of their columns under the names of a format, and those that templates build."""
    for name, column in taken.items():
        _check_type(features[column], name, column, source)
    swapped = any(column != name and column in taken for name, column in taken.items())  # a stream renames one by one
    if built or swapped or len(set(taken.values())) < len(taken):
        rows = build(rows, list(features), taken, built)
    else:
        rows = rows.select_columns(list(taken.values()))
        if changed := {column: name for name, column in taken.items() if column != name}:
            rows = rows.rename_columns(changed)
    rows = _with_features(rows, [*taken, *built])
    return _with_numbers(rows) if "label" in taken else rows


LABELS_LOOKED_AT = 1_000  # of a stream


def _with_numbers(rows: Rows) -> Rows:
    """Labels that are written as numbers, some with a point, as numbers: a regression learns them."""
    feature = (rows.features or {}).get("label")
    if not (isinstance(feature, Value) and feature.dtype in TEXT_TYPES):
        return rows
    first = rows if isinstance(rows, Dataset) else rows.take(LABELS_LOOKED_AT)
    texts = {row["label"] for row in first.select_columns(["label"]) if row["label"] is not None}
    if not any("." in text for text in texts) or not all(map(_NUMBER.fullmatch, texts)):
        return rows
    features = Features({**rows.features, "label": Value("float64")})  # type: ignore[dict-item]
    return rows.map(_to_number, input_columns=["label"], features=features)


def _to_number(text: str | None) -> dict[str, float | None]:
    return {"label": None if text is None else float(text)}


def _check_type(feature: Any, role: str, column: str, source: Source) -> None:
    """A role is text, or a conversation; a number is not made text behind the user's back."""
    if role in NOT_TEXT:  # what a label may hold is said in labels.py, and the rest in multiple_choice.py
        return
    if isinstance(feature, Json):  # rows of several types: `text_rules.py` tells which of them are texts
        return
    if role != "messages":
        if not (isinstance(feature, Value) and feature.dtype in TEXT_TYPES):
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
