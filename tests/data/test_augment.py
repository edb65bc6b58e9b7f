"""Counterfactual augmentation: words swapped with their grammar, rows joined or exchanged, labels left as they are."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from hfpipe.cli import main
from hfpipe.data.sources.load import load_rows
from hfpipe.data.swaps import LISTS, swapped
from hfpipe.recipe import Source

SENTENCES = {
    "He told her that her mother saw him and his brother.": "She told him that his father saw her and her sister.",
    "I saw her yesterday. She gave her the book.": "I saw him yesterday. He gave him the book.",
    "The red one is his, and the blue one is HERS.": "The red one is hers, and the blue one is HIS.",
    "Her family and her only son: she did it herself.": "His family and his only daughter: he did it himself.",
    "A shepherd and a manual are no he and no man.": "A shepherd and a manual are no she and no woman.",
    "其他人都见过他的妈妈。吉他在她那里。": "其他人都见过她的爸爸。吉他在他那里。",
}


@pytest.mark.parametrize(("text", "other"), SENTENCES.items())
def test_gender_is_swapped_with_its_grammar_and_back(text: str, other: str) -> None:
    assert swapped(text, "gender") == other
    assert swapped(other, "gender") == text


def test_every_listed_word_has_one_that_leads_back() -> None:
    one_way = {"him", "hers", "his", "her", "ms"}
    for words in LISTS.values():
        assert all(words[other] == word for word, other in words.items() if word not in one_way)


def test_names_are_swapped_as_they_are_written_and_lists_go_round() -> None:
    assert swapped("Emily met Jamal's friend in greg.", "names") == "Aisha met Greg's friend in greg."
    assert swapped("A cat, a dog, an OWL.", [["cat", "dog", "owl"]]) == "A dog, a owl, an CAT."


def rows(folder: Path, content: list[dict[str, Any]], **words: Any) -> list[dict[str, Any]]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    source = Source.model_validate({"path": "json", "data_files": str(path), "split": "train", **words})
    return [dict(row) for row in load_rows(source)]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_with_a_listed_word_are_joined_by_their_swapped_form(tmp_path: Path, streaming: bool) -> None:
    content = [
        {"id": "a", "sentence": "She is a doctor.", "label": "he"},
        {"id": "b", "sentence": "It rains.", "label": "no"},
    ]
    found = rows(tmp_path, content, augment={"swap": "gender"}, streaming=streaming)
    assert [(row["id"], row["sentence"], row["label"]) for row in found] == [
        ("a", "She is a doctor.", "he"),
        ("a swapped", "He is a doctor.", "he"),
        ("b", "It rains.", "no"),
    ]


def test_a_conversation_is_swapped_in_what_is_said_alone(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Is he in?"}, {"role": "assistant", "content": "She is, with her son."}]
    first, second = rows(tmp_path, [{"messages": turns}], augment={"swap": "gender"})
    said = [turn["content"] for turn in second["messages"]]
    assert said == ["Is she in?", "He is, with his daughter."]
    assert [turn["role"] for turn in second["messages"]] == [turn["role"] for turn in first["messages"]]


def test_half_of_the_rows_are_exchanged_and_always_the_same(tmp_path: Path) -> None:
    content = [{"text": f"{number}: he said so."} for number in range(400)]
    first, again = (rows(tmp_path, content, augment={"swap": "gender", "how": "exchange"}) for _ in range(2))
    assert first == again
    assert len(first) == 400
    assert 160 < sum("she" in row["text"] for row in first) < 240


@pytest.mark.slow
@pytest.mark.long
def test_a_stage_trains_on_each_row_and_its_swapped_form(tmp_path: Path) -> None:
    """The sounds of one animal are told of the other."""
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False)
    prose, sounds = content["stages"]
    for stage in (prose, sounds):
        stage["data"][0]["augment"] = {"swap": [["cat", "dog"]]}
    del prose["training"]["max_steps"]
    prose["training"]["num_train_epochs"] = 1
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    done = {name: json.loads((tmp_path / f"run/stages/{name}/done.json").read_text())["data"] for name in
            ("prose", "sounds")}  # fmt: skip
    texts = [json.loads(line)["text"] for line in (tmp_path / "prose.jsonl").read_text().splitlines()]
    assert done["prose"]["documents"] == 300 + sum("cat" in text or "dog" in text for text in texts)
    animals = itertools.islice(itertools.cycle(tiny.ANIMALS), 97)
    assert done["sounds"]["rows"] == 97 + sum(animal in ("cat", "dog") for animal in animals)


@pytest.mark.parametrize(
    ("augment", "text"),
    [
        ({"swap": "gendre"}, "Did you mean gender?"),
        ({"swap": "gender", "how": "joined"}, "one of join, exchange"),
        ({}, "augment.swap: missing"),
        ({"swap": [["he"]]}, "two words or more"),
    ],
)
def test_what_cannot_be_swapped_is_a_fault(
    tmp_path: Path, augment: dict[str, Any], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = tiny.recipe(tmp_path, merge=False)
    content["stages"][0]["data"][0]["augment"] = augment
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    assert text in capsys.readouterr().err


def test_a_suite_is_not_augmented(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = tiny.recipe(tmp_path, merge=False)
    content["evaluate"]["general"]["data"]["augment"] = {"swap": "gender"}
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    assert "a suite is scored as it is" in capsys.readouterr().err
