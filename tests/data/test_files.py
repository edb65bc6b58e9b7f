"""A path is enough: files of every kind, encoding and delimiter, folders of several kinds, and names that are wrong."""

from __future__ import annotations

import bz2
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import zstandard
from datasets import Dataset

from hfpipe.cli import main
from hfpipe.core.errors import RecipeError
from hfpipe.data.sources.load import load_rows, open_source
from hfpipe.recipe import Source

ROWS = [
    {"prompt": f"Is {n} even?", "completion": "Yes; it is." if n % 2 == 0 else "No, \u00e9tonnant."} for n in range(6)
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
streamed = pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])


def table(sign: str) -> str:
    def cell(text: str) -> str:
        return f'"{text}"' if sign in text else text

    return "".join(
        f"{cell(one)}{sign}{cell(other)}\n" for one, other in [("prompt", "completion"), *(r.values() for r in ROWS)]
    )


CHINESE = [("\u95ee\u9898", "\u56de\u7b54"), ("\u4e00\u52a0\u4e00\u7b49\u4e8e\u51e0", "\u7b49\u4e8e\u4e8c")]
FILES: dict[str, bytes] = {
    "a.jsonl": LINES.encode(),
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "wide.jsonl": LINES.encode("utf-16"),
    "latin.csv": table(",").encode("latin-1"),
    "a.csv": table(",").encode(),
    "semicolons.csv": table(";").encode("utf-8-sig"),
    "bars.csv": table("|").encode(),
    "a.tsv": table("\t").encode(),
    "wide.tsv": table("\t").encode("utf-16"),
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "a.jsonl.zst": zstandard.compress(LINES.encode()),
    "a.csv.bz2": bz2.compress(table(",").encode()),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@streamed
@pytest.mark.parametrize("name", [*FILES, "a.parquet", "saved"])
def test_a_path_reads_a_file_of_any_kind(name: str, streaming: bool) -> None:
    if name == "a.parquet":
        Dataset.from_list(ROWS).to_parquet(name)
    elif name == "saved":
        Dataset.from_list(ROWS).save_to_disk(name)
    else:
        Path(name).write_bytes(FILES[name])
    assert list(load_rows(Source(path=name, streaming=streaming))) == ROWS


def test_the_words_of_a_language_are_read_in_its_own_encoding() -> None:
    for encoding, told in (("gbk", "gb18030"), ("utf-8", ""), ("utf-16", "utf-16")):
        Path("zh.csv").write_bytes("prompt,completion\n".encode(encoding) + _plain(CHINESE * 20, encoding))
        opened = open_source(Source(path="zh.csv"))
        assert next(iter(opened.rows)) == {"prompt": CHINESE[0][0], "completion": CHINESE[0][1]}
        assert told in opened.taken.files
    Path("de.txt").write_bytes(
        "Der K\u00e4se ist gr\u00fcn, die T\u00fcr ist zu. Stra\u00dfe \u00fcber M\u00fcnchen.\n".encode("latin-1") * 9
    )
    [row] = load_rows(Source(path="de.txt"))
    assert row["text"].startswith("Der K\u00e4se ist gr\u00fcn")


def _plain(rows: list[tuple[str, str]], encoding: str) -> bytes:
    return "".join(f"{one},{other}\n" for one, other in rows).encode(encoding).removeprefix(b"\xff\xfe")


@streamed
def test_prose_is_a_document_unless_the_recipe_parts_it(streaming: bool) -> None:
    text = "One line.\nAnother.\n\nA new paragraph.\n"
    Path("a.txt").write_text(text)
    for by, count in ((None, 1), ("document", 1), ("paragraph", 2), ("line", 4)):
        words = {} if by is None else {"sample_by": by}
        assert len(list(load_rows(Source(path="a.txt", streaming=streaming, **words)))) == count
    long = "word and more\n" * 200_000
    Path("a.txt").write_text(long)
    parts = [row["text"] for row in load_rows(Source(path="a.txt", streaming=streaming))]
    assert "".join(parts) == long
    assert len(parts) > 1
    assert max(map(len, parts)) <= 2_000_000


@streamed
def test_a_folder_of_several_kinds_is_read_whole_and_resumes(streaming: bool) -> None:
    Path("mixed/deep").mkdir(parents=True)
    Path("mixed/a.txt").write_text("prose\nof two lines")
    Path("mixed/deep/b.md").write_text("# more")
    Path("mixed/c.jsonl").write_text('{"text": "row 1", "id": "x"}\n{"text": "row 2", "id": "y"}\n')
    Path("mixed/d.csv").write_text("text;n\nfirst;1\nsecond;2\n")
    Path("mixed/README.md").write_text("about the data")
    source = Source(path="mixed", streaming=streaming)
    opened = open_source(source)
    texts = [row["text"] for row in opened.rows]
    assert sorted(texts) == ["# more", "first", "prose\nof two lines", "row 1", "row 2", "second"]
    for word in ("2 text files, a row each document", "1 json file", "1 csv file (sep ';')"):
        assert word in str(opened.taken)
    assert [row["text"] for row in load_rows(Source(path="mixed", streaming=streaming, skip=1, take=3))] == texts[1:4]
    if streaming:
        begun = iter(opened.rows)
        first = [next(begun)["text"] for _ in range(3)]
        again = load_rows(source)
        again.load_state_dict(opened.rows.state_dict())
        assert first + [row["text"] for row in again] == texts
    Path("mixed/e.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    Path("mixed/c.jsonl").unlink()
    with pytest.raises(RecipeError, match="do not come to one format"):
        load_rows(source)


@streamed
def test_a_folder_with_a_link_to_itself_is_read_once(streaming: bool) -> None:
    Path("data/deep").mkdir(parents=True)
    Path("data/deep/a.jsonl").write_text(LINES)
    Path("data/deep/above").symlink_to("..")
    assert len(list(load_rows(Source(path="data", streaming=streaming)))) == 6


def test_the_one_split_of_a_file_serves_a_suite_and_no_other_does() -> None:
    Path("a.jsonl").write_text(LINES)
    assert len(list(load_rows(Source(path="a.jsonl"), default_split="test"))) == 6
    assert len(list(load_rows(Source(path="a.jsonl", split="train[:50%]")))) == 3
    with pytest.raises(RecipeError, match="leave `split` out"):
        load_rows(Source(path="a.jsonl", split="test"))
    Path("both").mkdir()
    for name in ("train", "test"):
        Path(f"both/{name}.jsonl").write_text(json.dumps({"text": name}))
    assert [row["text"] for row in load_rows(Source(path="both"), default_split="test")] == ["test"]


def test_home_variables_and_patterns_are_replaced(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    Path("data").mkdir()
    Path("data/a [1].jsonl").write_text(LINES)
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("MY_DATA", str(here / "data"))
    for path in ("~/data/*.jsonl", "${MY_DATA}/a [1].jsonl", "$MY_DATA", "data/"):
        assert len(list(load_rows(Source(path=path)))) == 6
    assert len(list(load_rows(Source(path="json", data_files="${MY_DATA}/*.jsonl")))) == 6
    with pytest.raises(RecipeError, match="the variable NOT_SET is not set"):
        load_rows(Source(path="${NOT_SET}/a.jsonl"))


def test_a_misspelt_path_is_told_with_its_neighbours_and_never_asked_of_the_hub(here: Path, capsys: Any) -> None:
    Path("train.jsonl").write_text(LINES)
    recipe = "name: x\nmodel: {{id: {}}}\nstages: [{{name: s, kind: sft, data: [{{path: {}}}]}}]\n"
    for path, said in (
        ("trian.jsonl", "near it is train.jsonl"),
        ("data/*.csv", "no such file"),
        ("./x", "no such file"),
    ):
        with pytest.raises(RecipeError, match="there is no such file or folder here") as caught:
            load_rows(Source(path=path))
        assert said in str(caught.value)
    Path("x.dat").write_text(LINES)
    with pytest.raises(RecipeError, match="ends in none of"):
        load_rows(Source(path="x.dat"))
    Path("recipe.yaml").write_text(recipe.format("none", "train.jsonl"))
    assert main(["check", "--fast", "recipe.yaml"]) == 0
    assert os.listdir(here / "cache" if (here / "cache").exists() else here)
