"""`hfpipe new`: a recipe for a file of one's own, from five answers and a look at the file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from hfpipe.convert.command import name_of
from hfpipe.convert.render import render
from hfpipe.convert.words import CHATML, is_file, turns
from hfpipe.core.errors import RecipeError, UserError
from hfpipe.recipe.choose import require_model
from hfpipe.recipe.faults import did_you_mean, listed
from hfpipe.recipe.row_formats import ENDS, RowFormat

LOOKED_AT = 1000  # rows
MOST_PARTS, HELD_OUT, FEWEST_PARTS = 20, 10, 4  # one part of so many is held out, and has some rows in a small file
EXPLAINED = 600  # characters in which a chat template says how tools are called
BATCHES, FEWEST_STEPS = (16, 8, 4), 40
TASKS = {
    "chat": "sft",
    "instructions": "sft",
    "pretrain": "pretrain",
    "classification": "classification",
    "translation": "translation",
}
_FORMATS = {  # of the rows that a kind of stage takes
    "sft": ("messages", "prompt_completion", "text"),
    "pretrain": ("text",),
    "classification": ("classification",),
    "translation": ("translation",),
}
_ASKED = {"question_answer": ("question", "answer"), "prompt_completion": ("prompt", "completion")}
_QUESTIONS = {
    "data": "Your data: a file (.jsonl .json .csv .parquet .txt) or a data set of the Hub",
    "model": "The base model: its id on the Hub, or a folder",
    "task": f"What it shall learn ({', '.join(TASKS)})",
    "hardware": "Where it is trained: cpu, or the memory of one GPU such as 24GB",
    "output": "Where the recipe goes",
    "format": "What the rows are",
}
_METRICS = {"classification": ["accuracy", "f1"], "translation": ["chrf"]}
_RATES = {"lora": 2e-4, "pretrain": 2e-5, "full": 2e-5}


@dataclass(frozen=True)
class Look:
    """A look at the first rows of the data.

    Args:
        format: The format that they were taken for.
        end: The format that they become.
        why: Why.
        rows: Rows that were looked at.
        characters: Characters of the median row and of the longest in a hundred.
        script: The script most letters are of, such as LATIN or CJK.
        labels: How often each label occurs; empty where there are none.
        columns: The data's column for each of the format's.
        repeats: Rows that stood there before.
        alike: Whether one half of the rows has some that the other half has too, or nearly.
        others: Other formats that the columns fit.
    """

    format: str
    end: str
    why: str
    rows: int
    characters: tuple[int, int]
    script: str
    labels: Mapping[str, int]
    columns: Mapping[str, str]
    repeats: int = 0
    alike: bool = False
    others: tuple[str, ...] = ()


def run(answers: Mapping[str, str | None]) -> None:
    """Asks what the flags do not say, looks at the data, and writes the recipe.

    Args:
        answers: `data`, `model`, `task`, `columns`, `format`, `hardware`, `output`; None where the command line does
            not say it.

    Raises:
        RecipeError: An answer is missing and there is nobody to ask, is none of the allowed, or the file exists.
        DataError: The data cannot be read.
    """
    lacking = [key for key in ("data", "model") if not answers.get(key)]
    if lacking and not sys.stdin.isatty():
        raise RecipeError(
            f"--{' and --'.join(lacking)}: missing, and standard input is no terminal, so nobody can be asked. Write: "
            "hfpipe new --data my.jsonl --model HuggingFaceTB/SmolLM2-135M --task chat. The task, the hardware "
            "(--hardware cpu or 24GB) and the file (-o) are worked out when they are absent."
        )
    asking = bool(lacking)
    data = answers.get("data") or _ask("data")
    model = answers.get("model") or _ask("model")
    require_model(model)
    source = _source(data, answers.get("columns"), answers.get("format"))
    if (task := answers.get("task")) not in (None, *TASKS):
        raise RecipeError(f"found {task!r} as the task; allowed is one of {', '.join(TASKS)}.")
    look = _looked_at(source, task)
    guess = task_of(look)
    task = task or (_ask("task", guess) if asking else guess)
    found = found_hardware()
    hardware = answers.get("hardware") or (_ask("hardware", found) if asking else found)
    name = name_of(Path(data), "my-data")
    output = Path(answers.get("output") or (_ask("output", f"{name}.yaml") if asking else f"{name}.yaml"))
    recipe, head, comments = build(name, source, model, task, memory_of(hardware), look)
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(render(recipe, [*head, f"  hfpipe check {output}", f"  hfpipe run {output}"], comments))
    except FileExistsError:
        raise RecipeError(f"{output} exists already. Remove it, or name another file with -o.") from None
    except OSError as error:
        raise RecipeError(f"{output} cannot be written: {error.strerror}.") from error
    print("\n".join(head[1:]))
    print(f"wrote {output}; what fits in memory and how long it takes: hfpipe check {output}")


def _ask(key: str, default: str = "") -> str:
    """One question, with what is taken for an empty answer."""
    answer = ""
    while not answer:
        answer = input(f"{_QUESTIONS[key]}{f' [{default}]' if default else ''}: ").strip() or default
    return answer


def _looked_at(source: dict[str, Any], task: str | None) -> Look:
    """A look at the rows; which of several formats they are is asked at a terminal, and is then kept in the source.

    A text file is one document. Where that makes too few to hold some out, its paragraphs are the rows, or its lines.

    Raises:
        RecipeError: There are too few rows, or nobody can be asked.
    """
    look = _look_or_ask(source, task)
    if look.rows < HELD_OUT and look.end == "text" and "sample_by" not in source and _is_of_texts(source["path"]):
        for part in ("paragraph", "line"):
            parts = look_at({**source, "sample_by": part}, task)
            if parts.rows >= HELD_OUT:
                source["sample_by"] = part
                return parts
    if look.rows < FEWEST_PARTS:
        raise RecipeError(
            f"{source['path']} has {look.rows} row{'s' if look.rows > 1 else ''}, too few to train on some and hold "
            f"out others. Name a file of {FEWEST_PARTS} or more."
        )
    return look


def _is_of_texts(path: str) -> bool:
    """Returns True if a path is a text file, or a folder with nothing else."""
    from hfpipe.data.sources.files import file_groups
    from hfpipe.recipe import Source

    return {group.kind for group in file_groups(Source.model_validate({"path": path}))} == {"text"}


def _look_or_ask(source: dict[str, Any], task: str | None) -> Look:
    """A look at the rows, after a question where two formats fit equally and there is a terminal."""
    from hfpipe.data.sources.formats import SeveralFormats

    try:
        return look_at(source, task)
    except SeveralFormats as error:
        words = " or ".join(f"--format {name}" for name in error.names)
        if not sys.stdin.isatty():
            raise SeveralFormats(error.found, error.names, f"Add {words}.") from error
        print(error.found)
        while source.get("format") not in error.names:
            source["format"] = _ask("format", error.names[0])
        return look_at(source, task)


def _source(data: str, columns: str | None, format: str | None) -> dict[str, Any]:
    """The source of a file, a folder or a data set of the Hub, and what its columns are, as the command line says it.

    Raises:
        RecipeError: A path is named that is not there, the columns are not written as they should be, or there is no
            such format.
    """
    from hfpipe.recipe.row_formats import ROW_FORMATS

    if is_file(data) and not Path(data).expanduser().exists():
        raise RecipeError(
            f"there is no file {data}. Name a file, a folder, or a data set of the Hub such as openai/gsm8k."
        )
    if format is not None and format not in ROW_FORMATS:
        known = [name for name, one in ROW_FORMATS.items() if (one.becomes or name) in {*chain(*_FORMATS.values())}]
        raise RecipeError(
            f"--format {format}: there is no such format; there are {listed(known)}.{did_you_mean(format, known)}"
        )
    source = {"path": data} if format is None else {"path": data, "format": format}
    if columns is None:
        return source
    pairs = [pair.partition("=") for pair in columns.split(",")]
    if not all(role and column for role, _, column in pairs):
        raise RecipeError(
            f"found --columns {columns}; allowed is ROLE=COLUMN,..., as in prompt=Frage,completion=Antwort."
        )
    return {**source, "columns": {role.strip(): column.strip() for role, _, column in pairs}}


def look_at(source: Mapping[str, Any], task: str | None = None) -> Look:
    """Reads the first rows.

    Args:
        source: The source.
        task: What they are for; told by the columns when absent, where a text with a label is for classification.

    Raises:
        DataError: They have no format that is known, or none for the task; the message says how to name the columns.
    """
    from hfpipe.data.sources.formats import UnknownColumns

    try:
        opened = _opened(source, _FORMATS.get(TASKS.get(task or "", "")))
    except UnknownColumns as error:
        words = ",".join(f"{role}={column}" for role, column in error.example.items())
        remedy = f"Say which column is which: --columns {words}, with the columns that are meant."
        raise UnknownColumns(error.found, error.example, remedy) from error
    others = opened.taken.others
    if task is None and "format" not in source and opened.taken.format.name == "text":
        with suppress(UserError):  # a text without a label
            opened, others = _opened(source, ("classification",)), (*others, "text")
    from hfpipe.data.cleaning.contamination import SuiteIndex
    from hfpipe.recipe.row_formats import text_of

    rows = list(opened.rows.take(LOOKED_AT))
    if not rows:
        raise RecipeError(f"{source['path']} has no row.")
    texts = [text_of(row) for row in rows]
    lengths = sorted(len(text) + _tool_characters(row) for text, row in zip(texts, rows, strict=True))
    labels = Counter(str(row["label"]) for row in rows if row.get("label") is not None)
    characters = (lengths[len(lengths) // 2], lengths[min(len(lengths) - 1, len(lengths) * 99 // 100)])
    format, columns = opened.taken.format, opened.taken.columns
    _require_used(source, format)
    end, why = format.becomes or format.name, f"columns {', '.join(columns.values())}"
    repeats, shared = len(texts) - len(set(texts)), SuiteIndex(rows[::2]).look_in(rows[1::2])
    alike = bool(repeats or shared.exact or shared.partly)
    return Look(format.name, end, why, len(rows), characters, script_of(texts), labels, columns, repeats, alike, others)


def _require_used(source: Mapping[str, Any], format: RowFormat) -> None:
    """Refuses columns of the command line that the rows have no place for: a recipe with them would have a fault."""
    places = {"id": None} | dict.fromkeys((*format.all_columns, *ENDS[format.becomes or format.name].all_columns))
    if lost := [role for role in source.get("columns", ()) if role not in places]:
        raise RecipeError(
            f"--columns names {listed(lost)}, and rows of {format.name} have {listed(format.all_columns)}. Leave out "
            "what is not meant, or name another --task or --format."
        )


def _tool_characters(row: Mapping[str, Any]) -> int:
    """Characters of the tools of a conversation, and of the calls of its turns, as a chat template writes them."""
    calls = [turn.get("tool_calls") for turn in row.get("messages") or () if isinstance(turn, Mapping)]
    said = [value for value in (row.get("tools"), *calls) if value]
    sizes = [len(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) for value in said]
    return sum(sizes) + (EXPLAINED if row.get("tools") else 0)


def _opened(source: Mapping[str, Any], kinds: tuple[str, ...] | None) -> Any:
    """The source as a stream, whose rows are of one of the kinds; of any when absent."""
    from hfpipe.data.sources.load import open_source
    from hfpipe.recipe import Source

    parsed = Source.model_validate({**source, "streaming": True})
    return open_source(parsed, kinds=kinds) if kinds else open_source(parsed)


def script_of(texts: list[str]) -> str:
    """The script of most letters, by their Unicode names."""
    letters = [letter for text in texts[:100] for letter in text[:1000] if letter.isalpha()]
    scripts = Counter(unicodedata.name(letter, "UNKNOWN").split()[0] for letter in letters)
    return scripts.most_common(1)[0][0] if scripts else "none"


def task_of(look: Look) -> str:
    """The task that rows of a format are for."""
    tasks = {"messages": "chat", "prompt_completion": "instructions", "text": "pretrain"}
    return tasks.get(look.end, look.end if look.end in TASKS else "instructions")


def found_hardware() -> str:
    """The memory of this machine's GPU, or cpu."""
    try:
        asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        said = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
        return f"{round(int(said.split()[0]) / 1024)}GB"
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return "cpu"


