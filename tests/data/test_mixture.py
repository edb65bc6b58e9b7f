"""Mixtures and replay: shares of tokens whatever the length of documents, to the end of the data, and the report."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import tiny
from datasets import Dataset

from hfpipe.cli import main
from hfpipe.core.errors import DataError
from hfpipe.data.stream.dataset import TokenStream
from hfpipe.model.create import train_tokenizer

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def table(count: int, words: tuple[int, int], seed: int) -> Dataset:
    chance = random.Random(seed)
    return Dataset.from_list(
        [{"text": f"{n}: " + " ".join(chance.choices(WORDS, k=chance.randint(*words)))} for n in range(count)]
    )


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((row["text"] for row in table(200, (5, 40), 0)), 400, 128)


def served(sources: list, tokenizer, steps: int | None = None, **options) -> dict:
    """The report on a stream after some batches, or all of them."""
    stream = TokenStream(sources, tokenizer, max_length=64, lanes=4, window_documents=50, **options)
    for step, _ in enumerate(stream.batches(4), 1):
        if step == steps:
            break
    return stream.facts()


def test_shares_hold_for_lengths_from_two_words_to_three_thousand(tokenizer) -> None:
    sources = [table(3000, (1, 3), 1), table(300, (50, 90), 2), table(40, (1000, 3000), 3)]
    found = served(sources, tokenizer, steps=700, weights=[0.2, 0.5, 0.3])
    facts = list(found["sources"].values())
    assert [source["token_share"] for source in facts] == pytest.approx([0.2, 0.5, 0.3], abs=0.01)
    for rows, source in zip(sources, facts, strict=True):
        assert source["rows"] <= len(rows), "each is counted once, however often it is read"
        assert 0 <= source["documents"] / len(rows) - source["epochs"] <= 4 / len(rows) + 1e-4, "begun, not ended"
    assert facts[1]["epochs"] > 1


def test_shares_hold_when_there_are_books_longer_than_a_lanes_part_of_the_run(tokenizer) -> None:
    sources = [table(3000, (1, 3), 1), table(10, (9000, 30000), 3), table(300, (50, 90), 2)]
    weights = [0.45, 0.1, 0.45]
    for steps in (10, 50):  # 2,560 tokens, and no book is shorter than 9,000
        found = served(sources, tokenizer, steps=steps, weights=weights)
        shares = [source["token_share"] for source in found["sources"].values()]
        assert shares == pytest.approx(weights, abs=2 / (4 * steps)), "within two rows"


def test_shares_hold_in_the_first_window_of_a_source_that_changes_its_script(tokenizer) -> None:
    """Ten times the tokens for a character from the 40th document of each lane on."""
    changing = [
        {"text": "one two three four " * 8 if n < 160 else "".join(map(chr, range(0x4E00 + n, 0x4E40 + n)))}
        for n in range(2000)
    ]
    stream = TokenStream(
        [Dataset.from_list(changing), table(3000, (20, 40), 1)], tokenizer, max_length=64, lanes=4, weights=[0.8, 0.2]
    )
    list(zip(range(100), stream.batches(4), strict=False))
    shares = [source["token_share"] for source in stream.facts()["sources"].values()]
    assert shares == pytest.approx([0.8, 0.2], abs=0.01)


def test_a_replayed_source_keeps_its_share_to_the_end_and_does_not_outlast_the_stage(tokenizer) -> None:
    own = [table(300, (20, 60), 1), table(1200, (20, 60), 2)]
    replayed = [table(100, (5, 200), 3)]
    found = served(
        [*own, *replayed], tokenizer, weights=[0.4, 0.4, 0.2], replayed=[False, False, True], exhausted="stop"
    )
    first, second, third = found["sources"].values()
    assert (first["rows"], second["rows"]) == (300, 1200)
    assert (first["epochs"], second["epochs"]) == (1, 1)
    assert third["token_share"] == pytest.approx(0.2, abs=0.01)
    assert third["epochs"] >= 1
    assert [source["replayed"] for source in found["sources"].values()] == [False, False, True]


def test_shares_hold_in_what_is_served_of_the_first_window(tokenizer) -> None:
    """And not only in what is drawn: a window may be longer than the run."""
    one, other = table(3000, (5, 90), 1), table(3000, (20, 200), 2).map(lambda row: {"text": row["text"].upper()})
    capitals = {tokenizer.encode(letter)[0] for letter in "EINORTUVWX"}  # lines of these alone, and of none
    stream = TokenStream([one, other], tokenizer, max_length=64, lanes=8, weights=[0.7, 0.3])
    served = np.zeros(2)
    for _, rows in zip(range(250), stream.batches(8), strict=False):
        for row in rows:
            ids = row["input_ids"].tolist()
            for start, end in itertools.pairwise([*np.flatnonzero(row["position_ids"] == 0), len(ids)]):
                served[int(bool(capitals.intersection(ids[start:end])))] += end - start
    assert served[0] / served.sum() == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("exhausted", ["repeat", "stop"])
def test_a_source_without_a_document_is_an_error_however_it_ends(tokenizer, others: int, exhausted: str) -> None:
    """It would train on nothing, or on another mixture, without a word."""
    empty = table(20, (1, 3), 1).map(lambda row: {"text": " "})
    with pytest.raises(DataError, match="no document with text"):
        served([*[table(300, (1, 30), 2)] * others, empty], tokenizer, exhausted=exhausted)


@pytest.mark.slow
@pytest.mark.long
def test_a_pretrain_stage_replays_a_fine_tuning_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False, push=None)
    prose, sounds = content["stages"]
    del sounds["lora"]
    again = {**prose, "name": "again", "replay": {"stage": "sounds", "share": "20%"}, "training": {**prose["training"]}}
    del again["training"]["max_steps"]
    again["training"]["num_train_epochs"] = 1
    again["global_batch_size"] = 16
    content["stages"] = [prose, sounds, again]
    path = tiny.write(tmp_path, content)
    assert main(["run", str(path)]) == 0
    done = {name: json.loads((tmp_path / f"run/stages/{name}/done.json").read_text()) for name in ("sounds", "again")}
    own, replayed = done["again"]["data"]["sources"].values()
    assert replayed["token_share"] == pytest.approx(0.2, abs=0.01)
    assert replayed["replayed"]
    assert own["token_share"] == pytest.approx(0.8, abs=0.01)
    assert "json (replayed) |" in (tmp_path / "run" / "report.md").read_text()
    capsys.readouterr()
    assert main(["check", str(path)]) == 0
    page = capsys.readouterr().out
    assert "replay     again: 20.0% of the tokens from json" in page
    steps = int(page.partition("stage      again: ")[2].split()[0])
    assert steps == pytest.approx(done["again"]["steps"], abs=2)


@pytest.mark.parametrize(
    ("kind", "replayed", "text"),
    [
        ("classification", "prose", "a classification stage does not"),
        ("pretrain", "judged", "does not train on texts"),
        ("pretrain", "prosa", "Did you mean prose?"),
    ],
)
def test_replay_where_it_makes_no_sense_is_a_fault(
    tmp_path: Path, kind: str, replayed: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = tiny.recipe(tmp_path, evaluate={}, merge=False)
    prose = content["stages"][0]
    judged = {"name": "judged", "kind": "classification", "data": prose["data"]}
    last = {**prose, "name": "last", "kind": kind, "parent": "prose", "replay": {"stage": replayed, "share": 0.1}}
    content["stages"] = [prose, judged, last]
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    assert text in capsys.readouterr().err
