"""Likelihood of given text (`bits_per_byte`, `perplexity` per token) and masked tokens of encoders.

For `masked_accuracy` and `masked_perplexity` 15 % of the tokens of each row are masked, the same ones for every model
of one tokenizer, and each is replaced by the mask token. This is what `run_mlm.py` of transformers reports, with masks
that stay as they are; the pseudo-perplexity of Salazar et al. (2020), which masks one token at a time, costs a forward
pass for each token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hfpipe.evaluation.metrics.rows import Interval, Ratio, Share, jackknife


class BitsPerByte(Ratio):
    """Bits of all targets over the UTF-8 bytes that they stand for (Gao et al. 2020, arXiv:2101.00027)."""

    needs = "likelihood"
    takes = ("bits", "bytes")
    types = ("float64", "int64")
    higher_is_better = False

    def statistics(self, predictions: Sequence[float], references: Sequence[int]) -> np.ndarray:
        return np.column_stack([np.asarray(predictions, dtype=float), np.asarray(references, dtype=float)])


MOST_BITS = 332.0  # per token or word: a perplexity of 1e100, above which nothing is told and numbers overflow


class Perplexity(BitsPerByte):
    """The exponential of the mean loss per token over all rows: comparable between models of one tokenizer only."""

    takes = ("bits", "tokens")

    def value(self, sums: np.ndarray) -> np.ndarray:
        return np.exp2(np.minimum(super().value(sums), MOST_BITS))

    def interval(self, value: float, statistics: np.ndarray) -> Interval:
        """Those of the bits, carried over: the error by its slope, the ends as they are, so that none is below one."""
        bits = np.log2(self.value(statistics.sum(0) - statistics))
        stderr, low, high = jackknife(float(np.log2(value)), bits, statistics[:, 1])
        if stderr is None or low is None or high is None:
            return None, None, None
        lower, upper = (float(np.exp2(min(end, MOST_BITS))) for end in (low, high))
        return stderr * value * float(np.log(2)), lower, upper


class WordPerplexity(Perplexity):
    """The same per word, as white space divides them: comparable between models of any tokenizer.

    It is the perplexity of LAMBADA (Paperno et al. 2016), where the target of a row is one word.
    """

    takes = ("bits", "words")


class GreedyMatch(Share):
    """The share of rows whose target the model would say itself, each token the likeliest: LAMBADA's accuracy."""

    needs = "likelihood"
    takes = ("greedy", "tokens")
    types = ("int64", "int64")

    def hit(self, prediction: int, reference: int) -> bool:
        return prediction > 0


class MaskedAccuracy(Ratio):
    """Masked tokens that the model finds the most likely, over all masked tokens."""

    needs = "masked"
    takes = ("hits", "tokens")
    types = ("int64", "int64")

    def statistics(self, predictions: Sequence[int], references: Sequence[int]) -> np.ndarray:
        return np.column_stack([np.asarray(predictions, dtype=float), np.asarray(references, dtype=float)])


class MaskedPerplexity(Perplexity):
    """The exponential of the mean loss per masked token: comparable between models of one tokenizer only."""

    needs = "masked"
