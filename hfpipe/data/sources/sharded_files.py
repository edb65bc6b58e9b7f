"""Streams of files that lanes share by parts of each file, and that resume within one.

`datasets` deals whole files out and finds its place in one by reading all that stands before it. FineWeb's files are of
two gigabytes: fifteen of them make lanes of two files and of one, and a resume reads a file's worth. Here each lane has
a run of the parts of every file, and a resume seeks.

`IterableDataset.skip` and `.take` divide their number among the shards once the stream is sharded, and so take rows
from the beginning of every shard: a stage that skips the rows of a suite would then be trained on most of them.
`stream_range` reads no row outside of the range, however many lanes share the stream.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Self, TypeAlias

import pyarrow as pa
from datasets import DownloadConfig, IterableDataset
from datasets.iterable_dataset import ArrowExamplesIterable, SkipExamplesIterable, TakeExamplesIterable
from datasets.utils.file_utils import xopen

from hfpipe.core.upstream import examples_of, tables_of, with_examples
from hfpipe.data.sources.decoding import python_of

MANY_FILES = 64  # so many can be dealt out without a look into them
Tables: TypeAlias = Iterator[tuple[Any, int, pa.Table]]


class SharedFiles(ArrowExamplesIterable):
    """The parts of files that are one lane's.

    Args:
        builder: The builder of `datasets` that reads them.
        arguments: Of its `_generate_tables`, for all files.
        files: Every file of the stream.
    """

    def __init__(self, builder: Any, arguments: dict[str, Any], files: list[str]) -> None:
        super().__init__(tables_of(builder), arguments, None, True)
        self.builder, self.files = builder, files
        self.lane, self.lanes = 0, 1
        config = DownloadConfig(token=builder.token, storage_options=builder.storage_options)
        self.opened: Callable[..., Any] = partial(xopen, mode="rb", download_config=config)

    def parts_of(self, file: str) -> int:
        """Counts the parts of a file; looked up once for all lanes."""
        raise NotImplementedError

    def tables(self, state: dict[str, Any]) -> Tables:
        """Tables from a place on, each with the rows that the state counts before it; keeps the state's other facts."""
        raise NotImplementedError

    def share(self, number: int) -> range:
        """The lane's parts of a file; which lane gets the larger run changes by file.

        Every lane goes through the files in their order: `skip` leaves out the first rows of each lane, and has to find
        the first rows of the stream among them.
        """
        parts, part = self.parts_of(self.files[number]), (self.lane + number) % self.lanes
        return range(part * parts // self.lanes, (part + 1) * parts // self.lanes)

    @property
    def num_shards(self) -> int:
        """Parts of all files; where there are many files, the files."""
        return len(self.files) if len(self.files) >= MANY_FILES else sum(map(self.parts_of, self.files))

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> Self:
        shard = copy.copy(self)
        shard.lane, shard.lanes, shard._state_dict = self.lane + self.lanes * index, self.lanes * num_shards, None
        return shard

    def reshard_data_sources(self) -> Self:
        return self.shard_data_sources(1, 0)

    def shuffle_data_sources(self, generator: Any) -> Self:
        return self.reshard_data_sources()

    def _iter_arrow(self) -> Iterator[tuple[Any, pa.Table]]:
        state = self._state_dict or self._fresh()
        for key, before, table in self.tables(state):
            state["shard_example_idx"] = before + len(table)
            yield key, table

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        state = self._state_dict or self._fresh()
        for key, before, table in self.tables(state):
            columns = python_of(table)
            for row, values in enumerate(zip(*columns.values(), strict=True), start=1):
                state["shard_example_idx"] = before + row
                yield key, dict(zip(columns, values, strict=True))

    def _fresh(self) -> dict[str, Any]:
        """A state that nobody asks for."""
        return copy.copy(self)._init_state_dict()


class FirstRows(TakeExamplesIterable):
    """The first n rows of a stream as one shard: only who reads from the beginning knows which they are."""

    @property
    def num_shards(self) -> int:
        return 1

    def reshard_data_sources(self) -> FirstRows:
        return self

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> FirstRows:
        # Anew in each shard, as every other stream does: the state of a stream that two lanes hold would be no one's.
        return FirstRows(self.ex_iterable.shard_data_sources(1, 0), self.n if index == 0 else 0)


def stream_range(rows: IterableDataset, skip: int, take: int | None) -> IterableDataset:
    """The rows [skip, skip + take) of a stream.

    Args:
        rows: The stream.
        skip: Rows to leave out at the beginning. Read in lanes and without `take`, each lane leaves out as many of its
            own: more than was asked for, and the rows in question for certain.
        take: Rows to keep; None for all.
    """
    examples = examples_of(rows)
    if skip:
        examples = SkipExamplesIterable(examples, skip, split_when_sharding=False)
    if take is not None:
        examples = FirstRows(examples, take)
    return with_examples(rows, examples)
