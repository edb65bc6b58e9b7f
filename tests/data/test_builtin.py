"""The built-in corpus: the same on every run, nothing held out in any training table, built once."""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from hfpipe.core.errors import MachineError, RecipeError
from hfpipe.data.builtin.corpus import LABELS, SPLITS, TABLES, builtin
from hfpipe.data.builtin.docstrings import docstrings_of
from hfpipe.data.builtin.numbers import chinese, english, german

LOAD = "from hfpipe.data.builtin.corpus import builtin; print(builtin()['id'][:5])"


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Every table of every split, from a cache of its own that two processes were told to build at once."""
    cache = str(tmp_path_factory.mktemp("corpus"))
    start = [sys.executable, "-c", LOAD]
    ranks = [
        subprocess.Popen(start, env=os.environ | {"HFPIPE_CACHE": cache}, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert printed[0] == printed[1] != ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HFPIPE_CACHE", cache)
        yield {(name, split): builtin(name, split) for name in TABLES for split in SPLITS} | {"cache": Path(cache)}


def lines(table) -> set[str]:
    return {line.strip() for text in table["text"] for line in text.split("\n") if len(line.strip()) >= 60}


@pytest.mark.slow
def test_documents_are_many_distinct_and_have_the_columns_of_web_text(tables: dict) -> None:
    train, test = tables["text", "train"], tables["text", "test"]
    assert train.column_names == ["text", "id", "url", "module", "package", "token_count"]
    assert len(train) > 3000
    assert 0.02 < len(test) / (len(train) + len(test)) < 0.12
    ids, texts = [*train["id"], *test["id"]], [*train["text"], *test["text"]]
    assert len(set(ids)) == len(ids)
    assert len(set(texts)) == len(texts)
    assert min(map(len, texts)) >= 200
    assert not any(name.startswith("hfpipe") for name in train.unique("module"))


@pytest.mark.slow
def test_nothing_held_out_is_trained_on(tables: dict) -> None:
    assert not lines(tables["text", "test"]) & lines(tables["text", "train"])
    held = set(tables["text", "test"]["id"])
    for name in ("package", "summary"):
        assert set(tables[name, "test"]["id"]) <= held
        assert not set(tables[name, "train"]["id"]) & held


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_package_is_balanced_and_does_not_give_the_answer_away(tables: dict, split: str) -> None:
    table = tables["package", split]
    counts = Counter(table["label"])
    assert len(set(counts.values())) == 1
    assert set(counts) <= set(LABELS)
    assert len(counts) >= 5
    assert Counter(table["label"][: len(counts)]) == dict.fromkeys(counts, 1)  # so `take` is balanced too
    for row in table:
        assert row["completion"] == f" {row['label']}"
        question = row["prompt"].removeprefix("Docstring: ").removesuffix("\nPackage:")
        assert row["label"] not in question.lower()
        assert len(question) <= 300


@pytest.mark.slow
def test_summary_goes_from_a_signature_to_a_sentence(tables: dict) -> None:
    by_id = dict(zip(tables["text", "train"]["id"], tables["text", "train"]["text"], strict=True))
    table = tables["summary", "train"]
    assert len(table) > 500
    for row in table:
        assert row["prompt"].startswith("def ")
        assert row["prompt"].endswith(":\n    Summary:")
        assert 20 <= len(row["completion"]) - 1 <= 120
        assert by_id[row["id"]].startswith(row["completion"][1:])


@pytest.mark.slow
def test_the_second_load_reads_the_cache_and_leaves_nothing_behind(tables: dict) -> None:
    begin = time.perf_counter()
    again = builtin()
    assert time.perf_counter() - begin < 0.5
    assert again[7] == tables["text", "train"][7]
    assert [path.name for path in tables["cache"].iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("arguments", "hint"), [(("txt",), "mean text?"), (("text", "tset"), "mean test?")])
def test_unknown_table_or_split_lists_what_there_is(arguments: tuple, hint: str) -> None:
    with pytest.raises(RecipeError, match=hint.replace("?", r"\?")) as caught:
        builtin(*arguments)
    assert "allowed is one of" in str(caught.value)


def test_a_cache_that_cannot_be_written_is_the_machines_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HFPIPE_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(MachineError, match="HFPIPE_CACHE"):
        builtin()


def test_sources_are_read_and_not_run(tmp_path: Path) -> None:
    prose = "It says what it does, at some length and in plain words. " * 5
    (tmp_path / "good.py").write_text(
        f'"""{prose}"""\nraise SystemExit("run")\n'
        f'class Door:\n    """Door. {prose}"""\n    def open(self, wide=True):\n        """Open. {prose}"""\n'
        f'def short():\n    """Too short."""\n'
    )
    (tmp_path / "broken.py").write_text(f'"""{prose}"""\ndef (:\n')
    (tmp_path / "latin.py").write_bytes(f'"""{prose} \xe9"""\n'.encode("latin-1"))
    (tmp_path / "code.py").write_text(f'"""{prose}"""\n' + "x = 1\n" * 1000)
    files = [(name, str(tmp_path / f"{name}.py")) for name in ("good", "broken", "latin", "code", "absent")]
    found = docstrings_of(files)
    assert [(row["module"], row["name"]) for row in found] == [("good", ""), ("good", "Door"), ("good", "Door.open")]
    assert [row["signature"] for row in found] == ["", "", "open(self, wide=True)"]


def test_numbers_are_said_in_three_languages_and_held_out_apart() -> None:
    said = {number: (english(number), german(number), chinese(number)) for number in (0, 1, 16, 21, 101, 1010, 2300)}
    assert said == {
        0: ("zero", "null", "零"),
        1: ("one", "eins", "一"),
        16: ("sixteen", "sechzehn", "十六"),
        21: ("twenty-one", "einundzwanzig", "二十一"),
        101: ("one hundred and one", "einhunderteins", "一百零一"),
        1010: ("one thousand and ten", "eintausendzehn", "一千零一十"),
        2300: ("two thousand three hundred", "zweitausenddreihundert", "二千三百"),
    }
    train, test = (builtin("numbers", split) for split in ("train", "test"))
    assert len(train) + len(test) == 10_000
    for language in ("en", "de", "zh"):
        assert len({*train[language], *test[language]}) == 10_000, "no two numbers are said alike"
