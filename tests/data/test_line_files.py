"""Streamed files of rows: shared by bytes, resumed by place, and the same rows as a reading from the beginning."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import zstandard
from datasets import IterableDataset

from hfpipe.core.upstream import examples_of
from hfpipe.data.cleaning.text_rules import Read, tidy_rows
from hfpipe.data.sources import line_files
from hfpipe.data.sources.builders import load_dataset
from hfpipe.data.sources.builders.csv import CsvFiles
from hfpipe.data.sources.line_files import ByteRanges, by_byte_range
from hfpipe.data.sources.load import load_rows
from hfpipe.data.stream.shard_reader import ShardReader
from hfpipe.recipe import Source

WORDS = ["größe", "a", 'say "x"', "line\nbreak", "x,y", "你好", "\\", "end\r\nof", "\t"]


def texts(count: int = 160) -> list[str]:
    chance = random.Random(0)
    return [f"doc {n} " + " ".join(chance.choices(WORDS, k=chance.choice([3, 20, 60, 300]))) for n in range(count)]


def as_lines(rows: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(rows)).encode()


def as_lines_of_windows(rows: list[str]) -> bytes:
    lines = [json.dumps({"text": text, "n": n}, ensure_ascii=False) for n, text in enumerate(rows)]
    return b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode()  # and no newline at the end


def as_list(rows: list[str]) -> bytes:
    return json.dumps([{"text": text} for text in rows], indent=1).encode()


def as_csv(rows: list[str]) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["text", "n"], *([text, n] for n, text in enumerate(rows))])
    return b"\n" + file.getvalue().encode()


def as_csv_without_names(rows: list[str]) -> bytes:
    return as_csv(rows).split(b"\r\n", 1)[1]


def as_text(rows: list[str]) -> bytes:
    return "\n".join(rows).encode()


def as_paragraphs(rows: list[str]) -> bytes:
    chance = random.Random(1)
    return "".join(row + "\n" * chance.choice([2, 2, 3, 4, 5]) for row in rows).encode()


FORMS: list[tuple[Callable[[list[str]], bytes], str, dict[str, Any], bool]] = [
    (as_lines, "json", {"chunksize": 3000}, True),
    (as_lines_of_windows, "json", {"chunksize": 2000}, True),
    (as_list, "json", {"chunksize": 2000}, False),
    (as_csv, "csv", {}, False),
    (as_csv_without_names, "csv", {"column_names": ["text", "n"], "chunksize": 3}, False),
    (as_text, "text", {"chunksize": 500}, True),
    (as_paragraphs, "text", {"chunksize": 500, "sample_by": "paragraph"}, True),
]
PACKED: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def column(rows: IterableDataset) -> list[str]:
    return [row["text"] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize(("form", "kind", "words", "shared"), FORMS, ids=lambda value: getattr(value, "__name__", None))
def test_rows_are_those_of_a_whole_reading_however_shared_and_stopped(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: Callable[[list[str]], bytes],
    kind: str,
    words: dict[str, Any],
    shared: bool,
    suffix: str,
) -> None:
    monkeypatch.setattr(CsvFiles, "piece_bytes", 700)
    rows = texts()
    for number, part in enumerate((rows[:100], rows[100:])):
        (tmp_path / f"{number}.{kind}{suffix}").write_bytes(PACKED[suffix](form(part)))
    arguments: dict[str, Any] = {"data_files": str(tmp_path / "*"), "split": "train", "streaming": True, **words}
    wanted = column(load_dataset(kind, **arguments))
    stream = by_byte_range(load_dataset(kind, **arguments))
    assert isinstance(examples_of(stream), ByteRanges)
    assert column(stream) == wanted
    assert stream.num_shards > 8 if shared and not suffix else stream.num_shards == 2
    for lanes in (2, 3, 8):
        parts = [column(stream.shard(num_shards=lanes, index=lane)) for lane in range(lanes)]
        assert sorted(chain(*parts)) == sorted(wanted)
    for stop in (1, len(wanted) // 2, len(wanted) - 1, len(wanted)):
        first, then = stream.shard(num_shards=1, index=0), stream.shard(num_shards=1, index=0)
        given = column(islice(first, stop))
        then.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert given + column(then) == wanted
        first, given = first.with_format("arrow"), []
        for block in first.iter(batch_size=13):
            given += block["text"].to_pylist()
            if len(given) >= stop:
                break
        then = stream.shard(num_shards=1, index=0).with_format("arrow")
        then.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for block in then.iter(batch_size=13):
            given += block["text"].to_pylist()
        assert given == wanted


@pytest.mark.parametrize("name", ["lines.jsonl", "lines.txt", "lines.csv", "lines.jsonl.gz"])
def test_a_resume_parses_no_more_the_farther_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(CsvFiles, "piece_bytes", 20_000)
    kind = {"jsonl": "json", "txt": "text", "csv": "csv"}[name.split(".")[1]]
    rows = {"json": as_lines, "text": as_text, "csv": as_csv}[kind]([f"row {n} " * 5 for n in range(12_000)])
    (tmp_path / name).write_bytes(gzip.compress(rows) if name.endswith(".gz") else rows)
    chunk = {} if kind == "csv" else {"chunksize": 20_000}
    source = Source(path=kind, data_files=str(tmp_path / name), streaming=True, **chunk)
    parsed: list[int] = []
    tables_of = ByteRanges.tables_of_piece

    def counted(self: ByteRanges, number: int, data: bytes) -> Any:
        parsed.append(len(data))
        return tables_of(self, number, data)

    monkeypatch.setattr(line_files.ByteRanges, "tables_of_piece", counted)
    reader, states = ShardReader(load_rows(source), 0, 2, source, epochs=1), []
    while not reader.ended:
        states.append((json.loads(json.dumps(reader.state())), reader.take(500)))
    assert len(parsed) > 10
    costs = []
    for state, wanted in (states[1], states[len(states) // 2], states[-2]):
        again = ShardReader(load_rows(source), 0, 2, source, epochs=1)
        again.load(state)
        parsed.clear()
        assert again.take(500) == wanted
        costs.append(sum(parsed))
    assert max(costs) < 0.4 * len(rows)  # two times the thousand rows that lanes part at a time


def test_a_broken_line_costs_its_row_in_a_piece_of_few_lines_too(tmp_path: Path) -> None:
    """A tenth of broken lines tells that a file is none of JSON lines, but not of a piece that holds three."""
    rows = [{"id": f"d{n}", "text": f"{n} " + "long " * 200} for n in range(60)]
    lines = [json.dumps(row) for row in rows]
    lines[30], lines[-1] = '{"no": row', lines[-1][:50]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    source = Source(path="json", data_files=str(tmp_path / "rows.jsonl"), streaming=True, chunksize=3000)
    read = Read()
    kept = [row["text"] for row in tidy_rows(load_rows(source), source, read)]
    assert kept == [row["text"] for number, row in enumerate(rows) if number not in (30, 59)]
    assert read.dirty.counts == {"missing": 2}
