"""Rows of a source from its beginning to its end, many at a time: what fine-tuning, suites and cleaning read.

As the reader of a lane does, they get past bytes that are not UTF-8 and wait for a network that went away.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset

from hfpipe.core.errors import Unreachable
from hfpipe.data.sources.decoding import can_be_arrow, python_of, table_blocks
from hfpipe.data.sources.errors import friendly, readable
from hfpipe.data.sources.retry import Retry
from hfpipe.recipe import Source

Block = dict[str, list[Any]]
ROWS = 1_000


def blocks_of(rows: Dataset | IterableDataset, source: Source, size: int = ROWS) -> Iterator[Block]:
    """The columns of a table or of a stream, `size` rows at a time.

    Args:
        rows: What `load_rows` gave.
        source: What it was opened from, for messages.
        size: Rows of a block.

    Raises:
        DataError: The data cannot be read.
        MachineError: The network was away for too long.
    """
    if isinstance(rows, Dataset):
        yield from readable(table_blocks(rows, size), source)
        return
    retry, state, read = Retry(source), None, 0
    while True:
        try:
            with friendly(source):
                stream = rows.shard(num_shards=1, index=0)  # a place of its own
            if can_be_arrow(stream):
                stream = stream.with_format("arrow")
            if state is not None:
                stream.load_state_dict(state)
            for block in readable(stream.iter(batch_size=size), source):
                retry.over(f"row {read:,}")
                columns = python_of(block) if isinstance(block, pa.Table) else block
                state, read = stream.state_dict(), read + len(next(iter(columns.values()), []))
                yield columns
            return
        except Unreachable as error:
            retry.wait(error, f"row {read:,}")


def rows_of(rows: Dataset | IterableDataset, source: Source, size: int = ROWS) -> Iterator[dict[str, Any]]:
    """The rows of a table or of a stream one after the other; see `blocks_of`."""
    for block in blocks_of(rows, source, size):
        for values in zip(*block.values(), strict=True):
            yield dict(zip(block, values, strict=True))
