"""Errors of opening or reading a source, each as one paragraph with the remedy.

Which exceptions these are was found by making each mistake with datasets 5.2; several are bare ValueErrors, told apart
by their text.
"""

from __future__ import annotations

import errno
import glob
import gzip
import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import TypeVar

from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError
from datasets.table import CastError
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from pyarrow.lib import ArrowException

from hfpipe.core.errors import DataError, MachineError, RecipeError, Unreachable, UserError
from hfpipe.core.http import last_trouble
from hfpipe.core.hub_errors import CACHED, not_readable, trouble
from hfpipe.core.upstream import builder_names
from hfpipe.recipe import Source
from hfpipe.recipe.faults import did_you_mean, listed

Row = TypeVar("Row")
UNREADABLE = (ArrowException, CastError, UnicodeError, gzip.BadGzipFile, zlib.error, EOFError)


@contextmanager
def friendly(source: Source, *, opening: bool = False) -> Iterator[None]:
    """Turns what `datasets` raises, here or while a stream is read, into a `UserError`; what it does not know passes.

    Args:
        source: What is read.
        opening: Whether all that happens here is `load_dataset`, so that any refusal is about its arguments.

    Raises:
        RecipeError: A file, split, configuration or argument does not exist.
        MachineError: The Hub, the network, the disk or the account refuses.
        DataError: The data cannot be read.
    """
    failed = _FailedFiles()
    logger = logging.getLogger("datasets")
    logger.addHandler(failed)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        explained = _explain(error, source, failed.files)
        if explained is None and opening:
            explained = RecipeError(f"{_name(source)} cannot be opened: {_first_line(error)}")
        if explained is None:
            raise
        raise explained from error
    finally:
        logger.removeHandler(failed)


class _FailedFiles(logging.Handler):
    """Keeps the names of the files that `datasets` could not read: it logs them, and its exceptions do not tell."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.files: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        named = re.search(r"Failed to .*?'([^']+)'", record.getMessage())
        if named and named[1] not in self.files:
            self.files.append(named[1])


def _explain(error: BaseException, source: Source, files: list[str]) -> UserError | None:
    if isinstance(error, DatasetGenerationError):
        cause = error.__cause__ or error.__context__
        known = _explain(cause, source, files) if cause is not None else None
        return known or _unreadable(cause or error, source, files)
    if isinstance(
        error, DatasetNotFoundError | RepositoryNotFoundError | HfHubHTTPError | ConnectionError | TimeoutError
    ):
        return _from_hub(error, source)
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "aiohttp"):
        return _from_http(error, source)
    if isinstance(error, UNREADABLE) or type(error).__module__.startswith("pandas.errors"):
        return _unreadable(error, source, files)
    if isinstance(error, FileNotFoundError) and "LocalEntryNotFoundError" in str(error):
        return _from_hub(error, source)  # `datasets` wraps a Hub that does not answer into a missing file
    if isinstance(error, FileNotFoundError | StopIteration | HFValidationError):
        return _missing_files(error, source)
    if isinstance(error, OSError) and error.errno is None:  # Arrow's, for a damaged file
        return _unreadable(error, source, files)
    if isinstance(error, OSError):
        full = " The disk is full: HF_HOME may name another." if error.errno == errno.ENOSPC else ""
        return MachineError(f"{_name(source)} cannot be read on this machine: {_first_line(error)}{full}")
    if isinstance(error, ValueError):
        return _from_text(str(error), source) or (_unreadable(error, source, files) if _of_a_file(error) else None)
    return _unreachable(error, source) if trouble(error) else None  # of the storage of the Hub


def _of_a_file(error: BaseException) -> bool:
    """Returns True if it was raised while a builder of `datasets` read a file."""
    places = (frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__))
    return any(Path(place).match("datasets/packaged_modules/*/*.py") for place in places)


def _from_hub(error: BaseException, source: Source) -> UserError:
    if source.path.startswith(("./", "../", "/", "~")):
        return _missing_files(error, source)  # the Hub is asked for what is no folder
    return _unreachable(error, source)


def _from_http(error: BaseException, source: Source) -> UserError:
    """The error of a server that is not the Hub, or of none at all."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if status is not None and status < 500 and status not in (408, 429):
        return MachineError(f"{_name(source)}: the server refuses it ({_first_line(error).rstrip('.')}).")
    return _unreachable(error, source)


def _unreachable(error: BaseException, source: Source) -> UserError:
    """Says why the Hub, or another server, does not give the data; see `not_readable`."""
    if str(error) == "Server Disconnected" and error.__cause__ is not None:
        error = error.__cause__  # `datasets` hides what it was
    found, hint = not_readable(error, _name(source), MachineError), _builder_meant(source)
    if found is not None and not isinstance(found, Unreachable):
        return type(found)(f"{found}{hint}")
    if found is None and (known := last_trouble()):
        found = Unreachable(f"{_name(source)}: {known} {CACHED}", known.rstrip("."))
    if found is None:
        why = _first_line(error).rstrip(".")
        text = f"the Hub cannot be reached ({why}). Check the network and HF_ENDPOINT; what is in the cache needs none."
        found = Unreachable(f"{_name(source)}: {text}", why)
    return Unreachable(f"{found}{hint}", found.why)


