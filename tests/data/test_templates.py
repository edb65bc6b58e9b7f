"""Conversations built by template out of any table, and what a template may not be."""

import json
from pathlib import Path

import pytest

from hfpipe.cli import main
from hfpipe.core.errors import DataError, RecipeError
from hfpipe.data.cleaning.text_rules import Read, tidy_rows
from hfpipe.data.sources.load import load_rows
from hfpipe.recipe import Source, dump_recipe, load_recipe

TURNS = [
    {"role": "system", "content": "Answer in {pair.to}."},
    {"role": "user", "content": "{pair.en}"},
    {"role": "assistant", "content": "{{{pair.de}}}"},
]


@pytest.mark.parametrize("streamed", [False, True])
def test_turns_are_built_of_columns_and_a_row_with_a_gap_is_left_out(tmp_path: Path, streamed: bool) -> None:
    rows = [{"id": "a", "pair": {"en": "cat", "de": "Katze", "to": "German"}, "tools": None}]
    rows.append({"id": "b", "pair": {"en": "dog", "de": None, "to": "German"}, "tools": None})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    block = {"path": "json", "data_files": str(tmp_path / "rows.jsonl"), "template": {"messages": TURNS}}
    source = Source.model_validate({**block, "streaming": streamed})
    read = Read()
    found = list(tidy_rows(load_rows(source, kinds=("messages",)), source, read))
    assert [(row["id"], row["messages"]) for row in found] == [
        (
            "a",
            [
                {"role": "system", "content": "Answer in German."},
                {"role": "user", "content": "cat"},
                {"role": "assistant", "content": "{Katze}"},
            ],
        )
    ]
    assert len(read.dirty) == 1


NOTE = (
    "{% if about %}\nAbout: {{ about }}\n{% endif %}\n"
    "{% for turn in said %}\n{{ turn.who }}: {{ turn.text }}\n{% endfor %}\nFirst: {{ said[0].text }}, {{ 'a' }}"
)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_part_is_left_out_and_turns_are_gone_through(tmp_path: Path, streamed: bool) -> None:
    said = [{"who": "A", "text": "Hi."}, {"who": "B", "text": "Hello."}]
    rows = [{"about": "trees", "said": said, "answer": "yes"}, {"about": None, "said": said[:1], "answer": None}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [
        {"role": "system", "content": "{% if about %}Of {{ about }}.{% endif %}"},
        {"role": "user", "content": NOTE},
        {"role": "assistant", "content": "{% if answer %}{{ answer }}{% else %}none{% endif %}"},
    ]
    block = {"path": str(tmp_path / "rows.jsonl"), "streaming": streamed}
    chats = [row["messages"] for row in load_rows(Source.model_validate({**block, "template": {"messages": turns}}))]
    assert [[turn["role"] for turn in chat] for chat in chats] == [
        ["system", "user", "assistant"],
        ["user", "assistant"],
    ]
    assert chats[0][0]["content"] == "Of trees."
    assert chats[0][1]["content"] == "About: trees\nA: Hi.\nB: Hello.\nFirst: Hi., a"
    assert chats[1][0]["content"] == "A: Hi.\nFirst: Hi., a"
    assert chats[1][1]["content"] == "none"
    plain = load_rows(Source.model_validate({**block, "template": {"text": NOTE}}))
    assert [row["text"] for row in plain] == [chats[0][1]["content"], chats[1][0]["content"]]


@pytest.mark.parametrize(
    ("template", "error", "words"),
    [
        ("{% if about %}", RecipeError, "is a Jinja template"),
        ("{% if not about %}{{ about | nothing }}{% endif %}", RecipeError, "there is no filter 'nothing'"),
        ("{% if about %}" * 400 + "{% endif %}" * 400, RecipeError, "nested too deep"),
        ("{% if abuot %}x{% endif %}", DataError, "names the column 'abuot'"),
        ("{% if about %}{{ about.__class__.__mro__ }}{% endif %}", DataError, "unsafe"),
        ("{% if about %}{{ about.missing }}{% endif %}", DataError, "no attribute 'missing'"),
    ],
)
def test_a_faulty_jinja_template_is_told(tmp_path: Path, template: str, error: type[Exception], words: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"about": "trees"}) + "\n")
    source = Source.model_validate({"path": str(tmp_path / "rows.jsonl"), "template": {"text": template}})
    with pytest.raises(error, match=words):
        list(tidy_rows(load_rows(source), source, Read()))


RECIPE = """
name: x
model: {id: me/small}
stages:
  - name: chat
    kind: sft
    data: [{path: me/talk, template: TEMPLATE}]
"""


def test_a_recipe_with_turns_is_written_as_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(RECIPE.replace("TEMPLATE", json.dumps({"messages": TURNS})))
    recipe = load_recipe(tmp_path / "one.yaml")
    (tmp_path / "two.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "two.yaml") == recipe


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({"messages": "{text}"}, ["template.messages: is a list of turns", "role: user"]),
        ({"prompt": TURNS, "completion": "{a}"}, ["template.prompt: is a text, and has no turns"]),
        ({"messages": [{"role": "user", "contnet": "{a}"}]}, ["contnet", "a turn", "Did you mean content?"]),
        ({"messages": [{"role": "user"}]}, ["messages.0.content: missing"]),
        ({"messages": []}, ["is a list of turns"]),
    ],
)
def test_a_mistake_in_a_template_is_told_at_its_place(
    template: dict, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("TEMPLATE", json.dumps(template)))
    assert main(["check", "--fast", str(path)]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
