"""Inputs with one thing wrong: recipes, data files, run folders and model folders, each made from a seed."""

from __future__ import annotations

import copy
import csv
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 10**40, -(10**20), 0.0, -0.5, 0.3, 1e308, float("inf"), float("nan"),
    "", " ", "x", "none", "null", "3%", "101%", "-5%", "2e-4", "a/b", "../x", "/", "~", "./x.py", "${HOME}", "{", "}",
    "{{", "{a}", "{% if %}", "\x00", "\ud7ff", "é" * 3, "a" * 5000, "2024-01-01", "base", "builtin", "lora", "all",
    [], [None], [[]], [1, 2], ["x"], ["x", 1], [{}], {}, {"a": 1}, {1: 2}, {"a": {"b": {"c": []}}}, {None: None},
    "/etc/passwd", "model", "${NOT_SET}/x", "train[:50%]", "train[50", "json", "nf4", "all-linear", "auto",
]  # fmt: skip


def paths(value: Any, steps: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path to every value below a mapping or list."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*steps, key)
        yield from paths(item, (*steps, key))


def mutated(value: Any, chance: random.Random, words: tuple[str, ...] = ()) -> Any:
    """Returns a copy with one to three changes: a value of another kind, a key away, misspelt, new or elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        every = list(paths(value))
        if not every:
            return value
        steps = chance.choice(every)
        outer = value
        for step in steps[:-1]:
            outer = outer[step]
        key, change = steps[-1], chance.randrange(8)
        if change < 4:
            outer[key] = copy.deepcopy(chance.choice(VALUES))
        elif change == 4:
            del outer[key]
        elif change == 5 and isinstance(outer, dict):
            outer[f"{key}{chance.choice('sx_')}"] = outer.pop(key)
        elif change == 6 and isinstance(outer, dict):
            outer[chance.choice(words or ("extra",))] = copy.deepcopy(chance.choice(VALUES))
        else:
            other = value
            for step in chance.choice(every)[:-1]:
                other = other[step] if not isinstance(other, str) else other
            outer[key] = copy.deepcopy(other) if chance.random() < 0.5 else [outer[key], outer[key]]
    return value


def spoilt(content: bytes, chance: random.Random) -> bytes:
    """Returns a file's bytes cut, with bytes changed, doubled, or of another kind."""
    size = len(content)
    at = chance.randrange(size + 1)
    change = chance.randrange(10)
    if change == 0:
        return content[:at]
    if change == 1:
        return content[:at] + bytes(chance.randrange(256) for _ in range(chance.choice((1, 3, 40)))) + content[at:]
    if change == 2:
        return content[:at] + content[at + chance.choice((1, 2, 50)) :]
    if change == 3:
        return b""
    if change == 4:
        return chance.choice(
            (b"null", b"[]", b"{}", b"0", b'"x"', b"\n\n", b"\x00" * 9, b"\xff\xfe", b"[[1]]", b"[null]")
        )
    if change == 5:
        return content + content
    if change == 6:
        return content.replace(b"\n", chance.choice((b"\r\n", b"\n\n", b" ", b"\n,\n")), chance.choice((1, -1)))
    if change == 7:
        return content.replace(chance.choice((b":", b'"', b"{", b",")), chance.choice((b"", b"::", b"'", b"[")), 3)
    if change == 8:
        return content.decode("utf-8", "replace").encode(
            chance.choice(("utf-16", "utf-8-sig", "gbk", "latin-1")), "replace"
        )
    return bytes(chance.randrange(256) for _ in range(chance.choice((1, 30, 400))))


def spoilt_json(content: bytes, chance: random.Random) -> bytes:
    """Returns a JSON file with one value odd, or its bytes spoilt."""
    if chance.random() < 0.3:
        return spoilt(content, chance)
    return json.dumps(mutated(json.loads(content), chance)).encode()


def spoil_folder(folder: Path, chance: random.Random) -> str:
    """Spoils one file of a folder, and returns what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    small = [path for path in files if path.suffix in (".json", ".jsonl", ".yaml")]
    path = chance.choice(small) if chance.random() < 0.75 else chance.choice(files)
    name, change = str(path.relative_to(folder)), chance.random()
    if change < 0.1:
        path.unlink()
        return f"{name} removed"
    if change < 0.15:
        path.unlink()
        path.mkdir()
        return f"{name} is a folder"
    before = path.read_bytes()
    path.write_bytes(spoilt_json(before, chance) if path.suffix == ".json" else spoilt(before, chance))
    return f"{name}: {path.read_bytes()[:200]!r}" if len(before) < 3000 else f"{name} changed"


def data_file(ending: str, kind: str, chance: random.Random) -> bytes:
    """Returns a data file with something wrong: its bytes spoilt, or a few of its values.

    Args:
        ending: Of the file, which says its format.
        kind: Of the stage that its rows are for.
        chance: Decides.
    """
    rows = [_row(kind, number) for number in range(chance.choice((1, 3, 60)))]
    if chance.random() < 0.6:
        for row in chance.sample(rows, min(len(rows), chance.choice((1, 1, 2, 60)))):
            column = chance.choice(list(row))
            change = chance.randrange(4)
            if change == 0:
                del row[column]
            elif change == 1:
                row["extra"] = chance.choice(VALUES)
            else:
                row[column] = copy.deepcopy(chance.choice(VALUES))
        content = _written(rows, ending)
        return content if chance.random() < 0.8 else spoilt(content, chance)
    return spoilt(_written(rows, ending), chance)


def _row(kind: str, number: int) -> dict[str, Any]:
    if kind == "classification":
        return {"sentence": f"number {number} is here", "label": "odd" if number % 2 else "even"}
    if kind == "pretrain":
        return {"text": f"The cat of number {number} sat by the river and said mew. " * 2, "id": f"d{number}"}
    if number % 2:  # of one file, so one or the other decides what it is
        return {"prompt": f"What is {number}?", "completion": f" It is {number}.", "id": number}
    return {"prompt": f"Who is {number}?", "completion": " Nobody.", "id": number}


def _written(rows: list[dict[str, Any]], ending: str) -> bytes:
    """Returns rows as a file of a format; Parquet takes texts alone."""
    if ending == "jsonl":
        return "".join(json.dumps(row, default=str) + "\n" for row in _named(rows)).encode("utf-8", "surrogatepass")
    if ending == "json":
        return json.dumps(_named(rows)).encode()
    if ending == "txt":
        return "\n\n".join(str(next(iter(row.values()), "")) for row in rows).encode("utf-8", "replace")
    columns = list(dict.fromkeys(str(key) for row in rows for key in row))
    cells = [[str(row.get(column, "")) for column in columns] for row in rows]
    if ending == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = {
            name: [line[at].encode("utf-8", "replace").decode() for line in cells] for at, name in enumerate(columns)
        }
        file = io.BytesIO()
        pq.write_table(pa.table(table), file)
        return file.getvalue()
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if ending == "tsv" else ",")
    writer.writerows([columns, *cells])
    return text.getvalue().encode("utf-8", "replace")


def _named(rows: list[dict[str, Any]]) -> list[Any]:
    """Returns the rows with every key a text, as JSON has it."""
    return json.loads(json.dumps([{str(key): value for key, value in row.items()} for row in rows], default=str))
