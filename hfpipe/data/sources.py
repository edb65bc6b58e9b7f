"""Sources: one `load_dataset` call of a recipe, to rows whose columns are roles.

The roles are `text`, `prompt` + `completion`, or `messages`; `id` comes along where there is one. Streams stay streams.
"""

from __future__ import annotations

import difflib
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, get_dataset_split_names, load_dataset, load_from_disk
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import OfflineModeIsEnabled

from hfpipe.data.where import compile_where
from hfpipe.errors import DataError, MachineError, RecipeError
from hfpipe.recipe import Source

ROLES = (("messages",), ("prompt", "completion"), ("text",))


def load_rows(source: Source, *, default_split: str = "train", seed: int = 0) -> Dataset | IterableDataset:
    """Opens a source and gives its rows with the columns of one role, and `id`.

    Args:
        source: The source as the recipe gives it.
        default_split: The split where the recipe names none.
        seed: Unused by most sources; a source that samples draws with it.

    Returns:
        A `Dataset`, or an `IterableDataset` when the source streams.

    Raises:
        RecipeError: The file, split or configuration does not exist.
        MachineError: The Hub cannot be reached or refuses.
        DataError: The data cannot be read, or lacks the columns.
    """
    with clear_errors(source):
        rows = _open(source, default_split)
        columns = _column_names(rows)
        if source.where is not None:
            rows = rows.filter(compile_where(source.where, columns, source.path))
        if source.skip:
            size = len(rows) if isinstance(rows, Dataset) else source.skip
            rows = rows.skip(min(source.skip, size))
        if source.take is not None:
            size = len(rows) if isinstance(rows, Dataset) else source.take
            rows = rows.take(min(source.take, size))
        return _with_roles(rows, columns, source)


def _open(source: Source, default_split: str) -> Dataset | IterableDataset:
    """The rows as they are stored."""
    arguments = dict(source.passed_through)
    if isinstance(arguments.get("data_files"), str | list):
        default_split = "train"  # what `datasets` calls files that are not given by split
    split = arguments.pop("split", default_split)
    folder = Path(source.path)
    if source.path == "builtin":
        from hfpipe.data.builtin import builtin

        return builtin(arguments.get("name", "text"), split)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = load_from_disk(source.path)
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise RecipeError(f"{source.path} has no split {split!r}; there are {', '.join(saved)}.")
            saved = saved[split]
        return saved.to_iterable_dataset() if arguments.get("streaming") else saved
    return load_dataset(source.path, split=split, **arguments)


