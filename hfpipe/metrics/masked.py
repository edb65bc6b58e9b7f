"""How well an encoder fills masked tokens: `masked_accuracy`, and `masked_perplexity` per masked token.

15 % of the tokens of each row are masked, the same ones for every model of one tokenizer, and each is replaced by the
mask token. This is what `run_mlm.py` of transformers reports, with masks that stay as they are; the pseudo-perplexity
of Salazar et al. (2020), which masks one token at a time, costs a forward pass for each token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hfpipe.metrics.likelihood import Perplexity
from hfpipe.metrics.rows import Ratio


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
