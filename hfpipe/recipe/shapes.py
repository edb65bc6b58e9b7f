"""What the words of a recipe are made of: closed blocks, names, shares, and values of several shapes."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema

BASE = "base"  # the model before any training, where the name of a stage may stand

Token = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="letters, digits, '.', '_' and '-'")]


# A value that may be a word, a list or a block is told apart by its shape, so that a fault is reported once and not
# once for each of the shapes. The tags appear in pydantic's paths; `structure.py` takes them out again.
WORD, LIST, BLOCK, TURNS = "<word>", "<list>", "<block>", "<turns>"


def word_or_block(value: Any) -> str:
    return BLOCK if isinstance(value, (dict, BaseModel)) else WORD


def list_or_block(value: Any) -> str:
    return BLOCK if isinstance(value, dict) else LIST


def list_or_word(value: Any) -> str:
    return LIST if isinstance(value, list) else WORD


def turns_or_texts(value: Any) -> str:
    turns = isinstance(value, list) and any(isinstance(one, (dict, BaseModel)) for one in value)
    return TURNS if turns else list_or_word(value)


def _as_share(value: Any) -> Any:
    """Reads "3%" and "3 %" as 0.03; a number is a share already."""
    if isinstance(value, str):
        percent = re.fullmatch(r"\s*([-+]?\d+(?:\.\d*)?)\s*%\s*", value)
        if percent is None:
            raise ValueError(f"found the text '{value}'; allowed is a share, such as 3% or 0.03.")
        value = float(percent[1]) / 100
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 1:
        hint = f" Did you mean {value:g}%?" if value <= 100 else ""
        raise ValueError(
            f"found {value:g}, which is {value:.0%}; allowed is a share up to 100%, such as 3% or 0.03.{hint}"
        )
    return value


Share = Annotated[
    float,
    BeforeValidator(_as_share),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "maximum": 1},
                {"type": "string", "pattern": r"^\s*\+?\d+(\.\d*)?\s*%\s*$"},
            ]
        }
    ),
]


class Words(BaseModel):
    """A closed block: an unknown key is a fault, and so is a value of another type ("8" is not 8)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# A text, or a list of them: the choices of a row, each a column or a template of its own.
TextOrTexts = Annotated[Annotated[str, Tag(WORD)] | Annotated[list[str], Tag(LIST)], Discriminator(list_or_word)]


class Turn(Words):
    """A turn of a conversation, whose content is a template."""

    role: Token = Field(description="who speaks: system, user or assistant")
    content: str = Field(description="what is said, with {column} for what stands in a column")


# What a role of a row is built by: a text with columns in it, several (choices), or the turns of a conversation.
Template = Annotated[
    Annotated[str, Tag(WORD)] | Annotated[list[str], Tag(LIST)] | Annotated[list[Turn], Tag(TURNS)],
    Discriminator(turns_or_texts),
]
