"""Files of this machine that a source's path names: their kinds, and how they are encoded and divided.

`path:` may be a file, a pattern or a folder. Files of one kind, encoding and delimiter are read together, by the
builder of that kind; those of a folder are given by split where their names say so (`train.jsonl`, `test/...`).
"""

from __future__ import annotations

import codecs
import csv
import difflib
import glob
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern

from hfpipe.core.errors import RecipeError
from hfpipe.recipe import Source
from hfpipe.recipe.faults import listed
from hfpipe.recipe.source_config import FILE_KINDS, expanded, file_kind, is_local_name, is_pattern

SAMPLE = 1 << 18  # bytes of a file that are looked at
FARTHEST = 1 << 24  # bytes in which a first letter beyond ASCII is looked for
NOT_DATA = {"readme.md", "license.txt", "license.md", "licence.txt", "dataset_infos.json", "state.json"}
DELIMITERS = (",", ";", "\t", "|")
BAD_BYTES = 2  # so few are damage, and say nothing of another encoding
FEW = 0.1  # share of letters that cannot be decoded, up to which a file is UTF-8 with some bad bytes


@dataclass(frozen=True)
class FileGroup:
    """Files that are read together.

    Args:
        kind: The builder of `datasets` that reads them.
        files: Their paths by split.
        options: The options of the builder that were found out.
    """

    kind: str
    files: dict[str, list[str]]
    options: dict[str, Any]

    def __str__(self) -> str:
        count = sum(map(len, self.files.values()))
        words = [f"{name} {value!r}" for name, value in self.options.items() if name != "sample_by"]
        told = f" ({', '.join(words)})" if words else ""
        by = ", a row each document" if self.options.get("sample_by") == "document" else ""
        return f"{count:,} {self.kind} file{'s' if count > 1 else ''}{told}{by}"


def local_path(source: Source) -> str:
    """The path of a source with `~` and variables replaced.

    Raises:
        RecipeError: A variable is not set, or the path is the root of the disk, of which every file would be looked at,
            without an end below /proc.
    """
    try:
        path = expanded(source.path)
    except KeyError as error:
        raise RecipeError(
            f"source {source.path!r}: the variable {error.args[0]} is not set in the environment. Set it, or write the "
            "path in full."
        ) from error
    if os.path.dirname(real := os.path.realpath(path)) == real:
        raise RecipeError(f"source {source.path!r} is the whole disk. Name the folder of the data, or its files.")
    return path


def file_groups(source: Source) -> list[FileGroup]:
    """The files that a source's path names; none where it is to be read by `load_dataset` as it stands.

    Raises:
        RecipeError: The path means this machine and names nothing here, or a file of an unknown kind.
    """
    path = local_path(source)
    if os.path.isdir(path):
        splits = _of_folder(path)
    elif os.path.isfile(path) or is_pattern(path):
        names = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
        splits = {"train": [name for name in names if os.path.isfile(name)]}
        unknown = [name for name in splits["train"] if file_kind(name) is None]
        if unknown:
            raise RecipeError(
                f"source {source.path!r}: {unknown[0]} ends in none of {listed(FILE_KINDS)}. Name its kind: "
                f"`path: json` (or csv, text, parquet) with `data_files: {source.path}`."
            )
    elif is_local_name(source.path):
        splits = {}
    else:
        return []
    if not any(splits.values()) and not os.path.isdir(path):
        raise RecipeError(
            f"source {source.path!r}: there is no such file or folder here{near_names(path)}. Paths are taken from the "
            f"current folder, {Path.cwd()}."
        )
    return _grouped(splits, source)


def near_names(path: str) -> str:
    """Names the files and folders with a name like that of a path; an empty text where there are none."""
    folder, name = os.path.split(path.rstrip("/"))
    if not os.path.isdir(folder or ".") or is_pattern(path):
        return ""
    near = difflib.get_close_matches(name, sorted(os.listdir(folder or ".")), n=3, cutoff=0.7)
    return (
        f"; near it {'is' if len(near) == 1 else 'are'} {listed(os.path.join(folder, one) for one in near)}"
        if near
        else ""
    )


def _of_folder(folder: str) -> dict[str, list[str]]:
    """The data files of a folder by split; none where its card or `datasets` says how it is read."""
    card = Path(folder, "README.md")
    if card.is_file() and re.search(r"^configs:", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE):
        return {}
    found: list[str] = []
    walked: set[str] = set()  # a link may lead to a folder above it
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in walked:
            folders.clear()
            continue
        walked.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        found += [os.path.join(place, name) for name in sorted(names) if not name.startswith((".", "__"))]
    data = [name for name in found if file_kind(name) and os.path.basename(name).lower() not in NOT_DATA]
    if not data:
        return {}
    folder = os.path.abspath(folder)
    try:
        patterns = {str(split): some for split, some in get_data_patterns(folder).items()}
    except (EmptyDatasetError, FileNotFoundError):
        patterns = {}
    splits = {split: {file for one in some for file in _matching(one, folder)} for split, some in patterns.items()}
    if {*splits} <= {"train"}:
        return {"train": data}
    return {split: [name for name in data if os.path.realpath(name) in files] for split, files in splits.items()}


