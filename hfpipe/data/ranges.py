"""`skip` and `take` of a stream, such that no row outside them is read however many lanes share the stream.

`IterableDataset.skip` and `.take` divide their number among the shards once the stream is sharded, and so take rows
from the beginning of every shard: a stage that skips the rows of a suite would then be trained on most of them.
"""

from __future__ import annotations

from datasets import IterableDataset
from datasets.iterable_dataset import SkipExamplesIterable, TakeExamplesIterable

from hfpipe.data.shared_files import stream_of


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
    examples = rows._ex_iterable
    if skip:
        examples = SkipExamplesIterable(examples, skip, split_when_sharding=False)
    if take is not None:
        examples = FirstRows(examples, take)
    return stream_of(rows, examples)
