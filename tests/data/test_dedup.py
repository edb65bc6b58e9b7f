"""Cleaning: duplicates, near duplicates and overlap with suites, wherever in the source, on any number of ranks."""

import json
import random
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import tiny
from datasets import Dataset, load_dataset

from hfpipe.cli import main
from hfpipe.data.dedup import Cleaner
from hfpipe.data.stream.dataset import TokenStream
from hfpipe.model.create import train_tokenizer
from hfpipe.recipe import Source

WORDS = [f"{one}{two}" for one in ("ba", "ce", "di", "fo", "gu") for two in ("lo", "mi", "na", "pe", "ru", "st", "th")]


def prose(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def changed(text: str, seed: int, count: int) -> str:
    """A text with some of its words replaced."""
    chance, words = random.Random(seed), text.split()
    for place in chance.sample(range(len(words)), count):
        words[place] = "new"
    return " ".join(words)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((prose(seed, 40) for seed in range(200)), 400, 128)


def shards(folder: Path, texts: list[str | None], files: int):
    rows = [{"id": f"d{number}", "text": text} for number, text in enumerate(texts)]
    for number in range(files):
        Dataset.from_list(rows[number::files]).to_parquet(folder / f"{number}.parquet", batch_size=10)
    return load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train", streaming=True)


def served(stream: TokenStream, tokenizer) -> Counter:
    """The documents of a stream that stops."""
    rows = [row for batch in stream.batches(1) for row in batch]
    found: Counter = Counter()
    for lane, source in product(range(stream.lanes), range(len(stream.sources))):
        mine = [row["input_ids"] for row in rows[lane :: stream.lanes] if row["source"] == source]
        ids = [token for row in mine for token in row.tolist()]
        found += Counter(filter(None, tokenizer.decode(ids).split(tokenizer.eos_token)))
    return found


def cleaned_stream(rows, tokenizer, folder: Path, suites: dict | None = None, **words) -> TokenStream:
    source = Source(path="parquet", **words)
    cleaner = Cleaner(folder / "cleaning", "key", suites or {})
    options = {"lanes": 4, "window_documents": 9, "exhausted": "stop", "origins": [source], "max_length": 64}
    if isinstance(rows, Dataset):
        rows, _ = cleaner.tables(rows, source)
    return TokenStream(
        [rows], tokenizer, cleaned=lambda number, rows, lanes: cleaner.shares(rows, lanes, source), **options
    )


@pytest.mark.parametrize("files", [1, 3, 9])
def test_each_text_is_served_once_whichever_files_its_copies_are_in(tmp_path: Path, tokenizer, files: int) -> None:
    chance = random.Random(files)
    different = [prose(seed, chance.randint(3, 60)) for seed in range(60)]
    texts: list[str | None] = [*different, *chance.choices(different, k=90), None, " "]
    chance.shuffle(texts)
    rows = shards(tmp_path, texts, files)
    stream = cleaned_stream(rows, tokenizer, tmp_path, deduplicate="exact")
    assert served(stream, tokenizer) == Counter(set(different))
    facts = next(iter(stream.facts()["sources"].values()))
    assert facts["removed"] == {"duplicate": len(texts) - 2 - len(set(different))}
    assert facts["dirty"] == {"empty": 1, "missing": 1}
    assert facts["rows"] == len(set(different)) + 2
    assert set(facts["removed_ids"]) <= {f"d{number}" for number in range(len(texts))}
    table = cleaned_stream(Dataset.from_list([{"text": text} for text in texts]), tokenizer, tmp_path / "table")
    assert sum(served(table, tokenizer).values()) == len(texts) - 2, "nothing was asked for"


@pytest.mark.parametrize("streamed", [True, False])
def test_near_duplicates_are_found_from_the_similarity_that_is_asked_for(
    tmp_path: Path, tokenizer, streamed: bool
) -> None:
    originals = [prose(seed, 400) for seed in range(30)]
    near = [changed(text, seed, 4) for seed, text in enumerate(originals)]  # a similarity of about 0.9
    far = [changed(text, seed, 40) for seed, text in enumerate(originals)]  # of about 0.4
    texts = [*originals, *near, *far, *(f"a{n}" for n in range(20)), "!?", "...", "!?"]
    random.Random(0).shuffle(texts)
    rows = shards(tmp_path, texts, 5) if streamed else Dataset.from_list([{"text": text} for text in texts])
    found = served(cleaned_stream(rows, tokenizer, tmp_path, deduplicate={"near": 0.8}), tokenizer)
    assert max(found.values()) == 1
    assert sum((text in found) + (other in found) for text, other in zip(originals, near, strict=True)) == 30
    assert all(text in found for text in [*far, "!?", "...", *(f"a{n}" for n in range(20))])
    stricter = cleaned_stream(rows, tokenizer, tmp_path, deduplicate={"near": 0.97})
    assert len(served(stricter, tokenizer)) == len(set(texts))


def test_interrupted_is_uninterrupted_and_looks_only_once(tmp_path: Path, tokenizer, capsys) -> None:
    texts = [prose(seed % 70, 5 + seed % 70) for seed in range(160)]
    rows = shards(tmp_path, texts, 5)

    def begin() -> TokenStream:
        return cleaned_stream(rows, tokenizer, tmp_path, deduplicate="near")

    whole = [row["input_ids"].tolist() for batch in begin().batches(1) for row in batch]
    assert capsys.readouterr().out.count("rows cleaned") == 1
    for stop in (1, 5, 12):
        first, second = begin(), begin()
        for number, _ in enumerate(first.batches(1), 1):
            if number == stop:
                break
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [row["input_ids"].tolist() for batch in second.batches(1) for row in batch] == whole[stop:]
    assert "rows cleaned" not in capsys.readouterr().out
    assert [path.suffix for path in (tmp_path / "cleaning").iterdir()] == [".npz"], "only the result is kept"


def test_what_overlaps_a_suite_goes_and_a_phrase_of_many_rows_stays(tmp_path: Path, tokenizer) -> None:
    suite = [{"text": prose(seed, 40)} for seed in range(1000, 1005)] + [{"text": "short row"}]
    phrase = prose(5, 20)
    licensed = [f"{prose(seed, 20)} number{seed} {phrase}" for seed in range(20)]  # in more than ten rows
    suite.append({"text": f"{prose(77, 30)} {phrase}"})
    quoting = [f"{prose(seed, 9)} {suite[seed % 5]['text'][:100]} {prose(seed, 9)}" for seed in range(200, 205)]
    texts = [*licensed, *quoting, suite[1]["text"].upper(), "Short row!", "short row of another kind"]
    rows = shards(tmp_path, texts, 3)
    stream = cleaned_stream(rows, tokenizer, tmp_path, {"general": suite}, decontaminate=True)
    assert served(stream, tokenizer) == Counter([*licensed, "short row of another kind"])
    assert next(iter(stream.facts()["sources"].values()))["removed"] == {"overlaps a suite": 7}


def test_a_stream_is_looked_at_as_far_as_it_will_be_read_and_no_further(tmp_path: Path, tokenizer) -> None:
    rows = shards(tmp_path, [f"{n} {WORDS[n % 30]}" for n in range(9000)], 4)
    source = Source(path="parquet", deduplicate="exact")
    cleaner = Cleaner(tmp_path / "cleaning", "key", {})
    assert [len(share) for share in cleaner.shares(rows, 2, source, tokens=10)] == [2000, 2000]
    more = cleaner.shares(rows, 2, source, tokens=2000)
    assert all(2500 < len(share) < 4000 for share in more)
    assert sum(map(len, cleaner.shares(rows, 2, source))) == 9000
    stream = TokenStream([rows], tokenizer, max_length=64, lanes=2, origins=[source], cleaned=lambda *_: more)
    for step, _ in enumerate(stream.batches(8)):
        if step == 200:
            break
    facts = next(iter(stream.facts()["sources"].values()))
    assert facts["epochs"] >= 1, "the part that was looked at begins anew"
    assert facts["removed"] == {}


@pytest.mark.parametrize("word", ["exact", "near"])
@pytest.mark.parametrize("table", [None, 0, 1])
def test_sources_of_a_stage_share_what_they_have_seen(tmp_path: Path, tokenizer, word: str, table: int | None) -> None:
    """Streams and tables alike, in either order; a source that does not ask is left alone."""
    chance = random.Random(3)
    different = [prose(seed, 60) for seed in range(90)]
    parts = [chance.choices(different[:60], k=80), chance.choices(different[30:], k=80), different[:20]]
    sources = [Source(path="one", deduplicate=word), Source(path="two", deduplicate=word), Source(path="three")]
    rows = []
    for number, texts in enumerate(parts):
        (tmp_path / str(number)).mkdir()
        streamed = shards(tmp_path / str(number), texts, 3)
        rows.append(Dataset.from_list([{"text": text} for text in texts]) if number == table else streamed)

    def opened(cleaner: Cleaner, lanes: int) -> TokenStream:
        tables = [cleaner.tables(part, source)[0] for part, source in zip(rows, sources, strict=True)]
        return TokenStream(
            tables,
            tokenizer,
            cleaned=lambda number, shares, lanes: cleaner.shares(shares, lanes, sources[number]),
            **{"lanes": lanes, "exhausted": "stop", "origins": sources, "max_length": 64, "window_documents": 9},
        )

    cleaner = Cleaner(tmp_path / "cleaning", "key", {}, [sources])
    stream = opened(cleaner, 4)
    assert stream.length() == sum(len(batch) for batch in stream.batches(1)), "what is removed does not count"
    stream = opened(cleaner, 4)
    wanted = Counter({*parts[0], *parts[1]}) + Counter(parts[2])
    assert served(stream, tokenizer) == wanted
    first = 1 if table == 1 else 0  # a table is judged before a stream
    kept = [facts["rows"] for facts in stream.facts()["sources"].values()]
    assert kept[first] == len(set(parts[first]))
    assert kept[2] == 20
    removed = [facts["removed"] for facts in stream.facts()["sources"].values()]
    if table is None:
        of_other = f"{'near ' if word == 'near' else ''}duplicate of another source"
        assert removed[1][of_other] >= len({*parts[0]} & {*parts[1]})
        assert sum(removed[1].values()) == 80 - kept[1]
    left = sorted(path for path in (tmp_path / "cleaning").iterdir())
    assert [path.suffix for path in left] == [".npz", ".npz"], "only the results are kept"
    left[0].unlink()
    again = Cleaner(tmp_path / "cleaning", "key", {}, [sources])
    assert served(opened(again, 4), tokenizer) == wanted, "what another source had is looked at anew"
    assert served(opened(again, 6), tokenizer) == wanted
    apart = Cleaner(tmp_path / "apart", "key", {}, [sources[:1], sources[1:]])
    assert served(opened(apart, 4), tokenizer) == Counter({*parts[0]}) + Counter({*parts[1]}) + Counter(parts[2])


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_of_fine_tuning_are_cleaned_by_all_that_they_say(tmp_path: Path, streamed: bool) -> None:
    pairs = [("a", "b"), ("a", "c"), ("d", None), ("a", "b"), ("a", "c"), ("d", None), ("e", "f")]
    rows = Dataset.from_list([{"id": n, "prompt": one, "completion": two} for n, (one, two) in enumerate(pairs)])
    source = Source(path="json", deduplicate="exact")
    cleaner = Cleaner(tmp_path / "cleaning", f"key {streamed}", {})
    left, facts = cleaner.rows(rows.to_iterable_dataset() if streamed else rows, source)
    assert [row["id"] for row in left] == [0, 1, 2, 5, 6], "what is dirty is for the reader to count"
    assert facts["removed"] == {"duplicate": 2}
    assert facts["removed_ids"] == ([] if streamed else ["3", "4"])
    other = Source(path="json", deduplicate="exact")
    cleaner = Cleaner(tmp_path / "cleaning", f"pair {streamed}", {}, [[source, other]])
    cleaner.rows(rows, source)
    more = Dataset.from_list([{"id": n, "prompt": "a", "completion": two} for n, two in enumerate("cdbd")])
    left, facts = cleaner.rows(more.to_iterable_dataset() if streamed else more, other)
    assert [row["id"] for row in left] == [1]
    assert facts["removed"] == {"duplicate": 1, "duplicate of another source": 2}


def cleaning_recipe(folder: Path) -> dict:
    """The tiny recipe, with sources that hold duplicates and the suites' own rows."""
    tiny.write_data(folder)
    for name, held in (("prose", "held"), ("sounds", "asked")):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        suite = [json.loads(line) for line in (folder / f"{held}.jsonl").read_text().splitlines()]
        if name == "prose":  # the tiny prose is all of a kind
            rows = [{"id": row["id"], "text": prose(number, 60)} for number, row in enumerate(rows)]
            suite = [{"id": row["id"], "text": prose(9000 + number, 60)} for number, row in enumerate(suite)]
            (folder / f"{held}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in suite))
        rows += [{**row, "id": f"again {row['id']}"} for row in rows[:10]] + suite[:5]
        random.Random(1).shuffle(rows)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = tiny.recipe(folder, merge=False, overlap="refuse")
    content["evaluate"]["general"]["metrics"] = content["evaluate"]["sounds"]["metrics"] = ["bits_per_byte"]
    prose_stage, sounds = content["stages"]
    prose_stage["data"][0] |= {"streaming": True, "deduplicate": "near", "decontaminate": True}
    sounds["data"][0] |= {"deduplicate": "exact", "decontaminate": True}
    for stage in (prose_stage, sounds):  # another source with half of the same
        first = stage["data"][0]
        rows = [json.loads(line) for line in Path(first["data_files"]).read_text().splitlines()][:40]
        said, words = ("text", 60) if "text" in rows[0] else ("note", 4)
        rows += [{**rows[0], "id": f"new {number}", said: prose(5000 + number, words)} for number in range(30)]
        other = first["data_files"].replace(".jsonl", "-more.jsonl")
        Path(other).write_text("".join(json.dumps(row) + "\n" for row in rows))
        stage["data"].append({**first, "data_files": other})
    del sounds["lora"]
    return content


def sources_of(run: Path, stage: str, number: int = 0) -> dict:
    return json.loads((run / "stages" / stage / "done.json").read_text())["data"]["sources"][f"{number}: json"]


@pytest.mark.slow
@pytest.mark.long
def test_a_run_is_cleaned_and_says_so_the_same_on_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = cleaning_recipe(tmp_path)
    path = tiny.write(tmp_path, content)
    assert main(["check", str(path)]) == 0
    assert "what overlaps a suite" in capsys.readouterr().out
    assert main(["run", str(path), "--set", "stages.prose.data.0.decontaminate=false"]) == 5
    assert "no score" not in capsys.readouterr().err
    assert main(["run", str(path)]) == 0
    run = tmp_path / "run"
    prose_facts, sounds = sources_of(run, "prose"), sources_of(run, "sounds")
    assert prose_facts["removed"] == {"near duplicate": 10, "overlaps a suite": 5}
    assert sounds["removed"] == {"duplicate": 10, "overlaps a suite": 5}
    assert sounds["rows"] == 97
    more, more_sounds = sources_of(run, "prose", 1), sources_of(run, "sounds", 1)
    assert more["removed"] == {"near duplicate of another source": 39, "overlaps a suite": 1}
    assert more_sounds["removed"] == {"duplicate of another source": 39, "overlaps a suite": 1}
    assert more_sounds["rows"] == 30
    report = (run / "report.md").read_text()
    assert "10 duplicate, 5 overlaps a suite" in report
    assert sounds["removed_ids"][0] in report
    content["output_dir"] = str(tmp_path / "two")
    config = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu.yaml"
    launch = ("accelerate.commands.launch", "--config_file", str(config))
    process = tiny.start("run", str(tiny.write(tmp_path, content, "two.yaml")), launch=launch)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert sources_of(tmp_path / "two", "prose")["removed"] == prose_facts["removed"]
    assert sources_of(tmp_path / "two", "prose", 1)["removed"] == more["removed"]
    assert sources_of(tmp_path / "two", "sounds") == sounds
    one, two = tiny.scores(run), tiny.scores(tmp_path / "two")
    assert two == pytest.approx(one, abs=2e-4)


@pytest.mark.parametrize(
    ("place", "words", "text"),
    [
        ("stage", {"deduplicate": "fuzzy"}, "exact, near"),
        ("stage", {"deduplicate": {"nearly": 0.8}}, "Did you mean near?"),
        ("stage", {"deduplicate": {"near": 0.2}}, "at least 0.5"),
        ("stage", {"decontaminate": "yes"}, "Did you mean true?"),
        ("stage", {"dedupliacte": "exact"}, "Did you mean deduplicate?"),
        ("suite", {"deduplicate": "exact"}, "scored as it is"),
        ("none", {"decontaminate": True}, "there is no suite"),
    ],
)
def test_misuse_is_a_fault(
    tmp_path: Path, place: str, words: dict, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = tiny.recipe(tmp_path)
    source = content["evaluate"]["general"]["data"] if place == "suite" else content["stages"][0]["data"][0]
    source |= words
    if place == "none":
        content["evaluate"] = {}
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    assert text in capsys.readouterr().err
