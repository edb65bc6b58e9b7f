"""Sources: roles, conditions, ranges, and every mistake a person can make with them as one paragraph."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from hub_server import HubServer

from hfpipe.core.errors import DataError, MachineError, RecipeError, UserError
from hfpipe.data.sources.formats import roles_of
from hfpipe.data.sources.load import friendly, load_rows
from hfpipe.recipe import Source

ROWS = [
    {"id": f"r{n}", "text": f"text {n}", "question": f"What is {n}?", "answer": str(n), "score": n / 10, "n": n}
    for n in range(10)
]
TEMPLATE = {"prompt": "Q: {question} {{in braces}}\nA:", "completion": " {answer}"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write("rows.jsonl", ROWS)
    return tmp_path


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(**words: Any) -> Dataset | IterableDataset:
    return load_rows(Source(**{"path": "json", "data_files": "rows.jsonl", **words}))


streamed = pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])


@streamed
def test_text_comes_with_its_id_and_nothing_else(folder: Path, streaming: bool) -> None:
    rows = load(streaming=streaming)
    assert isinstance(rows, IterableDataset if streaming else Dataset)
    assert set(rows.column_names) == set(rows.features) == {"text", "id"}
    assert roles_of(rows) == "text"
    assert list(rows) == [{"text": row["text"], "id": row["id"]} for row in ROWS]


@streamed
def test_columns_rename_and_replace_a_column_of_that_name(folder: Path, streaming: bool) -> None:
    rows = load(columns={"text": "question", "id": "answer"}, streaming=streaming)
    assert set(rows.column_names) == set(rows.features) == {"text", "id"}
    assert next(iter(rows)) == {"text": "What is 0?", "id": "0"}
    rows = load(columns={"prompt": "question", "completion": "answer"}, streaming=streaming)
    assert roles_of(rows) == "prompt_completion"
    assert next(iter(rows)) == {"prompt": "What is 0?", "completion": "0", "id": "r0"}
    rows = load(columns={"prompt": "answer", "completion": "answer"}, streaming=streaming)
    assert next(iter(rows)) == {"prompt": "0", "completion": "0", "id": "r0"}


@streamed
def test_template_builds_roles_and_a_missing_value_builds_none(folder: Path, streaming: bool) -> None:
    write("rows.jsonl", [*ROWS[:2], {**ROWS[2], "answer": None}])
    rows = load(template=TEMPLATE, streaming=streaming)
    assert set(rows.column_names) == set(rows.features) == {"prompt", "completion", "id"}
    found = list(rows)
    assert found[1] == {"prompt": "Q: What is 1? {in braces}\nA:", "completion": " 1", "id": "r1"}
    assert found[2]["completion"] is None
    assert next(iter(load(template={"text": "{text}!"}, streaming=streaming)))["text"] == "text 0!"
    assert list(load(template={"text": "{n} {score}"}, streaming=streaming))[1]["text"] == "1 0.1"
    mixed = load(columns={"prompt": "question"}, template={"completion": " {n}"}, streaming=streaming)
    assert list(mixed)[1] == {"prompt": "What is 1?", "completion": " 1", "id": "r1"}


@streamed
def test_messages_come_before_pairs_and_pairs_before_text(folder: Path, streaming: bool) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write("rows.jsonl", [{"text": "t", "prompt": "p", "completion": "c", "messages": chat}])
    rows = load(streaming=streaming)
    assert roles_of(rows) == "messages"
    assert list(rows) == [{"messages": chat}]
    write("two.jsonl", [{"text": "t", "prompt": "p", "completion": "c"}])
    rows = load(data_files="two.jsonl", streaming=streaming)
    assert list(rows) == [{"prompt": "p", "completion": "c"}]
    assert list(load(data_files="two.jsonl", columns={"text": "text"}, streaming=streaming)) == [{"text": "t"}]


@streamed
def test_a_column_inside_of_another_is_named_with_a_dot(folder: Path, streaming: bool) -> None:
    pairs = [{"translation": {"en": "A hill.", "de": "Ein Huegel."}, "id": "t0"}, {"translation": None, "id": "t1"}]
    write("pairs.jsonl", pairs)
    words = {"data_files": "pairs.jsonl", "streaming": streaming}
    rows = load(columns={"source": "translation.en", "target": "translation.de"}, **words)
    assert roles_of(rows) == "translation"
    assert next(iter(rows)) == {"source": "A hill.", "target": "Ein Huegel.", "id": "t0"}
    template = {"source": "translate English to German: {translation.en}", "target": "{translation.de}"}
    found = list(load(template=template, **words))
    assert found[0]["source"] == "translate English to German: A hill."
    assert found[1] == {"source": None, "target": None, "id": "t1"}
    with pytest.raises(DataError, match=r"'translation.fr'.*Did you mean translation"):
        load(columns={"source": "translation.en", "target": "translation.fr"}, **words)
    with pytest.raises(DataError, match=r"`columns: {source: translation.\w\w, target: translation.\w\w}` renames"):
        load_rows(Source(path="json", **words), kinds=("translation",))


def test_a_stream_that_does_not_know_its_columns_is_treated_like_one_that_does(folder: Path) -> None:
    Path("t.csv").write_text("content,n\na,1\nb,2\n")
    words = {"path": "csv", "data_files": "t.csv", "streaming": True}
    rows = load(columns={"text": "content"}, **words)
    assert rows.column_names == list(rows.features) == ["text"]
    assert list(rows) == [{"text": "a"}, {"text": "b"}]
    assert list(load(template={"text": "{n}"}, skip=1, **words)) == [{"text": "2"}]
    with pytest.raises(DataError, match="holds int64, not text"):
        load(columns={"text": "n"}, **words)


@streamed
@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("score >= 0.5", [5, 6, 7, 8, 9]),
        ("2 < n < 5 or id == 'r9'", [3, 4, 9]),
        ("not (n in [1, 2]) and n < 4", [0, 3]),
        ("n % 4 == 0 and answer != '4'", [0, 8]),
        ("-n + 1 > -1", [0, 1]),
        ("n / n == 1 and n not in (1, 2, 3)", [4, 5, 6, 7, 8, 9]),  # 0 / 0 is no reason to keep a row
        ("'t 7' in text", [7]),
    ],
)
def test_where_keeps_the_rows_it_describes(folder: Path, condition: str, kept: list[int], streaming: bool) -> None:
    assert [row["id"] for row in load(where=condition, streaming=streaming)] == [f"r{n}" for n in kept]


def test_where_of_a_missing_value_is_false_unless_it_is_asked_for(folder: Path) -> None:
    write("rows.jsonl", [{"text": "a", "score": 1.0}, {"text": "b", "score": None}])
    ids = {text: [row["text"] for row in load(where=text)] for text in ("score > 0", "score + 1 < 9", "score is None")}
    assert ids == {"score > 0": ["a"], "score + 1 < 9": ["a"], "score is None": ["b"]}
    assert [row["text"] for row in load(where="score != None")] == ["a"]


@pytest.mark.parametrize(
    "condition",
    [
        "__import__('os').system('true')",
        "text.upper() == 'A'",
        "text[0] == 'a'",
        "n ** n ** n > 1",
        "(lambda: 1)() == n",
        "[n for n in (1, 2)]",
        "n := 3",
        "f'{n}' == '1'",
        "n if n else 1",
        "n is 3",
        "n == b'1'",
        "n >",
        "1 < 2",
    ],
)
def test_where_allows_comparisons_only_and_says_where_it_is_wrong(folder: Path, condition: str) -> None:
    with pytest.raises(RecipeError, match="where: ") as caught:
        load(where=condition)
    assert "\n" not in str(caught.value)


def test_where_that_compares_text_with_numbers_is_told(folder: Path) -> None:
    with pytest.raises(DataError, match="text is str"):
        load(where="text > 3")
    rows = load(where="text > 3", streaming=True)
    with pytest.raises(DataError, match="text is str"):
        list(rows)


@streamed
def test_skip_and_take_cut_by_place_before_where_chooses(folder: Path, streaming: bool) -> None:
    def ids(**words: Any) -> list[str]:
        return [row["id"] for row in load(streaming=streaming, **words)]

    assert ids(skip=3, take=2) == ["r3", "r4"]
    assert ids(skip=8, take=9) == ["r8", "r9"]
    assert ids(take=99) == [f"r{n}" for n in range(10)]
    assert ids(skip=1, take=4, where="n % 2 == 0") == ["r2", "r4"]


@pytest.mark.parametrize("lanes", [2, 4, 8])
def test_lanes_read_no_row_outside_the_range(folder: Path, lanes: int) -> None:
    """datasets 5.2 divides skip and take among the shards of a stream, and so reads rows that a suite holds."""
    for part in range(8):
        write(f"part{part}.jsonl", [{"text": f"{part}.{n}"} for n in range(20)])

    def lane_rows(**words: Any) -> list[str]:
        rows = load(data_files="part*.jsonl", streaming=True, **words)
        return [row["text"] for lane in range(lanes) for row in rows.shard(num_shards=lanes, index=lane)]

    first = load(data_files="part*.jsonl", streaming=True, take=30)
    assert first.num_shards == first.reshard().num_shards == 1  # so whoever wants more shards deals out rows instead
    held_out = [row["text"] for row in first]
    assert held_out == [f"{n // 20}.{n % 20}" for n in range(30)]
    trained = lane_rows(skip=10)
    assert not set(trained) & set(held_out[:10])
    assert sorted(lane_rows(take=30, where="text != '0.3'")) == sorted(set(held_out) - {"0.3"})
    assert sorted(lane_rows(skip=10, take=20)) == sorted(held_out[10:])


def test_a_cut_stream_resumes_exactly(folder: Path) -> None:
    rows = load(streaming=True, skip=2, take=6, where="n != 4", template={"text": "{n}"})
    begun = iter(rows)
    first = [next(begun)["text"] for _ in range(2)]
    state = rows.state_dict()
    again = load(streaming=True, skip=2, take=6, where="n != 4", template={"text": "{n}"})
    again.load_state_dict(state)
    assert [*first, *(row["text"] for row in again)] == ["2", "3", "5", "6", "7"]


def test_saved_folders_are_opened_too(folder: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk("one")
    DatasetDict({"train": Dataset.from_list(ROWS[:6]), "test": Dataset.from_list(ROWS[6:])}).save_to_disk("two")
    assert len(load_rows(Source(path="one"), default_split="test")) == 10
    assert len(load_rows(Source(path="two"), default_split="test")) == 4
    assert isinstance(load_rows(Source(path="one", streaming=True)), IterableDataset)
    with pytest.raises(RecipeError, match=r"allowed: train, test\. Did you mean train"):
        load_rows(Source(path="two", split="trian"))


def test_a_stage_and_a_suite_take_their_own_split(folder: Path) -> None:
    Path("plain").mkdir()
    for name in ("train", "test"):
        write(f"plain/{name}.jsonl", [{"text": name}])
    assert next(iter(load_rows(Source(path="plain"))))["text"] == "train"
    assert next(iter(load_rows(Source(path="plain"), default_split="test")))["text"] == "test"
    assert next(iter(load_rows(Source(path="plain", split="test[:1]"))))["text"] == "test"
    assert len(load_rows(Source(path="json", data_files="rows.jsonl"), default_split="test")) == 10


CONFIGS = (
    b"---\nconfigs:\n- config_name: law\n  data_files: rows.jsonl\n- config_name: web\n  data_files: web.jsonl\n---\n"
)
MISTAKES = [  # words of the source, error, what its message says
    ({"split": "trian"}, RecipeError, ["trian", "allowed: train", "mean train?"]),
    ({"split": "trian", "streaming": True}, RecipeError, ["trian", "allowed: train", "mean train?"]),
    ({"split": "train[:5]", "streaming": True}, RecipeError, ["slice", "take"]),
    ({"split": "train[:5"}, RecipeError, ["train[:1000]"]),
    ({"data_files": "nope.jsonl"}, RecipeError, ["no file matches nope.jsonl", "current folder"]),
    ({"data_files": "nope/*.jsonl"}, RecipeError, ["no file matches nope/*.jsonl"]),
    ({"data_files": "nope/*.jsonl", "streaming": True}, RecipeError, ["no file matches nope/*.jsonl"]),
    ({"data_files": "empty.jsonl"}, DataError, ["no rows", "empty.jsonl"]),
    ({"data_files": None}, RecipeError, ["data_files"]),
    ({"data_files": "bad.jsonl"}, DataError, ["bad.jsonl", "row 1"]),
    ({"data_files": "bad.jsonl", "streaming": True}, DataError, ["bad.jsonl", "row 1"]),
    ({"path": "parquet", "data_files": "bad.parquet"}, DataError, ["bad.parquet", "magic"]),
    ({"path": "csv", "data_files": "bad.csv"}, DataError, ["bad.csv", "line 3"]),
    ({"sep": ","}, RecipeError, ["sep"]),
    ({"path": "./nowhere", "data_files": None}, RecipeError, ["./nowhere", "there is no such file or folder here"]),
    ({"path": "./void", "data_files": None}, RecipeError, ["without data files"]),
    ({"path": "./conf", "data_files": None}, RecipeError, ["`name:`", "law, web"]),
    ({"path": "./conf", "data_files": None, "name": "lwa"}, RecipeError, ["law, web", "mean law?"]),
    ({"where": "scor > 1"}, DataError, ["scor", "its columns are id, text", "mean score?"]),
    ({"columns": {"text": "txt"}}, DataError, ["columns.text", "mean text?"]),
    ({"template": {"text": "{anser}"}}, DataError, ["template.text", "mean answer?"]),
    ({"template": {"text": "{text.__class__}"}}, RecipeError, ["plain name"]),
    ({"template": {"text": "{text[0]}"}}, RecipeError, ["plain name"]),
    ({"template": {"text": "{n:>9}"}}, RecipeError, ["plain name"]),
    ({"template": {"text": "{text!r}"}}, RecipeError, ["plain name"]),
    ({"template": {"text": "{}"}}, RecipeError, ["plain name"]),
    ({"template": {"text": "{text"}}, RecipeError, ["doubled"]),
    ({"columns": {"prompt": "question", "completion": "n"}}, DataError, ["int64", "template:"]),
    ({"columns": {"messages": "text"}}, DataError, ["role", "content"]),
    ({"data_files": "other.jsonl"}, DataError, ["columns other", "columns:", "template:"]),
    ({"data_files": "turns.jsonl", "columns": {"messages": "turns"}}, DataError, ["who, what", "role"]),
    ({"path": "builtin", "data_files": None, "name": "txt"}, RecipeError, ["mean text?"]),
]


@pytest.mark.parametrize(("words", "error", "says"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_mistake_is_one_paragraph(folder: Path, words: dict, error: type[UserError], says: list[str]) -> None:
    write("other.jsonl", [{"other": "a"}])
    write("turns.jsonl", [{"turns": [{"who": "human", "what": "a"}]}])
    Path("empty.jsonl").write_text("")
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": "b"\n{"text": "c"}\n')
    Path("bad.parquet").write_bytes(b"PAR1 but not Parquet")
    Path("bad.csv").write_text("text,b\n1,2\n1,2,3,4\n")
    Path("void").mkdir()
    Path("conf").mkdir()
    Path("conf/README.md").write_bytes(CONFIGS)
    write("conf/rows.jsonl", ROWS)
    write("conf/web.jsonl", ROWS)
    words = {key: value for key, value in {"data_files": "rows.jsonl", **words}.items() if value is not None}
    source = Source(**{"path": "json", **words})
    with pytest.raises(UserError) as caught, friendly(source):
        list(load_rows(source))
    assert isinstance(caught.value, error)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?", ")"))
    for part in says:
        assert part in message


def test_what_is_read_later_is_told_with_its_file(folder: Path) -> None:
    write("a.jsonl", ROWS)
    Path("z.jsonl").write_text('{"id": "1", "text": \n')
    source = Source(path="json", data_files=["a.jsonl", "z.jsonl"], streaming=True)
    rows = load_rows(source)
    with pytest.raises(DataError, match=r"z\.jsonl") as caught, friendly(source):
        list(rows)
    assert "a.jsonl" not in str(caught.value)
    with pytest.raises(KeyError), friendly(source):  # not a fault of the data
        {}["bug"]


@pytest.mark.slow
def test_the_same_words_give_the_same_cache_on_every_rank(folder: Path) -> None:
    program = (
        "from hfpipe.data.sources.load import load_rows; from hfpipe.recipe import Source\n"
        "print(load_rows(Source(path='json', data_files='rows.jsonl', where='n > 3', template={'text': '{n}'}))"
        "._fingerprint)"
    )
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "shared"), "HF_HUB_OFFLINE": "1"}
    seen = {subprocess.check_output([sys.executable, "-c", program], env=environment, text=True) for _ in range(2)}
    assert len(seen) == 1


ON_THE_HUB = """
import sys
from hfpipe.core.errors import UserError
from hfpipe.data.sources.load import friendly, load_rows
from hfpipe.recipe import Source
for words in ({"path": "team/ok"}, {"path": "team/ok", "streaming": True}, {"path": "team/none"},
              {"path": "team/ok", "revision": "nope"}, {"path": "team/ok", "split": "tset"}, {"path": "team/conf"}):
    source = Source(**words)
    try:
        with friendly(source):
            print(len(list(load_rows(source))))
    except UserError as error:
        print(error.exit_code, error)
