"""Examples of a fine-tune in a stream: each once an epoch, whole, in rows of like length or shared ones, exact."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from hfpipe.core.errors import DataError
from hfpipe.data.row_order import PackedRows
from hfpipe.data.sources.load import load_rows
from hfpipe.data.stream.dataset import TokenStream
from hfpipe.data.stream.examples import Examples
from hfpipe.data.tokenize import IGNORED, RowTokenizer
from hfpipe.model.create import train_tokenizer
from hfpipe.recipe import Source

LENGTH, STEP, LANES = 64, 8, 4
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def chats(count: int, name: str = "c") -> list[dict[str, Any]]:
    chance = random.Random(count)
    return [
        {
            "messages": [
                {"role": "user", "content": f"{name}{number} " + "asks " * chance.randint(1, 20)},
                {"role": "assistant", "content": "says " * chance.randint(1, 20)},
            ]
        }
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts = (turn["content"] for row in chats(50) for turn in row["messages"])
    made = train_tokenizer(texts, 300, 512)
    made.chat_template = CHATML
    return made


def source(folder: Path, rows: list[dict[str, Any]], name: str = "chats", **words: Any) -> Any:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(Source.model_validate({"path": str(folder / f"{name}.jsonl"), "streaming": True, **words}))


def stream(sources: list[Any], tokenizer: Any, packed: bool, **words: Any) -> TokenStream:
    tokenizers = [RowTokenizer(tokenizer, LENGTH, too_long="drop") for _ in sources]
    given = {"lanes": LANES, "seed": 3, "window_documents": 40, **words}
    examples = Examples(tokenizers, packed, STEP // given["lanes"])
    return TokenStream(sources, tokenizer, max_length=LENGTH, examples=examples, **given)


def parts(row: dict[str, Any]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The examples of a row."""
    begins = np.flatnonzero(row["position_ids"] == 0) if "position_ids" in row else np.zeros(1, int)
    for ids, labels in zip(np.split(row["input_ids"], begins[1:]), np.split(row["labels"], begins[1:]), strict=True):
        yield tuple(ids.tolist()), tuple(labels.tolist())


def expected(rows: list[dict[str, Any]], tokenizer: Any) -> Counter:
    made = RowTokenizer(tokenizer, LENGTH, too_long="drop").encode(rows)
    return Counter((tuple(row["input_ids"]), tuple(row["labels"])) for row in made)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_every_example_comes_whole_once_an_epoch(tmp_path: Path, tokenizer: Any, packed: bool, table: bool) -> None:
    rows = chats(203)
    given = Dataset.from_list(rows) if table else source(tmp_path, rows)
    tokens = stream([given], tokenizer, packed, exhausted="stop", epochs=2)
    found = Counter(
        part for batch in tokens.batches(2) for row in batch if row["source"] is not None for part in parts(row)
    )
    wanted = expected(rows, tokenizer)
    assert found == Counter({part: 2 * count for part, count in wanted.items()})
    report = next(iter(tokens.facts()["sources"].values()))
    assert report["rows"] == 203
    assert report["long"] == 203 - sum(wanted.values()) > 0


@pytest.mark.parametrize("packed", [False, True])
def test_the_rows_are_the_same_on_any_ranks_and_from_any_place_on(tmp_path: Path, tokenizer: Any, packed: bool) -> None:
    one, two = chats(90), chats(41, "d")

    def opened(**words: Any) -> TokenStream:
        given = [source(tmp_path, one), Dataset.from_list(two)]
        return stream(given, tokenizer, packed, weights=[0.7, 0.3], **words)

    def take(tokens: TokenStream, count: int) -> list[list[int]]:
        batches = tokens.batches(1)
        return [next(batches)[0]["input_ids"].tolist() for _ in range(count)]

    whole = take(opened(), 120)
    ranks = [opened(rank=rank, ranks=2) for rank in range(2)]
    served = [take(tokens, 40) for tokens in ranks]
    assert [row for pair in zip(*served, strict=True) for row in pair] == whole[:80]
    state = json.loads(json.dumps(TokenStream.merge_states([tokens.state_dict() for tokens in ranks])))
    for count in (1, 4):
        again = [opened(rank=rank, ranks=count) for rank in range(count)]
        for tokens in again:
            tokens.load_state_dict(state)
        served = [take(tokens, 40 // count) for tokens in again]
        assert [row for turn in zip(*served, strict=True) for row in turn] == whole[80:]
    for stop in range(1, 40, 7):
        tokens = opened()
        take(tokens, stop)
        state = json.loads(json.dumps(tokens.state_dict()))
        again = opened()
        again.load_state_dict(state)
        assert take(again, 30) == whole[stop : stop + 30]


def test_sources_are_mixed_by_their_tokens_and_little_is_padded(tmp_path: Path, tokenizer: Any) -> None:
    long = [
        {"messages": [{"role": "user", "content": "a " * 10}, {"role": "assistant", "content": "b " * 10}]}
        for _ in range(60)
    ]
    short = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]} for _ in range(60)]
    for packed in (False, True):
        tokens = stream([source(tmp_path, long), source(tmp_path, short, "short")], tokenizer, packed)
        batches = tokens.batches(STEP)
        for _ in range(60):
            next(batches)
        shares = [found["token_share"] for found in tokens.facts()["sources"].values()]
        assert shares == pytest.approx([0.5, 0.5], abs=0.02)
    alike = stream([source(tmp_path, chats(400), "many")], tokenizer, packed=False)
    batches = alike.batches(STEP)
    sizes = np.array([[len(row["input_ids"]) for row in next(batches)] for _ in range(50)])
    assert 1 - sizes.sum() / (STEP * sizes.max(axis=1)).sum() == pytest.approx(alike.facts()["padding_share"], abs=1e-3)
    assert alike.facts()["padding_share"] < 0.2
    shared = stream([source(tmp_path, chats(400), "many")], tokenizer, packed=True)
    batches = shared.batches(STEP)
    for _ in range(50):
        next(batches)
    sizes = np.array([len(ids) for ids, _ in expected(chats(400), tokenizer)])
    whole = 1 - sizes.sum() / (LENGTH * PackedRows(sizes, LENGTH, 0).epoch(0).rows)  # packed without windows
    assert shared.facts()["padding_share"] < whole + 0.03


def test_what_has_nothing_to_train_on_is_counted_and_refused_where_all_is_so(tmp_path: Path, tokenizer: Any) -> None:
    rows = chats(40)
    for row in rows[::4]:
        row["messages"][1]["train"] = False
    tokens = stream([source(tmp_path, rows)], tokenizer, packed=True, exhausted="stop")
    given = [row for batch in tokens.batches(1) for row in batch]
    assert all((row["labels"] != IGNORED).any() for row in given if row["source"] is not None)
    assert next(iter(tokens.facts()["sources"].values()))["untrained"] == 10
    for row in rows:
        row["messages"][1]["train"] = False
    with pytest.raises(DataError, match="token to train on"):
        next(stream([source(tmp_path, rows)], tokenizer, packed=True).batches(1))


def test_a_small_file_is_opened_no_more_often_than_its_shares(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    path = tmp_path / "chats.jsonl"
    rows = source(tmp_path, chats(12))
    real = Path.open

    def counted(file: Path, *arguments: Any, **words: Any) -> Any:
        opened.append(file)
        return real(file, *arguments, **words)

    monkeypatch.setattr(Path, "open", counted)
    batches = stream([rows], tokenizer, packed=True, prefetch=False).batches(STEP)
    for _ in range(50):
        next(batches)
    assert opened.count(path) <= 2 * LANES
