"""Cleaning by datatrove: what it removes against hfpipe's own cleaning, and after a kill."""

import json
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from datasets import load_dataset

from hfpipe.cli import main
from hfpipe.data.cleaning.datatrove_steps import buckets_of, removed_share
from hfpipe.data.dedup import Cleaner
from hfpipe.data.sources.load import load_rows
from hfpipe.pipeline.clean_sources import clean_sources
from hfpipe.recipe import load_recipe

WORDS = [f"{one}{two}" for one in ("ba", "ce", "di", "fo", "gu") for two in ("lo", "mi", "na", "pe", "ru", "st", "th")]
HELD = "held.jsonl"


def prose(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def write(path: Path, texts: list[str | None]) -> str:
    path.write_text("".join(json.dumps({"id": f"{path.stem}{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    return str(path)


def web(folder: Path, texts: list[str | None], files: int, **words: object) -> dict:
    for number in range(files):
        write(folder / f"web{number}.jsonl", texts[number * len(texts) // files : (number + 1) * len(texts) // files])
    return {"path": "json", "data_files": str(folder / "web*.jsonl"), "split": "train", **words}


def recipe(folder: Path, sources: list[dict], suite: list[str]) -> Path:
    content = tiny.recipe(folder)
    held = {"path": "json", "data_files": write(folder / HELD, suite), "split": "train"}
    stage = {"name": "web", "kind": "pretrain", "data": sources, "max_dirty_share": 0.5}
    stage["training"] = {"max_steps": 2, "max_length": 64, "per_device_train_batch_size": 2}
    suites = {"general": {"data": held, "metrics": ["bits_per_byte"]}}
    quiet = {"energy": False, "shift": False}
    return tiny.write(folder, {**content, "stages": [stage], "evaluate": suites, "merge": False, **quiet})


def cleaned(path: Path, tasks: int = 3) -> tuple[list[list[str]], list[dict]]:
    """The ids that stay of each source, and the facts."""
    read = load_recipe(path)
    assert clean_sources(read, tasks, 1, None)
    [folder] = (Path(read.run_folder) / "cleaned").iterdir()
    facts = json.loads((folder / "done.json").read_text())["sources"]
    files = [str(folder / "text" / str(number) / "*.parquet") for number in range(len(facts))]
    return [list(load_dataset("parquet", data_files=one, split="train")["id"]) for one in files], facts


def by_hfpipe(path: Path, folder: Path) -> list[list[str]]:
    """The ids that stay of each source by hfpipe's own cleaning."""
    read = load_recipe(path)
    [suite] = [list(load_rows(one.data)) for one in read.evaluate.values()]
    sources = read.stages[0].data
    cleaner = Cleaner(folder / "own", "key", {"general": suite}, [sources])
    kept = []
    for source in sorted(sources, key=lambda one: bool(one.passed_through.get("streaming"))):
        rows = load_rows(source, kinds=("text",))
        if source.passed_through.get("streaming"):
            lanes = rows.num_shards
            reasons = cleaner.shares(rows, lanes, source)
            assert reasons is not None
            shares = [list(rows.shard(num_shards=lanes, index=lane)) for lane in range(lanes)]
            pairs = [pair for share, why in zip(shares, reasons, strict=True) for pair in zip(share, why, strict=True)]
            stay = [row for row, why in pairs if not why]
        else:
            stay = list(cleaner.tables(rows, source)[0])
        kept.append([row["id"] for row in stay if row["text"] and row["text"].strip()])
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_the_same_copies_and_the_same_overlap_are_removed_as_by_hfpipe(tmp_path: Path, streaming: bool) -> None:
    chance = random.Random(0)
    different = [prose(seed, chance.randint(3, 60)) for seed in range(80)]
    texts: list[str | None] = [*different, *chance.choices(different, k=90), None, " "]
    suite = [prose(seed, 40) for seed in range(1000, 1005)]
    texts += [f"{prose(seed, 9)} {suite[seed % 5]} {prose(seed, 9)}" for seed in range(200, 204)]
    chance.shuffle(texts)
    more = [*different[10:30], *(prose(seed, 20) for seed in range(500, 510))]  # copies of the first source, in another
    words = {"deduplicate": "exact", "streaming": streaming}
    other = {"path": "json", "data_files": write(tmp_path / "more.jsonl", more), "split": "train", **words}
    path = recipe(tmp_path, [other, web(tmp_path, texts, 3, decontaminate=True, **words)], suite)
    kept, facts = cleaned(path)
    own = by_hfpipe(path, tmp_path)
    if streaming:  # which copy of a text stays depends on how a stream is cut, into tasks here and lanes there
        said = {f"more{n}": text for n, text in enumerate(more)} | {
            f"web{number}{n}": text
            for number in range(3)
            for n, text in enumerate(texts[number * len(texts) // 3 : (number + 1) * len(texts) // 3])
        }
        kept, own = ([sorted(str(said[name]) for name in names) for names in each] for each in (kept, own))
    assert kept == own
    assert facts[0]["removed"] == {}, "the first of the sources keeps its copies"
    assert facts[1]["removed"] == {"overlaps a suite": 4, "duplicate": len(texts) - 6 - 80 + 20}
    assert facts[1]["dirty"] == {"empty": 1, "missing": 1}


@pytest.mark.slow
def test_near_duplicates_are_those_of_hfpipe_within_the_error_of_the_method(tmp_path: Path) -> None:
    threshold = 0.8
    chance = removed_share(np.linspace(0, 1, 1001), *buckets_of(threshold))
    told = [round(float(np.searchsorted(chance, share)) / 1000, 2) for share in (0.01, 0.5, 0.99)]
    assert told == [0.59, 0.82, 0.93], "docs/stream.md gives these"
    low, high = (float(np.searchsorted(chance, share)) / 1000 for share in (0.001, 0.999))
    texts, similar = [], []
    for seed in range(150):
        words = prose(seed, 300).split()
        changed = list(words)
        for place in random.Random(seed).sample(range(300), seed % 30):
            changed[place] = f"new{seed}"
        one, other = ({tuple(said[n : n + 5]) for n in range(296)} for said in (words, changed))
        similar.append(len(one & other) / len(one | other))
        texts += [" ".join(words), " ".join(changed)]
    path = recipe(tmp_path, [web(tmp_path, texts, 3, deduplicate={"near": threshold})], ["nothing of it"])
    kept = [{*ids} for ids in (cleaned(path)[0][0], by_hfpipe(path, tmp_path)[0])]
    names = [f"web{number}{row}" for number in range(3) for row in range(100)]
    for ids in kept:
        assert {*names[::2]} <= ids, "the first of two stays"
    gone = [[name not in ids for name in names[1::2]] for ids in kept]
    for one, other, similarity in zip(*gone, similar, strict=True):
        assert one == other or low < similarity < high
        assert one == (similarity >= high) or low < similarity < high
    assert sum(one == other for one, other in zip(*gone, strict=True)) >= 0.85 * len(similar)


@pytest.mark.slow
def test_run_reads_the_cleaned_text_and_the_recipe_needs_no_other_word(tmp_path: Path, capsys) -> None:
    texts = [prose(seed % 40, 30) for seed in range(120)]
    path = recipe(tmp_path, [web(tmp_path, texts, 1, deduplicate="exact")], [prose(999, 20)])
    assert main(["prepare", str(path), "--engine", "datatrove", "--tasks", "2", "--workers", "1"]) == 0
    assert main(["prepare", str(path), "--engine", "datatrove"]) == 0
    assert "cleaned already" in capsys.readouterr().out
    (tmp_path / "web0.jsonl").unlink()  # nobody reads it again
    write(tmp_path / "web0.jsonl", ["another text"] * 3)
    assert main(["run", str(path)]) == 0
    [facts] = json.loads((tmp_path / "run" / "stages" / "web" / "done.json").read_text())["data"]["sources"].values()
    assert facts["removed"] == {"duplicate": 80}
    assert not list((tmp_path / "run" / "stages" / "web" / "cleaning").glob("*.npz"))


@pytest.mark.parametrize(
    ("sources", "options", "code", "told"),
    [
        ([{}], [], 2, "no source of a pretrain stage has `deduplicate`"),
        ([{"deduplicate": "exact"}, {"deduplicate": "near"}], [], 2, "Give them the same `deduplicate`"),
        ([{"deduplicate": "exact"}], ["--tasks", "0"], 2, "--tasks 0 is not allowed"),
        ([{"deduplicate": "exact"}], ["--slurm", "partitoin=cpu"], 2, "Did you mean partition?"),
        ([{"deduplicate": "exact"}], ["--slurm", "partition=cpu"], 2, "--slurm needs time too"),
    ],
)
def test_what_datatrove_cannot_do_is_refused(tmp_path: Path, capsys, sources, options, code, told) -> None:
    texts = [prose(seed, 9) for seed in range(9)]
    path = recipe(tmp_path, [web(tmp_path, texts, 1, **words) for words in sources], ["x y z"])
    assert main(["prepare", str(path), "--engine", "datatrove", *options]) == code
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_preparation_goes_on_and_ends_as_one_that_was_not(tmp_path: Path) -> None:
    texts = [prose(seed % 3000, 5 + seed % 70) for seed in range(6000)]
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    paths = [
        recipe(tmp_path / name, [web(tmp_path / name, texts, 6, deduplicate="near", decontaminate=True)], texts[:5])
        for name in ("killed", "whole")
    ]
    line = ("prepare", str(paths[0]), "--engine", "datatrove", "--tasks", "6", "--workers", "2")
    work = tiny.start(*line)
    logs = tmp_path / "killed" / "run" / "cleaned"
    while not (marks := [*logs.glob("*/logs/*/completions/*")]) or len(marks) % 6 == 0:
        assert work.poll() is None
        time.sleep(0.05)
    work.send_signal(signal.SIGKILL)
    work.wait()
    marked = {mark: mark.stat().st_mtime_ns for mark in logs.glob("*/logs/*/completions/*")}
    assert 0 < len(marked) < 26
    time.sleep(1)  # tasks of the killed one notice it
    kept, _ = cleaned(paths[0])
    assert kept == cleaned(paths[1], 6)[0]
    assert all(mark.stat().st_mtime_ns == when for mark, when in marked.items()), "a task that was done ran again"
