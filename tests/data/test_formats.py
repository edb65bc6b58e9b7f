"""Every form of a source, streamed or not: each document once, also after a resume; mistakes leave nothing."""

import csv
import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny
from datasets import Dataset, DatasetDict, disable_progress_bars
from pyarrow import parquet

from hfpipe.cli import main
from hfpipe.core.upstream import tables_of
from hfpipe.data.sources import sharded_files
from hfpipe.data.sources.load import load_rows
from hfpipe.data.stream.dataset import TokenStream
from hfpipe.data.tokenize import IGNORED
from hfpipe.model.create import train_tokenizer
from hfpipe.recipe import Source

ROWS = [{"id": f"d{n}", "text": f"{n} of many: " + "so it goes, " * (n % 7), "n": n} for n in range(90)]
COLUMNS = ["id", "text", "n"]
FORMS = ["parquet", "json", "json.gz", "json.zst", "csv", "text", "folder", "saved", "saved splits"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer((row["text"] for row in ROWS), 300, 128)


def write(form: str, folder: Path) -> dict[str, Any]:
    """Writes the rows in three files, one empty where the form allows it, and gives the source's words."""
    disable_progress_bars()
    parts = [ROWS[:50], [], ROWS[50:]]
    lines = ["".join(json.dumps(row) + "\n" for row in part).encode() for part in parts]
    if form.startswith("saved"):
        table = Dataset.from_list(ROWS)
        (table if form == "saved" else DatasetDict({"train": table})).save_to_disk(folder / "saved")
        return {"path": str(folder / "saved")}
    kind, _, packed = form.partition(".")
    if kind == "folder":
        folder = folder / "rows"
        folder.mkdir()
    for number, part in enumerate(parts):
        path = folder / f"{number}.{kind if kind != 'folder' else 'jsonl'}"
        if kind == "parquet":
            table = pa.Table.from_pylist(part, schema=pa.Table.from_pylist(ROWS).schema)
            parquet.write_table(table, path, row_group_size=20)  # of no rows: a row group of none
        elif kind == "text":
            path.write_text("".join(row["text"] + "\n" for row in part))
        elif kind == "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(part)
        elif packed == "gz":
            Path(f"{path}.gz").write_bytes(gzip.compress(lines[number]))
        elif packed == "zst":
            zstandard = pytest.importorskip("zstandard")
            Path(f"{path}.zst").write_bytes(zstandard.compress(lines[number]))
        elif part or kind != "folder":
            path.write_bytes(lines[number])
    if kind == "folder":
        return {"path": str(folder)}
    return {"path": kind, "data_files": str(folder / f"*.{form}")}


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
@pytest.mark.parametrize("form", FORMS)
def test_each_document_once_and_the_same_rows_after_a_resume(
    tmp_path: Path, tokenizer: Any, form: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = Source(**write(form, tmp_path), streaming=streaming)

    def opened() -> TokenStream:
        options = {"max_length": 32, "lanes": 4, "window_documents": 8, "exhausted": "stop", "seed": 3}
        return TokenStream([load_rows(source)], tokenizer, origins=[source], **options)

    stream, states, rows = opened(), [], []
    for (row,) in stream.batches(1):
        rows.append(row)
        states.append(json.loads(json.dumps(stream.state_dict())))
    found: Counter[str] = Counter()
    for lane in range(4):
        ids: list[int] = []
        for row in rows[lane::4]:
            end = ((row["labels"] != IGNORED) | (row["position_ids"] == 0)).nonzero()[0][-1] + 1
            ids += row["input_ids"][:end].tolist()
        found.update(filter(None, tokenizer.decode(ids).split(tokenizer.eos_token)))
    strip = str.strip if form in ("text", "csv") else str
    assert Counter(map(strip, found.elements())) == Counter(strip(row["text"]) for row in ROWS)
    for stop in (1, len(rows) // 2, len(rows) - 3):
        again = opened()
        again.load_state_dict(states[stop])
        rest = [row["input_ids"].tolist() for (row,) in again.batches(1)]
        assert rest == [row["input_ids"].tolist() for row in rows[stop + 1 :]]


def row_groups(folder: Path) -> Source:
    for number in range(3):
        table = Dataset.from_list([{"text": f"{number}.{n}"} for n in range(100)])
        table.to_parquet(folder / f"{number}.parquet", batch_size=10)
    return Source(path="parquet", data_files=str(folder / "*.parquet"), streaming=True)


@pytest.mark.parametrize("skip", [5, 150])
@pytest.mark.parametrize("lanes", [2, 8])
def test_skip_leaves_out_the_first_rows_of_parquet_files_however_many_lanes(
    tmp_path: Path, lanes: int, skip: int
) -> None:
    source = row_groups(tmp_path)
    held_out = [row["text"] for row in load_rows(source.model_copy(update={"take": skip}))]
    assert held_out == [f"{n // 100}.{n % 100}" for n in range(skip)]
    rest = load_rows(source.model_copy(update={"skip": skip}))
    trained = [row["text"] for lane in range(lanes) for row in rest.shard(num_shards=lanes, index=lane)]
    assert len(set(trained)) == len(trained)
    assert not set(trained) & set(held_out)
    everything = [row["text"] for lane in range(lanes) for row in load_rows(source).shard(lanes, lane)]
    assert sorted(everything) == sorted(f"{number}.{n}" for number in range(3) for n in range(100))


def test_a_resume_in_a_parquet_file_reads_no_row_group_before_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    def recorded(builder: Any) -> Any:
        def tables(files: Any, row_groups_list: Any) -> Any:
            asked.extend(row_groups_list)
            return tables_of(builder)(files, row_groups_list)

        return tables

    monkeypatch.setattr(sharded_files, "tables_of", recorded)
    rows = load_rows(row_groups(tmp_path))
    begun = iter(rows)
    read = [next(begun)["text"] for _ in range(175)]
    state = rows.state_dict()
    asked.clear()
    again = load_rows(row_groups(tmp_path))
    again.load_state_dict(state)
    assert [*read, *(row["text"] for row in again)] == [f"{n // 100}.{n % 100}" for n in range(300)]
    assert asked == [(7, 8, 9), tuple(range(10))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ({"data_files": {"train": "prose.jsonl", "test": "held.jsonl"}, "split": "tset"}, 2, "allowed: train, test"),
        ({"data_files": "sounds.jsonl", "streaming": True}, 5, "columns id, animal, sound, note"),
        ({"data_files": "prose.jsonl", "weight": -1}, 2, "above 0"),
        ({"path": "someone/missing", "streaming": True}, 4, "is not in the cache, and HF_HUB_OFFLINE is set"),
    ],
    ids=["split", "column", "weight", "network"],
)
def test_a_mistake_leaves_nothing_that_stands_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, words: dict[str, Any], code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False)
    content["stages"] = content["stages"][:1]
    content["stages"][0]["training"]["max_steps"] = 1
    good = content["stages"][0]["data"]
    content["stages"][0]["data"] = [{"path": "json", **words}]
    assert main(["run", str(tiny.write(tmp_path, content))]) == code
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert not list((tmp_path / "run").glob("stages/*/*"))
    content["stages"][0]["data"] = good
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    assert sorted(path.name for path in (tmp_path / "run" / "stages").iterdir()) == ["base", "prose"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells no peak of memory")
def test_a_large_parquet_file_becomes_a_table_in_flat_memory(tmp_path: Path) -> None:
    """A process holds at most 200 MB more of a file of 240 MB than of a small one."""
    draw = np.random.default_rng(0)
    for name, groups in (("small", 1), ("large", 160)):
        schema = pa.schema({"text": pa.string()})
        with parquet.ParquetWriter(tmp_path / f"{name}.parquet", schema, compression="none") as file:
            for _ in range(groups):
                file.write_table(pa.table({"text": [draw.bytes(1_500).hex() for _ in range(500)]}))
    command = [sys.executable, "-c", PEAK_OF_LOADING, str(tmp_path / "small.parquet"), str(tmp_path / "large.parquet")]
    small, large = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert large - small < 200, (small, large)


PEAK_OF_LOADING = """
import json, sys
from pathlib import Path

from hfpipe.data.sources.load import load_rows
from hfpipe.recipe import Source

peaks = []
for path in sys.argv[1:]:
    load_rows(Source.model_validate({"path": path}))
    lines = Path("/proc/self/status").read_text().splitlines()
    peaks.append(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024)
print(json.dumps(peaks))
"""
