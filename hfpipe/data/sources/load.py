"""Opens a source of a recipe: one `load_dataset` call, brought to rows of one format.

The formats are the table in `hfpipe/recipe/row_formats.py`; `id` comes along where there is one. Streams stay streams,
and tables stay on disk.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, IterableDataset, concatenate_datasets, load_from_disk

from hfpipe.core import display, ranks
from hfpipe.core.errors import DataError, RecipeError
from hfpipe.core.upstream import builder_names
from hfpipe.data.builtin.corpus import builtin
from hfpipe.data.sources.builders import load_dataset
from hfpipe.data.sources.errors import friendly
from hfpipe.data.sources.files import FileGroup, file_groups, local_path
from hfpipe.data.sources.formats import Kind, Rows, Taken, require_column, to_format
from hfpipe.data.sources.line_files import by_byte_range
from hfpipe.data.sources.parquet import by_row_group
from hfpipe.data.sources.row_filter import RowFilter
from hfpipe.data.sources.sharded_files import stream_range
from hfpipe.data.swaps import augmented
from hfpipe.recipe import Fold, Source
from hfpipe.recipe.faults import did_you_mean, listed
from hfpipe.recipe.row_formats import ENDS
from hfpipe.recipe.signatures import load_dataset_fields


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


def open_source(
    source: Source, *, default_split: str = "train", kinds: tuple[Kind, ...] = tuple(ENDS), together: bool = False
) -> Opened:
    """Opens a source and gives its rows with the columns of one format, and `id` where there is one.

    First `skip` and `take` cut the rows by their place, so that two sources which share no place share no row; then
    `where` chooses among them, and `fold` a part of those; then `format`, `columns` and `template` say what the columns
    mean, and `augment` swaps words in them.

    Args:
        source: The source as the recipe gives it.
        default_split: The split where the recipe names none; files that are not given by split are `train`.
        kinds: The formats of rows that will do: `TEXT_KINDS` for a language model.
        together: Whether every rank calls this. A stream is then opened by the main process, and the others take it
            from there: the Hub counts the requests of all ranks together.

    Raises:
        RecipeError: The file, split or configuration does not exist, `where` or `template` is written wrongly, or two
            formats fit the columns equally.
        MachineError: The Hub cannot be reached or refuses.
        DataError: The data cannot be read, or lacks the columns.
    """

    def parts_of() -> list[tuple[Rows, FileGroup | None]]:
        with friendly(source, opening=True), display.doing(f"opening {source.title}"):
            return _open(source, default_split)

    shared = together and bool(source.passed_through.get("streaming"))
    parts = ranks.on_main(parts_of) if shared else parts_of()
    with friendly(source):
        files = ", ".join(str(group) for _, group in parts if group is not None)
        if len(parts) == 1 or all(rows.features == parts[0][0].features for rows, _ in parts):
            rows, taken = _in_format(_concatenated([rows for rows, _ in parts]), source, kinds)
        else:
            rows, taken = _of_several_kinds(parts, source, kinds)
        if source.augment is not None:
            rows = augmented(rows, source.augment)
        return Opened(rows, replace(taken, files=files))


def stored_rows(source: Source) -> Rows:
    """The rows of a source as they are stored, with all their columns.

    Raises:
        RecipeError: It does not exist, or has files of several kinds.
        DataError: It cannot be read.
    """
    with friendly(source, opening=True):
        parts = _open(source, "train")
    if len(parts) > 1:
        raise RecipeError(f"{source.path!r} has files of several kinds. Name one file.")
    return parts[0][0]


def _in_format(rows: Rows, source: Source, kinds: tuple[Kind, ...]) -> tuple[Rows, Taken]:
    """Cuts, filters and brings the rows of a source to one format."""
    features = _features_of(rows, source)
    rows = _cut(rows, source.skip, source.take)
    if source.where is not None:
        keep = RowFilter(source.where, source.path)
        for column in keep.columns:
            require_column(column, features, "where", source)
        rows = rows.filter(keep, input_columns=keep.columns)
    if source.fold is not None:
        rows = _in_fold(rows, source.fold, source.path)
    return to_format(rows, features, source, kinds)


def _of_several_kinds(
    parts: list[tuple[Rows, FileGroup | None]], source: Source, kinds: tuple[Kind, ...]
) -> tuple[Rows, Taken]:
    """The rows of files of several kinds, each brought to the format, one after the other.

    Raises:
        RecipeError: The kinds come to different formats, or `where` stands beside words that count rows.
    """
    cuts = [word for word, value in (("skip", source.skip), ("take", source.take), ("fold", source.fold)) if value]
    if source.where is not None and cuts:
        raise RecipeError(
            f"source {source.path!r} has files of several kinds, of which `where` and `{cuts[0]}` cannot both choose "
            "rows. Name the files of one kind, such as `path: " + os.path.join(source.path, "*.jsonl") + "`."
        )
    whole = source.model_copy(update={"skip": 0, "take": None, "fold": None})
    found = [_in_format(rows, whole, kinds) for rows, _ in parts]
    ends = {taken.format.becomes or taken.format.name for _, taken in found}
    if len(ends) > 1:
        told = "; ".join(f"{group} {taken}" for (_, group), (_, taken) in zip(parts, found, strict=True))
        raise RecipeError(
            f"source {source.path!r} has files of several kinds, which do not come to one format: {told}. Name them in "
            "sources of their own, such as `path: " + os.path.join(source.path, "*.jsonl") + "`."
        )
    names = [name for name in found[0][0].features if all(name in rows.features for rows, _ in found)]
    features = Features({name: found[0][0].features[name] for name in names})
    alike = [rows.select_columns(names).cast(features) for rows, _ in found]
    rows = _cut(_concatenated(alike), source.skip, source.take)
    return _in_fold(rows, source.fold, source.path) if source.fold is not None else rows, found[0][1]


def _concatenated(parts: list[Any]) -> Rows:
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def load_rows(
    source: Source, *, default_split: str = "train", kinds: tuple[Kind, ...] = tuple(ENDS), together: bool = False
) -> Rows:
    """The rows of a source; see `open_source`."""
    return open_source(source, default_split=default_split, kinds=kinds, together=together).rows


def _open(source: Source, default_split: str) -> list[tuple[Rows, FileGroup | None]]:
    """The rows as they are stored, by the files that hold them."""
    arguments = dict(source.passed_through)
    files = arguments.get("data_files")
    split = arguments.pop("split", None) or ("train" if isinstance(files, str | list) else default_split)
    if source.path == "builtin":
        return [(builtin(arguments.get("name") or "text", split), None)]
    if source.path in builder_names():
        needs_files = source.path not in ("eval", "iceberg", "lance")
        if needs_files and not files and not arguments.get("data_dir"):
            raise RecipeError(
                f"source {source.path!r} needs `data_files` (or `data_dir`): it reads files, and none is named."
            )
        return [(load(source.path, split=split, **_with_paths(arguments, source)), None)]
    folder = Path(local_path(source))
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = _saved(folder, split)
        return [(saved.to_iterable_dataset() if arguments.get("streaming") else saved, None)]
    is_named = any(arguments.get(word) for word in ("data_files", "data_dir", "name"))
    groups = [] if is_named and folder.is_dir() else file_groups(source)
    if not groups:
        return [(load(str(folder), split=split, **arguments), None)]
    return _read_groups(groups, split, arguments, source)


def _read_groups(
    groups: list[FileGroup], split: str, arguments: dict[str, Any], source: Source
) -> list[tuple[Rows, FileGroup | None]]:
    """The rows of groups of files; where they have one split, it is that of a stage and of a suite."""
    splits = list(dict.fromkeys(name for group in groups for name in group.files))
    name, slice = re.fullmatch(r"\s*([^\[]*?)\s*((?:\[.*)?)", split).groups()  # type: ignore[union-attr]
    if name not in splits and splits == ["train"] and "split" not in source.passed_through:
        name = "train"
    if name not in splits and "+" not in name:
        one = " A file has the one split `train`: leave `split` out." if splits == ["train"] else ""
        raise RecipeError(
            f"source {source.path!r} has no split {name!r}; allowed: {listed(splits)}.{did_you_mean(name, splits)}{one}"
        )
    parts: list[tuple[Rows, FileGroup | None]] = []
    known = load_dataset_fields() or {}
    for group in groups:
        if name in group.files or "+" in name:
            of_kind = load_dataset_fields(group.kind) or {}
            only = len(groups) == 1
            own = {word: value for word, value in arguments.items() if only or word in known or word in of_kind}
            rows = load(group.kind, split=f"{name}{slice}", data_files=group.files, **group.options | own)
            parts.append((rows, group))
    return parts


def _with_paths(arguments: dict[str, Any], source: Source) -> dict[str, Any]:
    """The arguments with `~` and variables in the paths of files replaced."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, list):
            return [plain(one) for one in value]
        return local_path(source.model_copy(update={"path": value})) if isinstance(value, str) else value

    return {word: plain(value) if word in ("data_files", "data_dir") else value for word, value in arguments.items()}


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


