"""A file of one's own becomes a recipe that `check --fast` accepts, without a question when the flags say enough."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfpipe.cli import main

TURNS = [{"from": "human", "value": "Is it so?"}, {"from": "gpt", "value": "Yes"}]
FILES: dict[str, list[dict[str, Any]]] = {
    "chat": [{"conversations": TURNS, "id": f"{n}"} for n in range(40)],
    "instructions": [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(40)],
    "pretrain": [{"text": f"A day like day {n}. " * 20} for n in range(40)],
    "classification": [{"text": f"number {n}", "label": "even" if n % 2 == 0 else "odd"} for n in range(40)],
    "translation": [{"source": f"day {n}", "target": f"Tag {n}"} for n in range(40)],
}


def written(folder: Path, rows: list[dict[str, Any]], name: str = "my.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@pytest.mark.parametrize("task", FILES)
def test_a_file_becomes_a_recipe_without_a_question(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "--data", written(tmp_path, FILES[task]), "--model", "team/base-1B", "--hardware", "24GB"]) == 0
    assert "40 rows" in capsys.readouterr().out
    assert main(["check", "--fast", "my.yaml"]) == 0, capsys.readouterr().err
    recipe = yaml.safe_load((tmp_path / "my.yaml").read_text())
    stage = recipe["stages"][0]
    assert stage["name"] == task  # told by the columns
    assert stage["data"][0]["fold"] == {"of": 4, "leave": 1}
    assert recipe["evaluate"]["held-out"]["data"]["fold"] == {"of": 4, "keep": 1}


@pytest.mark.parametrize("task", FILES)
def test_rows_that_stand_there_twice_are_kept_out_of_the_training(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "--data", written(tmp_path, FILES[task] + FILES[task][:9]), "--model", "team/base-1B"]) == 0
    assert main(["check", "--fast", "my.yaml"]) == 0, capsys.readouterr().err
    text = (tmp_path / "my.yaml").read_text()
    assert yaml.safe_load(text)["stages"][0]["data"][0]["decontaminate"] is True
    assert "stand there twice" in text


def test_rows_of_one_pattern_are_kept_out_of_the_training_where_one_of_them_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    thing = ("lamp", "chair", "shoe", "tent", "coat")
    answer = "Yes. You have thirty days to return it: print the label, put it on the parcel, and take it to the post."
    rows = [{"question": f"{n}. Can I send the {thing[n % 5]} back?", "answer": answer} for n in range(10)]
    told = "Number {0} tells of {0} days and {0} nights at sea, on ship {0} with {0} sailors and {0} barrels of fish."
    rows += [{"question": f"What is number {n}?", "answer": told.format(n)} for n in range(200)]
    assert main(["new", "--data", written(tmp_path, rows), "--model", "team/base-Instruct", "--task", "chat"]) == 0
    text = (tmp_path / "my.yaml").read_text()
    assert yaml.safe_load(text)["stages"][0]["data"][0]["decontaminate"] is True
    assert "rows are like each other" in text
    assert "decontaminate" not in _recipe_of_different_rows(tmp_path)


def _recipe_of_different_rows(folder: Path) -> str:
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]
    rows = [
        {"question": " ".join(words[n : n + 6]), "answer": " ".join(words[n + 6 : n + 12])} for n in range(0, 130, 12)
    ]
    file = written(folder, rows, "different.jsonl")
    assert main(["new", "--data", file, "--model", "team/base-Instruct", "--task", "chat"]) == 0
    return (folder / "different.yaml").read_text()


def test_an_alpaca_file_is_a_chat_when_a_chat_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, [{"instruction": f"Add {n}", "input": "", "output": "x"} for n in range(40)])
    assert main(["new", "--data", file, "--model", "team/base-8B", "--task", "chat", "--hardware", "12GB"]) == 0
    stage = yaml.safe_load((tmp_path / "my.yaml").read_text())["stages"][0]
    assert stage["data"][0]["format"] == "alpaca_chat"
    assert stage["quantization"] == "nf4"  # 16 GB of weights and 12 GB of memory


def test_without_flags_and_without_a_terminal_one_paragraph_says_what_to_write(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new"]) == 2
    said = capsys.readouterr().err
    assert "hfpipe new --data my.jsonl --model" in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--task", "chatt"], "allowed is one of chat"),
        (["--hardware", "big"], "such as 24GB"),
        (["--data", "nowhere.jsonl"], "there is no file"),
        (["--model", "./nowhere"], "there is no folder ./nowhere"),
        (
            ["--model", "models/bas"],
            "there is no folder models/bas. Name a folder with a model, or its id on the Hub. Did you mean base?",
        ),
        (["-o", "here.yaml"], "exists already"),
    ],
)
def test_a_wrong_answer_is_told_and_nothing_is_written(
    flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.yaml").write_text("mine")
    (tmp_path / "models" / "base").mkdir(parents=True)
    file = written(tmp_path, FILES["chat"])
    assert main(["new", "--data", file, "--model", "team/base-1B", *flags]) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "here.yaml").read_text() == "mine"
    assert not (tmp_path / "my.yaml").exists()


def test_rows_that_are_not_for_the_task_are_bad_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, FILES["chat"])
    assert main(["new", "--data", file, "--model", "team/base", "--task", "translation"]) == 5
    assert "no `source` with `target`" in capsys.readouterr().err


def test_questions_and_answers_become_turns_of_a_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, [{"question": f"{n} + 1?", "answer": f"{n + 1}"} for n in range(40)])
    assert main(["new", "--data", file, "--model", "team/base-Instruct", "--task", "chat", "--hardware", "cpu"]) == 0
    assert main(["check", "--fast", "my.yaml"]) == 0
    source = yaml.safe_load((tmp_path / "my.yaml").read_text())["stages"][0]["data"][0]
    assert [turn["content"] for turn in source["template"]["messages"]] == ["{question}", "{answer}"]


def test_what_is_missing_is_asked_at_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answers = iter([written(tmp_path, FILES["chat"]), "team/base", "", "8GB", ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    assert main(["new"]) == 0
    assert main(["check", "--fast", "my.yaml"]) == 0


def test_files_of_other_people_become_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = [{"author": "customer", "body": "Where is it?", "at": "9:00"}, {"author": "agent", "body": "On its way."}]
    written(tmp_path, [{"ticket": n, "thread": said} for n in range(40)], "desk.jsonl")
    assert main(["new", "--data", "desk.jsonl", "--model", "team/base-1B", "--hardware", "24GB"]) == 0
    content = yaml.safe_load((tmp_path / "desk.yaml").read_text())
    assert content["stages"][0]["name"] == "chat"
    assert content["stages"][0]["data"][0]["path"] == "desk.jsonl"
    rows = "".join(f"What is {n}?;It is {n}.\n" for n in range(40))
    (tmp_path / "faq.csv").write_text("question;answer\n" + rows, encoding="utf-8-sig")
    assert main(["new", "--data", "faq.csv", "--model", "team/base-1B", "--hardware", "24GB"]) == 0
    assert "40 rows of question_answer" in capsys.readouterr().out
    (tmp_path / "faq.csv").write_text("Frage;Antwort\n" + rows, encoding="utf-8-sig")
    assert main(["new", "--data", "faq.csv", "--model", "team/base-1B", "-o", "other.yaml"]) == 5
    assert "--columns prompt=Frage,completion=Antwort" in capsys.readouterr().err
    words = ["--task", "chat", "--columns", "prompt=Frage,completion=Antwort"]
    assert main(["new", "--data", "faq.csv", "--model", "team/base-1B", *words, "-o", "other.yaml"]) == 0
    assert "prompt_completion (columns Frage, Antwort)" in capsys.readouterr().out
    content = yaml.safe_load((tmp_path / "other.yaml").read_text())
    turns = content["stages"][0]["data"][0]["template"]["messages"]
    assert [turn["content"] for turn in turns] == ["{Frage}", "{Antwort}"]
    assert main(["check", "--fast", "other.yaml"]) == 0


def test_columns_that_are_not_known_are_told_with_those_that_hold_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"ticket": f"T{n}", "customer": f"Where is parcel {n}?", "agent": "On its way."} for n in range(40)]
    assert main(["new", "--data", written(tmp_path, rows), "--model", "team/base", "--task", "chat"]) == 5
    said = capsys.readouterr().err
    assert "--columns prompt=customer,completion=agent" in said
    assert "`template:" not in said  # there is no recipe yet in which it could stand


def test_a_file_with_a_chinese_name_and_chinese_columns_becomes_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"问题": f"第{n}个问题", "回答": f"答案是{n}。"} for n in range(40)]
    command = ["new", "--data", written(tmp_path, rows, "客服.jsonl"), "--model", "team/base", "--task", "chat"]
    assert main(command) == 5
    assert "--columns prompt=问题,completion=回答" in capsys.readouterr().err
    assert main([*command, "--columns", "prompt=问题,completion=回答"]) == 0
    assert "Letters are mostly CJK." in capsys.readouterr().out
    assert main(["check", "--fast", "my-data.yaml"]) == 0


BOTH: dict[str, Any] = {"prompt": "1 + 1 =", "response": " 2", "instruction": "Add one and one.", "output": "2"}


def test_rows_that_two_formats_fit_equally_are_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["new", "--data", written(tmp_path, [BOTH] * 30), "--model", "team/base-1B"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "can be read as prompt_completion" in said
    assert "Add --format prompt_completion or --format alpaca." in said
    assert main([*command, "--format", "alpacca"]) == 2
    assert "Did you mean alpaca?" in capsys.readouterr().err
    assert main([*command, "--format", "alpaca", "-o", "said.yaml"]) == 0
    answers = iter(["what", "alpaca"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    assert main([*command, "-o", "asked.yaml"]) == 0
    for name in ("said.yaml", "asked.yaml"):
        recipe = yaml.safe_load((tmp_path / name).read_text())
        assert recipe["stages"][0]["data"][0]["format"] == recipe["evaluate"]["held-out"]["data"]["format"] == "alpaca"
        assert main(["check", "--fast", name]) == 0


@pytest.mark.parametrize(
    ("row", "taken", "other"),
    [
        ({"text": "It is fine.", "label": "good"}, "text_label", "text"),
        ({"text": "It is fine.", "question": "Is it?", "answer": "Yes."}, "text", "question_answer"),
    ],
)
def test_another_format_that_fits_is_told_with_the_word_for_it(
    row: dict[str, str],
    taken: str,
    other: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{name: f"{value} {n % 2 if name == 'label' else n}" for name, value in row.items()} for n in range(30)]
    command = ["new", "--data", written(tmp_path, rows), "--model", "team/base-1B"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"30 rows of {taken}" in said
    assert f"make the recipe again with --format {other}" in said
    assert main([*command, "--format", other, "-o", "other.yaml"]) == 0
    said = capsys.readouterr().out
    assert f"30 rows of {other}" in said
    assert "fit" not in said.split("wrote")[0]
    assert main(["check", "--fast", "other.yaml"]) == 0


@pytest.mark.parametrize("task", [(), ("--task", "classification")])
def test_the_columns_of_labelled_texts_have_the_names_of_either_format(
    task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [f"第{n}条 {'很好吃' if n % 2 else '太难吃了'},{'好评' if n % 2 else '差评'}" for n in range(60)]
    (tmp_path / "my.csv").write_text("\n".join(["评论,情感", *lines]), encoding="gbk")
    command = ["new", "--data", "my.csv", "--model", "team/base-1B"]
    for text in ("text", "sentence"):
        columns = f"{text}=评论,label=情感"
        assert main([*command, "--columns", columns, *task, "-o", f"{text}.yaml"]) == 0
        assert "Labels: 差评 30, 好评 30." in capsys.readouterr().out
        assert yaml.safe_load((tmp_path / f"{text}.yaml").read_text())["stages"][0]["kind"] == "classification"
        assert main(["check", "--fast", f"{text}.yaml"]) == 0
    assert main([*command, "--columns", "text=评论,label=情感", "--task", "pretrain"]) == 2
    assert "--columns names label, and rows of text have text." in capsys.readouterr().err


@pytest.mark.parametrize(("rows", "parts", "batch"), [(5, 4, 4), (12, 4, 4), (60, 6, 4), (150, 15, 8), (400, 20, 16)])
def test_a_small_file_has_rows_held_out_and_enough_steps(
    rows: int, parts: int, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(rows)])
    assert main(["new", "--data", file, "--model", "team/base-1B"]) == 0
    text = (tmp_path / "my.yaml").read_text()
    assert yaml.safe_load(text)["evaluate"]["held-out"]["data"]["fold"] == {"of": parts, "keep": 1}
    assert f"one row in {parts}, never trained on" in text
    assert yaml.safe_load(text)["stages"][0]["global_batch_size"] == batch


@pytest.mark.parametrize(("between", "by"), [("\n\n", "paragraph"), ("\n", "line")])
def test_a_text_file_is_read_by_its_parts(
    between: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(between.join(f"Part {n} of the book tells of {n} days." for n in range(30)))
    assert main(["new", "--data", "book.txt", "--model", "team/base-1B"]) == 0
    assert "30 rows of text" in capsys.readouterr().out
    recipe = yaml.safe_load((tmp_path / "book.yaml").read_text())
    assert [recipe["stages"][0]["data"][0]["sample_by"], recipe["evaluate"]["held-out"]["data"]["sample_by"]] == [
        by,
        by,
    ]
    assert main(["check", "--fast", "book.yaml"]) == 0
    (tmp_path / "note.txt").write_text("One line.")
    assert main(["new", "--data", "note.txt", "--model", "team/base-1B"]) == 2
    assert "note.txt has 1 row, too few to train on" in capsys.readouterr().err


def test_the_tools_of_a_chat_count_among_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tools = [{"name": "order", "description": "Order a thing. " * 40, "parameters": {"type": "object"}}]
    rows = [{"conversations": TURNS, "tools": json.dumps(tools)} for _ in range(40)]
    for name, content in (("with", rows), ("without", [{"conversations": TURNS}] * 40)):
        assert (
            main(["new", "--data", written(tmp_path, content, f"{name}.jsonl"), "--model", "team/base-Instruct"]) == 0
        )
    lengths = [
        yaml.safe_load((tmp_path / f"{name}.yaml").read_text())["stages"][0]["training"]["max_length"]
        for name in ("with", "without")
    ]
    assert lengths == [512, 128]


def test_an_id_of_the_hub_is_one_beside_a_folder_of_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "team" / "base-3B").mkdir(parents=True)
    assert main(["new", "--data", written(tmp_path, FILES["instructions"]), "--model", "team/base-1B"]) == 0