"""


@pytest.mark.slow
def test_the_hub_and_its_refusals(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("dataset", "team/ok", {"train.jsonl": b'{"text": "a"}\n{"text": "b"}\n'})
    hub.add_repo("dataset", "team/conf", {"README.md": CONFIGS, "rows.jsonl": b"{}", "web.jsonl": b"{}"})
    done = subprocess.run(
        [sys.executable, "-c", ON_THE_HUB], env=os.environ | hub.env(home=tmp_path), capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["2", "2", "4", "2", "2", "2"]
    for line, says in zip(
        lines[2:], ["`hf auth login`", "'nope' doesn't exist", "allowed: train", "`name:` law, web"], strict=True
    ):
        assert says in line


@pytest.mark.slow
def test_without_a_network_it_says_so(tmp_path: Path) -> None:
    program = (
        "from hfpipe.data.sources.load import load_rows; from hfpipe.core.errors import MachineError\n"
        "from hfpipe.recipe import Source\n"
        "try: load_rows(Source(path='me/nothing'))\nexcept MachineError as error: print(error)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    printed = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert "HF_HUB_OFFLINE is set" in printed


def test_errors_of_ours_pass_friendly_unchanged() -> None:
    with pytest.raises(MachineError, match="as it was"), friendly(Source(path="builtin")):
        raise MachineError("as it was")
