"""`rouge1`, `rouge2`, `rougeL` and `rougeLsum`, by rouge_score, of generated texts against one reference a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from hfpipe.core.errors import RecipeError
from hfpipe.evaluation.metrics.rows import Ratio
from hfpipe.evaluation.metrics.words import reads_english, unicode_words

UNICODE = "unicode"  # see words.py
NAMES = (UNICODE, *BLEU.TOKENIZERS)


class WordTokenizer:
    """A tokenizer in the form that rouge_score takes: Unicode's words, or one of sacrebleu's in lower case."""

    def __init__(self, name: str) -> None:
        self.split = None if name == UNICODE else BLEU(tokenize=name).tokenizer

    def tokenize(self, text: str) -> list[str]:
        return unicode_words(text) if self.split is None else self.split(text.lower()).split()


class Rouge(Ratio):
    """Mean F-measure over the rows (Lin 2004).

    rouge_score's own tokenizer reads the letters a to z and digits only. It is used where it reads nine tenths of the
    letters of the right answers, and else Unicode's words; the signature says so.

    Options: `use_stemmer` (English), and `tokenize`: `unicode`, or one of sacrebleu's tokenizers.
    """

    def prepare(self) -> None:
        self.tokenize = self.options.get("tokenize")
        self.stems = bool(self.options.get("use_stemmer"))
        if self.tokenize is not None and self.tokenize not in NAMES:
            raise RecipeError(
                f"metric_options.{self.key}: no tokenizer {self.tokenize!r}; allowed: {', '.join(NAMES)}."
            )
        if self.tokenize is not None and self.stems:
            raise RecipeError(
                f"metric_options.{self.key}: use_stemmer is of rouge_score's own tokenizer, which `tokenize` replaces. "
                "Keep one of them."
            )

    @property
    def signature(self) -> str:
        return f"tok:{self.tokenize}" if self.tokenize else ""

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        if self.tokenize is None and not reads_english(references):
            if self.stems:
                raise RecipeError(
                    f"{self.key}: use_stemmer is for English, and more than a tenth of the letters of the right "
                    "answers are not its letters. Leave it out: words of any script are read then."
                )
            self.tokenize = UNICODE
        words = WordTokenizer(self.tokenize) if self.tokenize else None
        scorer = RougeScorer([self.key], use_stemmer=self.stems, tokenizer=words)
        values = [
            scorer.score(reference, prediction)[self.key].fmeasure
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        return np.column_stack([values, np.ones(len(values))])
