"""Prompts that people ask a trained model: a typed text, or a file of rows without their answers.

A model is asked as it was trained: in the turns of its chat template, in the words of the recipe's `template`, in
alpaca's or lm-eval's form, or by the plain text. A row that holds the answer too is asked without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from hfpipe.core.errors import DataError, RecipeError
from hfpipe.data.sources.batches import rows_of
from hfpipe.data.sources.convert import CONVERTERS, plain_turn
from hfpipe.data.sources.load import stored_rows
from hfpipe.data.sources.templates import fields_of, filled_texts, form_of, template_texts
from hfpipe.recipe import Source
from hfpipe.recipe.faults import listed
from hfpipe.recipe.row_formats import BESIDE_MESSAGES, ROW_FORMATS
from hfpipe.recipe.source_config import file_kind

Row = dict[str, Any]
PLAIN = ("prompt", "instruction", "question", "text")  # columns of a prompt that is one text, the surest first


@dataclass(frozen=True)
class Asking:
    """The way in which a stage was asked while it trained.

    Args:
        format: The format of its rows, a name of `ROW_FORMATS`.
        source: Whose `template` and `columns` made them; None for a model of which no recipe is known.
    """

    format: str
    source: Source | None = None

    @property
    def is_chat(self) -> bool:
        """True if the chat template writes the prompt."""
        return (ROW_FORMATS[self.format].becomes or self.format) == "messages"

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns that the recipe's template asks with; none without a template."""
        fields: list[str] = []
        for text in self._template_texts():
            fields += fields_of(text, "prompt", self.source) if self.source is not None else []
        return tuple(dict.fromkeys(fields))

    def of_text(self, text: str) -> Row:
        """A typed text as a row: in the place of the only column of a template, as the instruction, as the user's turn.

        Raises:
            RecipeError: The template is built of several columns.
        """
        if len(self.fields) > 1:
            raise RecipeError(
                f"the stage was trained on prompts that its template builds of the columns {listed(self.fields)}, so "
                "one text does not make a prompt. Give a file (JSONL or CSV) with these columns, or with whole prompts "
                "in a column `prompt`."
            )
        if self.fields:
            return self._by_template({self.fields[0]: text})
        if self.is_chat:
            return {"messages": [{"role": "user", "content": text}]}
        if self.format in ("alpaca", "question_answer"):
            name = {"alpaca": "instruction", "question_answer": "question"}[self.format]
            return {"prompt": CONVERTERS[self.format]({name: text, "output": None, "answer": None})["prompt"]}
        return {"prompt": text}

    def of_row(self, row: Mapping[str, Any]) -> Row | None:
        """A row of a file as what is put to the model; None where nothing in it is a prompt."""
        named = self.source.columns if self.source is not None and isinstance(self.source.columns, dict) else {}
        row = {**row, **{role: row[name] for role, name in named.items() if isinstance(name, str) and name in row}}
        if self.fields and all(_inside(row, name) is not None for name in self.fields):
            return self._by_template(row)
        for name in ("messages", "conversations", "conversation", "prompt"):
            if _is_turns(row.get(name)):
                return _conversation({**row, "messages": row[name]})
        asked = next((name for name in PLAIN if isinstance(row.get(name), str) and row[name].strip()), None)
        if asked == "instruction":
            return self._instruction(row)
        if asked == "prompt" and not self.is_chat:
            return {"prompt": row["prompt"]}  # whole, as it was trained on
        return None if asked is None else self.of_text(row[asked])

    def _instruction(self, row: Row) -> Row:
        filled = {"output": "", **row}
        if self.is_chat:
            return {"messages": CONVERTERS["alpaca_chat"](filled)["messages"][:-1]}
        if self.format == "alpaca":
            return {"prompt": CONVERTERS["alpaca"](filled)["prompt"]}
        return self.of_text("\n".join(filter(None, (row["instruction"], row.get("input")))))

    def _template_texts(self) -> list[str]:
        template = self.source.template if self.source is not None else None
        if not template:
            return []
        if "messages" in template:
            turns: Any = form_of(template["messages"])
            return [text for _, text in _asked(turns)]
        return template_texts(form_of(template["prompt"])) if "prompt" in template else []

    def _by_template(self, row: Mapping[str, Any]) -> Row:
        assert self.source is not None
        assert self.source.template is not None
        batch, template = {name: [_inside(row, name)] for name in self.fields}, self.source.template
        if "messages" in template:
            turns: Any = form_of(template["messages"])
            return {"messages": [{"role": who, "content": filled_texts(batch, text)[0]} for who, text in _asked(turns)]}
        return {"prompt": filled_texts(batch, str(template["prompt"]))[0]}


def _inside(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, which may lie inside of another: `translation.en`."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _asked(turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The turns before the last answer."""
    kept = list(turns)
    while kept and kept[-1][0] == "assistant":
        kept.pop()
    return kept


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def _conversation(row: Row) -> Row | None:
    """A conversation without the answer at its end."""
    turns = [plain_turn(turn) for turn in row["messages"]]
    if isinstance(row.get("system"), str) and row["system"].strip() and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": row["system"]}, *turns]
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    beside = {name: row[name] for name in BESIDE_MESSAGES if row.get(name) is not None}
    return {"messages": turns, **beside} if turns else None


@dataclass(frozen=True)
class Asked:
    """A row of a file of prompts.

    Args:
        given: The row as the file has it.
        row: What is put to the model: `messages` or `prompt`.
    """

    given: Row
    row: Row


def read_prompts(path: str, asking: Asking, limit: int | None = None) -> list[Asked]:
    """Reads a file of prompts: JSON lines, CSV, text (a prompt a line), and whatever a source can be.

    Args:
        path: The file.
        asking: How the model is asked.
        limit: Rows to read; all when None.

    Raises:
        RecipeError: There is no such file, or a text alone does not make a prompt.
        DataError: A row holds no prompt, or the file has no row.
    """
    words = {"sample_by": "line"} if file_kind(path) == "text" else {}
    source = Source.model_validate({"path": path, **words})
    found: list[Asked] = []
    for number, row in enumerate(islice(_rows(source), limit), 1):
        given = {name: value for name, value in row.items() if value is not None}
        asked = asking.of_row(given)
        if asked is None:
            wanted = [*asking.fields] if asking.fields else ["messages", "prompt", "instruction", "question", "text"]
            raise DataError(
                f"{path}, row {number}: found no prompt in the columns {listed(given) or 'of an empty row'}. A row has "
                f"{'all of' if asking.fields else 'one of'} {listed(wanted)}"
                f"{', or `prompt`' if asking.fields else ''}; rename the column, or leave the row out."
            )
        found.append(Asked(given, asked))
    if not found:
        raise DataError(
            f"{path} holds no row. A text file has a prompt a line; JSON lines have `prompt` or `messages`."
        )
    kinds = {"messages" in one.row for one in found}
    if len(kinds) > 1:
        raise DataError(
            f"{path} mixes conversations (`messages`) and plain prompts. Put them into a file each: they are asked in "
            "different ways."
        )
    return found


def _rows(source: Source) -> Iterator[Row]:
    rows = stored_rows(source)
    for row in rows_of(rows, source):
        if list(row) == ["text"] and not (row["text"] or "").strip():
            continue  # an empty line of a text
        yield json.loads(json.dumps(row, default=str))  # dates and the like as text, as the answers are written