@contextmanager
def clear_errors(source: Source) -> Iterator[None]:
    """Turns what `datasets` raises, here or while a stream is read, into one paragraph with the remedy."""
    where = f"source {source.path!r}"
    try:
        yield
    except DataFilesNotFoundError as error:
        raise RecipeError(f"{where}: {_first_line(error)} Check data_files and data_dir.") from error
    except FileNotFoundError as error:
        raise RecipeError(
            f"{where}: {_first_line(error)} Paths are taken from the current folder, {Path.cwd()}."
        ) from error
    except DatasetNotFoundError as error:
        if "gated" in str(error) or "authenticat" in str(error):
            raise MachineError(
                f"{where} is gated or private. Accept its conditions on its page of the Hub, then log in: `hf auth login`."
            ) from error
        if "Couldn't reach" in str(error):
            raise MachineError(f"{where}: the Hub cannot be reached. Check the network, and HF_HUB_OFFLINE.") from error
        raise RecipeError(
            f"{where} was found neither as a folder nor on the Hub. Check the spelling; a private data set needs "
            "`hf auth login` with an account that may read it."
        ) from error
    except (OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise MachineError(
            f"{where}: the Hub cannot be reached ({type(error).__name__}). Check the network, and HF_HUB_OFFLINE; what is "
            "in the cache loads without one."
        ) from error
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise DataError(f"{where} cannot be read: {_first_line(cause)}{_file_of(source)}") from error
    except ValueError as error:
        text = str(error)
        if "Unknown split" in text or "Bad split" in text:
            raise RecipeError(f"{where}: {_first_line(error)}{_splits_of(source, text)}") from error
        if "BuilderConfig" in text or "Config name is missing" in text:
            raise RecipeError(f"{where}: {' '.join(text.split())[:600]} Give one of them as `name`.") from error
        if isinstance(error, UnicodeDecodeError) or type(error).__module__.startswith(("pyarrow", "pandas", "json")):
            raise DataError(f"{where} cannot be read: {_first_line(error)}{_file_of(source)}") from error
        if "Couldn't cast" in text or "schema" in text.lower():
            raise DataError(
                f"{where}: its rows do not have the same columns throughout: {_first_line(error)}"
            ) from error
        raise RecipeError(f"{where}: {_first_line(error)}") from error
    except (TypeError, KeyError) as error:
        if type(error).__module__.startswith("hfpipe"):
            raise
        raise RecipeError(f"{where}: load_dataset refuses it: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0][:400]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _file_of(source: Source) -> str:
    files = source.passed_through.get("data_files")
    return f" Look at {files}." if files else ""


def _splits_of(source: Source, text: str) -> str:
    """The splits that there are, where the error does not list them itself."""
    if "Should be one of" in text or source.path == "builtin":
        return ""
    try:
        return f" There are {', '.join(get_dataset_split_names(source.path, source.passed_through.get('name')))}."
    except Exception:  # it only adds to a message
        return ""


def _column_names(rows: Dataset | IterableDataset) -> list[str]:
    """Names of the columns; a stream without known features is asked for its first row."""
    if rows.column_names is not None:
        return list(rows.column_names)
    return list(next(iter(rows), {}))


def _with_roles(rows: Any, columns: list[str], source: Source) -> Any:
    """Only the columns of one role, renamed or built as the recipe says."""
    if source.template is not None:
        return _from_template(rows, columns, source)
    if isinstance(source.columns, dict):
        for role, column in source.columns.items():
            if column not in columns:
                raise DataError(_missing(f"columns.{role}", column, columns, source))
        clash = [role for role in source.columns if role in columns and role not in source.columns.values()]
        rows = rows.remove_columns(clash)
        rows = rows.rename_columns({column: role for role, column in source.columns.items() if column != role})
        columns = [column for column in columns if column not in clash and column not in source.columns.values()]
        columns += list(source.columns)
    for role in ROLES:
        if set(role) <= set(columns):
            return rows.select_columns([*role, *(["id"] if "id" in columns else [])])
    raise DataError(
        f"source {source.path!r} has the columns {', '.join(columns) or 'none'}, and none of them is `text`, `prompt` and "
        "`completion`, or `messages`. Say what they mean: `columns: {text: THE_COLUMN}` renames, "
        '`template: {prompt: "Question: {question}", completion: " {answer}"}` builds them.'
    )


def _from_template(rows: Any, columns: list[str], source: Source) -> Any:
    template = source.template or {}
    for role, text in template.items():
        for _, field, form, conversion in string.Formatter().parse(text):
            if field is None:
                continue
            if form or conversion or not field.isidentifier() and field not in columns:
                raise RecipeError(
                    f"template.{role}: {{{field}}} is not a plain column name. Write {{column}}; braces of the text itself "
                    "are doubled: {{ and }}."
                )
            if field not in columns:
                raise DataError(_missing(f"template.{role}", field, columns, source))

    def build(batch: dict[str, list[Any]]) -> dict[str, list[str | None]]:
        keys = list(batch)
        table = [dict(zip(keys, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return {role: [_filled(text, row) for row in table] for role, text in template.items()}

    dropped = [column for column in columns if column != "id" and column not in template]
    return rows.map(build, batched=True, remove_columns=dropped)


def _filled(text: str, row: dict[str, Any]) -> str | None:
    """The template with a row's values; None when one of them is missing, so that the row counts as empty."""
    needed = [field for _, field, _, _ in string.Formatter().parse(text) if field]
    return None if any(row[field] is None for field in needed) else text.format_map(row)


def _missing(key: str, column: str, columns: Sequence[str], source: Source) -> str:
    near = difflib.get_close_matches(column, columns, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"source {source.path!r}: {key} names the column {column!r}; there are {', '.join(columns)}.{hint}"


def commit_of(source: Source) -> str | None:
    """The commit of a Hub data set; None for what is not on the Hub or cannot be asked now."""
    if source.path == "builtin" or "/" not in source.path or Path(source.path).exists():
        return None
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source.path, revision=source.passed_through.get("revision"), timeout=10).sha
    except Exception:  # a fact for the record; loading says what is wrong
        return None
