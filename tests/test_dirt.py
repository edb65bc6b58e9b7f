"""Dirty rows: left out, cut or mended by rule, and reported with their ids; files that are not UTF-8 to the end."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from hfpipe.cli import main
from hfpipe.data.dirt import Read, tidy, tidy_row, tidy_rows
from hfpipe.data.sources import load_rows
from hfpipe.evaluation import suite_rows
from hfpipe.recipe import Source, Suite

LINES = [
    b'{"id": "latin", "text": "caf\xe9 in latin-1"}',
    b'{"id": "half", "text": "half of \\ud83d here, all of \\ud83d\\ude00 there, and \\\\ud83d is no escape"}',
    b'{"id": "control", "text": "nul \\u0000 and \\u001b, but tab\\tand\\nline"}',
    b'{"id": "none", "text": null}',
    b'{"id": "blank", "text": " \\n\\u0007"}',
    b'{"id": "number", "text": 5}',
]


@pytest.mark.parametrize(
    ("value", "text", "found"),
    [
        (None, None, "missing"),
        (b"bytes", None, "not a text"),
        ("", None, "empty"),
        ("\x00 \n", None, "empty"),
        ("\ufdd0", None, "not UTF-8"),
        ("abcdefghijkl", "abcdefghij", "cut for length"),
        ("\ud800é\x7f", "\ufffdé", "lone surrogates replaced,control characters removed"),
        ("é\t\n\r\f ", "é\t\n\r\f ", ""),
    ],
)
def test_the_rules_of_a_text(value: object, text: str | None, found: str) -> None:
    assert tidy(value, 10) == (text, (tuple if text is None else list)(found.split(",") if found else []))


def test_the_rules_of_rows_with_several_texts() -> None:
    assert tidy_row({"prompt": "", "completion": "a\x01", "id": 3})[0] == {"prompt": "", "completion": "a", "id": 3}
    assert tidy_row({"prompt": "a", "completion": None}) == (None, ("missing",))
    assert tidy_row({"prompt": "a", "completion": "\n"}) == (None, ("empty",))
    call = {"role": "assistant", "content": None, "tool_calls": []}
    turns = [{"role": "user", "content": "a\x00b"}, call]
    new, found = tidy_row({"messages": turns})
    assert new == {"messages": [{"role": "user", "content": "ab"}, call]}
    assert found == ["control characters removed"]
    assert tidy_row({"messages": [call]}) == (None, ("empty",))
    assert tidy_row({"messages": "hello"}) == (None, ("not a text",))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["file", "gzip", "folder"])
def test_every_row_of_a_dirty_file_is_accounted_for(tmp_path: Path, form: str, streaming: bool) -> None:
    file = tmp_path / ("rows.jsonl.gz" if form == "gzip" else "rows.jsonl")
    file.write_bytes(gzip.compress(b"\n".join(LINES)) if form == "gzip" else b"\n".join(LINES))
    words = {"path": str(tmp_path)} if form == "folder" else {"path": "json", "data_files": str(file)}
    source = Source(**words, streaming=streaming)
    read = Read()
    texts = [row["text"] for row in tidy_rows(load_rows(source), source, read)]
    half = "half of \ufffd here, all of \U0001f600 there, and \\ud83d is no escape"
    assert texts == [half, "nul  and , but tab\tand\nline"]
    assert read.dirty.counts == {"not UTF-8": 1, "missing": 1, "empty": 1, "not a text": 1}
    assert read.dirty.ids == ["latin", "none", "blank", "number"]
    assert read.mended.counts == {"lone surrogates replaced": 1, "control characters removed": 1}
    assert read.mended.ids == ["half", "control"]
    assert read.rows == len(LINES)


def parquet_with_bad_bytes(path: Path) -> None:
    """Parquet lets bytes pass that are not UTF-8."""
    good, bad = b"a good document", b"caf\xe9"
    offsets = pa.array([0, len(good), len(good + bad)], pa.int32()).buffers()[1]
    texts = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(good + bad)])
    pq.write_table(pa.table({"id": ["good", "bad"], "text": texts}), path)


@pytest.mark.parametrize(("kind", "streaming"), [("parquet", True), ("json", False)])
def test_a_run_goes_on_past_dirty_rows_and_reports_them(tmp_path: Path, kind: str, streaming: bool) -> None:
    tiny.write_data(tmp_path)
    prose = tmp_path / "prose.jsonl"
    prose.write_bytes(b"\n".join([*LINES, prose.read_bytes()]))
    content = tiny.recipe(tmp_path, evaluate={}, merge=False)
    del content["stages"][1]
    stage = content["stages"][0]
    stage |= {"max_dirty_share": "5%", "lanes": 2}
    if kind == "parquet":
        parquet_with_bad_bytes(tmp_path / "rows.parquet")
        stage["data"].append({"path": "parquet", "data_files": str(tmp_path / "rows.parquet"), "weight": 0.5})
        stage["data"][0]["weight"] = 0.5
        stage["max_dirty_share"] = 0.5
    for source in stage["data"]:
        source["streaming"] = streaming
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    facts = json.loads((tmp_path / "run" / "stages" / "prose" / "done.json").read_text())["data"]["sources"]
    report = (tmp_path / "run" / "report.md").read_text()
    if kind == "parquet":
        assert facts["1: parquet"]["dirty_ids"] == ["bad"]
        assert set(facts["1: parquet"]["dirty"]) == {"not UTF-8"}
    assert {"latin", "none", "blank", "number"} == set(facts["0: json"]["dirty_ids"])
    assert {"half", "control"} == set(facts["0: json"]["mended_ids"])
    assert "lone surrogates replaced" in report
    assert "latin" in report
    assert "control characters removed" in (tmp_path / "run" / "report.html").read_text()


def test_a_file_in_another_encoding_ends_the_run_and_says_how_to_read_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_data(tmp_path)
    (tmp_path / "latin.txt").write_bytes(("un nom\n" * 9 + "un café\n").encode("latin-1") * 20)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False)
    del content["stages"][1]
    content["stages"][0]["data"] = [{"path": "text", "data_files": str(tmp_path / "latin.txt")}]
    content["stages"][0]["training"]["max_steps"] = 40
    content["model"]["tokenizer"]["train"]["vocab_size"] = 262
    path = str(tiny.write(tmp_path, content))
    assert main(["run", path]) == 5
    error = capsys.readouterr().err
    assert "`encoding`" in error
    assert "row 9" in error
    content["stages"][0]["data"][0]["encoding"] = "latin-1"
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0


def test_a_suite_is_scored_as_anyone_would_read_it(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(LINES[:2]))
    data = {"path": "json", "data_files": str(tmp_path / "rows.jsonl"), "split": "train"}
    rows = suite_rows(Suite.model_validate({"data": data, "metrics": ["bits_per_byte"]}), 0)
    assert rows[0]["text"] == "caf\ufffd in latin-1"
    assert rows[1]["text"].startswith("half of \ufffd here")
