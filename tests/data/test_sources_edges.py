"""Edges of a source: nothing left, roles exchanged, conditions that would fill the memory, a Hub that refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hub_server import HubServer

from hfpipe.core.errors import DataError, MachineError, RecipeError
from hfpipe.data.cleaning.text_rules import Read, tidy_rows
from hfpipe.data.sources.load import friendly, load_rows
from hfpipe.recipe import Source

streamed = pytest.mark.parametrize("streaming", [False, True])


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"text": f"t{n}", "prompt": "p", "completion": "c", "n": n} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read(**words: Any) -> list[dict[str, Any]]:
        source = Source(path="json", data_files=str(tmp_path / "rows.jsonl"), **words)
        with friendly(source):
            return list(load_rows(source))

    return read


@streamed
@pytest.mark.parametrize("words", [{"skip": 4}, {"skip": 9, "take": 2}, {"skip": 4, "where": "n > 0"}])
def test_skipping_every_row_leaves_none(read: Any, words: dict[str, Any], streaming: bool) -> None:
    assert read(streaming=streaming, **words) == []


@streamed
def test_roles_may_be_exchanged(read: Any, streaming: bool) -> None:
    rows = read(columns={"prompt": "completion", "completion": "prompt"}, streaming=streaming)
    assert rows[0] == {"prompt": "c", "completion": "p"}


def test_a_condition_reckons_with_numbers_only(read: Any) -> None:
    with pytest.raises(DataError, match="only numbers"):
        read(where="[n] * 10000000000 == n")
    assert read(where="n * 1" + "0" * 400 + " + 0.5 > 1") == []


def test_an_operator_that_is_refused_is_shown(read: Any) -> None:
    with pytest.raises(RecipeError, match=r"'n \*\* 2'"):
        read(where="n ** 2 > 1")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"path": "https://huggingface.co/datasets/team/rows"}, "write the data set's name, 'team/rows'"),
        ({"path": "jsonl", "data_files": "rows.jsonl"}, "Did you mean json?"),
    ],
)
def test_a_path_that_is_nearly_right(words: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    with pytest.raises((RecipeError, MachineError), match=re.escape(says)):
        load_rows(Source(**words))


@streamed
def test_bytes_are_made_text_as_the_error_says(tmp_path: Path, streaming: bool) -> None:
    """Some programs write text into Parquet without saying that it is."""
    Dataset.from_list([{"text": "caf\u00e9".encode()}, {"text": b"caf\xe9"}]).to_parquet(tmp_path / "rows.parquet")
    words = {"path": "parquet", "data_files": str(tmp_path / "rows.parquet"), "streaming": streaming}
    with pytest.raises(DataError, match=re.escape('`template: {text: "{text}"}`')):
        load_rows(Source(**words))
    source, read = Source(**words, template={"text": "{text}"}), Read()
    assert [row["text"] for row in tidy_rows(load_rows(source), source, read)] == ["caf\u00e9"]
    assert read.dirty.counts == {"not UTF-8": 1}


@streamed
def test_damaged_files_are_bad_data(tmp_path: Path, streaming: bool) -> None:
    Dataset.from_list([{"text": f"t{n}"} for n in range(500)]).to_parquet(tmp_path / "rows.parquet")
    content = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(content[:100] + bytes(200) + content[300:])
    (tmp_path / "rows.json").write_text('[{"text": "a"}, {"text": "b"')
    for path in ("parquet", "json"):
        source = Source(path=path, data_files=str(tmp_path / f"rows.{path}"), streaming=streaming)
        with pytest.raises(DataError, match="cannot be read"), friendly(source):
            list(load_rows(source))


@streamed
def test_a_csv_file_without_a_header_is_named(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "0.csv").write_text("text\na\n")
    (tmp_path / "1.csv").write_text("")
    source = Source(path="csv", data_files=str(tmp_path / "*.csv"), streaming=streaming)
    with pytest.raises(DataError, match=r"1\.csv'? has not even a header"), friendly(source):
        list(load_rows(source))


CLIENT = """
import json, sys
from hfpipe.core.errors import UserError
from hfpipe.data.sources.load import load_rows
from hfpipe.recipe import Source
try:
    load_rows(Source(**json.loads(sys.argv[1])))
except UserError as error:
    print(json.dumps([error.exit_code, str(error)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "status", "env", "code", "says"),
    [
        ("team/rows", 401, {}, 4, "hf auth login"),
        ("team/rows", 403, {}, 4, "the Hub refuses it (403"),
        ("team/gated", 401, {}, 4, "is gated"),
        ("team/rows", None, {"HF_HUB_OFFLINE": "1"}, 4, "HF_HUB_OFFLINE is set"),
        (
            "./nowhere",
            None,
            {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
            2,
            "there is no such file or folder here",
        ),
    ],
)
def test_a_hub_that_refuses(
    hub: HubServer, tmp_path: Path, path: str, status: int | None, env: dict[str, str], code: int, says: str
) -> None:
    hub.add_repo("dataset", "team/gated" if path == "team/gated" else "team/rows", {"train.jsonl": b'{"text": "a"}\n'})
    if status is not None:
        gated = {"X-Error-Code": "GatedRepo"} if path == "team/gated" else {}
        hub.fail("/resolve/", status=status, times=50, **gated)
    command = [sys.executable, "-c", CLIENT, json.dumps({"path": path})]
    env = os.environ | hub.env(tmp_path) | env
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found[0] == code
    assert says in found[1]


@pytest.mark.parametrize("sign", ["\t", ";", "|"])
def test_cells_that_another_sign_divides_are_told_the_word_for_it(sign: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"prompt{sign}completion\nA{sign}B\nC{sign}D\n")
    with pytest.raises(DataError, match="delimiter") as told:
        load_rows(Source(path="csv", data_files=str(path)), kinds=("prompt_completion",))
    written = re.search(r'`delimiter: "(.+?)"`', str(told.value))
    assert written
    given = Source(path="csv", data_files=str(path), delimiter=written[1].encode().decode("unicode_escape"))
    assert [row["completion"] for row in load_rows(given, kinds=("prompt_completion",))] == ["B", "D"]


def test_a_file_has_the_one_split_train(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    for source in (Source(path=str(path), split="test"), Source(path="json", data_files=str(path), split="test")):
        with pytest.raises(RecipeError, match="leave `split` out"):
            load_rows(source)


def test_a_json_file_of_null_is_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("null")
    with pytest.raises(DataError, match="holds null"):
        load_rows(Source(path=str(path)))


def test_the_whole_disk_is_no_source() -> None:
    for path in ("/", "/tmp/.."):
        with pytest.raises(RecipeError, match="is the whole disk"):
            load_rows(Source.model_validate({"path": path, "data_files": "rows.jsonl", "columns": {"text": "text"}}))
