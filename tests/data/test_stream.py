"""The stream: every document once an epoch, the same rows on any number of ranks, exact at any interruption."""

import copy
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, active_count, get_ident
from time import sleep
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from transformers import AutoConfig, AutoModelForCausalLM

from hfpipe.core.errors import DataError, RecipeError
from hfpipe.data.dataloader import collate
from hfpipe.data.sources.load import load_rows
from hfpipe.data.sources.sharded_files import stream_range
from hfpipe.data.stream import shard_reader
from hfpipe.data.stream.dataset import TokenStream
from hfpipe.data.stream.packing import isolation_leak, pack
from hfpipe.data.tokenize import IGNORED
from hfpipe.model.create import train_tokenizer
from hfpipe.recipe import Source

datasets.disable_progress_bars()
LENGTH = 32
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def documents(count: int, seed: int = 0, longest: int = 40, prefix: str = "d") -> list[dict]:
    """Documents that begin with their own number, so that a row tells which it holds."""
    chance = random.Random(seed)
    return [
        {"id": f"{prefix}{n}", "text": f"{prefix}{n}: " + " ".join(chance.choices(WORDS, k=chance.randint(1, longest)))}
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((row["text"] for row in documents(300)), 400, 128)


def parquet(folder: Path, rows: list[dict], files: int) -> object:
    for number in range(files):
        Dataset.from_list(rows[number::files]).to_parquet(folder / f"{number}.parquet", batch_size=10)
    return load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train", streaming=True)


def stream(sources: list, tokenizer, **options) -> TokenStream:
    return TokenStream(sources, tokenizer, max_length=LENGTH, **{"window_documents": 7, "seed": 5, **options})


def take(source: TokenStream, batches: int, rows: int = 2) -> list[list[list[int]]]:
    found = source.batches(rows)
    return [[row["input_ids"].tolist() for row in next(found)] for _ in range(batches)]


def texts(rows: list[list[int]], lanes: int, tokenizer) -> list[str]:
    """The documents in rows served in run order by one rank: each lane's rows are one run of tokens."""
    whole = []
    for lane in range(lanes):
        ids = [token for row in rows[lane::lanes] for token in row]
        whole += tokenizer.decode(ids).split(tokenizer.eos_token)[:-1]
    return whole


@pytest.mark.parametrize("kind", ["table", "parquet", "few shards"])
def test_every_document_exactly_once_in_each_epoch(tmp_path: Path, tokenizer, kind: str) -> None:
    rows = documents(123)
    source = Dataset.from_list(rows) if kind == "table" else parquet(tmp_path, rows, 8 if kind == "parquet" else 1)
    tokens = stream([source], tokenizer, lanes=4)
    served = [row for batch in take(tokens, 150) for row in batch]
    assert tokens.facts()["tokens"] == len(served) * LENGTH
    begun = sum(tokenizer.decode(row).count(tokenizer.eos_token) for row in served)
    assert abs(tokens.facts()["documents"] - begun) <= 4  # a document may have begun and not ended in each lane
    found = Counter(texts(served, 4, tokenizer))
    assert set(found) == {row["text"] for row in rows}
    # Each lane has gone through the shares a whole number of times and a part: the counts differ by that part only.
    for lane in range(4):
        counts = Counter(texts(served[lane::4], 1, tokenizer))
        assert max(counts.values()) - min(counts[row["text"]] for row in rows) <= 1


@pytest.mark.parametrize("kind", ["table", "files", "row groups", "one row group"])
def test_lanes_of_unequal_shares_read_every_document_as_often(tmp_path: Path, tokenizer, kind: str) -> None:
    rows = [{"text": f"d{n}: " + "one " * (40 if n % 4 == 1 else 2)} for n in range(48)]
    files, groups = {"files": (6, 8), "row groups": (3, 2), "one row group": (1, 48)}.get(kind, (1, 1))
    if kind == "table":
        source = Dataset.from_list(rows)
    else:
        for number in range(files):
            Dataset.from_list(rows[number::files]).to_parquet(tmp_path / f"{number}.parquet", batch_size=groups)
        source = load_rows(Source(path="parquet", data_files=str(tmp_path / "*.parquet"), streaming=True))
    endless = stream([source], tokenizer, lanes=4, window_documents=3)
    served = [row for batch in take(endless, 240, rows=1) for row in batch]
    found = Counter(text.strip() for text in texts(served, 4, tokenizer))
    counts = [found[row["text"].strip()] for row in rows]
    assert min(counts) >= 7
    assert max(counts) - min(counts) <= 4, "as far apart as the lanes, however long the run"
    three = stream([source], tokenizer, lanes=4, window_documents=3, exhausted="stop", epochs=3)
    found = Counter(filter(None, texts(learned(stopped(three)), 4, tokenizer)))
    assert found == Counter({row["text"]: 3 for row in rows})


def test_rows_are_the_plain_tokenization_of_the_documents_in_their_order(tmp_path: Path, tokenizer) -> None:
    rows = documents(200)
    rows += [
        {"id": "u", "text": "日本語 naïve 👩‍👩‍👧 \u200b ﷽ \t\n x"},
        {"id": "e", "text": "</s> <|im_start|> in text"},
    ]
    source = parquet(tmp_path, rows, 5)
    served = take(stream([source], tokenizer, lanes=4), 120, rows=1)
    for lane in range(4):
        ids = [token for (row,) in served[lane::4] for token in row]
        ends = [place for place, token in enumerate(ids) if token == tokenizer.eos_token_id]
        plain = {row["text"]: tokenizer(row["text"])["input_ids"] for row in rows}
        by_tokens = {tuple(tokens): text for text, tokens in plain.items()}
        begins = [0, *(end + 1 for end in ends)]
        order = [by_tokens[tuple(ids[begin:end])] for begin, end in zip(begins, ends, strict=False)]
        expected = [token for text in order for token in [*plain[text], tokenizer.eos_token_id]]
        assert ids[: len(expected)] == expected
        assert len(ids) - len(expected) < max(map(len, plain.values())) + 1


@pytest.mark.parametrize("streamed", [False, True])
def test_interrupted_anywhere_is_uninterrupted(tmp_path: Path, tokenizer, streamed: bool) -> None:
    def sources() -> list:
        one, two = documents(90), documents(31, seed=1, prefix="e")
        if not streamed:
            return [Dataset.from_list(one), Dataset.from_list(two)]
        folders = [tmp_path / "one", tmp_path / "two"]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        return [parquet(folders[0], one, 4), parquet(folders[1], two, 1)]

    whole = take(stream(sources(), tokenizer, lanes=4, weights=[0.7, 0.3]), 70)
    for stop in range(0, 60, 7):
        first = stream(sources(), tokenizer, lanes=4, weights=[0.7, 0.3])
        assert take(first, stop) == whole[:stop]
        second = stream(sources(), tokenizer, lanes=4, weights=[0.7, 0.3])
        second.load_state_dict(TokenStream.merge_states([first.state_dict()]))
        assert take(second, 8) == whole[stop : stop + 8]
        third = stream(sources(), tokenizer, lanes=4, weights=[0.7, 0.3])  # stopped again before much happened
        third.load_state_dict(second.state_dict())
        assert take(third, 2) == whole[stop + 8 : stop + 10]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_rows_of_one_rank_and_may_change_on_resume(tokenizer, ranks: int) -> None:
    source = Dataset.from_list(documents(90))
    one = [row for batch in take(stream([source], tokenizer, lanes=4), 80) for row in batch]
    parts = [stream([source], tokenizer, lanes=4, rank=rank, ranks=ranks) for rank in range(ranks)]
    served = [[row for batch in take(part, 40 // ranks) for row in batch] for part in parts]
    assert [served[n % ranks][n // ranks] for n in range(80)] == one[:80]
    single = stream([source], tokenizer, lanes=4)
    single.load_state_dict(TokenStream.merge_states([part.state_dict() for part in parts]))
    assert [row for batch in take(single, 40) for row in batch] == one[80:]


def test_lanes_that_ranks_cannot_share_are_refused(tokenizer) -> None:
    with pytest.raises(RecipeError, match="1, 2, 4 ranks"):
        stream([Dataset.from_list(documents(9))], tokenizer, lanes=4, ranks=3)


def test_weights_are_shares_of_tokens_whatever_the_length_of_documents(tokenizer) -> None:
    short, long = documents(50, longest=3, prefix="s"), documents(20, seed=2, longest=200, prefix="l")
    source = stream([Dataset.from_list(short), Dataset.from_list(long)], tokenizer, weights=[0.25, 0.75], lanes=2)
    take(source, 800)
    shares = [facts["token_share"] for facts in source.facts()["sources"].values()]
    assert shares == pytest.approx([0.25, 0.75], abs=0.01)


def test_fewer_documents_than_lanes_do_not_hang(tokenizer) -> None:
    served = [row for batch in take(stream([Dataset.from_list(documents(3))], tokenizer), 40) for row in batch]
    assert set(texts(served, 3, tokenizer)) == {row["text"] for row in documents(3)}


def test_dirty_rows_are_counted_and_left_out(tokenizer) -> None:
    rows = [*documents(20), {"id": "none", "text": None}]
    rows += [{"id": "empty", "text": " \n"}, {"id": "nul", "text": "a\x00b"}]
    source = stream([Dataset.from_list(rows)], tokenizer, lanes=1)
    served = [row for batch in take(source, 30) for row in batch]
    found = set(texts(served, 1, tokenizer))
    assert "ab" in found
    assert len(found) == 21
    facts = next(iter(source.facts()["sources"].values()))
    assert facts["epochs"] > 1
    assert (facts["rows"], facts["dirty"]) == (23, {"missing": 1, "empty": 1}), "each once, however often it is read"
    assert {"none", "empty"} <= set(facts["dirty_ids"])
    with pytest.raises(DataError, match="no document with text"):
        take(stream([Dataset.from_list(rows[20:22])], tokenizer), 1)


def test_a_file_shared_by_many_lanes_resumes_at_each_lanes_own_place(tmp_path: Path, tokenizer) -> None:
    rows = documents(400)
    Dataset.from_list(rows).to_parquet(tmp_path / "0.parquet", batch_size=10)
    whole_file = load_dataset("parquet", data_files=str(tmp_path / "*.parquet"), split="train", streaming=True)
    for source in (whole_file, stream_range(whole_file, 10, 380)):
        whole = take(stream([source], tokenizer, lanes=4), 200)
        for stop in (3, 40, 77, 150):
            first, second = stream([source], tokenizer, lanes=4), stream([source], tokenizer, lanes=4)
            take(first, stop)
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
            assert take(second, 40) == whole[stop : stop + 40]


@pytest.mark.slow
def test_random_sources_resume_everywhere_with_the_same_counts(tmp_path: Path, tokenizer) -> None:
    for seed in range(6):
        chance = random.Random(seed)
        rows = documents(chance.randint(5, 60), seed) + [{"id": "dirty", "text": None}] * chance.randint(0, 3)
        chance.shuffle(rows)
        other = documents(chance.randint(5, 40), seed + 100, prefix="e")
        folder = tmp_path / str(seed)
        folder.mkdir()
        sources = [Dataset.from_list(rows), parquet(folder, other, chance.randint(1, 6))]
        options = {
            "lanes": chance.choice([1, 2, 4, None]),
            "window_documents": chance.randint(1, 12),
            "weights": [chance.uniform(0.1, 1), chance.uniform(0.1, 1)],
            "prefetch": chance.random() < 0.5,
        }
        first = stream(sources, tokenizer, **options)
        served = first.batches(3)
        positions = [(first.state_dict(), first.facts())]
        whole = []
        for _ in range(25):
            whole.append([row["input_ids"].tolist() for row in next(served)])
            positions.append((json.loads(json.dumps(first.state_dict())), first.facts()))
        served.close()
        for stop in range(22):
            second = stream(sources, tokenizer, **options)
            second.load_state_dict(positions[stop][0])
            assert second.facts() == positions[stop][1]
            assert take(second, 3, rows=3) == whole[stop : stop + 3]
            assert second.facts() == positions[stop + 3][1]


def test_batches_begin_where_the_last_ones_ended(tokenizer) -> None:
    source = Dataset.from_list(documents(90))
    whole = take(stream([source], tokenizer, lanes=2), 40)
    again = stream([source], tokenizer, lanes=2)
    assert [batch for count in (1, 12, 7, 20) for batch in take(again, count)] == whole


def test_more_ranks_continue_at_a_row_that_they_do_not_divide(tokenizer) -> None:
    source = Dataset.from_list(documents(90))
    whole = [row for batch in take(stream([source], tokenizer, lanes=4), 40, rows=1) for row in batch]
    first = stream([source], tokenizer, lanes=4)
    take(first, 6, rows=1)
    found = {}
    for rank in range(4):
        part = stream([source], tokenizer, lanes=4, rank=rank, ranks=4)
        part.load_state_dict(first.state_dict())
        begin = next(n for n in range(6, 10) if n % 4 == rank)
        found |= dict(zip(range(begin, 40, 4), (row for batch in take(part, 8, rows=1) for row in batch), strict=False))
    assert [found[n] for n in range(6, 38)] == whole[6:38]


def test_a_weight_holds_in_the_first_window(tokenizer) -> None:
    short, long = documents(4000, longest=3, prefix="s"), documents(400, seed=2, longest=200, prefix="l")
    source = stream([Dataset.from_list(short), Dataset.from_list(long)], tokenizer, lanes=1, window_documents=2000)
    take(source, 100)
    assert all(builder["window"] == 0 for builder in source.state_dict()["states"]["0"]["start"]["builders"])
    shares = [facts["token_share"] for facts in source.facts()["sources"].values()]
    assert shares == pytest.approx([0.5, 0.5], abs=0.01)


@pytest.mark.parametrize("kind", ["table", "one file", "files"])
def test_a_lane_without_a_usable_document_reads_the_whole_source(tmp_path: Path, tokenizer, kind: str) -> None:
    texts_of = ["alpha one", None, None, "beta two", " ", None, "gamma three", None]  # of 4 lanes some have none
    rows = [{"id": str(number), "text": text} for number, text in enumerate(texts_of)]
    files = {"one file": 1, "files": 8}
    source = Dataset.from_list(rows) if kind == "table" else parquet(tmp_path, rows, files[kind])
    tokens = stream([source], tokenizer, lanes=4)
    served = [row for batch in take(tokens, 60) for row in batch]
    assert set(texts(served, 4, tokenizer)) == {"alpha one", "beta two", "gamma three"}
    resumed = stream([source], tokenizer, lanes=4)
    resumed.load_state_dict(tokens.state_dict())
    assert take(resumed, 5) == take(tokens, 5)


@pytest.mark.parametrize(("ranks", "documents_", "lanes"), [(1, 3, 3), (2, 5, 4), (4, 3, 4), (3, 50, 9), (1, 50, 8)])
def test_lanes_are_no_more_than_a_tables_documents(tokenizer, ranks: int, documents_: int, lanes: int) -> None:
    assert stream([Dataset.from_list(documents(documents_))], tokenizer, ranks=ranks).lanes == lanes


def stopped(source: TokenStream, rows: int = 2) -> list[dict]:
    return [row for batch in source.batches(rows) for row in batch]


def learned(rows: list[dict]) -> list[list[int]]:
    """The tokens of rows without their padding; of a row that is padding, one EOS."""
    ends = [np.flatnonzero((row["labels"] != IGNORED) | (row["position_ids"] == 0))[-1] for row in rows]
    return [row["input_ids"][: end + 1].tolist() for row, end in zip(rows, ends, strict=True)]


def texts_of(rows: list[dict], source: int, tokenizer) -> list[str]:
    """The documents of one source in a lane's rows: its rows are one run of tokens, with others between them."""
    whole = [token for row in learned([row for row in rows if row["source"] == source]) for token in row]
    return tokenizer.decode(whole).split(tokenizer.eos_token)[:-1]


@pytest.mark.parametrize("lanes", [2, 8])
def test_lanes_of_a_table_end_together_however_unequal_its_documents(tokenizer, lanes: int) -> None:
    chance = random.Random(1)
    rows = [{"id": f"{n}", "text": "one " * int(chance.lognormvariate(3, 1.2) + 1)} for n in range(400)]
    rows[7] = {"id": None, "text": None}
    source = stream([Dataset.from_list(rows)], tokenizer, lanes=lanes, exhausted="stop")
    assert source.length() == len(stopped(source, rows=1))
    facts = source.facts()
    assert facts["padding_share"] < 0.02
    assert facts["documents"] == 399
    assert next(iter(facts["sources"].values()))["dirty_ids"] == ["row 7"]


@pytest.mark.parametrize("batches", [1, 9, 40])
def test_the_report_tells_what_was_served_and_not_what_was_drawn_for_it(tokenizer, batches: int) -> None:
    sources = [Dataset.from_list(documents(60, 1, 90, "s")), Dataset.from_list(documents(30, 2, 200, "l"))]
    tokens = stream(sources, tokenizer, lanes=4, weights=[0.6, 0.4], window_documents=50)
    found = tokens.batches(8)
    served = [row for _ in range(batches) for row in next(found)]
    facts = tokens.facts()
    for number, (rows, source) in enumerate(zip(sources, facts["sources"].values(), strict=True)):
        mine = [row for row in served if row["source"] == number]
        assert source["tokens"] == LENGTH * len(mine)
        lanes = [
            tokenizer.decode([t for row in served[lane::4] if row["source"] == number for t in row["input_ids"]])
            for lane in range(4)
        ]
        begun = [text for lane in lanes for text in lane.split(tokenizer.eos_token) if text]
        assert all(text[0] == "sl"[number] for text in begun), "rows are of one source"
        assert source["documents"] == len(begun)
        assert source["token_share"] == pytest.approx(source["tokens"] / facts["tokens"], abs=1e-4)
        whole = sum(lane.count(tokenizer.eos_token) for lane in lanes)
        assert source["epochs"] == pytest.approx(whole / len(rows), abs=1e-4)


def test_stop_serves_each_document_once_and_pads_the_tail(tmp_path: Path, tokenizer) -> None:
    for seed in range(8):
        chance = random.Random(seed)
        one, two = documents(chance.randint(1, 40), seed), documents(chance.randint(1, 90), seed + 9, prefix="e")
        folder = tmp_path / str(seed)
        folder.mkdir()
        sources = [Dataset.from_list(one), parquet(folder, two, chance.randint(1, 5))]
        source = stream(sources, tokenizer, lanes=4, exhausted="stop", window_documents=chance.randint(1, 20))
        rows = stopped(source, chance.randint(1, 5))
        assert all(len(row["input_ids"]) == LENGTH for row in rows)
        for number, whole in enumerate((one, two)):
            found = [text for lane in range(4) for text in texts_of(rows[lane::4], number, tokenizer)]
            assert Counter(found) == Counter(row["text"] for row in whole)
        facts = source.facts()
        assert facts["documents"] == len(one + two)
        assert facts["tokens"] == sum(len(tokenizer(row["text"])["input_ids"]) + 1 for row in one + two)
        assert facts["padding_share"] == pytest.approx(1 - facts["tokens"] / (facts["rows"] * LENGTH), abs=1e-4)
        middle = stream(sources, tokenizer, lanes=4, exhausted="stop", window_documents=source.window_documents)
        begin = len(take(middle, 2, rows=1))
        resumed = stream(sources, tokenizer, lanes=4, exhausted="stop", window_documents=source.window_documents)
        resumed.load_state_dict(middle.state_dict())
        assert learned(stopped(resumed, 1))[:8] == learned(rows)[begin : begin + 8]


def test_all_ranks_stop_after_the_same_number_of_batches(tmp_path: Path, tokenizer, monkeypatch) -> None:
    source = parquet(tmp_path, [{"text": "one " * (3 if n % 2 else 200)} for n in range(40)], 4)  # rank 0 has far more
    together, flags = Barrier(2), {}

    def gather_of_threads(value: object) -> list:
        flags[get_ident()] = value
        together.wait(20)
        values = list(flags.values())
        together.wait(20)
        return values

    monkeypatch.setattr("hfpipe.data.stream.dataset.gather", gather_of_threads)
    parts = [stream([source], tokenizer, lanes=4, rank=rank, ranks=2, exhausted="stop") for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        served = list(threads.map(stopped, parts))
    assert len(served[0]) == len(served[1]) > 10
    words = [sum(tokenizer.decode(row).count("one") for row in learned(rows)) for rows in served]
    assert words == [20 * 200, 20 * 3]


@pytest.mark.parametrize("prefetch", [True, False])
def test_an_error_of_a_source_reaches_the_trainer_and_the_thread_ends(tokenizer, prefetch: bool) -> None:
    def broken() -> Iterator[dict]:
        yield from documents(30)
        raise OSError("the disk is gone")

    source = stream([IterableDataset.from_generator(broken)], tokenizer, lanes=1, prefetch=prefetch)
    before = active_count()
    with pytest.raises(Exception, match="the disk is gone"):
        take(source, 1000)
    assert active_count() == before


def test_the_thread_ends_with_its_iterator_and_builds_no_more_than_one_window_ahead(tokenizer) -> None:
    read = []

    def counted() -> Iterator[dict]:
        for row in documents(5000):
            read.append(row)
            yield row

    before = active_count()
    served = stream([IterableDataset.from_generator(counted)], tokenizer, lanes=1).batches(1)
    next(served)
    sleep(0.5)
    assert len(read) <= 3 * 7  # the window that is served, the one ahead, and a part that a stream reads ahead
    served.close()
    assert active_count() == before


@pytest.mark.parametrize(("cores", "named", "told"), [(2, None, "false"), (2, "true", "true"), (64, None, None)])
def test_threads_that_fill_the_cores_have_the_tokenizer_use_no_others(
    tokenizer, monkeypatch: pytest.MonkeyPatch, cores: int, named: str | None, told: str | None
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if named is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", named)
    served = stream([Dataset.from_list(documents(100))], tokenizer).batches(1)
    next(served)
    assert os.environ.get("TOKENIZERS_PARALLELISM") == told
    served.close()
    assert os.environ.get("TOKENIZERS_PARALLELISM") == named


def test_a_window_of_books_is_bounded_by_their_characters(tokenizer) -> None:
    read = []

    def books() -> Iterator[dict]:
        for _ in range(200):
            read.append(1)
            yield {"text": "one two three " * 15_000}  # 210,000 characters

    source = stream([IterableDataset.from_generator(books)], tokenizer, lanes=1, window_documents=500, prefetch=False)
    next(source.batches(1))
    assert len(read) == 100, "a block of rows, and no second"
    assert source.state_dict()["states"]["0"]["sources"][0]["rows"] == 10


def test_an_iterator_that_is_left_open_does_not_disturb_the_exit() -> None:
    script = (
        "import time\nfrom hfpipe.data.stream.prefetch import Prefetch\n"
        "def build():\n    time.sleep(0.3)\n    print('built', flush=True)\n"
        "prefetch = Prefetch({0: build})\nprefetch.take(0)\ntime.sleep(0.1)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "built\nbuilt\n", "")


def test_truncation_and_padding_of_the_tokenizer_do_not_matter_and_eos_does(tokenizer) -> None:
    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.enable_truncation(4)
    own.backend_tokenizer.enable_padding(length=64)
    source = Dataset.from_list(documents(30))
    served = stream([source], own).batches(2)
    own.backend_tokenizer.enable_truncation(4)  # as whoever else uses the tokenizer may do at any time
    found = [[row["input_ids"].tolist() for row in next(served)] for _ in range(10)]
    assert found == take(stream([source], tokenizer), 10)
    own = copy.deepcopy(tokenizer)
    own.eos_token = None
    with pytest.raises(RecipeError, match="no EOS"):
        stream([source], own)


@pytest.mark.parametrize("one_by_one", [100, 1000])
def test_a_table_that_stops_is_dealt_out_so_that_lanes_end_together(
    monkeypatch: pytest.MonkeyPatch, one_by_one: int
) -> None:
    monkeypatch.setattr(shard_reader, "ONE_BY_ONE", one_by_one)
    chance = random.Random(0)
    texts = ["x" * int(chance.lognormvariate(4, 1.2)) for _ in range(300)]
    dealt = shard_reader.deal(Dataset.from_dict({"text": texts}), 8, by_length=True)
    assert sorted(np.concatenate(dealt.places).tolist()) == list(range(300))
    sizes = [sum(len(texts[place]) for place in places) for places in dealt.places]
    assert max(sizes) < 1.05 * min(sizes)
    turns = [sum(map(len, texts[lane::8])) for lane in range(8)]
    assert max(turns) > 1.3 * min(turns), "rows of which some are far longer than others"


def test_packing_keeps_every_token_and_marks_every_beginning() -> None:
    tokens = np.arange(1, 101, dtype=np.int32)
    starts = np.zeros(100, dtype=bool)
    starts[[0, 7, 30, 31, 64]] = True
    packed, rest, _ = pack(tokens, starts, 16)
    assert np.concatenate([packed.input_ids.ravel(), rest]).tolist() == tokens.tolist()
    zero = np.flatnonzero(packed.position_ids.ravel() == 0)
    assert zero.tolist() == sorted({0, 7, 30, 31, 64, *range(0, 96, 16)})
    assert (packed.labels.ravel()[zero] == IGNORED).all()
    assert (np.delete(packed.labels.ravel(), zero) == np.delete(packed.input_ids.ravel(), zero)).all()


def test_packing_counts_documents_that_begin_and_that_are_cut() -> None:
    starts = np.zeros(40, dtype=bool)
    starts[[0, 5, 16, 36]] = True  # rows of 8: document 1 is cut once, 2 goes over three rows, 0 and 3 are whole
    packed = pack(np.arange(40, dtype=np.int32), starts, 8).rows
    assert packed.documents.tolist() == [2, 0, 1, 0, 1]
    assert packed.cut.tolist() == [True, False, True, False, False]
    assert packed.continued.tolist() == [False, True, False, True, True]
    assert packed.ended.tolist() == [1, 1, 0, 0, 2]


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


def small_model(model_type: str, attention: str) -> Any:
    torch.manual_seed(0)
    fields = {"intermediate_size": 64, "max_position_embeddings": 128, **SMALL}
    if model_type == "gpt2":
        fields = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}
    if model_type in ("llama", "qwen2"):
        fields["num_key_value_heads"] = 1
    config = AutoConfig.for_model(model_type, **fields, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.config.use_cache = False
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # fresh weights attend to nothing much: a leak would not show
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_neox", "gpt2"])
def test_packed_documents_do_not_see_each_other_and_a_leak_is_noticed(model_type: str, attention: str) -> None:
    model = small_model(model_type, attention)
    assert isolation_leak(model) < 1e-4
    model.config.use_cache = True
    assert isolation_leak(model) > 1e-3
    model.config.use_cache = False
    plain = type(model).forward

    def with_mask(self, *args, position_ids=None, **kwargs):
        ones = torch.ones(kwargs["input_ids"].shape, dtype=torch.long)
        return plain(self, *args, position_ids=position_ids, attention_mask=ones, **kwargs)

    model.forward = with_mask.__get__(model)
    assert isolation_leak(model) > 1e-3


def test_the_self_test_sees_what_the_trainer_feeds(tokenizer) -> None:
    model, fed = small_model("llama", "sdpa"), []
    plain = type(model).forward

    def recorded(self, *args, input_ids=None, position_ids=None, **kwargs):
        fed.append((args, input_ids.shape, position_ids is not None, set(kwargs) - {"labels", "return_dict"}))
        return plain(self, *args, input_ids=input_ids, position_ids=position_ids, **kwargs)

    model.forward = recorded.__get__(model)
    isolation_leak(model)
    served = stream([Dataset.from_list(documents(40))], tokenizer).batches(2)
    model(**collate([row | {"input_ids": row["input_ids"] % 64} for row in next(served)], 0) | {"labels": None})
    packed, trained = fed[0], fed[-1]
    assert packed == trained, "the same arguments, [B, L] with B = 2, positions, no mask, no word on a cache"
    assert packed[1] == (2, LENGTH)
