"""A stream whose server fails while it is read goes on without losing or repeating a document, or ends honestly."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetInfo, Features, IterableDataset, Value, disable_progress_bars
from datasets.iterable_dataset import ArrowExamplesIterable
from hub_server import HubServer

from hfpipe.data.sources.batches import rows_of
from hfpipe.model.create import train_tokenizer
from hfpipe.recipe import Source

CARD = b"---\nconfigs:\n- config_name: sample\n  data_files:\n  - split: train\n    path: data/*\n---\n"
FILES, ROWS = 16, 30
CLIENT = """
import json, sys, time
import huggingface_hub.utils._http, datasets.utils.file_utils
from transformers import AutoTokenizer
from hfpipe.data.sources import retry
from hfpipe.data.sources.load import load_rows
from hfpipe.data.stream.dataset import TokenStream
from hfpipe.core.errors import UserError
from hfpipe.recipe import Source

class Quick:  # the libraries' own waits, which come before ours
    def __getattr__(self, name):
        return getattr(time, name)
    def sleep(self, seconds):
        time.sleep(min(seconds, 0.05))

huggingface_hub.utils._http.time = datasets.utils.file_utils.time = Quick()
retry.FIRST_WAIT_SECONDS, retry.PATIENCE_SECONDS = 0.1, float(sys.argv[1])
source = Source(path="team/web", name="sample", streaming=True)
stream = TokenStream([load_rows(source)], AutoTokenizer.from_pretrained("tokenizer"), max_length=32, lanes=4, seed=1,
                     origins=[source], window_documents=10, exhausted="stop")
print("open", flush=True)
sys.stdin.readline()
lanes = [[] for _ in range(4)]
try:
    for number, (row,) in enumerate(stream.batches(1)):
        lanes[number % 4] += row["input_ids"][: len(row["labels"])].tolist()
        if number == 40:
            print("begun", flush=True)
            sys.stdin.readline()
except UserError as error:
    print(json.dumps([error.exit_code, str(error)]))
else:
    print(json.dumps(lanes))
"""


def documents() -> list[dict]:
    return [{"id": f"d{n}", "text": f"{n} of the web " + "and so on " * (n % 9)} for n in range(FILES * ROWS)]


@pytest.fixture(params=["Parquet", "JSON lines"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, hub: HubServer) -> Path:
    disable_progress_bars()
    rows, files = documents(), {"README.md": CARD}
    lines = request.param == "JSON lines"
    for number in range(2 if lines else FILES):
        if lines:  # read in pieces, which lanes share
            files["README.md"] = CARD.removesuffix(b"---\n") + b"  chunksize: 2000\n---\n"
            files[f"data/{number}.jsonl"] = "\n".join(map(json.dumps, rows[number::2])).encode()
            continue
        Dataset.from_list(rows[number::FILES]).to_parquet(tmp_path / "shard.parquet", batch_size=10)
        files[f"data/{number:02}.parquet"] = (tmp_path / "shard.parquet").read_bytes()
    hub.add_repo("dataset", "team/web", files)
    train_tokenizer((row["text"] for row in rows), 300, 128).save_pretrained(tmp_path / "tokenizer")
    return tmp_path


@pytest.mark.parametrize("columns", [None, Features({"n": Value("int64")})], ids=["Python", "Arrow"])
def test_rows_read_from_beginning_to_end_wait_too(columns: Features | None, monkeypatch, capsys) -> None:
    """Fine-tuning, suites and cleaning read streams from beginning to end."""
    monkeypatch.setattr("hfpipe.data.sources.retry.FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    faults = [17, 17, 40]

    def numbers(part: list[int]) -> Iterator[tuple[int, pa.Table]]:
        for n in range(25 * part[0], 25 * part[0] + 25):
            if faults and n == faults[0]:
                raise ConnectionError(f"lost at {faults.pop(0)}")
            yield n, pa.table({"n": [n]})

    def dicts(part: list[int]) -> Iterator[dict[str, int]]:
        for _, table in numbers(part):
            yield table.to_pylist()[0]

    if columns is None:
        stream = IterableDataset.from_generator(dicts, gen_kwargs={"part": [0, 1]})
    else:
        examples = ArrowExamplesIterable(numbers, {"part": [0, 1]})
        stream = IterableDataset(examples, info=DatasetInfo(features=columns))
    found = rows_of(stream, Source(path="web"), size=4)
    assert [row["n"] for row in found] == list(range(50))
    assert faults == []
    assert capsys.readouterr().out.count("trying again in") == 3
    assert [row["n"] for row in rows_of(stream, Source(path="web"), size=7)] == list(range(50)), "a place of its own"


def start(hub: HubServer, folder: Path, patience: float) -> subprocess.Popen:
    """A client that has opened the source and waits for a line before it reads."""
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(patience)],
        env=os.environ | hub.env(folder / "home") | {"HF_HUB_DOWNLOAD_TIMEOUT": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    assert client.stdout is not None
    assert client.stdout.readline() == "open\n"
    return client


def go_on(client: subprocess.Popen) -> None:
    assert client.stdin is not None
    client.stdin.write("\n")
    client.stdin.flush()


@pytest.mark.slow
@pytest.mark.long
def test_faults_in_the_middle_of_reading_lose_and_repeat_nothing(hub: HubServer, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    client = start(hub, folder, patience=60)
    before = len(hub.requests)
    for _ in range(2):  # more of each kind than the libraries bear by themselves
        hub.fail("GET /datasets/team/web/resolve/", status=503, times=7)
        hub.cut("GET /datasets/team/web/resolve/", times=7)
        hub.drop("GET /datasets/team/web/resolve/", times=7)
    hub.fail("GET /datasets/team/web/resolve/", status=500, times=7)
    hub.stall("GET /datasets/team/web/resolve/", times=1)
    go_on(client)
    printed = []
    for line in client.stdout or ():
        if line == "begun\n":
            break
        printed.append(line)
    else:
        pytest.fail("".join(printed))
    restart = threading.Thread(target=hub.outage, args=(1.5,))
    restart.start()
    go_on(client)
    output = client.communicate(timeout=100)[0]
    restart.join()
    printed += output.splitlines(keepends=True)
    assert len(hub.requests) > before + 43
    assert sum(fault.times for fault in hub.faults) == 0, "not every fault was met"
    assert any("trying again in" in line and "lane" in line for line in printed), printed
    assert any("goes on where it stood" in line for line in printed)
    lanes = json.loads(printed[-1])
    assert isinstance(lanes[0], list), printed[-1]
    found: Counter[str] = Counter()
    for ids in lanes:
        found.update(text for text in tokenizer.decode(ids).split(tokenizer.eos_token) if text)
    assert found == Counter(row["text"] for row in documents())


@pytest.mark.slow
def test_a_server_that_stays_away_ends_the_run_with_exit_code_4(hub: HubServer, folder: Path) -> None:
    client = start(hub, folder, patience=0.5)
    hub.fail("/resolve/", status=502, times=10_000)
    go_on(client)
    code, message = json.loads(client.communicate(timeout=60)[0].splitlines()[-1])
    assert code == 4
    assert "\n" not in message
    for says in ("did not come back", "502", "the same command continues"):
        assert says in message
