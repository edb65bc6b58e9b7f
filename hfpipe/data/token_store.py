"""Tokens of a source, made once: in an Arrow file that every rank maps, kept by what they were made from.

A file holds lists of int32 by row: `input_ids`, and `trained`, the ends of the runs of tokens that are trained on
(begin, end, begin, ...), or `labels`, or the `label` of a sentence as numbers. What was counted stands beside it as
JSON, written last: without it a file does not count. Memory stays flat: rows come in blocks, and what was mapped is
given back now and then.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset, IterableDataset

from hfpipe.core import display, ranks
from hfpipe.core.files import load_json, write_json
from hfpipe.core.version import __version__
from hfpipe.data.text_tokens import IGNORED, TokenRows, untrimmed

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

Columns = dict[str, pa.Array]
LABEL = "label"  # what a sentence is, in numbers that are no tokens
_NO_TOKENS = ("trained", LABEL)
_BLOCK = 1_000  # rows hashed at a time
_RELEASED_AFTER = 10  # blocks of a source
_RELEASED_EVERY = 32 << 20  # bytes of tokens read
_MAPPED_AT_ONCE = 512 << 10  # bytes that Linux maps around the one that is read, where they are in its cache
_TOLD_EVERY = 10.0  # seconds


def key_of(rows: Dataset | IterableDataset, tokenizer: Any, *words: Any) -> str:
    """Returns a hash of all that the tokens of a source depend on: its rows, the tokenizer and the words of the recipe.

    Args:
        rows: The rows of the source; of a stream, which cannot be read twice, `words` have to name it.
        tokenizer: The tokenizer with its chat template.
        words: Whatever else decides.
    """
    digest = xxhash.xxh3_128()
    if isinstance(rows, Dataset):
        for count, table in enumerate(rows.with_format("arrow").iter(batch_size=_BLOCK)):
            for batch in table.combine_chunks().to_batches():
                digest.update(batch.serialize())
            if count % _RELEASED_AFTER == 0:
                release_mapped()
    if tokenizer.is_fast:
        digest.update(untrimmed(tokenizer).to_str().encode())
    else:
        digest.update(json.dumps([repr(tokenizer), tokenizer.get_vocab()], sort_keys=True).encode())
    more = [__version__, tokenizer.special_tokens_map, tokenizer.chat_template, *words]
    digest.update(json.dumps(more, default=str, sort_keys=True).encode())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Returns where tokens are kept for other runs: beside the data sets of `datasets`."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "hfpipe-tokens"


def made_once(
    rows: Dataset | IterableDataset,
    tokenizer: Any,
    words: Sequence[Any],
    make: Callable[[Path], dict[str, Any]],
    folder: Path,
) -> tuple[TokenStore, dict[str, Any], bool]:
    """Returns the tokens of a source and what was counted of it, made now or before. Every rank has to call this.

    One process of each machine makes them; the others wait, for however long it takes.

    Args:
        rows: See `key_of`.
        tokenizer: See `key_of`.
        words: See `key_of`.
        make: Writes the file, and returns what it counted.
        folder: Where the tokens of a stream are kept, which are this run's own.

    Returns:
        The tokens, the counts, and whether they were there before.
    """
    place = cache_folder() if isinstance(rows, Dataset) else folder

    def work() -> tuple[str, bool] | None:
        if not ranks.state().is_local_main_process:
            return None
        path = place / f"{key_of(rows, tokenizer, *words)}.arrow"
        counts = path.with_suffix(".json")
        if counts.exists() and path.exists():
            counts.touch()
            return path.name, True
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            found = make(beside)
            os.replace(beside, path)
            write_json(counts, found)
        finally:
            beside.unlink(missing_ok=True)
        return path.name, False

    name, before = next(found for found in ranks.each(work) if found is not None)
    path = place / name
    return TokenStore(path), load_json(path.with_suffix(".json")), before


def write_columns(path: Path, blocks: Iterable[Columns]) -> None:
    """Writes blocks of rows into an Arrow file."""
    writer = None
    with pa.OSFile(str(path), "wb") as sink:
        for block in blocks:
            batch = pa.RecordBatch.from_pydict(block)
            if writer is None:
                writer = pa.ipc.new_file(sink, batch.schema)
            writer.write_batch(batch)
        if writer is not None:
            writer.close()


class Tokenized(Protocol):
    """Tokens of many rows, in whatever columns: beside `TokenRows`, those of a kind of stage that has its own."""

    @property
    def untrained(self) -> int: ...
    @property
    def long(self) -> int: ...
    @property
    def refused(self) -> tuple[tuple[int, str], ...]: ...
    @property
    def tokens(self) -> int: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[dict[str, Any]]: ...
    def columns(self) -> Columns: ...


class Tokenizes(Protocol):
    """Makes tokens of rows."""

    def encode(self, rows: list[dict[str, Any]]) -> Tokenized: ...


def columns_of(made: TokenRows) -> Columns:
    """Returns the columns of rows for fine-tuning."""
    flags = np.concatenate([[0], made.trained.astype(np.int8), [0]])
    lengths = np.diff(made.starts)
    steps = np.diff(flags)
    if len(lengths):  # a run ends where its row does
        inner = made.starts[1:-1]
        both = inner[(flags[inner] == 1) & (flags[inner + 1] == 1)]
    else:
        both = np.zeros(0, dtype=np.int64)
    begins = np.sort(np.concatenate([np.flatnonzero(steps == 1), both]))
    ends = np.sort(np.concatenate([np.flatnonzero(steps == -1), both]))
    row = np.searchsorted(made.starts, begins, "right") - 1
    offsets = np.concatenate([[0], np.cumsum(2 * np.bincount(row, minlength=len(lengths)))])
    runs = np.stack([begins - made.starts[row], ends - made.starts[row]], axis=1).ravel()
    return {"input_ids": list_column(made.ids, made.starts), "trained": list_column(runs, offsets)}


def list_column(values: np.ndarray, starts: np.ndarray) -> pa.Array:
    """Returns an Arrow column of lists of int32."""
    return pa.ListArray.from_arrays(
        pa.array(starts.astype(np.int32)), pa.array(np.ascontiguousarray(values, dtype=np.int32))
    )


def told(blocks: Iterator[Columns], title: str, total: int | None) -> Iterator[Columns]:
    """Yields blocks, and says in a line now and then how far they have come."""
    begin = last = time.monotonic()
    rows = tokens = 0
    with display.doing(f"tokenizing {title}"):
        for number, block in enumerate(blocks):
            yield block
            rows += len(block["input_ids"])
            tokens += len(block["input_ids"].values)
            display.count(rows, total)
            now = time.monotonic()
            if now - last > _TOLD_EVERY:
                of = "" if total is None else f" of {total:,}"
                speed = f"{tokens / (now - begin):,.0f} tokens/s"
                ranks.say(f"  {title}: {rows:,}{of} rows tokenized ({speed})", "progress")
                last = now
            if number % _RELEASED_AFTER == 0:
                release_mapped()


class TokenStore:
    """The rows of an Arrow file, mapped into memory.

    Args:
        path: The file.
        rows: How many of the first rows to give; None for all.
    """

    def __init__(self, path: Path, rows: int | None = None) -> None:
        self.path = path
        self._file = pa.memory_map(str(path))
        empty = path.stat().st_size == 0
        reader = None if empty else pa.ipc.open_file(self._file)
        self._mapped = pa.py_buffer(b"") if empty else self._file.read_buffer()
        self._read = 0
        self._blocks: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []
        lengths, sizes, self.tokens = [np.zeros(0, np.int32)], [0], 0
        for number in range(reader.num_record_batches if reader is not None else 0):
            assert reader is not None
            batch = reader.get_batch(number)
            block = {
                name: (column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=True))
                for name, column in zip(batch.schema.names, batch.columns, strict=True)
            }
            self._blocks.append(block)
            sizes.append(len(batch))
            lengths.append(
                np.sum([np.diff(offsets) for name, (offsets, _) in block.items() if name not in _NO_TOKENS], axis=0)
            )
            self._touched(len(block))
        self._begins = np.cumsum(sizes)
        self.lengths = np.concatenate(lengths).astype(np.int32)[:rows]

    def _touched(self, places: int, size: int = 0) -> bool:
        """Counts what was read at some places of the file; returns True if the pages of all were given back now.

        Args:
            places: How many.
            size: Their bytes together, beyond what Linux maps around each.
        """
        self._read += places * _MAPPED_AT_ONCE + size
        if self._read <= _RELEASED_EVERY:
            return False
        self._read = 0
        _release(self._mapped.address, self._mapped.size)
        return True

    def __len__(self) -> int:
        return len(self.lengths)

    def lengths_of(self, column: str) -> np.ndarray:
        """Returns the tokens (N,) of each list of a column."""
        found = [np.zeros(0, np.int32)]
        for block in self._blocks:
            found.append(np.diff(block[column][0]))
            self._touched(1)
        return np.concatenate(found)[: len(self)]

    def lists(self, column: str) -> Iterator[np.ndarray]:
        """Yields the lists of a column, row by row."""
        for block in self._blocks:
            offsets, values = block[column]
            for begin, end in pairwise(offsets.tolist()):
                yield values[begin:end]
            self._touched(1, values.nbytes)

    def first(self, rows: int) -> TokenStore:
        """Returns the first rows alone."""
        return TokenStore(self.path, rows)

    @property
    def trained(self) -> int:
        """Tokens that are trained on, where the columns say it."""
        count, left = 0, len(self)
        for block in self._blocks:
            offsets, runs = block["trained"]
            runs = runs[offsets[0] : offsets[min(left, len(offsets) - 1)]]
            count += int((runs[1::2] - runs[::2]).sum())
            self._touched(2)
            left = max(0, left - len(offsets) + 1)
        return count

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """Returns the arrays of a row; `labels` are made of `trained` where they are not written."""
        block = int(np.searchsorted(self._begins, number, "right")) - 1
        place = number - int(self._begins[block])
        row = {}
        for name, (offsets, values) in self._blocks[block].items():
            row[name] = values[offsets[place] : offsets[place + 1]]
        runs = row.pop("trained", None)
        if runs is not None:
            labels = np.full(len(row["input_ids"]), IGNORED, dtype=np.int32)
            for begin, end in runs.reshape(-1, 2):
                labels[begin:end] = row["input_ids"][begin:end]
            row["labels"] = labels
        if self._touched(len(row), row["input_ids"].nbytes):
            row = {name: np.array(values) for name, values in row.items()}
        return row


class Concatenated:
    """Several stores as one sequence of rows."""

    def __init__(self, parts: Sequence[TokenStore | Concatenated]) -> None:
        self.parts = parts
        self.lengths: np.ndarray = np.concatenate([part.lengths for part in parts])
        self._begins = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return len(self.lengths)

    def lengths_of(self, column: str) -> np.ndarray:
        """Returns the tokens (N,) of each list of a column."""
        return np.concatenate([part.lengths_of(column) for part in self.parts])

    @property
    def trained(self) -> int:
        """Tokens that are trained on."""
        return sum(part.trained for part in self.parts)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        part = int(np.searchsorted(self._begins, number, "right")) - 1
        return self.parts[part][number - int(self._begins[part])]


def release_mapped() -> None:
    """Gives the memory of mapped Arrow files back; a page that is read again comes from the disk's cache.

    Without it a process that reads a file of 100 GB once seems to hold 100 GB. Where the system says nothing of its
    maps, nothing is done.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.endswith(".arrow") and line.split(" ", 2)[1] in ("r--s", "r--p"):  # pyarrow's maps, shared or private
            begin, end = (int(place, 16) for place in line.split(" ", 1)[0].split("-"))
            _release(begin, end - begin)


def _release(begin: int, size: int) -> None:
    """Gives the pages of a map back that begins at an address of this process."""
    if _LIBC is not None:
        _LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), 4)  # MADV_DONTNEED
