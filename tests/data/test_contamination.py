"""Nothing is trained on what a suite holds: rows are found by content, whole or in part, and nothing else is."""

import json
import random
from pathlib import Path

import pytest
import tiny

from hfpipe.cli import main
from hfpipe.data.cleaning.contamination import SuiteIndex, packed, unpacked

WORDS = [f"{first}{second}" for first in "bcdfgklmnprst" for second in ("ab", "en", "ir", "ol", "um")]


def text(seed: int, words: int = 40) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


SUITE = [{"text": text(seed)} for seed in range(20)] + [{"text": "Thank you very much!"}, {"text": "你好!我的朋友。"}]


def found(*texts: str) -> tuple[list[int], list[int], list[int]]:
    overlap = SuiteIndex(SUITE).look_in([{"text": one} for one in texts])
    assert overlap.looked_at == len(texts)
    return overlap.exact, overlap.partly, overlap.touched


def test_a_whole_row_is_found_whatever_its_case_and_punctuation() -> None:
    assert found(text(100), text(3).upper().replace(" ", ",  ") + "!") == ([3], [3], [3])
    assert found("thank you, very much") == ([20], [], [])
    assert found("你好 我的朋友") == ([21], [], [])
    assert found("thank you very", text(101)) == ([], [], [])


def test_a_row_inside_a_longer_document_is_found_by_its_runs() -> None:
    assert found(f"{text(100)} {text(5)} {text(101)}") == ([], [5], [5])
    half = " ".join(text(7).split()[:20])  # of 40 words
    assert found(f"{text(100)} {half}") == ([], [7], [7])
    less = " ".join(text(7).split()[:19])
    assert found(f"{text(100)} {less}") == ([], [], [7]), "some runs are counted, and not refused"
    assert found(" ".join(text(7).split()[:12])) == ([], [], [])
    parts = " ".join(text(7).split()[:19]), " ".join(text(7).split()[19:38])
    assert found(*parts) == ([], [], [7]), "what is scattered over documents is no copy"
    assert found(*[f"{text(seed)} {text(9)}" for seed in range(200, 220)]) == ([], [9], [9]), "copied twenty times"


def looked(suite: list[dict], *trained: dict) -> dict[str, list[int]]:
    overlap = SuiteIndex(suite).look_in(trained)
    return {name: places for name in ("exact", "partly", "near") if (places := getattr(overlap, name))}


def test_each_sentence_of_a_pair_is_looked_for() -> None:
    pairs = [{"good": text(seed, 9), "bad": text(seed + 1, 9)} for seed in range(0, 20, 2)]
    assert looked(pairs, {"text": text(4, 9)}, {"text": text(7, 9)}) == {"exact": [2, 3]}
    swapped = " ".join([*text(10, 9).split()[:4], "other", *text(10, 9).split()[5:]])
    assert looked(pairs, {"text": swapped}) == {"near": [5]}, "one changed word"
    crows = [{"more": text(30, 20), "less": text(31, 20)}]
    assert looked(crows, {"text": f"{text(100)} {text(31, 20)}"}) == {"partly": [0]}


def test_a_question_and_its_answer_are_found_however_they_are_divided() -> None:
    asked, said = text(40, 10), text(41, 5)
    suite = [{"prompt": f"{asked} ", "completion": said}]
    chat = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
    assert looked(suite, {"text": f"{asked} {said}"}) == {"exact": [0]}
    assert looked(suite, chat) == {"exact": [0]}
    assert looked(suite, {"prompt": asked, "completion": text(42, 9)}) == {"exact": [0]}, "the question is known"
    assert looked([chat], {"prompt": f"{asked} ", "completion": said}) == {"exact": [0]}


