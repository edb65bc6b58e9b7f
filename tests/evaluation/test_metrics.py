"""Our metrics beside the libraries called plainly; errors beside formulas and recomputation; names and options."""

import json
import random
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tiny
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF, TER
from sklearn import metrics as sklearn_metrics

from hfpipe.cli import main
from hfpipe.core.errors import RecipeError
from hfpipe.evaluation.metrics import load_metric
from hfpipe.evaluation.metrics.rows import paired_test, resampled_sums
from hfpipe.evaluation.metrics.words import unicode_words
from hfpipe.recipe import load_recipe
from hfpipe.recipe.metric_table import MASKED_METRICS, OUR_METRICS
from hfpipe.scores.scorecard import Change, Score, forgetting

ENGLISH = [
    ("The cat sat on the mat.", "The cat is sitting on the mat."),
    ("A dog barks at the moon tonight.", "The dog barks at the moon."),
    ("Nothing of the kind", "Something else entirely happened here."),
    ("He said hello to his old friend.", "He said hello to his old friend."),
]
GERMAN = [("Die Straße führt über den Fluß.", "Die Straße führt über die Brücke."), ("Äpfel und Öl.", "Äpfel und Öle.")]
CHINESE = [
    ("今天天气很好。", "今天的天气非常好。"),
    ("他在家里看书。", "他正在家里看书。"),
    ("我不知道。", "我不知道。"),
]
CLASSES = [("a", "a"), ("b", "a"), ("c", "c"), ("a", "b"), ("b", "b"), ("a", "a"), ("d", "c"), ("c", "c"), ("a", "c")]


def computed(name: str, pairs: list, **options: object) -> dict:
    said, right = map(list, zip(*pairs, strict=True))
    return load_metric(name, options).compute(predictions=said, references=right)


@pytest.mark.parametrize("pairs", [ENGLISH, GERMAN, CHINESE], ids=["English", "German", "Chinese"])
@pytest.mark.parametrize(
    ("name", "scorer", "options"),
    [
        ("bleu", BLEU, {}),
        ("bleu", BLEU, {"tokenize": "zh"}),
        ("bleu", BLEU, {"lowercase": True, "smooth_method": "floor"}),
        ("chrf", CHRF, {}),
        ("chrf", CHRF, {"word_order": 2}),
        ("ter", TER, {}),
        ("ter", TER, {"asian_support": True, "normalized": True}),
    ],
)
def test_translation_scores_are_sacrebleus(name: str, scorer: type, options: dict, pairs: list) -> None:
    said, right = map(list, zip(*pairs, strict=True))
    found = computed(name, pairs, **options)
    if pairs is CHINESE:  # which has no spaces between words
        options = {"bleu": {"tokenize": "zh"}, "ter": {"asian_support": True, "normalized": True}}.get(
            name, {}
        ) | options
    assert found[name] == scorer(**options).corpus_score(said, [right]).score
    assert found["low"] <= found[name] <= found["high"]


def test_what_bleu_and_ter_take_for_words_is_in_their_signature_and_the_recipes_word_goes_first() -> None:
    def signature(name: str, right: str, **options: object) -> str:
        metric = load_metric(name, options)
        metric.compute(predictions=[right], references=[right])
        return metric.signature

    chinese, japanese, german = "我不知道他在哪里。", "今日は天気がいいですね。", "Das weiß ich nicht."
    assert "tok:zh|" in signature("bleu", chinese)
    assert "tok:13a|" in signature("bleu", chinese, tokenize="13a")
    assert "tok:zh" not in signature("bleu", japanese)
    assert "tok:13a" not in signature("bleu", japanese)
    assert "tok:13a|" in signature("bleu", german)
    assert "asian:yes" in signature("ter", chinese)
    assert "asian:no" in signature("ter", german)


