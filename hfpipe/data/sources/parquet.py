"""Streams of Parquet files that lanes share by row group and that resume at one."""

from __future__ import annotations

from typing import Any

from datasets import IterableDataset
from datasets.packaged_modules.parquet.parquet import Parquet
from pyarrow import parquet

from hfpipe.core.upstream import examples_of, file_builder_of, with_examples
from hfpipe.data.sources.builders import TABLE_ROWS
from hfpipe.data.sources.sharded_files import SharedFiles, Tables


class RowGroups(SharedFiles):
    """The row groups of Parquet files that are one lane's.

    Args:
        builder: The builder that reads them.
        files: Every file of the stream.
    """

    def __init__(self, builder: Parquet, files: list[str]) -> None:
        super().__init__(builder, {"files": files, "row_groups_list": [None] * len(files)}, files)
        self.sizes: dict[str, list[int]] = {}  # rows of each row group by file; shared by the lanes

    def parts_of(self, file: str) -> int:
        if file not in self.sizes:
            with self.opened(file) as source:
                footer = parquet.read_metadata(source)
            self.sizes[file] = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        return len(self.sizes[file])

    def tables(self, state: dict[str, Any]) -> Tables:
        """The rows that count are those of the file that this lane has read."""
        for number in range(state["shard_idx"], len(self.files)):
            file, groups = self.files[number], self.share(number)
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


def by_row_group(rows: IterableDataset) -> IterableDataset:
    """A stream of Parquet files as `RowGroups`; any other as it is."""
    examples = examples_of(rows)
    builder = file_builder_of(examples)
    if not isinstance(builder, Parquet):
        return rows
    if builder.config.filters is not None or builder.config.on_bad_files != "error":
        return rows  # what a row group gives is not what its footer says
    builder.config.batch_size = builder.config.batch_size or TABLE_ROWS
    return with_examples(rows, RowGroups(builder, list(examples.kwargs["files"])))