def chat(instruction: str, asked: str, said: str) -> dict:
    turns = [("system", instruction), ("user", asked), ("assistant", said)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_a_question_asked_for_something_else_is_no_overlap() -> None:
    asked = text(43, 14)
    suite = [chat("Say it in German.", asked, text(44, 9))]
    assert looked(suite, chat("Say it in Chinese.", asked, text(45, 9))) == {"near": [0]}
    assert looked(suite, chat("Say it in German.", asked, text(45, 9)))["exact"] == [0], "the question is known"
    assert looked(suite, chat("Say it in German.", asked, text(44, 9)))["exact"] == [0]
    assert looked(suite, {"text": f"{text(46)} {asked} {text(47)}"}) == {"partly": [0]}, "a text has no other answer"


def test_a_question_of_the_same_pattern_with_another_answer_is_near() -> None:
    words = text(48, 14).split()
    suite = [{"prompt": " ".join([*words, ""]), "completion": text(49, 8)}]
    other = [*words[:-1], "other", ""]
    assert looked(suite, {"prompt": " ".join(other), "completion": text(50, 8)}) == {"near": [0]}
    assert looked(suite, {"prompt": " ".join(other), "completion": text(49, 8)}) == {"partly": [0]}


def test_one_prompt_for_a_whole_task_is_no_overlap() -> None:
    suite = [{"prompt": f"{text(50)} ", "completion": text(seed, 30)} for seed in range(5)]
    trained = [{"prompt": f"{text(50)} ", "completion": text(seed, 30)} for seed in range(100, 150)]
    assert looked(suite, *trained) == {}


def test_a_template_of_many_rows_is_no_overlap() -> None:
    template = text(50, 20)
    suite = SuiteIndex([{"prompt": f"{template} ", "completion": text(seed, 8)} for seed in range(60, 64)])
    other = [{"prompt": f"{template} ", "completion": text(seed, 8)} for seed in range(70, 90)]
    assert suite.look_in(other).partly == []
    assert suite.look_in([*other, {"prompt": f"{template} ", "completion": text(61, 8)}]).exact == [1]


def run(folder: Path, trained: list[dict], *options: str) -> int:
    held = [{"id": f"h{seed}", "text": text(seed)} for seed in range(20)]
    for name, rows in (("trained", trained), ("held", held)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def source(name: str) -> dict:
        return {"path": "json", "data_files": str(folder / f"{name}.jsonl"), "split": "train"}

    content = tiny.recipe(folder, merge=False, shift=False, overlap="refuse")
    content["stages"] = [{**content["stages"][0], "data": [source("trained")]}]
    content["evaluate"] = {"general": {"data": source("held"), "metrics": ["bits_per_byte"]}}
    command, *rest = options
    path = tiny.write(folder, content)
    return main([command, str(path), "--set", "stages.prose.training.max_steps=1", *rest])


@pytest.mark.slow
def test_a_run_refuses_it_unless_the_recipe_says_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean = [{"id": f"t{seed}", "text": text(seed)} for seed in range(100, 160)]
    dirty = [*clean, {"id": "copy", "text": f"{text(200)} {text(4)}"}]
    assert run(tmp_path, dirty, "run") == 5
    said = capsys.readouterr().err
    assert "suite general: 1 of 20 rows stands in 61 rows of stages.prose (json)" in said
    assert f"h4 '{' '.join(text(4).split()[:8])}" in said
    assert "`overlap: report`" in said
    assert not (tmp_path / "run/stages/prose").exists(), "before anything is trained"
    assert run(tmp_path, dirty, "check") == 5

    assert run(tmp_path, clean, "run") == 0, "the data was mended, and the same command goes on"
    assert run(tmp_path, dirty, "run", "--set", "overlap=report", "--set", "seed=7") == 0
    (pair,) = json.loads((tmp_path / "run/overlap.json").read_text())["pairs"]
    assert (pair["exact"], pair["partly"], pair["touched"], pair["looked_at"]) == (0, 1, 1, 61)
    for page in ("report.md", "report.html"):
        assert "Overlap of suites and training data" in (tmp_path / "run" / page).read_text()
    assert (
        f"| general | prose | json | 61 | 20 | 0 | 1 | 0 | 1 | {pair['which'][0]} |"
        in (tmp_path / "run/report.md").read_text()
    )


def test_what_decontamination_leaves_does_not_overlap() -> None:
    """One rule: what makes a row of a suite overlap is what `decontaminate` removes."""
    rng = random.Random(5)
    suite = [
        {"prompt": f"{text(seed, rng.choice((6, 9, 14, 30)))} ", "completion": text(seed + 500, 5)}
        for seed in range(60)
    ]
    suite += [chat("Say it.", text(seed, 12), text(seed + 500, 12)) for seed in range(60, 80)]
    rows: list[dict] = [{"text": text(seed, 60)} for seed in range(2000, 2060)]
    for place, row in enumerate(suite):
        said = (
            " ".join(turn["content"] for turn in row["messages"])
            if "messages" in row
            else row["prompt"] + row["completion"]
        )
        words = said.split()
        start = rng.randrange(len(words))
        rows += [{"text": f"{text(place + 3000, 9)} {' '.join(words[start:])} {text(place + 4000, 9)}"}, row]
        rows.append({"prompt": said[: len(said) // 2], "completion": said[len(said) // 2 :]})
    index = SuiteIndex(suite)
    found = [one for place, row in enumerate(rows) if (one := index.look_at(row, place)) is not None]
    overlap, guilty = index.judge(found)
    assert len({*overlap.exact, *overlap.partly}) > 60
    left = index.look_in([row for place, row in enumerate(rows) if place not in guilty])
    assert (left.exact, left.partly) == ([], [])
    assert len(rows) - len(guilty) > 60, "and no more than that"
    assert unpacked(packed(found), 7)[0].row == found[0].row + 7
    again = index.judge(unpacked(packed(found)))
    assert (again[0].exact, again[0].partly, again[1]) == (overlap.exact, overlap.partly, guilty)
