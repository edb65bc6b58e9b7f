"""What a model spends on given text: `bits_per_byte`, whatever its tokenizer; `perplexity`, per token of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hfpipe.metrics.rows import Ratio


class BitsPerByte(Ratio):
    """Bits of all targets over the UTF-8 bytes that they stand for (Gao et al. 2020, arXiv:2101.00027)."""

    needs = "likelihood"
    takes = ("bits", "bytes")
    types = ("float64", "int64")
    higher_is_better = False

    def statistics(self, predictions: Sequence[float], references: Sequence[int]) -> np.ndarray:
        return np.column_stack([np.asarray(predictions, dtype=float), np.asarray(references, dtype=float)])


class Perplexity(BitsPerByte):
    """The exponential of the mean loss per token over all rows: comparable between models of one tokenizer only."""

    takes = ("bits", "tokens")

    def value(self, sums: np.ndarray) -> np.ndarray:
        return np.exp2(super().value(sums))

    def interval(self, value: float, statistics: np.ndarray, draws: np.ndarray) -> tuple[float, float, float]:
        stderr, low, high = super().interval(value, statistics, draws)
        return stderr * value * float(np.log(2)), low, high  # of the exponent, carried over by its slope
