"""Shares of right answers: `accuracy` among given ones; `exact_match`, `squad_em`, `squad_f1` of generated ones."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from hfpipe.evaluation.metrics import names_of
from hfpipe.evaluation.metrics.rows import Ratio, Share
from hfpipe.evaluation.metrics.words import reads_english, unicode_words


class Accuracy(Share):
    """The share of rows for which the model finds the right one of the suite's answers the most likely.

    Of several classes at once, the share of rows whose classes are all found and no other (subset accuracy).
    """

    needs = "choice"
    several = True

    def hit(self, prediction: str | list[str], reference: str | list[str]) -> bool:
        return names_of(prediction) == names_of(reference)


class AccuracyPerCharacter(Accuracy):
    """The same with the log-likelihood of an answer divided by its characters: `acc_norm` of lm-eval."""

    takes = ("prediction_norm", "reference")
    several = False


class AccuracyPerByte(Accuracy):
    """The same with the log-likelihood of an answer divided by its UTF-8 bytes: `acc_bytes` of lm-eval."""

    takes = ("prediction_bytes", "reference")
    several = False


class ExactMatch(Share):
    """The share of rows whose generated answer is the right one, white space at the ends aside."""

    def hit(self, prediction: str, reference: str) -> bool:
        return prediction.strip() == reference.strip()


class SquadExactMatch(Share):
    """Exact match of SQuAD (Rajpurkar et al. 2016): case, punctuation, articles and white space aside.

    Right answers in other scripts than English: see words.py.
    """

    unicode = False

    @property
    def signature(self) -> str:
        return "tok:unicode" if self.unicode else ""

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        self.unicode = not reads_english(references)
        return super().statistics(predictions, references)

    def hit(self, prediction: str, reference: str) -> bool:
        return normalised(prediction, self.unicode) == normalised(reference, self.unicode)


class SquadF1(Ratio):
    """Mean over the rows of the F1 of the words of answer and reference, both normalised as for `squad_em`."""

    unicode = False

    @property
    def signature(self) -> str:
        return "tok:unicode" if self.unicode else ""

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        self.unicode = not reads_english(references)
        values = [
            words_f1(normalised(said, self.unicode), normalised(right, self.unicode))
            for said, right in zip(predictions, references, strict=True)
        ]
        return np.column_stack([values, np.ones(len(values))])


def normalised(text: str, unicode: bool = False) -> str:
    """The normalisation of SQuAD's official script: lower case, without punctuation (ASCII) and English articles.

    With `unicode`, the words of any script instead.
    """
    if unicode:
        return " ".join(unicode_words(text))
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def words_f1(prediction: str, reference: str) -> float:
    said, right = prediction.split(), reference.split()
    shared = sum((Counter(said) & Counter(right)).values())
    if not said or not right:  # an empty answer is right where nothing is the answer
        return float(said == right)
    return 2 * shared / (len(said) + len(right))