def memory_of(hardware: str) -> int:
    """Gigabytes of a GPU; 0 for a CPU.

    Raises:
        RecipeError: It is neither.
    """
    number = re.fullmatch(r"(\d+)\s*(GB|G|GiB)?", hardware.strip(), re.IGNORECASE)
    if hardware.strip().lower() != "cpu" and number is None:
        raise RecipeError(f"found {hardware!r} as hardware; allowed is cpu, or the memory of one GPU such as 24GB.")
    return int(number[1]) if number else 0


def _size_of(model: str) -> float:
    """Billions of parameters, by the model's name; 0 where it does not say."""
    found = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)([BM])(?![a-z])", model, re.IGNORECASE)
    return float(found[-1][0]) / (1000 if found[-1][1].upper() == "M" else 1) if found else 0.0


def build(
    name: str, source: dict[str, Any], model: str, task: str, gigabytes: int, look: Look
) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """The recipe, the comments above it, and those beside its keys.

    Raises:
        RecipeError: The task is none, or is not one that such rows are for.
    """
    if task not in TASKS:
        raise RecipeError(f"found {task!r} as the task; allowed is one of {', '.join(TASKS)}.")
    kind, source, parts = TASKS[task], dict(source), parts_of(look.rows)
    if task == "chat" and look.format == "alpaca":
        source["format"] = "alpaca_chat"
    elif task == "chat" and look.format in _ASKED:
        question, answer = (f"{{{look.columns[name]}}}" for name in _ASKED[look.format])
        source.pop("columns", None)
        source.pop("format", None)
        source["template"] = turns(question, answer)
    fitting = _FORMATS[kind]
    if look.end not in fitting:
        raise RecipeError(
            f"the rows are {look.format} ({look.why}), and {task} takes {' or '.join(fitting)}. Take "
            f"--task {task_of(look)}, or say what the columns mean in a recipe: `columns:` or `template:`."
        )
    size = _size_of(model)
    adapter = kind in ("sft",) or (kind == "pretrain" and bool(size) and size > 1)
    stage: dict[str, Any] = {"name": task, "kind": kind, "data": [{**source, "fold": {"of": parts, "leave": 1}}]}
    comments = {"data": f"{look.format}: {look.why}", "evaluate.held-out": f"one row in {parts}, never trained on"}
    comments["evaluate"] = "what is forgotten shows on text of another kind: docs/how-to.md, Keep what the base can do"
    if look.alike:  # else `check` would find the held-out rows among those that are trained on
        stage["data"][0]["decontaminate"] = True
        told = f"{look.repeats:,} rows stand there twice" if look.repeats else "rows are like each other"
        comments["data"] += f"; {told}, and none like a held-out one is trained on"
    if adapter:
        stage["lora"] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
        if gigabytes and size * 2 > gigabytes * 0.5:
            stage["quantization"] = "nf4"
            comments["quantization"] = (
                f"the base in 4 bits: {size:g} billion weights take most of {gigabytes} GB otherwise"
            )
    length = tokens_of(look)
    epochs = 1 if look.rows == LOOKED_AT else 3
    stage["global_batch_size"] = batch_of(look.rows * (parts - 1) // parts * epochs)
    if stage["global_batch_size"] < BATCHES[0]:
        comments["global_batch_size"] = "small, as so few rows make few steps otherwise, and a model learns by steps"
    stage["training"] = {
        "num_train_epochs": epochs,
        "learning_rate": _RATES["lora" if adapter else "pretrain" if kind == "pretrain" else "full"],
        "max_length": length,
        "per_device_train_batch_size": 1 if stage.get("quantization") else 2 if not gigabytes else 4,
    }
    comments["training.max_length"] = "99 rows of 100 are shorter, by their characters"
    recipe: dict[str, Any] = {"name": name, "model": {"id": model}, "stages": [stage]}
    if task == "chat" and (folder := Path(model)).is_dir() and not _has_template(folder):
        marks = ["<|im_start|>", "<|im_end|>"]
        recipe["model"]["tokenizer"] = {"add_special_tokens": marks, "chat_template": CHATML}
        comments["model.tokenizer"] = "the base has no chat template"
    metrics = _METRICS.get(kind, ["bits_per_byte"])
    recipe["evaluate"] = {"held-out": {"data": {**source, "fold": {"of": parts, "keep": 1}}, "metrics": metrics}}
    return recipe, _head(name, source, task, look, length), comments


def parts_of(rows: int) -> int:
    """The parts that rows are cut into, one of which is held out: 20, and fewer of few rows."""
    return min(MOST_PARTS, max(FEWEST_PARTS, rows // HELD_OUT))


def batch_of(rows: int) -> int:
    """The rows of a step: 16, and fewer where so many rows in all would make too few steps to learn anything."""
    return next((size for size in BATCHES if rows >= size * FEWEST_STEPS), BATCHES[-1])


def _has_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").exists() or (config.exists() and "chat_template" in config.read_text())


def tokens_of(look: Look) -> int:
    """Tokens that hold all but the longest rows: a power of two from 128 to 4096."""
    dense = look.script in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")
    tokens = look.characters[1] / (1 if dense else 3)
    return next((length for length in (128, 256, 512, 1024, 2048) if tokens <= length), 4096)


def _head(name: str, source: Mapping[str, Any], task: str, look: Look, length: int) -> list[str]:
    """Returns the comment lines that describe the data and the next command."""
    data = source["path"]
    more = "the first " if look.rows == LOOKED_AT else ""
    lines = [
        f"{name}: {task} on {data}, written by `hfpipe new`.",
        f"{more}{look.rows} rows of {look.format} ({look.why}); the median has {look.characters[0]:,} characters, "
        f"99 of 100 have at most {look.characters[1]:,}: rows of {length} tokens. Letters are mostly "
        f"{look.script if look.script == 'CJK' else look.script.capitalize()}.",
    ]
    if look.others:
        words = " or ".join(f"--format {name}" for name in look.others)
        lines.append(
            f"The columns fit {listed(look.others)} too; if that is meant, make the recipe again with {words}."
        )
    if look.labels:
        counts = ", ".join(f"{label} {count}" for label, count in Counter(look.labels).most_common(8))
        lines.append(f"Labels: {counts}{' and others' if len(look.labels) > 8 else ''}.")
    return lines


def answers_of(options: Any) -> dict[str, str | None]:
    """The answers that the command line gives."""
    return {key: getattr(options, key) for key in (*_QUESTIONS, "columns")}
