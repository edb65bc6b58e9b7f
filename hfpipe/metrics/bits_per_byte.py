"""Bits per byte: what a model spends on a byte of text, whatever its tokenizer (Gao et al. 2020, arXiv:2101.00027)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np


class BitsPerByte(evaluate.Metric):
    """Bits of all targets over the UTF-8 bytes that they stand for; rows are weighted by their length."""

    needs = "likelihood"
    higher_is_better = False

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[int]) -> dict[str, Any]:
        """Takes the bits of each row as predictions and its bytes as references."""
        bits, size = np.asarray(predictions, dtype=float), np.asarray(references, dtype=float)
        value = bits.sum() / size.sum()
        # Standard error of a ratio of sums, by the delta method.
        stderr = math.sqrt(np.square(bits - value * size).sum()) / size.sum()
        return {"bits_per_byte": float(value), "stderr": float(stderr)}