def _missing_files(error: BaseException, source: Source) -> UserError:
    patterns = _patterns(source)
    local = [pattern for pattern in patterns if "://" not in pattern]
    missing = [pattern for pattern in local if not glob.glob(pattern, recursive=True)]
    if missing:
        return RecipeError(f"{_name(source)}: no file matches {listed(missing)}. {_base(source)}")
    if isinstance(error, StopIteration):
        return DataError(f"{_name(source)}: there are no rows in {listed(patterns) or 'it'}.")
    if isinstance(error, DataFilesNotFoundError) and not Path(source.path).exists():
        return RecipeError(f"{_name(source)} is a data set of the Hub without files that `datasets` can read.")
    if page := re.match(r"https?://[^/]+/datasets/([^/]+/[^/?#]+)", source.path):
        return RecipeError(f"{_name(source)} is the address of a page; write the data set's name, {page[1]!r}.")
    if isinstance(error, HFValidationError) or not patterns:
        place = Path(source.path)
        what = "is a folder without data files" if place.is_dir() else "is no folder here and no data set of the Hub"
        return RecipeError(f"{_name(source)} {what}. Paths are taken from the current folder, {Path.cwd()}.")
    return RecipeError(f"{_name(source)}: {_first_line(error)}")


def _base(source: Source) -> str:
    """The folder or address at which the paths of `data_files` begin."""
    if source.path in builder_names() or Path(source.path).is_dir():
        return f"Paths are taken from the current folder, {Path.cwd()}."
    return "Paths are those of the files in that data set."


def _unreadable(error: BaseException, source: Source, files: list[str]) -> DataError:
    place = listed(files or _patterns(source))
    where = f" in {place}" if place else ""
    if isinstance(error, CastError):
        return DataError(
            f"{_name(source)}: the rows{where} do not have the same columns and types throughout: {_flat(error)} "
            "Make the files alike, or give `features`."
        )
    remedy = "Correct the file or leave it out."
    if isinstance(error, UnicodeError):
        remedy = "Give its `encoding` (latin-1, cp1252...), or save it as UTF-8."
    if str(error).startswith("No columns to parse") and (empty := _empty_files(source)):
        remedy = f"{listed(empty)} has not even a header: leave it out."
    return DataError(f"{_name(source)}: the data{where} cannot be read: {_first_line(error)} {remedy}")


def _from_text(text: str, source: Source) -> UserError | None:
    """`datasets` raises plain ValueErrors for these."""
    found = re.search(r"\[([^\]]*)\]\s*\.?$", text.split("\nExample")[0])
    allowed = re.findall(r"['\"]([^'\"]+)['\"]", found[1]) if found else []
    if split := re.match(r"(?:Unknown split|Bad split:?) \"?([^\"]+?)\"?\. ", text):
        if "[" in split[1]:
            text = (
                f"a stream has no slice such as {split[1]!r}; name the split ({listed(allowed)}) and `skip` or `take`."
            )
            return RecipeError(f"{_name(source)}: {text}")
        hint = did_you_mean(split[1], allowed)
        files = source.passed_through.get("data_files")
        one = " Files have the one split `train`: leave `split` out." if isinstance(files, str | list) else ""
        return RecipeError(f"{_name(source)} has no split {split[1]!r}; allowed: {listed(allowed)}.{hint}{one}")
    if text.startswith("Couldn't find cache for"):  # the Hub said no, and `datasets` then tells only of its cache
        files = listed(_patterns(source))
        return RecipeError(
            f"{_name(source)}: neither the Hub nor the cache has it with these arguments"
            + (f"; is there a file {files}? {_base(source)}" if files else ". Check `name` and the network.")
        )
    if text.endswith("corresponds to no data!") or text.endswith("at least one example when writing data"):
        return DataError(f"{_name(source)}: there are no rows in {listed(_patterns(source)) or 'it'}.")
    if text.startswith("Unrecognized instruction format"):
        return RecipeError(
            f"{_name(source)}: {_flat(text)} A slice of a split is written `train[:1000]` or `train[5%:]`."
        )
    if text.startswith("Config name is missing"):
        return RecipeError(f"{_name(source)} has several tables. Give one of them as `name:` {listed(allowed)}.")
    if config := re.match(r"BuilderConfig '([^']+)' not found", text):
        hint = did_you_mean(config[1], allowed)
        return RecipeError(f"{_name(source)} has no table `name: {config[1]}`; allowed: {listed(allowed)}.{hint}")
    return None


def _name(source: Source) -> str:
    return f"source {source.path!r}"


def _builder_meant(source: Source) -> str:
    """A builder of files with a name like that of the data set, where files are named."""
    return did_you_mean(source.path, builder_names()) if _patterns(source) else ""


def _patterns(source: Source) -> list[str]:
    """The files that the recipe names, as it names them."""
    files = source.passed_through.get("data_files")
    groups = list(files.values()) if isinstance(files, dict) else [files]
    names = [name for group in groups for name in (group if isinstance(group, list | tuple) else [group])]
    folder = source.passed_through.get("data_dir") or (source.path if Path(source.path).is_dir() else "")
    return [os.path.join(folder, name) for name in names if isinstance(name, str)]


def _empty_files(source: Source) -> list[str]:
    """The files here that hold nothing, where one of that kind has to hold something."""
    found = [name for pattern in _patterns(source) for name in glob.glob(pattern, recursive=True)]
    if Path(source.path).is_dir() and not found:
        found = glob.glob(os.path.join(source.path, "**"), recursive=True)
    return [name for name in found if name.endswith(".csv") and not os.path.getsize(name)]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return _flat(lines[0] if lines else type(error).__name__)


def _flat(text: object) -> str:
    line = " ".join(str(text).split())[:400]
    return line if line.endswith((".", "!", "?")) else f"{line}."


def readable(rows: Iterable[Row], source: Source) -> Iterator[Row]:
    """The rows of a source one after the other, with clear errors while they are read; see `friendly`."""
    with friendly(source):
        yield from rows
