"""`bleu`, `chrf` and `ter`, by sacrebleu, of generated texts against one reference a row.

sacrebleu's usual words are separated by spaces, and a Chinese sentence has none: BLEU and TER would count it as one.
Where the recipe does not say otherwise, the references choose the tokenizer; the score's signature has its name.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF, TER

from hfpipe.core.errors import MachineError, RecipeError
from hfpipe.core.upstream import row_statistics, score_of_statistics
from hfpipe.evaluation.metrics.rows import RowMetric
from hfpipe.evaluation.metrics.words import MOST_UNREAD

SACREBLEU = {"bleu": BLEU, "chrf": CHRF, "ter": TER}
KANA = re.compile(r"[\u3040-\u30ff]")
HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
OTHER_WITHOUT_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")  # Thai, Lao, Burmese, Khmer
CHOSEN = {"bleu": ("tokenize", "trg_lang"), "ter": ("normalized", "asian_support")}  # options that references choose


def tokenizer_for(references: Sequence[str]) -> str | None:
    """sacrebleu's tokenizer for texts in a script without spaces; None where the letters are of one that has them."""
    text = "".join(references)
    kana, han, other = (len(pattern.findall(text)) for pattern in (KANA, HAN, OTHER_WITHOUT_SPACES))
    letters = sum(map(str.isalpha, text))
    if 2 * (kana + han + other) <= letters:  # the Chinese tokenizer leaves the words of other scripts whole
        return "zh" if han > MOST_UNREAD * letters and kana <= 0.05 * (kana + han) else None
    if kana > 0.05 * (kana + han):  # Japanese; sacrebleu's own choice for it is an extra
        return "ja-mecab" if importlib.util.find_spec("MeCab") and importlib.util.find_spec("ipadic") else "char"
    return "zh" if han > other else "char"


class SacreBleu(RowMetric):
    """A metric of sacrebleu (Post 2018, arXiv:1804.08771) from its own statistics; options are those of its class."""

    def prepare(self) -> None:
        self.higher_is_better = self.key != "ter"  # type: ignore[misc]
        self.scorer = self._scorer(self.options)

    def _scorer(self, options: dict[str, Any]) -> Any:
        try:
            return SACREBLEU[self.key](**options)
        except (KeyError, TypeError, AssertionError, ValueError) as error:
            raise RecipeError(
                f"metric_options.{self.key}: sacrebleu does not take {options}: {error}. Its tokenizers are "
                f"{', '.join(BLEU.TOKENIZERS)}."
            ) from error
        except (ImportError, RuntimeError) as error:
            raise MachineError(f"metric {self.key!r}: {error}") from error

    @property
    def signature(self) -> str:
        return str(self.scorer.get_signature())

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        if self.key in CHOSEN and not any(option in self.options for option in CHOSEN[self.key]):
            name = tokenizer_for(references)
            if self.key == "ter" and name == "char" and not KANA.search("".join(references)):
                raise RecipeError(
                    "ter: sacrebleu divides Chinese and Japanese into words, and no other script without spaces, so a "
                    "sentence would be one word. Take chrf, or bleu (`metric_options: {bleu: {tokenize: char}}`)."
                )
            by_script = {"tokenize": name} if self.key == "bleu" else {"normalized": True, "asian_support": True}
            self.scorer = self._scorer(self.options | (by_script if name else {}))
        return np.asarray(row_statistics(self.scorer, predictions, references), dtype=float)

    def value(self, sums: np.ndarray) -> np.ndarray:
        rows = sums.reshape(-1, sums.shape[-1])
        scores = [score_of_statistics(self.scorer, row.tolist()) for row in rows]
        return np.asarray(scores).reshape(sums.shape[:-1])
