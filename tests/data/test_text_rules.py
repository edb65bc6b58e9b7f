"""Dirty rows: left out, cut or mended by rule, and reported with their ids; files that are not UTF-8 to the end."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from hub_server import HubServer

from hfpipe.cli import main
from hfpipe.core.errors import DataError
from hfpipe.data.cleaning.text_rules import Read, finding, judge, tidy, tidy_row, tidy_rows
from hfpipe.data.sources.load import load_rows
from hfpipe.evaluation.suites import suite_rows
from hfpipe.recipe import Source, Suite

LINES = [
    b'{"id": "latin", "text": "caf\xe9 in latin-1"}',
    b'{"id": "half", "text": "half of \\ud83d here, all of \\ud83d\\ude00 there, and \\\\ud83d is no escape"}',
    b'{"id": "control", "text": "nul \\u0000 and \\u001b, but tab\\tand\\nline"}',
    b'{"id": "raw", "text": "not \x02 escaped"}',
    b'{"id": "digits", "text": "12"}',
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
@pytest.mark.parametrize("form", ["file", "gzip", "folder", "list"])
def test_every_row_of_a_dirty_file_is_accounted_for(tmp_path: Path, form: str, streaming: bool) -> None:
    file = tmp_path / {"gzip": "rows.jsonl.gz", "list": "rows.json"}.get(form, "rows.jsonl")
    content = b"[" + b",\n".join(LINES) + b"]" if form == "list" else b"\n".join(LINES)
    file.write_bytes(gzip.compress(content) if form == "gzip" else content)
    words = {"path": str(tmp_path)} if form == "folder" else {"path": "json", "data_files": str(file)}
    source = Source(**words, streaming=streaming)
    read = Read()
    texts = [row["text"] for row in tidy_rows(load_rows(source), source, read)]
    half = "half of \ufffd here, all of \U0001f600 there, and \\ud83d is no escape"
    assert texts == [half, "nul  and , but tab\tand\nline", "not  escaped", "12"]
    assert read.dirty.counts == {"not UTF-8": 1, "missing": 1, "empty": 1, "not a text": 1}
    assert read.dirty.ids == ["latin", "none", "blank", "number"]
    assert read.mended.counts == {"lone surrogates replaced": 1, "control characters removed": 2}
    assert read.mended.ids == ["half", "control", "raw"]
    assert read.rows == len(LINES)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_number_among_texts_costs_one_row_wherever_it_stands(tmp_path: Path, streaming: bool) -> None:
    """`datasets` reads JSON in parts, takes the columns from the first, and makes JSON of a part that does not fit."""
    texts = [f'{n} "quoted"\n and so on' for n in range(2000)]
    rows = [{"text": text} for text in texts]
    rows[1500] = {"text": 1500}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = {"path": "json", "data_files": str(tmp_path / "rows.jsonl"), "chunksize": 1 << 14}
    source, read = Source(**words, streaming=streaming), Read()
    kept = [row["text"] for row in tidy_rows(load_rows(source), source, read)]
    assert kept == texts[:1500] + texts[1501:]
    assert (read.rows, len(read.dirty), read.dirty.ids) == (2000, 1, ["row 1500"])
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "{}"}] for text in texts]
    turns[1500][0]["content"] = ["a", "list"]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": one}) for one in turns))
    rows = load_rows(Source(**words, streaming=streaming))
    assert [row["messages"] for row in rows] == turns
    read = Read()
    assert len(list(tidy_rows(rows, source, read))) == 1999
    assert (read.dirty.ids, read.dirty.counts) == (["row 1500"], {"not a text": 1})


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("numbers", [False, True])
def test_a_line_that_is_no_json_costs_its_row(tmp_path: Path, streaming: bool, numbers: bool) -> None:
    lines = [json.dumps({"id": f"d{n}", "text": f"{n} and so on"}) for n in range(300)]
    lines[100], lines[-1] = "no row", lines[-1][:17]
    if numbers:  # so that the column is of several types
        lines[50] = '{"id": "number", "text": 50}'
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    source, read = Source(path="json", data_files=str(tmp_path / "rows.jsonl"), streaming=streaming), Read()
    texts = [row["text"] for row in tidy_rows(load_rows(source), source, read)]
    dirty = [50] * numbers + [100, 299]
    assert texts == [f"{n} and so on" for n in range(300) if n not in dirty]
    assert read.dirty.counts == {"missing": 2} | ({"not a text": 1} if numbers else {})
    assert read.dirty.ids == ["number"] * numbers + ["row 100", "row 299"]


CLIENT = """
import json, sys
from datasets import config
from hfpipe.data.cleaning.text_rules import Read, tidy_rows
from hfpipe.data.sources.load import load_rows
from hfpipe.recipe import Source
found = {}
for name in sys.argv[2:]:
    source, read = Source(path=name, streaming=sys.argv[1] == "streamed"), Read()
    texts = [row["text"] for row in tidy_rows(load_rows(source), source, read)]
    found[name] = [texts, read.rows, read.dirty.ids, sorted(read.mended.counts)]
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.long
def test_one_bad_byte_costs_its_row_in_a_data_set_of_the_hub_too(tmp_path: Path, hub: HubServer) -> None:
    """Streamed, as a table, and from the cache without a network."""
    lines = [b"one line", b"caf\xe9", b"\xc3\xa9 and \x01 more"]
    good = ["one line", "\u00e9 and  more"]
    whole = b"".join(b'{"text": "%s"}\n' % line for line in lines)
    repos = {
        "team/lines": ({"data.jsonl": whole}, good),
        "team/list": ({"train.json": b"[" + whole.strip().replace(b"\n", b",") + b"]"}, good),
        "team/prose": ({"data/train.txt": b"\n".join(lines)}, good),
        "team/table": ({"data/train.csv": b"\n".join([b"text", *lines])}, good),
        "team/latin": (
            {
                "README.md": b"---\nconfigs:\n- config_name: default\n  data_files: a.txt\n  encoding: latin-1\n---\n",
                "a.txt": b"caf\xe9",
            },
            ["caf\u00e9"],
        ),
    }
    for name, (files, _) in repos.items():
        hub.add_repo("dataset", name, files)
    env = os.environ | hub.env(tmp_path) | {"OMP_NUM_THREADS": "1"}
    for mode in ("streamed", "table", "cached"):
        if mode == "cached":
            env["HF_HUB_OFFLINE"] = "1"
        command = [sys.executable, "-c", CLIENT, mode, *repos]
        done = subprocess.run(command, env=env, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        for name, (texts, rows, dirty, mended) in json.loads(done.stdout).items():
            assert texts == repos[name][1], (mode, name)
            assert (rows, dirty) == ((3, ["row 1"]) if len(texts) == 2 else (1, [])), (mode, name)
            assert mended == ["control characters removed"][: len(texts) - 1], (mode, name)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["file", "gzip"])
