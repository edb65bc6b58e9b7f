"""The turns of a conversation that are trained, over every chat template that ships with TRL."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizer_families
import trl
from encoding import encode_for_training
from jinja2 import TemplateError

from hfpipe.core.errors import DataError
from hfpipe.data.tokenize import IGNORED

TEMPLATES = {path.stem: path.read_text() for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")}
PARTS = ("idefics3", "llava_next", "smolvlm")  # templates that take parts of a content alone
TWO = [
    {"role": "user", "content": "What does the fox say?"},
    {"role": "assistant", "content": "yelp yelp."},
    {"role": "user", "content": "And the cow? 牛呢"},
    {"role": "assistant", "content": "moo, I think."},
]
THOUGHT = [
    TWO[0],
    {"role": "assistant", "content": "<think>\nfoxes bark\n</think>\n\nyelp yelp."},
    TWO[2],
    {"role": "assistant", "content": "<think>\ncows low\n</think>\n\nmoo, I think."},
]
CALL = {"type": "function", "function": {"name": "times", "arguments": {"number": 2}}}
CALLED = [
    {"role": "user", "content": "What is twice two?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "times", "content": "four"},
    {"role": "assistant", "content": "It is 4."},
]
# Whose marked form, TRL's `NAME_training`, writes the same text and begins behind the generation prompt.
BEGIN_BEFORE = (
    "deepseek",
    "gptoss",
    "muse",
    "nemotron",
    "qwen2_5",
    "qwen3_5",
    "qwen3_6",
    "qwen3_8",
    "diffusion",
    "llava",
)
MARKED = [
    name
    for name in TEMPLATES
    if f"{name}_training" in TEMPLATES and (not name.startswith(BEGIN_BEFORE) or name == "qwen2_5_vl")
]
CONVERSATIONS = {"plain": TWO, "system": [{"role": "system", "content": "Be brief."}, *TWO], "thought": THOUGHT}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = tokenizer_families.make("byte-level, trimmed offsets")
    made.add_tokens(["<|end|>", "<|start|>", "<|return|>", "<|call|>"])
    return made


def turns_for(name: str, turns: Sequence[dict]) -> list[dict]:
    in_parts = name.removesuffix("_training") in PARTS
    return [{**one, "content": [{"type": "text", "text": one["content"]}]} if in_parts else one for one in turns]


def rendered(tokenizer: Any, turns: Sequence[dict], **options: Any) -> str:
    """Returns the text of a conversation."""
    return tokenizer.apply_chat_template(list(turns), tokenize=False, **options)


def is_refused(tokenizer: Any, turns: Sequence[dict]) -> bool:
    """Tells whether the template takes no such conversation; then hfpipe has to refuse the row too."""
    try:
        rendered(tokenizer, turns)
    except (TemplateError, TypeError):
        with pytest.raises(DataError):
            encode_for_training([{"messages": list(turns)}], tokenizer, max_length=None)
        return True
    return False


def trained_of(tokenizer: Any, row: dict, **options: Any) -> list[str]:
    """The texts that are trained on, each run of tokens one."""
    (made,) = encode_for_training([row], tokenizer, max_length=None, **options)
    runs, before = [], IGNORED
    for token in made["labels"]:
        if token != IGNORED:
            runs[-1:] = [[*runs[-1], token]] if before != IGNORED else [*runs[-1:], [token]]
        before = token
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistants_turns_are_trained_and_nothing_else(tokenizer: Any, name: str, kind: str) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    turns = turns_for(name, CONVERSATIONS[kind])
    if is_refused(tokenizer, turns):
        return
    whole = rendered(tokenizer, turns)
    row = {"messages": turns}
    (made,) = encode_for_training([row], tokenizer, max_length=None)
    assert made["input_ids"] == tokenizer(whole, add_special_tokens=False)["input_ids"]
    both = trained_of(tokenizer, row)
    assert [said.count("yelp") // 2 + said.count("moo") for said in both if "yelp" in said or "moo" in said] == [1, 1]
    assert not any(word in said for word in ("fox say", "the cow", "牛", "brief") for said in both)
    last = trained_of(tokenizer, row, train_on="last")
    assert "moo" in last[0]
    assert not any("yelp" in said for said in last)
    # What the last turn says is what a model has to say after the prompt that it will be given.
    prompt = rendered(tokenizer, turns[:-1], add_generation_prompt=True)
    if whole.startswith(prompt) and "{% generation" not in TEMPLATES[name].replace("{%-", "{%"):
        assert "".join(last) == whole[len(prompt) :]
    first = [*turns[:-1], {**turns[-1], "train": False}]
    assert trained_of(tokenizer, {"messages": first}) == both[: -len(last)]
    first = [{**one, "weight": int(place > 2 or place == 1 + (kind == "system"))} for place, one in enumerate(turns)]
    assert trained_of(tokenizer, {"messages": first}) == both


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name.endswith("_training")])
def test_generation_marks_say_it_where_they_stand(name: str) -> None:
    # Of trimmed offsets transformers loses the turns that begin with a space.
    tokenizer = tokenizer_families.make("byte-level, whole offsets")
    tokenizer.chat_template = TEMPLATES[name]
    for turns in (*CONVERSATIONS.values(), CALLED):
        turns = turns_for(name, turns)
        try:
            theirs = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        except TemplateError:
            continue
        (ours,) = encode_for_training([{"messages": turns}], tokenizer, max_length=None)
        mask = [int(label != IGNORED) for label in ours["labels"]]
        assert ours["input_ids"] == theirs["input_ids"]
        assert mask[1:] == theirs["assistant_masks"][1:]


@pytest.mark.parametrize("name", MARKED)
def test_turns_found_by_rendering_are_those_of_trls_marks(tokenizer: Any, name: str) -> None:
    """Compared where TRL's marked form writes the same text and begins behind the generation prompt."""
    marked = TEMPLATES[f"{name}_training"]
    for turns in (*CONVERSATIONS.values(), CALLED):
        turns = turns_for(name, turns)
        tokenizer.chat_template = TEMPLATES[name]
        try:
            (ours,) = encode_for_training([{"messages": turns}], tokenizer, max_length=None)
        except DataError:
            continue  # the template refuses the row
        tokenizer.chat_template = marked
        (theirs,) = encode_for_training([{"messages": turns}], tokenizer, max_length=None)
        if ours["input_ids"] == theirs["input_ids"]:
            assert ours == theirs


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_of_tools_are_trained_and_their_answers_are_not(tokenizer: Any, name: str) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    turns = turns_for(name, CALLED)
    if is_refused(tokenizer, turns):
        return
    whole = rendered(tokenizer, turns)
    both = "".join(trained_of(tokenizer, {"messages": turns}))
    assert "It is 4." in both
    if "number" in whole:  # some templates write no calls
        assert "number" in both
    assert not any(word in both for word in ("twice", "four"))


