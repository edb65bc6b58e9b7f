"""Streams of Parquet files that lanes share by row group and that resume at one.

`datasets` deals whole files out and finds its place in one by reading all that stands before it. FineWeb's files are of
two gigabytes and a thousand row groups: fifteen files make lanes of two files and of one, and a resume reads a file's
worth. Here each lane has a run of the row groups of every file, and a resume asks for the row groups that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
from datasets import Dataset, DownloadConfig, IterableDataset
from datasets.exceptions import DatasetGenerationError
from datasets.iterable_dataset import ArrowExamplesIterable
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.utils.file_utils import xopen
from pyarrow import parquet

from hfpipe.data.builders import load_dataset
from hfpipe.data.lenient import python_of

MANY_FILES = 64  # so many can be dealt out without a look at their row groups
TABLE_ROWS = 1_000  # read at a time: a row group may be a whole file


class RowGroups(ArrowExamplesIterable):
    """The row groups of Parquet files that are one lane's.

    Args:
        tables: Reads tables of given row groups, `Parquet._generate_tables`.
        opened: Opens a file.
        files: Every file of the stream.
        lane: Whose share.
        lanes: Number of shares.
        sizes: Rows of each row group by file, as far as they were looked up; shared by the lanes.
    """

    def __init__(
        self,
        tables: Callable[..., Iterator[tuple[Any, pa.Table]]],
        opened: Callable[..., Any],
        files: list[str],
        lane: int = 0,
        lanes: int = 1,
        sizes: dict[str, list[int]] | None = None,
    ) -> None:
        super().__init__(tables, {"files": files, "row_groups_list": [None] * len(files)}, None, True)
        self.opened, self.files, self.lane, self.lanes = opened, files, lane, lanes
        self.sizes = {} if sizes is None else sizes

    @property
    def num_shards(self) -> int:
        """Row groups of all files; where there are many files, the files."""
        if len(self.files) >= MANY_FILES:
            return len(self.files)
        return sum(len(self._sizes_of(file)) for file in self.files)

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> RowGroups:
        lane, lanes = self.lane + self.lanes * index, self.lanes * num_shards
        return RowGroups(self.generate_tables_fn, self.opened, self.files, lane, lanes, self.sizes)

    def reshard_data_sources(self) -> RowGroups:
        return self.shard_data_sources(1, 0)

    def shuffle_data_sources(self, generator: Any) -> RowGroups:
        return self.reshard_data_sources()

    def _sizes_of(self, file: str) -> list[int]:
        """Rows of each row group."""
        if file not in self.sizes:
            with self.opened(file) as source:
                footer = parquet.read_metadata(source)
            self.sizes[file] = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        return self.sizes[file]

    def _share(self, number: int) -> tuple[str, range]:
        """A file, and the lane's row groups of it; which lane gets the larger part changes by file.

        Every lane goes through the files in their order: `skip` leaves out the first rows of each lane, and has to find
        the first rows of the stream among them.
        """
        groups, part = len(self._sizes_of(self.files[number])), (self.lane + number) % self.lanes
        return self.files[number], range(part * groups // self.lanes, (part + 1) * groups // self.lanes)

    def _tables(self) -> Iterator[tuple[Any, int, pa.Table]]:
        """Tables from this place on, each with the rows of its file that this lane read before it."""
        state = self._state_dict or {"shard_idx": 0, "shard_example_idx": 0}
        for number in range(state["shard_idx"], len(self.files)):
            file, groups = self._share(number)
            read = 0
            while groups and read + self.sizes[file][groups[0]] <= state["shard_example_idx"]:
                read += self.sizes[file][groups[0]]
                groups = groups[1:]
            if groups:
                for key, table in self.generate_tables_fn(files=[file], row_groups_list=[tuple(groups)]):
                    passed = min(max(state["shard_example_idx"] - read, 0), len(table))
                    if passed < len(table):
                        yield key, read + passed, table.slice(passed)
                    read += len(table)
            state["shard_idx"], state["shard_example_idx"] = number + 1, 0

    def _iter_arrow(self) -> Iterator[tuple[Any, pa.Table]]:
        for key, read, table in self._tables():
            if self._state_dict:
                self._state_dict["shard_example_idx"] = read + len(table)
            yield key, table

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        for key, read, table in self._tables():
            columns = python_of(table)
            for row, values in enumerate(zip(*columns.values(), strict=True), start=1):
                if self._state_dict:
                    self._state_dict["shard_example_idx"] = read + row
                yield key, dict(zip(columns, values, strict=True))


def load(path: str, **arguments: Any) -> Dataset | IterableDataset:
    """`load_dataset`, with a stream of Parquet files as `RowGroups`.

    Files may begin with a row group of no rows, as pandas writes an empty table. For a table `datasets` reads as many
    rows at a time as the first row group holds, and Arrow refuses to read none.
    """
    try:
        rows = load_dataset(path, **arguments)
    except DatasetGenerationError as error:
        if not str(error.__cause__).startswith("BatchSize must be greater than 0"):
            raise
        rows = load_dataset(path, **arguments, batch_size=TABLE_ROWS)
    return by_row_group(rows) if isinstance(rows, IterableDataset) else rows


def by_row_group(rows: IterableDataset) -> IterableDataset:
    """A stream of Parquet files as `RowGroups`; any other as it is."""
    examples = rows._ex_iterable
    builder = getattr(getattr(examples, "generate_tables_fn", None), "__self__", None)
    if type(examples) is not ArrowExamplesIterable or not isinstance(builder, Parquet):
        return rows
    if builder.config.filters is not None or builder.config.on_bad_files != "error":
        return rows  # what a row group gives is not what its footer says
    builder.config.batch_size = builder.config.batch_size or TABLE_ROWS
    config = DownloadConfig(token=builder.token, storage_options=builder.storage_options)
    opened = partial(xopen, mode="rb", download_config=config)
    return IterableDataset(
        ex_iterable=RowGroups(examples.generate_tables_fn, opened, list(examples.kwargs["files"])),
        info=rows.info.copy(),
        split=rows.split,
        formatting=rows._formatting,
        token_per_repo_id=rows._token_per_repo_id,
    )