def _matching(pattern: str, folder: str) -> list[str]:
    try:
        return [os.path.realpath(file) for file in resolve_pattern(pattern, folder)]
    except FileNotFoundError:
        return []


def _grouped(splits: dict[str, list[str]], source: Source) -> list[FileGroup]:
    """Files by kind, encoding and delimiter, in the order of the first of each."""
    given = source.passed_through
    groups: dict[tuple[Any, ...], FileGroup] = {}
    for split, files in splits.items():
        for file in files:
            kind = file_kind(file)
            assert kind is not None  # others are left out
            options = _options(file, kind, given)
            group = groups.setdefault((kind, *sorted(options.items())), FileGroup(kind, {}, options))
            group.files.setdefault(split, []).append(_as_pattern(file))
    return list(groups.values())


def _as_pattern(name: str) -> str:
    """A name in which no sign stands for others."""
    return os.path.abspath(glob.escape(name))


def _options(file: str, kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options under which a file is read, but for those that the recipe gives."""
    options: dict[str, Any] = {}
    if kind == "text" and "sample_by" not in given:
        options["sample_by"] = "document"
    if kind not in ("json", "csv", "text"):
        return options
    with fsspec.open(file, "rb", compression="infer" if not file.endswith(".zst") else "zstd") as opened:
        sample = _sample(opened)
    encoding = given.get("encoding") or encoding_of(sample)
    if "encoding" not in given and encoding != "utf-8":
        options["encoding"] = encoding
    if kind == "csv" and not given.keys() & {"sep", "delimiter"}:
        text = codecs.decode(sample, encoding, "replace").removeprefix("\ufeff")
        delimiter = delimiter_of(text, "\t" if ".tsv" in file.lower() else ",")
        if delimiter != ",":
            options["sep"] = delimiter
    return options


def _sample(opened: Any) -> bytes:
    """The beginning of a file, and where it is ASCII alone, the beginning of what is not."""
    sample: bytes = opened.read(SAMPLE)
    if not sample.isascii():
        return sample
    read = len(sample)
    while read < FARTHEST and (more := opened.read(SAMPLE)):
        if not more.isascii():
            return sample + more
        read += len(more)
    return sample


def encoding_of(sample: bytes) -> str:
    """The encoding of the beginning of a file; UTF-8 where a few of its bytes are none.

    UTF-16 is told by its mark or its zeros. Bytes that are no UTF-8 are taken for Chinese where they come in runs and
    decode to its characters, for what charset-normalizer says where they come in runs, and else for Western Europe's.
    """
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if sample.startswith(codecs.BOM_UTF8) or sample.isascii():
        zeros = [sample[start::2].count(0) / max(len(sample) // 2, 1) for start in (0, 1)]
        return ("utf-16-be", "utf-16-le")[zeros[1] > zeros[0]] if max(zeros) > 0.4 else "utf-8"
    decoded = codecs.getincrementaldecoder("utf-8")("replace").decode(sample)
    bad = decoded.count("\ufffd")
    letters = sum(not letter.isascii() for letter in decoded) - bad
    if bad <= max(FEW * letters, BAD_BYTES):
        return "utf-8"
    high = re.findall(rb"[\x80-\xff]+", sample)
    in_runs = sum(len(run) for run in high if len(run) > 1) / sum(map(len, high))
    if in_runs > 0.9:
        return _of_runs(sample)
    return _tried(sample, ("cp1252",)) or "latin-1"


def _of_runs(sample: bytes) -> str:
    chinese = codecs.getincrementaldecoder("gb18030")("replace").decode(sample)
    beyond = [letter for letter in chinese if not letter.isascii()]
    if sum("\u3000" <= letter <= "\u9fff" or "\uff00" <= letter <= "\uffef" for letter in beyond) > 0.95 * len(beyond):
        return "gb18030"
    from charset_normalizer import from_bytes

    best = from_bytes(sample).best()
    return best.encoding if best is not None else "cp1252"


def _tried(sample: bytes, encodings: Iterable[str]) -> str | None:
    for encoding in encodings:
        try:
            sample.decode(encoding)
            return encoding
        except UnicodeDecodeError:
            continue
    return None


def delimiter_of(text: str, usual: str) -> str:
    """The sign that divides a CSV file's cells: the one that gives every row as many, and more than one."""
    lines = text.splitlines()[: 100 if len(text) >= SAMPLE else None]
    lines = lines[:-1] if len(text) >= SAMPLE and len(lines) > 1 else lines
    found = []
    for sign in (usual, *DELIMITERS):
        try:
            widths = Counter(len(row) for row in csv.reader(lines, delimiter=sign) if row)
        except csv.Error:
            continue
        if widths and (width := max(widths, key=lambda one: widths[one])) > 1:
            found.append((widths[width] / sum(widths.values()), sign))
    best = max((share for share, _ in found), default=0)
    return next((sign for share, sign in found if share == best), usual)