def _in_fold(rows: Rows, fold: Fold, path: str) -> Rows:
    """The rows of one fold, or of all others, in their order. Streams are refused before: their rows have no place.

    Dealt out at random: by turns, a table that is itself in turns would lend each fold rows of its own kind.

    Raises:
        DataError: There are fewer rows than folds.
    """
    if len(rows) < fold.of:
        raise DataError(
            f"source {path!r} has {len(rows):,} rows, which do not make {fold.of:,} folds. Write at most that many, or "
            "take more rows."
        )
    place = (fold.keep or fold.leave or 1) - 1
    kept = np.array_split(np.random.RandomState(0).permutation(len(rows)), fold.of)[place]
    return rows.select(np.sort(kept) if fold.keep else np.setdiff1d(np.arange(len(rows)), kept))


def _features_of(rows: Rows, source: Source) -> Features:
    """Columns and their types; a stream that does not know them is asked for its first row."""
    if rows.features:
        return rows.features
    first = next(iter(rows), None)
    if not first:
        raise DataError(f"source {source.path!r} has no rows; look at its files and its split.")
    return Dataset.from_list([first]).features


def load(path: str, **arguments: Any) -> Dataset | IterableDataset:
    """`load_dataset`, with a stream of files as `SharedFiles` where its builder is one of files."""
    rows = load_dataset(path, **arguments)
    return by_byte_range(by_row_group(rows)) if isinstance(rows, IterableDataset) else rows
