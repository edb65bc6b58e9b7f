"""Words of any script, for metrics whose own tokenizer reads English letters only.

ROUGE's and SQuAD's scripts are written for English. Where more than a tenth of the letters of the right answers are not
theirs, the words are Unicode's: runs of letters, marks and digits, and each character of a script without spaces
(Chinese, Japanese, Thai, Lao, Khmer, Burmese), as in the scripts of MLQA (arXiv:1910.07475).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

MOST_UNREAD = 0.1  # share of letters
WITHOUT_SPACES = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\U00020000-\U0003ffff]"
)


def reads_english(texts: Iterable[str]) -> bool:
    """Tells whether a tokenizer of the letters a to z reads at least nine tenths of the letters of some texts."""
    letters = [letter for text in texts for letter in text.lower() if letter.isalpha()]
    unread = sum(not "a" <= letter <= "z" for letter in letters)
    return unread <= MOST_UNREAD * len(letters)


def unicode_words(text: str) -> list[str]:
    """The words of a text in any script, in lower case and without punctuation."""
    words: list[str] = []
    joins = marks = False  # whether a letter, or a combining mark, goes to the last word
    for letter in unicodedata.normalize("NFC", text.lower()):
        kind = unicodedata.category(letter)[0]
        if kind in "LN" or (kind == "M" and not marks):
            alone = bool(WITHOUT_SPACES.match(letter))
            if joins and not alone:
                words[-1] += letter
            else:
                words.append(letter)
            joins, marks = not alone, True
        elif kind == "M":
            words[-1] += letter
        else:
            joins = marks = False
    return words
