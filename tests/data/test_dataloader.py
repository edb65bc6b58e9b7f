"""Fine-tuning rows: the same global batches however they are divided, and an exact resume."""

import numpy as np
import pytest

from hfpipe.core.errors import RecipeError
from hfpipe.data.dataloader import ResumableSampler, collate
from hfpipe.data.tokenize import IGNORED

ROWS = [{"input_ids": [n] * (1 + n * 7 % 13), "labels": [n] * (1 + n * 7 % 13)} for n in range(37)]
LENGTHS = [len(row["input_ids"]) for row in ROWS]


def source(per_device: int, accumulation: int, rank: int = 0, ranks: int = 1, total: int = 100) -> ResumableSampler:
    return ResumableSampler(
        ROWS, LENGTHS, total=total, per_device=per_device, accumulation=accumulation, seed=7, rank=rank, ranks=ranks
    )


def global_batches(per_device: int, accumulation: int, ranks: int, total: int = 100) -> list[list[int]]:
    """The trained rows of each step over all ranks, as sorted row numbers."""
    served = [list(source(per_device, accumulation, rank, ranks, total).batches(per_device)) for rank in range(ranks)]
    assert len({len(batches) for batches in served}) == 1, "ranks make different numbers of steps"
    steps = []
    for start in range(0, len(served[0]), accumulation):
        rows = [row for batches in served for batch in batches[start : start + accumulation] for row in batch]
        steps.append(sorted(row["input_ids"][0] for row in rows if row["labels"][0] != IGNORED))
    return steps


@pytest.mark.parametrize(("per_device", "accumulation", "ranks"), [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_division_does_not_change_a_global_batch(per_device: int, accumulation: int, ranks: int) -> None:
    assert global_batches(per_device, accumulation, ranks) == global_batches(4, 2, 1)


def test_every_row_once_in_each_epoch() -> None:
    rows = [row for step in global_batches(4, 2, 1, total=2 * len(ROWS)) for row in step]
    assert len(rows) == 2 * len(ROWS)
    assert np.bincount(rows).tolist() == [2] * len(ROWS)


def test_interrupted_is_uninterrupted_at_every_step() -> None:
    whole = list(source(4, 2).batches(4))
    for step in range(len(whole) // 2):
        first = source(4, 2)
        batches = first.batches(4)
        for _ in range(2 * step):
            next(batches)
        second = source(2, 2, ranks=2)
        second.load_state_dict(first.state_dict())
        third = source(4, 2)
        third.load_state_dict(first.state_dict())
        assert list(third.batches(4)) == whole[2 * step :]
        assert second.state_dict() == first.state_dict()


def test_another_global_batch_is_refused_in_the_middle_of_one() -> None:
    other = source(3, 1)
    with pytest.raises(RecipeError, match="global_batch_size"):
        other.load_state_dict({"progress": 8})


def test_collate_pads_right_and_gives_packed_rows_no_mask() -> None:
    batch = collate(ROWS[:3], pad_token_id=99, multiple=8)
    assert batch["input_ids"].shape[1] % 8 == 0
    for row, ids, mask, labels in zip(ROWS, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=False):
        size = len(row["input_ids"])
        assert ids[:size].tolist() == row["input_ids"]
        assert set(ids[size:].tolist()) <= {99}
        assert set(labels[size:].tolist()) <= {IGNORED}
        assert mask.sum() == size
    packed = [{"input_ids": [1, 2], "labels": [IGNORED, 2], "position_ids": [0, 1]}] * 2
    assert "attention_mask" not in collate(packed, 0)
