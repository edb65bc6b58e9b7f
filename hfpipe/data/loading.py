"""`load_dataset`, with streams of files as lanes share them."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError

from hfpipe.data.builders import load_dataset
from hfpipe.data.byte_ranges import by_byte_range
from hfpipe.data.row_groups import TABLE_ROWS, by_row_group


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
