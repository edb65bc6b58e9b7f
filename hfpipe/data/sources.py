"""Sources: one `load_dataset` call of a recipe, to rows whose columns are roles.

The roles are `text`, `prompt` + `completion`, `messages`, `sentence` + `label`, or `source` + `target`; `id` comes
along where there is one. Streams stay streams, and tables stay on disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from datasets import Dataset, DatasetDict, Features, IterableDataset, Json, Value, load_from_disk
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from huggingface_hub import HfApi

from hfpipe.builtin.corpus import builtin
from hfpipe.core.errors import DataError, RecipeError
from hfpipe.data.dirt import BESIDE_MESSAGES
from hfpipe.data.loading import load
from hfpipe.data.ranges import stream_range
from hfpipe.data.source_errors import friendly
from hfpipe.data.templates import Form, build, fields_of, form_of, texts_of
from hfpipe.data.turns import as_conversation, is_conversation, turn_of
from hfpipe.data.where import Where
from hfpipe.recipe import Fold, Source, Stage
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
    # What only suites have: see choices.py and stereotypes.py.
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

__all__ = ["fingerprint", "friendly", "kinds_of", "load_rows", "roles_of"]


def load_rows(
    source: Source, *, default_split: str = "train", seed: int = 0, kinds: tuple[Kind, ...] = tuple(ROLES)
) -> Rows:
    """Opens a source and gives its rows with the columns of one role, and `id` where there is one.

    First `skip` and `take` cut the rows by their place, so that two sources which share no place share no row; then
    `where` chooses among them, and `fold` a part of those; then `columns` and `template` name and build the roles.

    Args:
        source: The source as the recipe gives it.
        default_split: The split where the recipe names none; files that are not given by split are `train`.
        seed: Reserved for sources that draw; none does.
        kinds: The kinds of rows that will do: `TEXT_KINDS` for a language model.

    Returns:
        A `Dataset`, or an `IterableDataset` when the source streams; its errors come while it is read: see `friendly`.

    Raises:
        RecipeError: The file, split or configuration does not exist, or `where` or `template` is written wrongly.
        MachineError: The Hub cannot be reached or refuses.
        DataError: The data cannot be read, or lacks the columns.
    """
    with friendly(source, opening=True):
        rows = _open(source, default_split)
    with friendly(source):
        features = _features_of(rows, source)
        rows = _cut(rows, source.skip, source.take)
        if source.where is not None:
            keep = Where(source.where, source.path)
            for column in keep.columns:
                _require(column, features, "where", source)
            rows = rows.filter(keep, input_columns=keep.columns)
        if source.fold is not None:
            rows = _in_fold(rows, source.fold)
        return _with_roles(rows, features, source, kinds)


def kinds_of(stage: Stage) -> tuple[Kind, ...]:
    """The kinds of rows that a stage is trained on."""
    kinds: dict[str, tuple[Kind, ...]] = {"pretrain": ("text",), "sft": TEXT_KINDS}
    return kinds.get(stage.kind) or (cast(Kind, stage.kind),)


def roles_of(rows: Rows) -> Kind:
    """Which kind of rows `load_rows` gave."""
    columns = rows.column_names if rows.column_names is not None else next(iter(rows), {})
    return next(kind for kind, roles in ROLES.items() if set(roles) <= set(columns))


def fingerprint(source: Source) -> str | None:
    """The commit of a data set on the Hub; None for what is local or cannot be asked now."""
    path = source.path
    if path == "builtin" or path in _PACKAGED_DATASETS_MODULES or Path(path).exists():
        return None
    try:
        return HfApi().dataset_info(path, revision=source.passed_through.get("revision"), timeout=10).sha
    except Exception:  # a fact for the record; loading says what is wrong
        return None


def _open(source: Source, default_split: str) -> Rows:
    """The rows as they are stored."""
    arguments = dict(source.passed_through)
    files = arguments.get("data_files")
    split = arguments.pop("split", None) or ("train" if isinstance(files, str | list) else default_split)
    if source.path == "builtin":
        return builtin(arguments.get("name") or "text", split)
    folder = Path(source.path)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = _saved(folder, split)
        return saved.to_iterable_dataset() if arguments.get("streaming") else saved
    needs_files = source.path in _PACKAGED_DATASETS_MODULES and source.path not in ("eval", "iceberg", "lance")
    if needs_files and not files and not arguments.get("data_dir"):
        raise RecipeError(
            f"source {source.path!r} needs `data_files` (or `data_dir`): it reads files, and none is named."
        )
    return load(source.path, split=split, **arguments)


def _saved(folder: Path, split: str) -> Dataset:
    """A folder that `save_to_disk` wrote."""
    saved = load_from_disk(str(folder))
    if not isinstance(saved, DatasetDict):
        return saved  # has no splits
    if split not in saved:
        hint = did_you_mean(split, saved)
        raise RecipeError(f"source {str(folder)!r} has no split {split!r}; allowed: {listed(saved)}.{hint}")
    return saved[split]


def _cut(rows: Rows, skip: int, take: int | None) -> Rows:
    if not skip and take is None:
        return rows
    if isinstance(rows, IterableDataset):
        return stream_range(rows, skip, take)
    end = len(rows) if take is None else min(skip + take, len(rows))
    return rows.select(range(skip, end) if skip < end else [])  # `select` refuses an empty range at the end


def _in_fold(rows: Rows, fold: Fold) -> Rows:
    """The rows of one fold, or of all others, in their order. Streams are refused before: their rows have no place.

    Dealt out at random: by turns, a table that is itself in turns would lend each fold rows of its own kind.
    """
    from sklearn.model_selection import KFold  # a second to import

    number = fold.keep or fold.leave or 1
    left, kept = list(KFold(fold.of, shuffle=True, random_state=0).split(range(len(rows))))[number - 1]
    return rows.select(kept if fold.keep else left)


def _features_of(rows: Rows, source: Source) -> Features:
    """Columns and their types; a stream that does not know them is asked for its first row."""
    if rows.features:
        return rows.features
    first = next(iter(rows), None)
    if not first:
        raise DataError(f"source {source.path!r} has no rows; look at its files and its split.")
    return Dataset.from_list([first]).features


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
    if role in NOT_TEXT:  # what a label may hold is said in labels.py, and the rest in choices.py
        return
    if isinstance(feature, Json):  # rows of several types: `dirt.py` tells which of them are texts
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