def test_resampled_bleu_is_bleu_of_the_resampled_corpus() -> None:
    pairs = ENGLISH * 5
    said, right = map(list, zip(*pairs, strict=True))
    metric = load_metric("bleu")
    sums = resampled_sums(metric.statistics(said, right), samples=3, seed=4)
    counts = np.random.default_rng(4).multinomial(len(pairs), [1 / len(pairs)] * len(pairs), size=3)
    for row, value in zip(counts, metric.value(sums), strict=True):
        drawn = [index for index, count in enumerate(row) for _ in range(count)]
        whole = BLEU().corpus_score([said[i] for i in drawn], [[right[i] for i in drawn]]).score
        assert value == pytest.approx(whole, abs=1e-10)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_rouge_is_rouge_scores(name: str) -> None:
    for options in ({}, {"use_stemmer": True}):
        scorer = RougeScorer([name], **options)
        plain = np.mean([scorer.score(right, said)[name].fmeasure for said, right in ENGLISH])
        assert computed(name, ENGLISH, **options)[name] == pytest.approx(plain, abs=1e-15)


SCRIPTS = {  # a sentence, its words, and one that shares the digit alone
    "Russian": ("Кошка спит за рекой в 7 часов.", 7, "Собака лает на холме 7."),
    "Arabic": ("القطة تنام قرب النهر 7", 5, "الكلب ينبح 7"),
    "Hindi": ("बिल्ली नदी के पास सोती है 7।", 7, "कुत्ता भौंकता 7।"),
    "Japanese": ("猫は川で寝る7", 7, "犬ガ吠エ7"),
    "Thai": ("แมวนอน 7", 7, "หมาเห่า 7"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_texts_of_other_scripts_are_compared_by_their_words(script: str) -> None:
    right, words, other = SCRIPTS[script]
    for name in ("rouge1", "rougeL", "squad_f1", "exact_match", "chrf"):
        full = 100 if name == "chrf" else 1
        assert computed(name, [(right, right)])[name] == pytest.approx(full)
        assert computed(name, [(other, right)])[name] < 0.4 * full  # the digit alone is shared
    assert computed("squad_em", [(right.rstrip(".।"), right)])["squad_em"] == 1
    assert len(unicode_words(right)) == words


def test_few_foreign_letters_leave_rouge_and_squad_as_they_are_and_the_signature_names_another_tokenizer() -> None:
    pairs = [("the cat sat on the hill", "the cafés of the hill are open, said the owl")]
    plain = RougeScorer(["rouge1"]).score(pairs[0][1], pairs[0][0])["rouge1"].fmeasure
    english, russian = load_metric("rouge1"), load_metric("rouge1")
    assert english.compute(predictions=[pairs[0][0]], references=[pairs[0][1]])["rouge1"] == plain
    russian.compute(predictions=["кошка"], references=["кошка спит"])
    assert (english.signature, russian.signature) == ("", "tok:unicode")
    with pytest.raises(RecipeError, match="use_stemmer is for English"):
        computed("rouge1", [("кошка", "кошка")], use_stemmer=True)
    with pytest.raises(RecipeError, match="Keep one of them"):
        load_metric("rouge1", {"tokenize": "intl", "use_stemmer": True})
    with pytest.raises(RecipeError, match="Take chrf"):
        computed("ter", [("แมวนอน", "หมาเห่า")])


def test_rouge_of_chinese_takes_the_tokenizer_that_the_recipe_names() -> None:
    assert computed("rouge1", CHINESE[2:], tokenize="zh")["rouge1"] == 1
    # 今 天 的 天 气 非 常 好 。 against 今 天 天 气 很 好 。: 6 shared of 7 and 9.
    assert computed("rouge1", CHINESE[:1], tokenize="zh")["rouge1"] == pytest.approx(12 / 16)


def plainly(name: str, said: list, right: list) -> float:
    if name == "matthews_correlation":
        return sklearn_metrics.matthews_corrcoef(right, said)
    average = "micro" if name.endswith("_micro") else "macro"
    function = getattr(sklearn_metrics, f"{name.removesuffix('_micro')}_score")
    return function(right, said, average=average, zero_division=0)


@pytest.mark.parametrize(
    "name", ["f1", "f1_micro", "precision", "precision_micro", "recall", "recall_micro", "matthews_correlation"]
)
def test_class_scores_are_scikit_learns_and_so_are_the_resampled_ones(name: str) -> None:
    said, right = map(list, zip(*CLASSES, strict=True))
    assert computed(name, CLASSES)[name] == plainly(name, said, right)
    metric, chance = load_metric(name), random.Random(1)
    statistics = metric.statistics(said, right)
    for _ in range(50):
        drawn = chance.choices(range(len(said)), k=len(said))
        plain = plainly(name, [said[i] for i in drawn], [right[i] for i in drawn])
        assert float(metric.value(statistics[drawn].sum(0))) == pytest.approx(plain, abs=1e-12)


def test_squad_normalises_as_the_official_script() -> None:
    pairs = [("The  Eiffel-Tower!", "eiffeltower"), ("in a big red house", "the big house."), ("Paris", "London")]
    assert computed("squad_em", pairs)["squad_em"] == pytest.approx(1 / 3)
    # "in big red house" against "big house": precision 2/4, recall 2/2.
    assert computed("squad_f1", pairs)["squad_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_perplexity_and_calibration_are_their_definitions() -> None:
    pairs = [(12.0, 5), (3.0, 2), (40.0, 11)]
    assert computed("perplexity", pairs)["perplexity"] == pytest.approx(2 ** (55 / 18))
    sure = [(0.95, 1), (0.97, 0), (0.30, 0), (0.31, 1), (1.0, 1)]  # bins (4/15, 5/15] and (14/15, 1]
    assert computed("calibration_error", sure)["calibration_error"] == pytest.approx((0.92 + 0.39) / 5)


def test_intervals_cover_and_are_those_of_the_field() -> None:
    hits = [("a", "a")] * 20 + [("b", "a")] * 10
    found = computed("accuracy", hits)
    assert found["stderr"] == pytest.approx((2 / 3 * 1 / 3 / 29) ** 0.5)  # of a sample, as lm-eval's
    assert (found["low"], found["high"]) == pytest.approx((0.48783, 0.80769), abs=1e-4)  # Wilson
    perfect = computed("accuracy", [("a", "a")] * 10)
    assert perfect["low"] == pytest.approx(0.72246, abs=1e-4)
    chance = np.random.default_rng(5)
    covered = 0
    for _ in range(200):  # 60 texts of a model that spends 2 bits a byte on average
        size = chance.integers(20, 200, size=60)
        found = computed("bits_per_byte", list(zip(chance.normal(2, 0.5, 60) * size, size.tolist(), strict=True)))
        covered += found["low"] <= 2 <= found["high"]
    assert 178 <= covered <= 199


EDGES = {
    "binary": [("1", "1"), ("0", "1"), ("0", "0"), ("1", "0"), ("1", "1")],
    "one class is never said": [("a", "a"), ("a", "b"), ("c", "c"), ("a", "b")],
    "one class is never right": [("a", "a"), ("b", "a"), ("c", "c"), ("b", "c")],
    "nothing is right": [("a", "b"), ("b", "a"), ("a", "c")],
    "one class": [("a", "a"), ("a", "a")],
    "always the same answer": [("a", "a"), ("a", "b"), ("a", "b")],
}


@pytest.mark.parametrize("pairs", EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("name", ["f1", "f1_micro", "precision", "recall", "matthews_correlation"])
def test_class_scores_at_the_edges_are_scikit_learns(name: str, pairs: list) -> None:
    said, right = map(list, zip(*pairs, strict=True))
    found = computed(name, pairs)
    assert found[name] == plainly(name, said, right)
    assert found["low"] <= found[name] <= found["high"]
    metric = load_metric(name)
    assert float(metric.value(metric.statistics(said, right).sum(0))) == pytest.approx(found[name], abs=1e-12)


@pytest.mark.parametrize("name", ["f1", "precision", "recall"])
def test_class_scores_take_scikit_learns_averages(name: str) -> None:
    function = getattr(sklearn_metrics, f"{name}_score")
    for pairs, options in (
        (EDGES["binary"], {"average": "binary", "pos_label": "1"}),
        (EDGES["binary"], {"average": "binary", "pos_label": "0"}),
        (CLASSES, {"average": "weighted"}),
        (CLASSES, {"average": "micro"}),
    ):
        said, right = map(list, zip(*pairs, strict=True))
        found = computed(name, pairs, **options)
        assert found[name] == function(right, said, zero_division=0, **options)
        metric = load_metric(name, options)
        assert float(metric.value(metric.statistics(said, right).sum(0))) == pytest.approx(found[name], abs=1e-12)
        assert found["low"] <= found[name] <= found["high"]
    for wrong in ({"average": "binary"}, {"pos_label": "1"}, {"average": "mean"}):
        with pytest.raises(RecipeError, match="allowed is an `average`"):
            load_metric(name, wrong)


@pytest.mark.parametrize("name", ["f1", "matthews_correlation"])
def test_intervals_of_class_scores_cover_on_thirty_rows(name: str) -> None:
    chance = np.random.default_rng(7)

    def drawn(rows: int) -> tuple[list[str], list[str]]:
        right = chance.choice(3, size=rows, p=[0.7, 0.2, 0.1])
        said = np.where(chance.random(rows) < 0.95, right, (right + chance.integers(1, 3, size=rows)) % 3)
        return said.astype(str).tolist(), right.astype(str).tolist()

    metric = load_metric(name)
    many = drawn(100_000)
    true = metric.whole(*many, metric.statistics(*many))
    covered = 0
    for _ in range(60):
        said, right = drawn(30)
        found = metric.compute(predictions=said, references=right)
        covered += found["low"] <= true <= found["high"]
    assert covered >= 54  # the plain percentiles cover 45 to 49
    assert computed(name, [("a", "a"), ("b", "b")] * 15)["low"] < 0.95


def test_a_ruined_model_has_a_finite_perplexity() -> None:
    for name in ("perplexity", "word_perplexity"):
        found = computed(name, [(1e9, 3), (2e9, 4)])
        assert all(np.isfinite(value) for value in found.values())
        json.dumps(found, allow_nan=False)


def test_two_models_on_the_same_rows_are_told_apart_by_less_than_two_apart() -> None:
    chance = np.random.default_rng(6)
    size = chance.integers(50, 500, size=100)
    hard = chance.normal(2, 0.6, size=100)  # how hard a text is, for both models
    before, after = hard * size, (hard - 0.02 + chance.normal(0, 0.01, size=100)) * size
    metric = load_metric("bits_per_byte")
    paired = paired_test(metric, (before, size), (after, size))
    plain = np.std([(after[i] - before[i]).sum() / size[i].sum() for i in (chance.integers(0, 100, (2000, 100)))])
    assert paired.stderr == pytest.approx(plain, rel=0.1)
    assert paired.low < -0.02 < paired.high < 0
    scores = []
    for stage, bits in (("base", before), ("one", after)):
        result = metric.compute(predictions=bits, references=size)
        scores.append(Score(stage, "s", "bits_per_byte", result["bits_per_byte"], result["stderr"], 100, False))
    assert not Change(*scores).beyond_noise
    assert Change(scores[0], replace(scores[1], paired={"base": paired})).beyond_noise


def test_the_test_of_two_models_is_exact_for_few_rows() -> None:
    metric = load_metric("exact_match")
    right, wrong = ["a"] * 4 + ["b"] * 6, ["x"] * 4 + ["b"] * 6
    assert paired_test(metric, (right, right), (wrong, right)).p == pytest.approx(2 / 2**4), "four rows, all one way"
    six = [*["x"] * 6, *["b"] * 4]
    assert paired_test(metric, (right, right), (six, right)).p == pytest.approx(2 / 2**6)
    assert paired_test(metric, (right, right), (right, right)).p == 1
    many, none = ["a"] * 300, ["x"] * 300
    assert 0 < paired_test(metric, (many, many), (none, many)).p < 1e-20, "beyond what random exchanges can show"


def test_a_change_is_told_at_five_percent_of_whole_runs() -> None:
    """20 suites and 3 earlier models of which none changed: Holm's correction over all of them."""
    chance = np.random.default_rng(1)
    told = 0
    for _ in range(200):
        scores = [
            Score(stage, f"s{suite}", "accuracy", float(value), 0.02, 500, True)
            for suite in range(20)
            for stage, value in zip(("base", "one", "two", "three"), chance.normal(0.5, 0.02, 4), strict=True)
        ]
        changes = [forgetting(scores, "three", (f"s{suite}", "accuracy")) for suite in range(20)]
        told += any(change is not None and change.gain < 0 and change.beyond_noise for change in changes)
    assert told <= 20


def test_too_few_rows_tell_nothing_and_the_rows_that_would_are_named() -> None:
    few = [Score(stage, "s", "accuracy", value, 0.0, 5, True) for stage, value in (("base", 0.0), ("one", 1.0))]
    assert not Change(*few).beyond_noise
    some = [Score(stage, "s", "accuracy", value, 0.05, 50, True) for stage, value in (("base", 0.4), ("one", 0.45))]
    needed = Change(*some).rows_needed
    assert needed is not None
    error = 0.05 * (50 / needed) ** 0.5
    assert 2.01 * error * 2**0.5 == pytest.approx(0.05, rel=0.01)  # Student's t of 49 degrees of freedom


def test_a_metric_is_ours_or_the_hubs_and_a_misspelt_one_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = tiny.recipe(tmp_path)
    suite = content["evaluate"]["sounds"]
    suite["metrics"] = [
        *sorted({*OUR_METRICS} - {"flip_rate", *MASKED_METRICS}),
        "owner/metric",
        "bertscore",
        "./own.py",
    ]
    suite["metric_options"] = {"bleu": {"tokenize": "zh"}, "rougeL": {"use_stemmer": True}}
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 0
    suite["metrics"] = ["blue", "rogue1", "squad_f", "chrf"]
    suite["metric_options"] = {"chrf": {"word_ordr": 2}, "bleu": {}}
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    message = capsys.readouterr().err
    for hint in ("Did you mean bleu?", "Did you mean rouge1?", "Did you mean squad_f1?", "Did you mean word_order?"):
        assert hint in message
    assert "evaluate.sounds.metric_options.bleu: is not among the suite's metrics" in message


def test_a_family_of_metrics_is_written_out_with_its_options(tmp_path: Path) -> None:
    content = tiny.recipe(tmp_path)
    options = {"rouge": {"use_stemmer": True}}
    content["evaluate"]["sounds"] |= {"metrics": ["squad", "rouge", "rougeL"], "metric_options": options}
    path = tiny.write(tmp_path, content)
    assert main(["check", "--fast", str(path)]) == 0
    suite = load_recipe(path).evaluate["sounds"]
    assert suite.metrics == ["squad_em", "squad_f1", "rouge1", "rouge2", "rougeL", "rougeLsum"]
    assert suite.metric_options == {name: {"use_stemmer": True} for name in suite.metrics[2:]}
    for key, block in (("limit", {"limit": 3}), ("metrics", {"metrics": ["accuracy"], "lm_eval": "arc_easy"})):
        content["evaluate"]["sounds"] |= block
        assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2, key


@pytest.mark.slow
@pytest.mark.long
def test_every_metric_of_ours_scores_a_model_and_two_models_are_compared_by_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, merge=False)
    asks = {name: (metric.needs, metric.rows) for name, metric in ((name, load_metric(name)) for name in OUR_METRICS)}
    of_text = [name for name, ask in asks.items() if ask in product(("likelihood", "choice", "generation"), [None])]
    content["evaluate"]["sounds"]["metrics"] = of_text
    path = str(tiny.write(tmp_path, content))
    assert main(["run", path]) == 0
    rows = json.loads((tmp_path / "run" / "scorecard.json").read_text())
    assert {row["metric"] for row in rows} == set(of_text)
    for row in rows:
        assert row["low"] <= row["value"] <= row["high"], row
        assert set(row["paired"]) == {"base": set(), "prose": {"base"}, "sounds": {"base", "prose"}}[row["stage"]]
    stages = tmp_path / "run" / "stages"
    lines = (stages / "sounds" / "predictions" / "sounds.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(record["row"], record["id"]) for record in records] == [(n, f"s{n + 500}") for n in range(30)]
    accuracy = next(row for row in rows if (row["stage"], row["metric"]) == ("sounds", "accuracy"))
    assert np.mean([record["values"]["accuracy"] for record in records]) == pytest.approx(accuracy["value"])
    assert all(record["choice"]["correct"] == record["values"]["accuracy"] for record in records)
    capsys.readouterr()
    models = [str(stages / stage / "model") for stage in ("sounds", "prose")]
    assert main(["evaluate", models[0], path, "--against", models[1], "--output", str(tmp_path / "both.json")]) == 0
    differences = [line for line in capsys.readouterr().out.splitlines() if line.startswith("difference")]
    assert len(differences) == 1 + len(of_text)
    both = json.loads((tmp_path / "both.json").read_text())
    assert len(both) == 2 * (1 + len(of_text))
    again = next(row for row in both if row["stage"] == models[0] and row["metric"] == "bits_per_byte")
    assert again["paired"][models[1]] == pytest.approx(
        next(r for r in rows if (r["stage"], r["metric"]) == ("sounds", "bits_per_byte"))["paired"]["prose"], rel=1e-3
    )


@pytest.mark.slow
@pytest.mark.long
def test_an_uneven_suite_on_two_ranks_scores_each_row_once(tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, merge=False)
    content["stages"] = content["stages"][:1]
    content["evaluate"]["sounds"]["data"]["take"] = 29
    # chrf sees every generated letter: one answer that stood beside another row's would move it.
    content["evaluate"]["sounds"]["metrics"] = ["accuracy", "exact_match", "chrf", "perplexity", "calibration_error"]
    pairs = [{"more": f"{n}. The {one}.", "less": f"The {one}. {n}"} for n, one in enumerate(tiny.ANIMALS * 2)][:11]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    source = {"path": "json", "data_files": str(tmp_path / "pairs.jsonl")}
    content["evaluate"]["pairs"] = {"data": source, "metrics": ["stereotype_score", "likelihood_difference"]}
    flips = {**content["evaluate"]["sounds"], "metrics": ["flip_rate"], "swap": [["cat", "dog"]]}
    content["evaluate"]["flips"] = flips
    grammar = {**source, "columns": {"good": "more", "bad": "less"}}
    content["evaluate"]["grammar"] = {"data": grammar, "metrics": ["accuracy"]}
    one = str(tiny.write(tmp_path, content))
    assert main(["run", one]) == 0
    config = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu.yaml"
    launch = ("accelerate.commands.launch", "--config_file", str(config))
    run = tmp_path / "run"
    process = tiny.start("evaluate", str(run), one, "--output", str(tmp_path / "two.json"), launch=launch)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    rows = [row for row in json.loads((run / "scorecard.json").read_text()) if row["stage"] == "prose"]
    for row, again in zip(rows, json.loads((tmp_path / "two.json").read_text()), strict=True):
        assert (again["suite"], again["metric"], again["n"]) == (row["suite"], row["metric"], row["n"])
        assert [again[key] for key in ("value", "low", "high")] == pytest.approx(
            [row[key] for key in ("value", "low", "high")], rel=1e-4
        )
    assert {row["n"] for row in rows if row["suite"] == "sounds"} == {29}
    found = {(row["suite"], row["metric"]): row for row in rows}
    assert found["sounds", "chrf"]["value"] > 0
    assert (found["pairs", "likelihood_difference"]["n"], found["flips", "flip_rate"]["n"]) == (11, 9)