def test_a_later_turn_that_rewrites_earlier_ones_moves_no_label(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES["qwen3"]
    trained = trained_of(tokenizer, {"messages": THOUGHT})
    assert trained == ["yelp yelp.<|im_end|>\n", "<think>\ncows low\n</think>\n\nmoo, I think.<|im_end|>\n"]
    only = trained_of(tokenizer, {"messages": THOUGHT[:2]})
    assert only == ["<think>\nfoxes bark\n</think>\n\nyelp yelp.<|im_end|>\n"]


def test_many_rows_of_many_shapes_are_labelled_as_each_alone(tokenizer: Any) -> None:
    """Labels looked up by shape after the first rows equal those of rendering."""
    words = ["moo", "assistant", "user", "<|im_end|>", "yelp\n", " fox ", "<think>\nx\n</think>\n\ny", "system"]
    rows = []
    for number in range(120):
        said = [words[(number * step) % len(words)] + ("" if number % 3 else " fox") for step in (1, 3, 5, 7)]
        turns = [{**one, "content": text} for one, text in zip(TWO, said, strict=True)]
        rows.append({"messages": turns[: 2 + 2 * (number % 2)]})
    for name in ("qwen3", "gptoss", "gemma", "phi3"):
        tokenizer.chat_template = TEMPLATES[name]
        together = encode_for_training(rows, tokenizer, max_length=None)
        alone = [encode_for_training([row], tokenizer, max_length=None)[0] for row in rows]
        assert together == alone


def test_all_is_trls_default_and_a_message_may_be_left_out_of_it(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES["qwen2_5"]
    whole = rendered(tokenizer, TWO)
    (said,) = trained_of(tokenizer, {"messages": TWO}, train_on="all")
    assert whole.endswith(said)
    assert len(tokenizer(whole)["input_ids"]) == len(tokenizer(said)["input_ids"]) + 1  # the first is no target
    asked = [*TWO[:2], {**TWO[2], "train": False}, TWO[3]]
    before, behind = trained_of(tokenizer, {"messages": asked}, train_on="all")
    assert before.endswith("yelp yelp.<|im_end|>\n")
    assert behind.startswith("<|im_start|>assistant\nmoo")


def test_a_weight_between_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES["qwen2_5"]
    with pytest.raises(DataError, match="weight"):
        encode_for_training([{"messages": [TWO[0], {**TWO[1], "weight": 0.5}]}], tokenizer, max_length=None)


def test_long_rows_are_cut_split_or_dropped(tokenizer: Any) -> None:
    rows = [{"text": "moo " * 40}, {"text": "yelp"}]
    lengths = {}
    for word in ("cut", "split", "drop"):
        made = encode_for_training(rows, tokenizer, max_length=16, too_long=word)
        lengths[word] = [len(row["input_ids"]) for row in made]
        assert all(row["labels"][0] == IGNORED for row in made)
    whole = [len(row["input_ids"]) for row in encode_for_training(rows, tokenizer, max_length=None)]
    assert lengths["cut"] == [16, whole[1]]
    assert lengths["drop"] == [whole[1]]
    assert lengths["split"][:-1] == [16] * (whole[0] // 16) + [whole[0] % 16] * bool(whole[0] % 16)
