"""Sources of a recipe as pydantic models, and the types of the keys of sources and stages."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema

from hfpipe.recipe.row_formats import ROW_FORMATS

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[tuple(ROW_FORMATS)]

BASE = "base"  # the model before any training, where the name of a stage may stand

Token = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="letters, digits, '.', '_' and '-'")]


# A value that may be a word, a list or a block is told apart by its shape, so that a fault is reported once and not
# once for each of the shapes. The tags appear in pydantic's paths; `validate.py` takes them out again.
WORD, LIST, BLOCK, TURNS = "<word>", "<list>", "<block>", "<turns>"
# The endings that are read, by the builder of `datasets` whose options they take.
FILE_KINDS = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".txt", ".md", ".text"), "text"),
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


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


def _auto(value: Any) -> Any:
    if isinstance(value, str) and value != "auto":
        raise ValueError(f"found the text '{value}'; allowed is a whole number, or auto.")
    return None if value == "auto" else value


Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]

AutoCount = Annotated[
    int | None,
    BeforeValidator(_auto),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "exclusiveMinimum": 0}]}),
]


class StrictBlock(BaseModel):
    """A closed block: an unknown key is a fault, and so is a value of another type ("8" is not 8)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# A text, or a list of them: the choices of a row, each a column or a template of its own.
TextOrTexts = Annotated[Annotated[str, Tag(WORD)] | Annotated[list[str], Tag(LIST)], Discriminator(list_or_word)]


class Turn(StrictBlock):
    """A turn of a conversation, whose content is a template."""

    role: Token = Field(description="who speaks: system, user or assistant")
    content: str = Field(description="what is said, with {column} for what stands in a column")


# What a role of a row is built by: a text with columns in it, several (choices), or the turns of a conversation.
Template = Annotated[
    Annotated[str, Tag(WORD)] | Annotated[list[str], Tag(LIST)] | Annotated[list[Turn], Tag(TURNS)],
    Discriminator(turns_or_texts),
]


class Fold(StrictBlock):
    """One of several equal parts of a table, whose rows are dealt out at random, and always alike."""

    of: int = Field(ge=2, description="number of folds")
    keep: int | None = Field(None, ge=1, description="the one fold whose rows are kept")
    leave: int | None = Field(None, ge=1, description="the one fold whose rows are left out")


class Deduplicate(StrictBlock):
    """The likeness at which two documents count as one."""

    near: Share = Field(0.8, ge=0.5, lt=1, description="least Jaccard similarity of their word 5-grams")


# What is swapped: a list that ships, or lists of words each of which becomes the next.
Swap = Annotated[
    Annotated[Literal["gender", "names"], Tag(WORD)] | Annotated[list[list[str]], Tag(LIST)],
    Discriminator(list_or_word),
]


class Augment(StrictBlock):
    """Swaps words of a source's rows, so that what is said of one group is said of the other too."""

    swap: Swap = Field(
        description="what is swapped: gender (English and Chinese), names (between two groups, English), or lists of "
        "words each of which becomes the next, e.g. [[Christian, Muslim]]"
    )
    how: Literal["join", "exchange"] = Field(
        "join", description="a row with such a word is joined by its swapped form, or half of them exchanged for it"
    )


class Source(StrictBlock):
    """One `load_dataset` call, and what its columns mean.

    Keys that are not declared here go to `datasets.load_dataset` as they stand.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    path: str = Field(
        description="a file, a folder, a pattern such as data/*.jsonl, a Hub data set, a builder (json, csv...) with "
        "`data_files`, or `builtin`"
    )
    weight: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="share drawn from this source: of the tokens (pretrain, streamed sft), or of the rows",
    )
    take: int | None = Field(None, gt=0, description="keep this many rows")
    skip: int = Field(0, ge=0, description="leave out this many rows at the beginning")
    where: str | None = Field(None, description='a condition on columns, such as "language_score > 0.9"')
    fold: Fold | None = Field(None, description="one of several equal parts of a table, or all but that one")
    format: FormatName | None = Field(
        None, description="what the rows are, e.g. alpaca or sharegpt; recognized by the columns when absent"
    )
    columns: (
        Annotated[
            Annotated[dict[str, TextOrTexts], Tag(BLOCK)] | Annotated[list[str], Tag(LIST)],
            Discriminator(list_or_block),
        ]
        | None
    ) = Field(None, description="role: column, for columns with other names, e.g. {text: content}")
    template: dict[str, Template] | None = Field(
        None, description='builds roles from columns, e.g. {prompt: "Q: {question}\\nA:", completion: " {answer}"}'
    )
    src_lang: str | None = Field(None, description="language code of `source`, of tokenizers that have them (NLLB)")
    tgt_lang: str | None = Field(None, description="language code of `target`, of tokenizers that have them")
    deduplicate: (
        Annotated[
            Annotated[Literal["exact", "near"], Tag(WORD)] | Annotated[Deduplicate, Tag(BLOCK)],
            Discriminator(word_or_block),
        ]
        | None
    ) = Field(None, description="rows that say the same (exact), or nearly the same (near), are trained on once")
    augment: Augment | None = Field(
        None, description="add to each row with listed words, such as he and she, the row with these words swapped"
    )
    decontaminate: bool = Field(
        False, description="leave out rows that overlap a suite, or hold 13 words of it in a row"
    )

    @property
    def title(self) -> str:
        """Its name where a person reads it: the path, and the configuration that a data set of many has."""
        name = self.passed_through.get("name")
        return f"{self.path} {name}" if name is not None else self.path

    @property
    def near(self) -> float | None:
        """The similarity from which documents are near duplicates; None where none are looked for."""
        block = Deduplicate.model_validate({}) if self.deduplicate == "near" else self.deduplicate
        return block.near if isinstance(block, Deduplicate) else None

    @property
    def cleaned(self) -> bool:
        """True if rows are removed before training."""
        return self.deduplicate is not None or self.decontaminate

    @property
    def passed_through(self) -> dict[str, Any]:
        """The arguments of `load_dataset` as the recipe gives them."""
        extra = dict(self.model_extra or {})
        if isinstance(self.columns, list):  # Parquet's own `columns`: which ones to read
            extra["columns"] = self.columns
        return extra


def file_kind(name: str) -> str | None:
    """The kind of a file by its ending, with or without one of compression; None for any other."""
    stem, ending = os.path.splitext(name.lower())
    if ending in COMPRESSED:
        ending = os.path.splitext(stem)[1]
    return FILE_KINDS.get(ending)


def is_local_name(path: str) -> bool:
    """Returns True if a path can mean nothing but files of this machine: by how it begins, by its ending, or as a
    pattern.
    """
    return path.startswith(("./", "../", "/", "~", "$")) or file_kind(path) is not None or is_pattern(path)


def is_pattern(path: str) -> bool:
    """Returns True if a path is a pattern such as `data/*.jsonl`."""
    return "://" not in path and any(sign in path for sign in "*?[")


def expanded(path: str) -> str:
    """A path with `~` and the variables of the environment in it replaced.

    Raises:
        KeyError: A variable is not set.
    """

    def value(found: re.Match[str]) -> str:
        return os.environ[found[1] or found[2]]

    return os.path.expanduser(re.sub(r"\$\{(\w+)\}|\$(\w+)", value, path))
