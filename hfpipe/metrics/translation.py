"""`bleu`, `chrf` and `ter`, by sacrebleu, of generated texts against one reference a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics import BLEU, CHRF, TER

from hfpipe.errors import MachineError, RecipeError
from hfpipe.metrics.rows import RowMetric

SACREBLEU = {"bleu": BLEU, "chrf": CHRF, "ter": TER}


class SacreBleu(RowMetric):
    """A metric of sacrebleu (Post 2018, arXiv:1804.08771) from its own statistics; options are those of its class."""

    def prepare(self) -> None:
        self.higher_is_better = self.key != "ter"  # type: ignore[misc]
        try:
            self.scorer = SACREBLEU[self.key](**self.options)
        except (KeyError, TypeError, AssertionError, ValueError) as error:
            raise RecipeError(
                f"metric_options.{self.key}: sacrebleu does not take {self.options}: {error}. Its tokenizers are "
                f"{', '.join(BLEU.TOKENIZERS)}."
            ) from error
        except (ImportError, RuntimeError) as error:
            raise MachineError(f"metric {self.key!r}: {error}") from error

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        return np.asarray(self.scorer._extract_corpus_statistics(predictions, [references]), dtype=float)

    def value(self, sums: np.ndarray) -> np.ndarray:
        rows = sums.reshape(-1, sums.shape[-1])
        scores = [self.scorer._compute_score_from_stats(row.tolist()).score for row in rows]
        return np.asarray(scores).reshape(sums.shape[:-1])
