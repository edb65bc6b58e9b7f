"""Shares of right answers: `accuracy` among given ones; `exact_match`, `squad_em`, `squad_f1` of generated ones."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from hfpipe.evaluation.metrics.rows import Ratio, Share, wilson
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


class SquadExactMatch(Ratio):
    """Exact match of SQuAD (Rajpurkar et al. 2016): case, punctuation, articles and white space aside.

    Right answers in other scripts than English: see words.py.
    """

    unicode = False

    @property
    def signature(self) -> str:
        return "tok:unicode" if self.unicode else ""

    def row_score(self, prediction: str, reference: str) -> float:
        """The score of one row, both texts normalised."""
        return float(prediction == reference)

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        self.unicode = not reads_english(references)
        plain = _in_any_script if self.unicode else normalised
        values = [self.row_score(plain(p), plain(r)) for p, r in zip(predictions, references, strict=True)]
        return np.column_stack([values, np.ones(len(values))])

    def interval(self, value: float, statistics: np.ndarray, draws: np.ndarray) -> tuple[float, float, float]:
        return super().interval(value, statistics, draws)[0], *wilson(value, len(statistics))


class SquadF1(SquadExactMatch):
    """Mean over the rows of the F1 of the words of answer and reference, both normalised as SQuAD does."""

    def row_score(self, prediction: str, reference: str) -> float:
        return words_f1(prediction, reference)

    def interval(self, value: float, statistics: np.ndarray, draws: np.ndarray) -> tuple[float, float, float]:
        return Ratio.interval(self, value, statistics, draws)


def names_of(answer: str | list[str]) -> set[str]:
    """The classes of an answer that names one, or several."""
    return {answer} if isinstance(answer, str) else set(answer)


def normalised(text: str) -> str:
    """The normalisation of SQuAD's official script: lower case, without punctuation (ASCII) and English articles."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _in_any_script(text: str) -> str:
    return " ".join(unicode_words(text))


def words_f1(prediction: str, reference: str) -> float:
    said, right = prediction.split(), reference.split()
    shared = sum((Counter(said) & Counter(right)).values())
    if not said or not right:  # an empty answer is right where nothing is the answer
        return float(said == right)
    return 2 * shared / (len(said) + len(right))
