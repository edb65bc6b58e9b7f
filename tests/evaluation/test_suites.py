"""Suites described in YAML, beside a plain script: multiple choice, minimal pairs, last words."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from plain import Plain, make_model, scored

from hfpipe.cli import main

QUESTIONS = [
    ("What does the cat say?", ["mew", "a loud bark", "moo"], 0),
    (
        "What does the dog say, in the barn by the river, when it is late and dark and the hen is asleep?",
        ["no", "b"],
        1,
    ),
    ("Where did the fox sit? ", ["by the hill", "in the tree ö", "nowhere"], 2),
    ("Who said hoot?", ["owl", "the old brown owl in the tree", "hen", "cow"], 0),
    ("Which one moos?", ["cow", "ĉow ĉow"], 0),
]
# Of two bytes a letter: per character they seem less likely than they do per byte.
QUESTIONS += [(f"{animal}?", [f"zq{animal[0]}", f"ĉĝ{animal[0]}ŝ"], 0) for animal in tiny.ANIMALS]


@pytest.fixture(scope="module", params=["llama with BOS", "gpt2 without"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), llama=request.param.startswith("llama"))


def letters(answer: int) -> str:
    return "ABCDE"[answer]


FORMS: dict[str, Any] = {
    "list and place": lambda q, c, a: {"question": q, "choices": c, "answer": a},
    "list and text": lambda q, c, a: {"question": q, "choices": c, "answer": c[a]},
    "table with labels": lambda q, c, a: {
        "question": q,
        "choices": {"text": c, "label": [letters(n) for n in range(len(c))]},
        "answer": letters(a),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_multiple_choice_is_the_plain_scripts(
    model: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Plain(model)
    rows = [FORMS[form](*question) for question in QUESTIONS]
    suite = {
        "data": {"template": {"prompt": "Question: {question}\nAnswer:"}},
        "metrics": ["accuracy", "accuracy_norm", "accuracy_bytes"],
    }
    found = scored(tmp_path, model, rows, suite)
    hits = {metric: 0 for metric in found}
    for question, choices, answer in QUESTIONS:
        likely = [plain(f"Question: {question}\nAnswer:", f" {choice}")[0] for choice in choices]
        for metric, sizes in (
            ("accuracy", [1] * len(choices)),
            ("accuracy_norm", [len(choice) for choice in choices]),
            ("accuracy_bytes", [len(choice.encode()) for choice in choices]),
        ):
            values = [value / size for value, size in zip(likely, sizes, strict=True)]
            hits[metric] += values.index(max(values)) == answer
    assert found == {metric: count / len(QUESTIONS) for metric, count in hits.items()}
    assert found["accuracy_norm"] != found["accuracy_bytes"]
    assert "texts fill the 48 tokens that the model takes" in capsys.readouterr().out


def test_answers_that_count_from_one_and_choices_in_columns(model: Path, tmp_path: Path) -> None:
    plain = Plain(model)
    rows = [
        {"sentence": f"The {one} sat by the {two}, and _ said {tiny.SOUNDS[one]}.", "a": one, "b": two, "right": str(n)}
        for n, (one, two) in zip(
            [1, 2, 1, 2], [("cat", "dog"), ("cow", "hen"), ("fox", "owl"), ("owl", "cat")], strict=True
        )
    ]
    suite = {
        "data": {"columns": {"prompt": "sentence", "choices": ["a", "b"], "answer": "right"}},
        "metrics": ["accuracy"],
        "blank": "_",
    }
    found = scored(tmp_path, model, rows, suite)
    hits = 0
    for row in rows:
        before, after = row["sentence"].split("_")
        likely = [plain(before + row[column], " " + after.strip())[0] for column in ("a", "b")]
        hits += likely.index(max(likely)) == int(row["right"]) - 1
    assert found == {"accuracy": hits / len(rows)}


def test_letters_of_a_prompt_that_lists_its_choices(model: Path, tmp_path: Path) -> None:
    plain = Plain(model)
    rows = [{"question": q, "choices": [*c, "x"][:3], "answer": a} for q, c, a in QUESTIONS]
    prompt = "{question}\nA. {choices[0]}\nB. {choices[1]}\nC. {choices[2]}\nAnswer:"
    suite = {"data": {"template": {"prompt": prompt}}, "metrics": ["accuracy"], "choices": ["A", "B", "C"]}
    found = scored(tmp_path, model, rows, suite)
    likely = [[plain(prompt.format(**row), f" {letter}")[0] for letter in "ABC"] for row in rows]
    hits = sum(values.index(max(values)) == row["answer"] for values, row in zip(likely, rows, strict=True))
    assert found == {"accuracy": hits / len(rows)}


def test_minimal_pairs_are_the_plain_scripts_and_a_tie_is_wrong(model: Path, tmp_path: Path) -> None:
    plain = Plain(model)
    rows = [
        {"sentence_good": f"The {one} said {sound}.", "sentence_bad": f"{sound} the said {one}."}
        for one, sound in tiny.SOUNDS.items()
    ]
    rows += [{"sentence_good": "The same.", "sentence_bad": "The same."}]
    suite = {"data": {"columns": {"good": "sentence_good", "bad": "sentence_bad"}}, "metrics": ["accuracy"]}
    found = scored(tmp_path, model, rows, suite)
    hits = sum(plain("", row["sentence_good"])[0] > plain("", row["sentence_bad"])[0] for row in rows[:-1])
    assert found == {"accuracy": hits / len(rows)}


@pytest.mark.slow
@pytest.mark.long
def test_minimal_pairs_with_a_delimiter_are_lm_evals(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    rows = [
        {"good": f"The {one} {verb} {sound}.", "bad": f"{sound} the {verb} {one}."}
        for one, sound in tiny.SOUNDS.items()
        for verb in ("said", "heard", "sat by")
    ]
    ours = scored(tmp_path, model, rows, {"metrics": ["accuracy"], "delimiter": " "})
    task = {
        "task": "tiny_pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[good, bad]}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(yaml.safe_dump(task))
    content = tiny.recipe(tmp_path)
    content["evaluate"] = {"it": {"lm_eval": "tiny_pairs", "include_path": str(tmp_path / "tasks")}}
    path, output = str(tiny.write(tmp_path, content)), tmp_path / "scores.json"
    assert main(["evaluate", str(model), path, "--output", str(output)]) == 0
    assert [score["value"] for score in json.loads(output.read_text())] == list(ours.values())
    judge = Plain(model)
    pairs = [tuple(judge("", " " + row[side])[0] for side in ("good", "bad")) for row in rows]
    assert ours["accuracy"] == sum(good > bad for good, bad in pairs) / len(rows)
    assert [good > bad for good, bad in pairs] != [
        judge("", row["good"])[0] > judge("", row["bad"])[0] for row in rows
    ], "these rows do not tell the two rules apart"


def test_matthews_correlation_of_one_class_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "The cat", "completion": " mew"}, {"prompt": "The kitten", "completion": " mew"}]
    content = tiny.recipe(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": "json", "data_files": str(tmp_path / "rows.jsonl"), "split": "train"}
    content["evaluate"] = {"it": {"data": source, "metrics": ["matthews_correlation"], "choices": [" mew", " moo"]}}
    tiny.write_data(tmp_path)
    assert main(["check", str(tiny.write(tmp_path, content))]) == 5
    assert "undefined where all right answers are one class" in capsys.readouterr().err


def test_last_words_are_the_plain_scripts(model: Path, tmp_path: Path) -> None:
    plain = Plain(model)
    rows = [{"text": f"The {animal} by the river, the {animal} said {tiny.SOUNDS[animal]}"} for animal in tiny.ANIMALS]
    # One that the model would say itself.
    with torch.no_grad():
        ids = plain.tokenizer("The cat by the", return_tensors="pt")["input_ids"]
        said = plain.tokenizer.decode(plain.model.generate(ids, max_new_tokens=1, do_sample=False)[0, ids.shape[1] :])
    rows.append({"text": f"The cat by the {said.strip()}"})
    suite = {"metrics": ["greedy_match", "word_perplexity", "perplexity"], "target": "last_word"}
    found = scored(tmp_path, model, rows, suite)
    split = [row["text"].rpartition(" ") for row in rows]
    results = [plain(given, space + word) for given, space, word in split]
    nats = -sum(result[0] for result in results)
    assert found["greedy_match"] == sum(result[1] for result in results) / len(rows)
    assert found["word_perplexity"] == pytest.approx(math.exp(nats / len(rows)), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / sum(result[2] for result in results)), rel=1e-5)


@pytest.mark.slow
def test_a_task_of_lm_eval_gives_its_scores_and_they_are_those_of_the_same_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    model = make_model(tmp_path / "model", llama=True)
    rows = [{"question": q.strip(), "choices": c, "answer": a} for q, c, a in QUESTIONS]
    task = {
        "task": "tiny_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
    }
    suite = {
        "data": {"template": {"prompt": "Question: {question}\nAnswer:"}},
        "metrics": ["accuracy", "accuracy_norm", "accuracy_bytes"],
    }
    ours = scored(tmp_path, model, rows, suite)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(yaml.safe_dump(task))
    content = tiny.recipe(tmp_path)
    content["evaluate"] = {"it": {"lm_eval": "tiny_questions", "include_path": str(tmp_path / "tasks")}}
    path, output = str(tiny.write(tmp_path, content)), tmp_path / "scores.json"
    assert main(["check", "--fast", path]) == 0
    assert main(["evaluate", str(model), path, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert [score["metric"] for score in found] == ["acc", "acc_norm", "acc_bytes"]
    assert [score["value"] for score in found] == list(ours.values())
    for score in found:
        value, n = score["value"], len(rows)
        assert (score["n"], score["higher_is_better"]) == (n, True)
        assert score["stderr"] == pytest.approx((value * (1 - value) / (n - 1)) ** 0.5)
        middle, z = (value + 1.96**2 / (2 * n)) / (1 + 1.96**2 / n), 1.96 / (1 + 1.96**2 / n)  # Wilson's interval
        half = z * (value * (1 - value) / n + 1.96**2 / (4 * n**2)) ** 0.5
        assert (score["low"], score["high"]) == (pytest.approx(middle - half), pytest.approx(middle + half))
    content["evaluate"]["it"]["lm_eval"] = "tiny_question"
    assert main(["evaluate", str(model), str(tiny.write(tmp_path, content))]) == 2
    assert "Did you mean tiny_questions?" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", str(model), str(tiny.write(tmp_path, content))]) == 4
    assert 'pip install "hfpipe[lm-eval]"' in capsys.readouterr().err


def test_an_answer_that_is_no_choice_is_told(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path)
    rows = tmp_path / "rows.jsonl"
    suite = {"data": {"path": "json", "data_files": str(rows)}, "metrics": ["accuracy"]}
    content["evaluate"] = {"it": suite}
    path = str(tiny.write(tmp_path, content))
    rows.write_text(json.dumps({"prompt": "p", "choices": ["one", "two"], "answer": "three"}))
    assert main(["evaluate", str(model), path]) == 5
    assert "'three' is none of the choices one, two" in capsys.readouterr().err
    suite["metrics"] = ["bleu"]
    assert main(["evaluate", str(model), str(tiny.write(tmp_path, content))]) in (2, 5)
    content["stages"][1]["data"][0]["template"] = {"prompt": "{sound}", "choices": ["a", "b"]}
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    assert "is a role of a suite's rows" in capsys.readouterr().err
