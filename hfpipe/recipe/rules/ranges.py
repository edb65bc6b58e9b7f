"""Ranges of numbers that are passed through: the libraries' classes ask for a number, and seldom say which ones work.

A number is not negative, and a float32 or a count of 64 bits holds it; the table has what is narrower. A class's own
default may stand, whatever it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from hfpipe.recipe.faults import Fault
from hfpipe.recipe.passthrough import stage_fields
from hfpipe.recipe.raw import Block, RawStage
from hfpipe.recipe.signatures import Field, Fields, lora_fields, peft_fields

MOST, MOST_WHOLE = 3.4e38, 2**63 - 1  # of a float32, and of a count


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes.

    Args:
        low: The least.
        high: The most.
        above: Whether `low` itself is too small.
        below: Whether `high` itself is too large.
        more: Words for a message, behind the numbers.
    """

    low: float = 0
    high: float = math.inf
    above: bool = False
    below: bool = False
    more: str = ""

    def has(self, value: float) -> bool:
        """Returns True if a number is in the range."""
        most = MOST_WHOLE if isinstance(value, int) else MOST
        low = self.low < value if self.above else self.low <= value
        return low and (value < self.high if self.below else value <= min(self.high, most))

    def words(self, value: float, *, whole: bool) -> str:
        """Returns the range in words.

        Args:
            value: That it has not.
            whole: Whether the option takes no fractions.
        """
        kind = "a whole number" if whole else "a number"
        least = f"{kind} {'above' if self.above else 'from'} {self.low:g}"
        if self.high < math.inf:
            least += f" {'to below' if self.below else 'up to'} {self.high:,}"
        elif value > self.low:
            least += f" up to {MOST_WHOLE if whole else MOST}"
        return f"{least}{self.more}"


COUNT, ABOVE_ZERO, PART = Range(1), Range(above=True), Range(high=1, below=True)
RANGES: dict[str, Range] = {
    **dict.fromkeys(
        (
            "gradient_accumulation_steps",
            "max_length",
            "max_target_length",
            "save_total_limit",
            "pad_to_multiple_of",
            "torch_empty_cache_steps",
            "ddp_bucket_cap_mb",
            "ddp_timeout",
            "precompute_ref_batch_size",
            "num_virtual_tokens",
            "r",
        ),
        COUNT,
    ),
    **dict.fromkeys(
        (
            "num_train_epochs",
            "logging_steps",
            "save_steps",
            "eval_steps",
            "save_minutes",
            "beta",
            "adam_epsilon",
            "discopop_tau",
            "lora_alpha",
        ),
        ABOVE_ZERO,
    ),
    "per_device_train_batch_size": Range(1, 2**20),  # rows at once, whose divisors are walked
    "max_steps": Range(1, more=", or -1 for epochs"),
    "label_smoothing_factor": Range(high=1, below=True, more=", as in torch's cross_entropy"),
    "label_smoothing": Range(high=0.5, below=True),
    "ld_alpha": Range(high=1),
    # NEFTune's authors take 5 to 15.
    "neftune_noise_alpha": Range(high=1000, above=True, more=", or leave it out for no noise"),
}


def check_ranges(stage: RawStage) -> Iterator[Fault]:
    """Yields the numbers of a stage's `training:`, `lora:` and `peft:` that their options cannot take."""
    if stage.kind is not None:
        yield from _out_of_range(stage.at("training"), stage_fields(stage.kind))
    yield from _out_of_range(stage.at("lora"), lora_fields() if stage.at("lora").data else None)
    peft = stage.at("peft")
    yield from _out_of_range(peft, peft_fields(str(peft.data.get("type"))) if peft.data else None)


def range_of(name: str) -> Range:
    """Returns the range of an option's numbers."""
    return RANGES.get(name) or (PART if name.endswith(("dropout", "dropout_p")) else Range())


def _out_of_range(block: Block, fields: Fields | None) -> Iterator[Fault]:
    for key, value in block.data.items():
        field = (fields or {}).get(key)
        if field is None or isinstance(value, bool) or not isinstance(value, int | float) or value == field.default:
            continue
        allowed = range_of(key)
        if not allowed.has(value):
            yield Fault(
                (*block.steps, key), f"found {value}; allowed is {allowed.words(value, whole=_is_whole(field))}."
            )


def _is_whole(field: Field) -> bool:
    words = {kind.word for kind in field.kinds}
    return "int" in words and "float" not in words
