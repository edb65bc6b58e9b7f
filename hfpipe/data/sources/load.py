"""Opens a source of a recipe: one `load_dataset` call, brought to rows of one format.

The formats are the table in `hfpipe/recipe/row_formats.py`; `id` comes along where there is one. Streams stay streams,
and tables stay on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, IterableDataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from huggingface_hub import HfApi

from hfpipe.builtin.corpus import builtin
from hfpipe.core.errors import DataError, RecipeError
from hfpipe.data.sources.builders import load_dataset
from hfpipe.data.sources.errors import friendly
from hfpipe.data.sources.formats import Kind, Rows, Taken, require_column, to_format
from hfpipe.data.sources.line_files import by_byte_range
from hfpipe.data.sources.parquet import TABLE_ROWS, by_row_group
from hfpipe.data.sources.row_filter import Where
from hfpipe.data.sources.sharded_files import stream_range
from hfpipe.recipe import Fold, Source
from hfpipe.recipe.faults import did_you_mean, listed
from hfpipe.recipe.row_formats import ENDS

__all__ = ["fingerprint", "friendly", "load_rows"]


@dataclass(frozen=True)
class Opened:
    """A source that was opened.

    Args:
        rows: Its rows: a `Dataset`, or an `IterableDataset` when the source streams; the errors of a stream come while
            it is read: see `friendly`.
        taken: The format that the source was taken for, and why.
    """

    rows: Rows
    taken: Taken


def open_source(source: Source, *, default_split: str = "train", kinds: tuple[Kind, ...] = tuple(ENDS)) -> Opened:
    """Opens a source and gives its rows with the columns of one format, and `id` where there is one.

    First `skip` and `take` cut the rows by their place, so that two sources which share no place share no row; then
    `where` chooses among them, and `fold` a part of those; then `format`, `columns` and `template` say what the columns
    mean.

    Args:
        source: The source as the recipe gives it.
        default_split: The split where the recipe names none; files that are not given by split are `train`.
        kinds: The formats of rows that will do: `TEXT_KINDS` for a language model.

    Raises:
        RecipeError: The file, split or configuration does not exist, `where` or `template` is written wrongly, or two
            formats fit the columns equally.
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
                require_column(column, features, "where", source)
            rows = rows.filter(keep, input_columns=keep.columns)
        if source.fold is not None:
            rows = _in_fold(rows, source.fold)
        return Opened(*to_format(rows, features, source, kinds))


def load_rows(
    source: Source, *, default_split: str = "train", seed: int = 0, kinds: tuple[Kind, ...] = tuple(ENDS)
) -> Rows:
    """The rows of a source; see `open_source`."""
    return open_source(source, default_split=default_split, kinds=kinds).rows


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


def load(path: str, **arguments: Any) -> Dataset | IterableDataset:
    """`load_dataset`, with a stream of files as `SharedFiles` where its builder is one of files.

    Files may begin with a row group of no rows, as pandas writes an empty table. For a table `datasets` reads as many
    rows at a time as the first row group holds, and Arrow refuses to read none.
    """
    try:
        rows = load_dataset(path, **arguments)
    except DatasetGenerationError as error:
        if not str(error.__cause__).startswith("BatchSize must be greater than 0"):
            raise
        rows = load_dataset(path, **arguments, batch_size=TABLE_ROWS)
    return by_byte_range(by_row_group(rows)) if isinstance(rows, IterableDataset) else rows
