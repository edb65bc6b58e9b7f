"""Files that are whole or absent: written beside their place and renamed into it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from hfpipe.core.errors import DamagedFileError, MachineError

GIB = 2**30


def gibibytes(size: float) -> str:
    """Returns bytes as a number of GiB, the same on every line and page: two decimals below 10, one above."""
    number = size / GIB
    return f"{number:.2f}" if number < 9.995 else f"{number:,.1f}"


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one piece; a reader sees the old file or the new one, never half of either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON in one piece."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Writes one JSON value a line, in one piece."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives a folder to write in and renames it to `path` when the block ends without an error."""
    beside = path.with_name(f".{path.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)
    os.replace(beside, path)


def link_or_copy(file: Path, place: Path) -> None:
    """Gives a file a second name, or copies it where the file system has no hard links."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, place)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(file, place)


def hash_of_file(path: Path) -> str:
    """xxh3 of a file: it has to find a cut or rotten file at the speed of the disk, not to withstand an attacker."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def hashes_of(folder: Path, *, without: str = "README.md") -> dict[str, list[Any]]:
    """Size and hash of every file of a folder, by its path there; without one, a card that is written again."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != without)
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, hash_of_file(path)] for path in files}


def fault_in(folder: Path, files: dict[str, list[Any]], editable: Collection[str] = ()) -> str | None:
    """Returns what is wrong with the files of a folder, beginning with the name of one; None where all are as written.

    Args:
        folder: The folder.
        files: See `hashes_of`.
        editable: Names of files that a person may change, and that have to be there.
    """
    for name, facts in files.items():
        if not isinstance(facts, list) or len(facts) != 2:
            return f"{name} is listed without its size and hash"
        size, digest = facts
        path = folder / name
        if path.is_symlink():
            return f"{name} is a link, and was a file"
        if name in editable and path.is_file():
            continue
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or has another size"
        if hash_of_file(path) != digest:
            return f"{name} has other content than was written"
    return None


def require_disk(place: Path, need: int, what: str) -> None:
    """Refuses work whose files would not find room.

    Args:
        place: A folder on the disk.
        need: Bytes.
        what: The work, for the message, with what it writes.

    Raises:
        MachineError: There is less than `need` free.
    """
    free = shutil.disk_usage(place).free
    if need > free:
        raise MachineError(
            f"{what} takes about {need / GIB:.2f} GiB of disk, and {place.parent.absolute()} has {free / GIB:.2f} GiB "
            "free. Nothing was written. Free some space, or move the run folder to a larger disk, and run again."
        )


def load_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        DamagedFileError: It is no JSON in UTF-8.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: it is no JSON ({error}). Put a copy of the file back.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an empty one where there is no such file."""
    return load_json(path) if path.exists() else {}


def read_jsonl(path: Path) -> list[Any]:
    """Reads all of `each_in_jsonl`."""
    return list(each_in_jsonl(path))


def each_in_jsonl(path: Path) -> Iterator[Any]:
    """Reads one JSON value a line, line by line; a last line that a kill cut short is left out.

    A text in a line may hold marks that `splitlines` would take for its end.

    Raises:
        DamagedFileError: Another line is no JSON in UTF-8.
    """
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                if line.strip() and line.endswith(("\n", "}")):
                    yield json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}. Put a copy of the file back.") from error