def test_lines_paragraphs_and_documents_are_read_past_bad_bytes(tmp_path: Path, form: str, streaming: bool) -> None:
    texts = ["one\ntwo\n\n\nthree\n\nfour", "caf\u00e9\r\n\r\nfive\rsix\n\n"]
    for number, text in enumerate(texts):
        file = tmp_path / f"{number}.txt{'.gz' if form == 'gzip' else ''}"
        content = text.encode("latin-1" if number else "utf-8")
        file.write_bytes(gzip.compress(content) if form == "gzip" else content)
    wanted = {
        "line": ["one", "two", "three", "four", "five", "six"],
        "paragraph": ["one\ntwo", "\nthree", "four", "five\nsix"],
        "document": [texts[0]],
    }
    for by, rows in wanted.items():
        words = {"path": "text", "data_files": str(tmp_path / "*.txt*"), "streaming": streaming, "sample_by": by}
        read = Read()
        assert [row["text"] for row in tidy_rows(load_rows(Source(**words)), Source(**words), read)] == rows
        assert read.dirty.counts["not UTF-8"] == 1
    words["encoding"] = "latin-1"
    assert [row["text"] for row in load_rows(Source(**words))][1].startswith("caf\u00e9\n\nfive")


def test_dirt_is_judged_over_all_ranks_together() -> None:
    """Four of 800 rows are dirty, all in the part of one of the ranks."""

    def lane(rows: int, dirty: int, epochs: int = 1) -> dict:
        return {"rows": rows, "epochs": epochs, "tokens": 9, "dirty": {"empty": dirty}, "dirty_ids": [f"d{dirty}"]}

    source = Source(path="json")
    ranks = [finding([lane(100, 4), lane(100, 0)], whole=True), *[finding([lane(300, 0)], whole=True)] * 2]
    judge(source, ranks, 0.01)
    with pytest.raises(DataError, match="4 of 800 rows"):
        judge(source, ranks, 0.004)
    begun = finding([lane(100, 4, epochs=0)], whole=False)
    judge(source, [begun] * 9, 0.01)
    with pytest.raises(DataError, match="40 of 1,000 rows"):
        judge(source, [begun] * 10, 0.01)


def parquet_with_bad_bytes(path: Path) -> None:
    """Parquet lets bytes pass that are not UTF-8."""
    good, bad = b"a good document", b"caf\xe9"
    offsets = pa.array([0, len(good), len(good + bad)], pa.int32()).buffers()[1]
    texts = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(good + bad)])
    pq.write_table(pa.table({"id": ["good", "bad"], "text": texts}), path)


@pytest.mark.slow
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
    assert {"half", "control", "raw"} == set(facts["0: json"]["mended_ids"])
    assert "lone surrogates replaced" in report
    assert "latin" in report
    assert "control characters removed" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
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
    rows = suite_rows(Suite.model_validate({"data": data, "metrics": ["bits_per_byte"]}))
    assert rows[0]["text"] == "caf\ufffd in latin-1"
    assert rows[1]["text"].startswith("half of \ufffd here")
