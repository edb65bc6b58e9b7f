"""Values of a file are trained on and compared as they stand in it: none changes its text on the way."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from hfpipe.cli import main
from hfpipe.data.labels import plain_labels
from hfpipe.data.sources.load import load_rows
from hfpipe.evaluation.suites import suite_rows
from hfpipe.recipe import Source, Suite

NUMBERS = ["1", "1000000", "-7", "0", "0.5", "0.50", "1.0", "-0.25", "1e3", "1E-5", "0.00001", "12345678901234567890"]
NUMBERS += [
    "9007199254740993",
    "10000000000000000000000000",
    "3.141592653589793238",
    "100.0",
    "-0",
    "123456789012345.5",
]
TEXTS = [
    "2024-01-01",
    "2024-01-01T10:00:00Z",
    "10:30",
    "NA",
    "null",
    "None",
    "nan",
    "true",
    "False",
    "007",
    "+5",
    " 5 ",
]
streamed = pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
TEMPLATE = {"prompt": "{q}:", "completion": " {a}"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def answers(path: Path, kind: str, **words: Any) -> list[str | None]:
    source = Source(path=kind, data_files=str(path), template=TEMPLATE, **words)
    rows = list(load_rows(source))
    return [None if row["completion"] is None else row["completion"][1:] for row in rows]


@streamed
@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "with others"])
def test_json_keeps_texts_and_numbers_as_they_are_written(tmp_path: Path, streaming: bool, mixed: bool) -> None:
    groups = [[number] for number in NUMBERS] if not mixed else [NUMBERS, ["1", "2.5"], ["1", "null", "3"]]
    for values in groups:
        lines = [f'{{"q": "which", "a": {value}}}' for value in values]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        wanted = [None if value == "null" else value for value in values]
        assert answers(tmp_path / "rows.jsonl", "json", streaming=streaming) == wanted
    for values in [[text] for text in TEXTS] if not mixed else [TEXTS]:
        (tmp_path / "rows.json").write_text(json.dumps([{"q": "which", "a": text} for text in values]))
        assert answers(tmp_path / "rows.json", "json", streaming=streaming) == values


@streamed
@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "with others"])
def test_csv_keeps_cells_as_they_are_written(tmp_path: Path, streaming: bool, mixed: bool) -> None:
    groups = [[one] for one in NUMBERS + TEXTS]
    if mixed:
        groups = [NUMBERS, TEXTS, NUMBERS + TEXTS, ["1"] * 99 + [""] + ["2"] * 99, ["0.5", "", "1"]]
    for values in groups:
        (tmp_path / "rows.csv").write_text("q,a\n" + "".join(f"which,{value}\n" for value in values))
        wanted = [value or None for value in values]
        assert answers(tmp_path / "rows.csv", "csv", streaming=streaming) == wanted
    (tmp_path / "rows.csv").write_text("q,a\nwhich,1\n,NA\n")
    read = load_rows(Source(path="csv", data_files=str(tmp_path / "rows.csv"), template=TEMPLATE, keep_default_na=True))
    assert [row["completion"] for row in read] == [" 1", None]  # pandas' own words have their effect


def test_a_late_row_changes_the_type_of_no_earlier_one(tmp_path: Path) -> None:
    """In a stream of many parts, compressed too, and in a table of several files."""
    values = [str(n) for n in range(4000)] + ["0.50", "007"]
    for number, part in enumerate((values[:3000], values[3000:])):
        (tmp_path / f"{number}.csv").write_text("q,a\n" + "".join(f"w,{value}\n" for value in part))
        lines = [f'{{"q": "w", "a": {value if value != "007" else 7}}}' for value in part]
        (tmp_path / f"{number}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    for streaming in (False, True):
        assert answers(tmp_path / "*.csv", "csv", streaming=streaming, chunksize=100) == values
        found = answers(tmp_path / "*.jsonl.gz", "json", streaming=streaming, chunksize=1000)
        assert found == [*values[:-1], "7"]


@streamed
def test_a_condition_takes_a_number_that_is_kept_as_text(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "rows.csv").write_text("text,price\na,0.50\nb,2\nc,\nd,10\n")
    words = {"path": "csv", "data_files": str(tmp_path / "rows.csv"), "streaming": streaming}
    for condition, kept in (("price > 1", "bd"), ("price * 2 == 1", "a"), ("price in [2, 10]", "bd")):
        assert "".join(row["text"] for row in load_rows(Source(**words, where=condition))) == kept
    assert [row["text"] for row in load_rows(Source(**words, where="price == '0.50'"))] == ["a"]


def test_labels_and_right_answers_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("sentence,label\na,01\nb,02\nc,\n")
    source = Source(path="csv", data_files=str(tmp_path / "rows.csv"))
    rows, _ = plain_labels(load_rows(source), "rows.csv")
    assert [row["label"] for row in rows] == ["01", "02", None]
    (tmp_path / "rows.csv").write_text("sentence,label\na,1\nb,2\nc,\n")
    rows, _ = plain_labels(load_rows(source), "rows.csv")
    assert [row["label"] for row in rows] == ["1", "2", None]
    for numbers in ("0.5", "0.50", "1", "-2.25"):
        (tmp_path / "rows.csv").write_text(f"sentence,label\na,{numbers}\nb,0.5\nc,\n")
        rows, _ = plain_labels(load_rows(source), "rows.csv")
        assert [row["label"] for row in rows] == [float(numbers), 0.5, None]
    (tmp_path / "asked.jsonl").write_text('{"prompt": "when", "completion": "2024-01-01"}\n')
    data = {"path": "json", "data_files": str(tmp_path / "asked.jsonl")}
    [row] = suite_rows(Suite.model_validate({"data": data, "metrics": ["exact_match"]}))
    assert row["completion"] == "2024-01-01"


def test_a_file_of_nothing_is_bad_data_and_no_fault_of_ours(tmp_path: Path, capsys: Any) -> None:
    recipe = "name: x\nmodel: {{id: none}}\nstages: [{{name: s, kind: sft, data: [{{path: json, data_files: {}}}]}}]\n"
    for number, content in enumerate(("null", "5", '"text"', "[1, 2]", "{}", "[[1]]")):
        file = tmp_path / f"{number}.json"
        file.write_text(content)
        (tmp_path / "recipe.yaml").write_text(recipe.format(file))
        source = Source(path="json", data_files=str(file))
        with pytest.raises(Exception, match=f"{number}.json") as caught:
            load_rows(source)
        assert getattr(caught.value, "exit_code", None) == 5, content
    assert main(["check", "--fast", str(tmp_path / "recipe.yaml")]) == 0


def test_a_file_that_is_one_value_gives_its_rows(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    for content in (rows, {"data": rows}, {"text": ["a", "b"]}, {"text": {"0": "a", "1": "b"}}, ["a", "b"]):
        (tmp_path / "rows.json").write_text(json.dumps(content, indent=1))
        assert list(load_rows(Source(path="json", data_files=str(tmp_path / "rows.json")))) == rows
    (tmp_path / "rows.json").write_text(json.dumps({"version": 1, "data": rows, "more": []}))
    assert list(load_rows(Source(path="json", data_files=str(tmp_path / "rows.json"), field="data"))) == rows
