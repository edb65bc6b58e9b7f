"""Numbers in words (`path: builtin`, `name: numbers`): a small translation between English, German and Chinese.

It is learned in a minute, and is right or wrong. German says the unit before the ten and Chinese has a word for a gap,
so neither is the English word by word. Held out are numbers: nothing that is asked was trained on.
"""

from __future__ import annotations

import hashlib
import math

import pyarrow as pa

BELOW = 10_000
TEST_SHARE = 0.05
EN_UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
EN_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
DE_UNITS = (
    *("null", "ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf"),
    *("dreizehn", "vierzehn", "fünfzehn", "sechzehn", "siebzehn", "achtzehn", "neunzehn"),
)
DE_TENS = ("", "", "zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig")
ZH_DIGITS, ZH_PLACES = "零一二三四五六七八九", ("千", "百", "十", "")


def english(number: int) -> str:
    """A number below 10,000 in English: `two thousand three hundred and one`."""
    rest = number % 100
    words = [f"{EN_UNITS[number // 1000]} thousand"] if number >= 1000 else []
    if hundreds := number // 100 % 10:
        words.append(f"{EN_UNITS[hundreds]} hundred")
    if rest or not words:
        tens = EN_UNITS[rest] if rest < 20 else "-".join(filter(None, [EN_TENS[rest // 10], _unit(EN_UNITS, rest)]))
        words += ["and", tens] if words else [tens]
    return " ".join(words)


def german(number: int) -> str:
    """A number below 10,000 in German: `zweitausenddreihunderteins`."""
    rest = number % 100
    said = f"{DE_UNITS[number // 1000]}tausend" if number >= 1000 else ""
    if hundreds := number // 100 % 10:
        said += f"{DE_UNITS[hundreds]}hundert"
    if rest == 1:
        return f"{said}eins"
    if rest < 20:
        return said + (DE_UNITS[rest] if rest or not said else "")
    unit = _unit(DE_UNITS, rest)
    return f"{said}{unit}und{DE_TENS[rest // 10]}" if unit else said + DE_TENS[rest // 10]


def _unit(words: tuple[str, ...], number: int) -> str:
    return words[number % 10] if number % 10 else ""


def chinese(number: int) -> str:
    """A number below 10,000 in Chinese, with 二 and never 两: `二千三百零一`."""
    if number == 0:
        return ZH_DIGITS[0]
    said, gap = "", False
    for digit, place in zip(f"{number:04d}", ZH_PLACES, strict=True):
        if digit == "0":
            gap = bool(said)
            continue
        said += (ZH_DIGITS[0] if gap else "") + ZH_DIGITS[int(digit)] + place
        gap = False
    return said[1:] if 10 <= number < 20 else said


def numbers(split: str) -> pa.Table:
    """The numbers below 10,000 of a split, in a fixed order that is not theirs.

    Args:
        split: `train`, or `test` for one in twenty.

    Returns:
        Columns id, number (digits), en, de, zh; `digits`, the names of its digits, for several classes at once; and
        `magnitude`, the decimal logarithm of number + 1, for a regression.
    """
    drawn = {number: hashlib.sha256(str(number).encode()).digest() for number in range(BELOW)}
    held = {number for number, draw in drawn.items() if int.from_bytes(draw[:4]) < TEST_SHARE * 2**32}
    chosen = sorted((number for number in drawn if (number in held) == (split == "test")), key=drawn.__getitem__)
    digits = [[EN_UNITS[digit] for digit in sorted({*map(int, str(number))})] for number in chosen]
    return pa.table(
        {
            "id": [f"number-{number}" for number in chosen],
            "number": [str(number) for number in chosen],
            "en": [english(number) for number in chosen],
            "de": [german(number) for number in chosen],
            "zh": [chinese(number) for number in chosen],
            "digits": pa.array(digits, pa.list_(pa.string())),
            "magnitude": [math.log10(number + 1) for number in chosen],
        }
    )
