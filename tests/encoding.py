"""Rows for fine-tuning as a stage tokenizes them."""

from collections.abc import Sequence
from typing import Any

from hfpipe.data.tokenize import RowTokenizer


def encode_for_training(
    rows: Sequence[dict[str, Any]], tokenizer: Any, *, max_length: int | None, **options: Any
) -> list[dict[str, list[int]]]:
    """Returns `{"input_ids": [L], "labels": [L]}` of each row that has a token to train on; see `RowTokenizer`."""
    return list(RowTokenizer(tokenizer, max_length, **options).encode(rows))
