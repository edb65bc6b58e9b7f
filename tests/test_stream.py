"""The stream: every document once an epoch, the same rows on any number of ranks, exact at any interruption."""

import random
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from transformers import AutoConfig, AutoModelForCausalLM

from hfpipe.data.encode import IGNORED
from hfpipe.data.packing import isolation_leak, pack
from hfpipe.data.stream import TokenStream
from hfpipe.errors import DataError, RecipeError
from hfpipe.model.create import train_tokenizer

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
    assert tokens.report()["tokens"] == len(served) * LENGTH
    begun = sum(tokenizer.decode(row).count(tokenizer.eos_token) for row in served)
    assert abs(tokens.report()["documents"] - begun) <= 4  # a document may have begun and not ended in each lane
    found = Counter(texts(served, 4, tokenizer))
    assert set(found) == {row["text"] for row in rows}
    # Each lane has gone through its share a whole number of times and a part: the counts differ by that part only.
    by_lane = [Counter(texts(served[lane::4], 1, tokenizer)) for lane in range(4)]
    for counts in by_lane:
        assert max(counts.values()) - min(counts.values()) <= 1
    shares = [set(counts) for counts in by_lane]
    assert sum(map(len, shares)) == len(rows), "two lanes served the same document"


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
    shares = [facts["token_share"] for facts in source.report()["sources"].values()]
    assert shares == pytest.approx([0.25, 0.75], abs=0.01)


def test_fewer_documents_than_lanes_do_not_hang(tokenizer) -> None:
    served = [row for batch in take(stream([Dataset.from_list(documents(3))], tokenizer), 40) for row in batch]
    assert set(texts(served, 8, tokenizer)) == {row["text"] for row in documents(3)}


def test_dirty_rows_are_counted_and_left_out(tokenizer) -> None:
    rows = [*documents(20), {"id": "none", "text": None}]
    rows += [{"id": "empty", "text": " \n"}, {"id": "nul", "text": "a\x00b"}]
    source = stream([Dataset.from_list(rows)], tokenizer, lanes=1)
    served = [row for batch in take(source, 30) for row in batch]
    found = set(texts(served, 1, tokenizer))
    assert "ab" in found
    assert len(found) == 21
    facts = next(iter(source.report()["sources"].values()))
    assert set(facts["dirty"]) == {"missing", "empty"}
    assert {"none", "empty"} <= set(facts["dirty_ids"])
    with pytest.raises(DataError, match="no document with text"):
        take(stream([Dataset.from_list(rows[20:22])], tokenizer), 1)


def test_packing_keeps_every_token_and_marks_every_beginning() -> None:
    tokens = np.arange(1, 101, dtype=np.int32)
    starts = np.zeros(100, dtype=bool)
    starts[[0, 7, 30, 31, 64]] = True
    packed = pack(tokens, starts, 16)
    assert np.concatenate([packed.input_ids.ravel(), packed.rest]).tolist() == tokens.tolist()
    zero = np.flatnonzero(packed.position_ids.ravel() == 0)
    assert zero.tolist() == sorted({0, 7, 30, 31, 64, *range(0, 96, 16)})
    assert (packed.labels.ravel()[zero] == IGNORED).all()
    assert (np.delete(packed.labels.ravel(), zero) == np.delete(packed.input_ids.ravel(), zero)).all()


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_neox", "gpt2"])
def test_packed_documents_do_not_see_each_other(model_type: str) -> None:
    torch.manual_seed(0)
    fields = {"intermediate_size": 64, "max_position_embeddings": 128, **SMALL}
    if model_type == "gpt2":
        fields = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}
    if model_type in ("llama", "qwen2"):
        fields["num_key_value_heads"] = 1
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # fresh weights attend to nothing much: a leak would not show
    assert isolation_leak(model) < 1e-4
    leaky = type(model).forward

    def with_mask(self, *args, **kwargs):
        shape = kwargs["input_ids"].shape
        return leaky(self, *args, attention_mask=torch.ones(shape, dtype=torch.long), **kwargs)

    model.forward = with_mask.__get__(model)
    assert isolation_leak(model) > 1e-3
