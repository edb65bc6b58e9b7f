"""Conversations tokenized by several processes are those of one, in order."""

from typing import Any

import numpy as np
import pytest

from hfpipe.core.errors import DataError
from hfpipe.data import token_pool
from hfpipe.data.token_pool import encoded
from hfpipe.data.tokenize import RowTokenizer
from hfpipe.model.create import train_tokenizer

CHATML = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def chats(count: int, role: str = "user") -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": role, "content": f"{n}?"}, {"role": "assistant", "content": "yes " * (1 + n % 7)}]}
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> RowTokenizer:
    made = train_tokenizer(["yes and no"] * 20, 280, 128)
    made.chat_template = CHATML
    return RowTokenizer(made, 64)


def test_several_processes_make_the_same_tokens_in_order(
    tokenizer: RowTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = chats(90)
    rows[70]["messages"][0]["role"] = "tool"
    blocks = [rows[begin : begin + 10] for begin in range(0, 90, 10)]
    alone = list(encoded(tokenizer, blocks, processes=1))
    monkeypatch.setattr(token_pool, "ALONE", 20)
    shared = list(encoded(tokenizer, blocks, processes=2))
    assert [block for block, _ in shared] == blocks
    for (_, one), (_, other) in zip(alone, shared, strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.trained, other.trained)
        assert np.array_equal(one.starts, other.starts)
        assert one.refused == other.refused
    assert sum(len(made.refused) for _, made in shared) == 1


def test_a_template_that_takes_nothing_is_told_at_once(tokenizer: RowTokenizer) -> None:
    with pytest.raises(DataError, match="takes none of 5 conversations"):
        next(encoded(tokenizer, [chats(5, "tool")]))
    some = encoded(tokenizer, [chats(5), chats(1, "tool")])  # the last block is one row, and dirty
    assert [len(made.refused) for _, made in some] == [0, 1]
