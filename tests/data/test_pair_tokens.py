"""Pairs of conversations become the tokens of TRL's DPOTrainer, for tokenizers of every family and TRL's templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from tokenizer_families import FAMILIES, make
from trl import DPOConfig, DPOTrainer

from hfpipe.data.preference import PairTokenizer
from hfpipe.model.create import create_model

SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURES = ("_vl", "idefics", "llava", "smolvlm", "_training")  # of these, and of another use of a template in the list
TEMPLATES = {
    path.stem: path.read_text()
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    if not any(word in path.stem for word in PICTURES)
}
# Of the ways in which templates differ: a thought before the last answer, a BOS, content that is trimmed.
OF_EVERY_FAMILY = ("qwen3", "llama3", "gemma")


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def pairs() -> list[dict[str, Any]]:
    """One question, several turns and a system message; answers that begin alike, end alike, or are of white space."""
    asked = [
        [said("user", "What does the fox say?")],
        [said("user", "2 + 2 ="), said("assistant", "4"), said("user", "Grüße! 牛呢  ")],
        [said("system", "Be brief."), said("user", " def moo(x):\n")],
    ]
    answers = [
        ("yelp", "moo"),
        (" 牛 2024", " 牛 2025 and more"),
        ("return x", "return x + 1\n"),
        ("the end", "an end"),
    ]
    return [
        {"prompt": prompt, "chosen": [said("assistant", one)], "rejected": [said("assistant", other)]}
        for prompt in asked
        for one, other in answers
    ]


def by_trl(tokenizer: Any, rows: list[dict[str, Any]], folder: Path) -> list[tuple[list[int], list[int], int]]:
    """The tokens of both sides and where the answers begin, as DPOTrainer makes them."""
    words: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "max_length": None}
    trainer = DPOTrainer(
        model=create_model({"model_type": "llama", **SHAPE}, tokenizer, 0),
        ref_model=create_model({"model_type": "llama", **SHAPE}, tokenizer, 0),
        args=DPOConfig(str(folder), **words),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return [
        (row["prompt_ids"] + row["chosen_ids"], row["prompt_ids"] + row["rejected_ids"], len(row["prompt_ids"]))
        for row in trainer.train_dataset
    ]


def by_hfpipe(tokenizer: Any, rows: list[dict[str, Any]]) -> list[tuple[list[int], list[int], int]]:
    found = PairTokenizer(tokenizer, None).encode(rows)
    sides = [(one.tolist(), other.tolist()) for one, other in found.sides]
    return [(*both, begin) for both, begin in zip(sides, found.begins, strict=True)]


def takes(tokenizer: Any, turns: list[dict[str, str]]) -> bool:
    """Some templates take no system message."""
    try:
        tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:
        return False
    return True


def assert_same(tokenizer: Any, template: str, folder: Path) -> None:
    tokenizer.chat_template = TEMPLATES[template]
    rows = [row for row in pairs() if takes(tokenizer, row["prompt"])]
    assert len(rows) >= 4
    theirs = by_trl(tokenizer, rows, folder)
    assert len(theirs) == len(rows)
    assert by_hfpipe(tokenizer, rows) == [one for one in theirs if one[0] != one[1]]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", OF_EVERY_FAMILY)
def test_turns_are_the_tokens_of_dpo_trainer_for_every_tokenizer(family: str, template: str, tmp_path: Path) -> None:
    assert_same(make(family), template, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
def test_turns_are_the_tokens_of_dpo_trainer_under_every_template_of_trl(template: str, tmp_path: Path) -> None:
    assert_same(make("tiktoken's"), template, tmp_path)


def test_a_prompt_loses_its_beginning_before_an_answer_its_end() -> None:
    tokenizer = make("tiktoken's")
    rows = [{"prompt": " one two three four five six seven", "chosen": " yes", "rejected": " no"}]
    [whole], [begin] = (lambda found: (found.sides, found.begins))(PairTokenizer(tokenizer, None).encode(rows))
    cut = PairTokenizer(tokenizer, None, 3).encode(rows)
    assert (cut.begins, cut.long) == ([3], 1)
    for ours, theirs in zip(cut.sides[0], whole, strict=True):
        assert ours.tolist() == theirs[begin - 3 :].tolist()
    assert PairTokenizer(tokenizer, None, begin).encode(rows).long == 0
