"""Rows of every family of tokenizers beside TRL's own, token by token and label by label."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizer_families
from datasets import Dataset
from encoding import encode_for_training
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from hfpipe.data.tokenize import IGNORED, encode

PAIRS = [
    ("The fox said", " yelp"),
    ("The fox said ", "yelp"),
    ("The fox said  ", "  yelp  "),
    ("The fo", "x said yelp"),
    ("Question: what?\nAnswer:", "\nmoo"),
    ("Question: what?\nAnswer:\n", "moo, 2024"),
    ("12", "345 and 12,345"),
    (" ", " the end"),
    ("", "yelp yelp"),
    ("def moo(x):\n", "    return x\n\n"),
    ("Grüße", "! 牛呢 😀"),
    ("e", "\u0301 the"),  # an accent that belongs to the letter before it
    ("it is 😀", "😀 done\t"),
    ("The cow said </s>", "moo</s>"),
]
TURNS = [
    {"role": "user", "content": "What does the fox say? "},
    {"role": "assistant", "content": " yelp\n"},
    {"role": "user", "content": "  And the cow?\n牛呢"},
    {"role": "assistant", "content": "moo"},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def of_trl(tokenizer: Any, rows: list[dict], folder: Path, **training: Any) -> list[tuple[list[int], list[int]]]:
    """Returns the tokens and labels that SFTTrainer makes of rows."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
    arguments = SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", **training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
    found = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        found.append((batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
    return found


@pytest.mark.parametrize("family", tokenizer_families.FAMILIES)
def test_rows_of_every_tokenizer_are_trls_own(family: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_families.make(family, CHATML)
    before = tokenizer.backend_tokenizer.to_str()
    forms = {
        "pairs": ([{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS], "completion"),
        "texts": ([{"text": prompt + completion} for prompt, completion in PAIRS], None),
        "messages": ([{"messages": TURNS}, {"messages": TURNS[:2]}], "all"),
        "turns": ([{"prompt": TURNS[:3], "completion": TURNS[3:]}], "completion"),
    }
    for form, (rows, train_on) in forms.items():
        theirs = of_trl(tokenizer, rows, tmp_path)
        if form == "turns":
            rows = [{"messages": TURNS, "completion_turns": 1}]
        ours = encode_for_training(rows, tokenizer, max_length=1024, train_on=train_on)
        assert len(ours) == len(theirs)
        for row, mine, (ids, labels) in zip(rows, ours, theirs, strict=True):
            assert mine["input_ids"] == ids, row
            assert mine["labels"][1:] == labels[1:], row  # the first is never a target of the shifted loss
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("family", tokenizer_families.FAMILIES)
def test_a_turn_is_trained_with_its_border_spaces_and_its_end(family: str) -> None:
    tokenizer = tokenizer_families.make(family, CHATML)
    (row,) = encode_for_training([{"messages": TURNS}], tokenizer, max_length=None)
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    parts = [
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (" yelp\n<|im_end|>\n", "moo<|im_end|>\n")
    ]
    assert row["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    trained = [token for token in row["labels"] if token != IGNORED]
    assert trained.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    said, wanted = (tokenizer.decode(ids).replace(" ", "").replace("\n", "") for ids in (trained, parts[0] + parts[1]))
    assert said == wanted
    if "byte-level" in family and "in front" not in family:
        assert tokenizer.decode(trained) == " yelp\n<|im_end|>\nmoo<|im_end|>\n"


@pytest.mark.parametrize("family", tokenizer_families.FAMILIES)
def test_the_bytes_that_are_scored_are_those_of_the_completion(family: str) -> None:
    tokenizer = tokenizer_families.make(family)
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS[4:6] + PAIRS[9:10]]
    for row, one in zip(rows, encode(rows, tokenizer, max_length=None, append_eos=False), strict=True):
        said = row["completion"] if "byte-level" in family or "tiktoken" in family else row["completion"].strip()
        assert len(said.encode()) <= one.scored_bytes <= len(row["completion"].encode()) + 1
