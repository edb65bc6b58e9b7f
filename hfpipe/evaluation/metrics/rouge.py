"""`rouge1`, `rouge2`, `rougeL` and `rougeLsum`, by rouge_score, of generated texts against one reference a row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU, _get_tokenizer

from hfpipe.core.errors import RecipeError
from hfpipe.evaluation.metrics.rows import Ratio


class Words:
    """One of sacrebleu's tokenizers in the form that rouge_score takes; words in lower case, as its own has them."""

    def __init__(self, name: str) -> None:
        self.tokenizer = _get_tokenizer(name)()

    def tokenize(self, text: str) -> list[str]:
        return self.tokenizer(text.lower()).split()


class Rouge(Ratio):
    """Mean F-measure over the rows (Lin 2004). rouge_score reads the letters a to z and digits only.

    Options: `use_stemmer` (English), and `tokenize`, one of sacrebleu's tokenizers, for texts with other letters.
    """

    def prepare(self) -> None:
        options: dict[str, Any] = dict(self.options)
        self.tokenize = options.pop("tokenize", None)
        if self.tokenize is not None and self.tokenize not in BLEU.TOKENIZERS:
            raise RecipeError(
                f"metric_options.{self.key}: no tokenizer {self.tokenize!r}; allowed: {', '.join(BLEU.TOKENIZERS)}."
            )
        self.scorer = RougeScorer([self.key], tokenizer=Words(self.tokenize) if self.tokenize else None, **options)

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        foreign = sum(not re.search("[a-z0-9]", text.lower()) for text in references)
        if self.tokenize is None and 2 * foreign > len(references):
            raise RecipeError(
                f"{foreign} of {len(references)} right answers have no letter from a to z, and rouge_score reads no "
                f"other: {self.key} would be 0 whatever the model says. Give the suite a tokenizer for its language: "
                f"`metric_options: {{{self.key}: {{tokenize: zh}}}}` for Chinese, `intl` for most others, or use chrf."
            )
        values = [
            self.scorer.score(reference, prediction)[self.key].fmeasure
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        return np.column_stack([values, np.ones(len(values))])
