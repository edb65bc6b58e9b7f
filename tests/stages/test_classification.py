"""Classifiers through the command line: scores beside scikit-learn, files beside plain transformers and peft."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from classifying import written
from datasets import ClassLabel, Dataset, Features, List, Value
from peft import PeftModel
from plain import make_encoder
from safetensors import safe_open
from scipy import stats
from sklearn import metrics
from sklearn.preprocessing import MultiLabelBinarizer
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    RobertaConfig,
    RobertaForMaskedLM,
)

from hfpipe.cli import main
from hfpipe.data.labels import known_names, plain_labels

LONG = pytest.mark.long


def records(folder: Path, need: str = "choice") -> Iterator[tuple[Any, Any]]:
    """Yields the answer and the right answer of each row."""
    for line in (folder / "run/stages/kinds/predictions/kinds.jsonl").read_text().splitlines():
        yield json.loads(line)[need]["prediction"], json.loads(line)[need]["reference"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a decoder with LoRA, after a stage of pretraining, on six classes."""
    folder = tmp_path_factory.mktemp("classes")
    content = written(folder, "one", lora={"r": 4, "target_modules": "all-linear"})
    usual = tiny.recipe(folder)
    content["stages"].insert(0, usual["stages"][0])
    content["evaluate"]["general"] = usual["evaluate"]["general"]
    assert main(["run", str(tiny.write(folder, content))]) == 0
    return folder


@pytest.mark.slow
def test_an_adapter_and_its_merge_say_the_same_to_plain_transformers_and_peft(adapter: Path) -> None:
    stage = adapter / "run/stages/kinds"
    tokenizer = AutoTokenizer.from_pretrained(stage / "model")
    config = AutoConfig.from_pretrained(stage / "model")
    assert sorted(config.id2label.values()) == sorted(tiny.SOUNDS.values())
    place = adapter / "run/stages/prose/model"
    base = AutoModelForSequenceClassification.from_pretrained(place, config=config, dtype=torch.float32)
    models = [PeftModel.from_pretrained(base, stage / "model").eval()]
    models.append(AutoModelForSequenceClassification.from_pretrained(stage / "merged").eval())
    said = [answer for answer, _ in records(adapter)]
    for model in models:
        for line, answer in zip((adapter / "test.jsonl").read_text().splitlines(), said, strict=True):
            with torch.no_grad():
                logits = model(**tokenizer(json.loads(line)["text"], return_tensors="pt")).logits[0]
            assert config.id2label[int(logits.argmax())] == answer


@pytest.mark.slow
def test_scores_and_confusion_are_scikit_learns(adapter: Path) -> None:
    said, right = map(list, zip(*records(adapter), strict=True))
    found = tiny.scores(adapter / "run")
    assert found["kinds", "kinds", "accuracy"] == metrics.accuracy_score(right, said) > 0.8
    assert found["kinds", "kinds", "f1"] == pytest.approx(metrics.f1_score(right, said, average="macro"))
    assert found["kinds", "kinds", "matthews_correlation"] == pytest.approx(metrics.matthews_corrcoef(right, said))
    # The base has no head for the classes, and the classifier none for text.
    assert {stage for stage, suite, _ in found if suite == "kinds"} == {"kinds"}
    assert {stage for stage, suite, _ in found if suite == "general"} == {"base", "prose"}
    report = (adapter / "run/report.md").read_text()
    names = sorted({*said, *right})
    for name, counts in zip(names, metrics.confusion_matrix(right, said, labels=names), strict=True):
        assert f"| {name} | {' | '.join(map(str, counts))} | {counts.sum()} |" in report
    # Without a score of the base, a classifier is held against what needs no model.
    scores = {row["metric"]: row for row in json.loads((adapter / "run/scorecard.json").read_text())}
    majority = max(right.count(name) for name in names) / len(right)
    assert scores["accuracy"]["baselines"] == {"the majority class": majority, "chance": 1 / len(set(right))}
    assert scores["matthews_correlation"]["baselines"] == {"the majority class": 0.0}
    verdict = report[: report.index("## ")]
    assert f"kinds accuracy {majority:.1%} → ".replace("%", " %") in verdict
    assert "points better than the majority class, chance" in verdict


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks_are_one_rank(adapter: Path, tmp_path: Path) -> None:
    content = written(tmp_path, "one", global_batch_size=8, training={"num_train_epochs": 1})
    content["model"]["architecture"] = tiny.ENCODER
    one = tiny.write(tmp_path, content, "one.yaml")
    assert main(["run", str(one)]) == 0
    content["output_dir"] = str(tmp_path / "two")
    launch = ("accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml")
    process = tiny.start("run", str(tiny.write(tmp_path, content, "two.yaml")), launch=launch)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert tiny.scores(tmp_path / "two") == pytest.approx(tiny.scores(tmp_path / "run"), abs=1e-3)


@pytest.mark.slow
def test_several_classes_at_once_by_an_encoder_in_full(tmp_path: Path) -> None:
    content = written(tmp_path, "several", training={"num_train_epochs": 10})
    content["model"]["architecture"] = tiny.ENCODER
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    said, right = zip(*records(tmp_path), strict=True)
    hot = MultiLabelBinarizer().fit([*said, *right])
    said_hot, right_hot = hot.transform(said), hot.transform(right)
    found = tiny.scores(tmp_path / "run")
    for name, average in (("f1", "macro"), ("f1_micro", "micro")):
        plain = metrics.f1_score(right_hot, said_hot, average=average, zero_division=0)
        assert found["kinds", "kinds", name] == pytest.approx(plain)
    assert found["kinds", "kinds", "accuracy"] == pytest.approx(metrics.accuracy_score(right_hot, said_hot))
    assert found["kinds", "kinds", "f1_micro"] > 0.6
    config = AutoConfig.from_pretrained(tmp_path / "run/stages/kinds/model")
    assert config.problem_type == "multi_label_classification"
    assert len(config.id2label) == 6


@pytest.mark.slow
@pytest.mark.long
def test_a_number_by_qlora_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    content = written(tmp_path, "number", lora={"r": 4, "target_modules": "all-linear"}, quantization="nf4")
    content["model"]["architecture"] |= {"hidden_size": 56, "intermediate_size": 112}  # sizes of no kernel
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    said, right = zip(*records(tmp_path, "number"), strict=True)
    found = tiny.scores(tmp_path / "run")
    assert found["kinds", "kinds", "pearsonr"] == pytest.approx(stats.pearsonr(said, right).statistic)
    assert found["kinds", "kinds", "mse"] == pytest.approx(metrics.mean_squared_error(right, said))
    assert found["kinds", "kinds", "pearsonr"] > 0.5
    config = AutoConfig.from_pretrained(tmp_path / "run/stages/kinds/merged")
    assert config.problem_type == "regression"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_a_head_stays_whole_on_a_quantized_body(model_type: str, tmp_path: Path) -> None:
    """BERT's pooler lies in its body, and T5's head has a name of its own."""
    pytest.importorskip("bitsandbytes")
    content = written(tmp_path, "one", lora={"r": 4, "target_modules": "all-linear"}, quantization="nf4")
    content["model"]["architecture"] = {
        "bert": tiny.ENCODER,
        "t5": {"model_type": "t5", "d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4},
    }[model_type]
    content["stages"][0]["training"] = {"max_steps": 4, "max_length": 64}
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    stage = tmp_path / "run/stages/kinds"
    name = {"bert": "bert.pooler.dense", "t5": "classification_head.dense"}[model_type]
    with safe_open(stage / "model/adapter_model.safetensors", "pt") as tensors:
        assert any(f"{name}.weight" in key for key in tensors.keys())  # noqa: SIM118
    plain = AutoModelForSequenceClassification.from_pretrained(stage / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(stage / "merged")
    for line, (said, _) in zip((tmp_path / "test.jsonl").read_text().splitlines(), records(tmp_path), strict=True):
        with torch.no_grad():
            logits = plain(**tokenizer(json.loads(line)["text"], return_tensors="pt")).logits[0]
        assert plain.config.id2label[int(logits.argmax())] == said


@pytest.mark.slow
def test_balanced_weights_help_the_rare_classes(tmp_path: Path) -> None:
    found = {}
    for name, weights in (("plain", {}), ("balanced", {"class_weights": "balanced"})):
        folder = tmp_path / name
        folder.mkdir()
        content = written(folder, "one", skewed=True, training={"num_train_epochs": 1}, **weights)
        assert main(["run", str(tiny.write(folder, content))]) == 0
        said, right = zip(*records(folder), strict=True)
        found[name] = metrics.recall_score(right, said, average="macro", zero_division=0)
    assert found["balanced"] > found["plain"]


@pytest.mark.parametrize(
    ("values", "feature", "classes", "said"),
    [
        ([0, 1, None, -1], ClassLabel(names=["bad", "good"]), None, ["bad", "good", None, None]),
        ([3, 10], Value("int64"), None, ["3", "10"]),
        ([0, 1], Value("int64"), ["schlecht", "gut"], ["schlecht", "gut"]),
        ([True, False], Value("bool"), None, ["True", "False"]),
        ([0.0, None, 1.0], Value("float64"), None, ["0", None, "1"]),  # how a CSV with a missing label is read
        ([0.0, 1.0], Value("float64"), ["a", "b"], ["a", "b"]),
        ([0.0, 1.0], Value("float64"), None, [0.0, 1.0]),
        ([[0, 1, 1], [0, 0, 0]], List(Value("int64")), None, [["1", "2"], []]),  # a place for each class
        ([[0.0, 1.0], [1.0, 1.0]], List(Value("float32")), ["a", "b"], [["b"], ["a", "b"]]),
        ([[0, 2], [1]], List(Value("int64")), None, [["0", "2"], ["1"]]),
        ([["b", "a"], []], List(Value("string")), None, [["b", "a"], []]),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_labels_are_names_however_they_are_written(
    values: list, feature: Any, classes: list | None, said: list, streamed: bool
) -> None:
    rows: Any = Dataset.from_dict({"label": values}, features=Features({"label": feature}))
    rows, _ = plain_labels(rows.to_iterable_dataset() if streamed else rows, "x", classes)
    assert [row["label"] for row in rows] == said


def test_names_of_the_data_are_found_among_those_of_a_model() -> None:
    known = ["negative", "positive"]
    assert known_names(["NEGATIVE", "1", "positive"], known) == {
        "NEGATIVE": "negative",
        "1": "positive",
        "positive": "positive",
    }
    assert known_names([["0", "neutral", "2"]], known) == {"0": "negative"}
    assert known_names(["1"], ["0", "1", "one"]) == {"1": "1"}
    assert known_names(["A"], ["a", "A"]) == {"A": "A"}


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [{}, {"lora": {"r": 2}}])
def test_long_rows_are_cut_to_what_the_model_has_positions_for(tmp_path: Path, adapter: dict) -> None:
    content = written(tmp_path, "one", training={"max_steps": 2, "max_length": None}, **adapter)
    content["model"]["architecture"] = {**tiny.ENCODER, "model_type": "roberta", "max_position_embeddings": 40}
    for name in ("train", "test"):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        rows = [{**row, "text": row["text"] * 20} for row in map(json.loads, lines[:40])]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    del content["stages"][0]["training"]["max_length"]
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    if adapter:  # both layers of RoBERTa's head are in one module, which PEFT saves whole
        with safe_open(tmp_path / "run/stages/kinds/model/adapter_model.safetensors", "pt") as tensors:
            head = [name for name in tensors.keys() if "classifier" in name]  # noqa: SIM118
        assert len(head) == 4


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"labels": ["mew", "bark"]}, 5, ["the labels cluck, hoot, moo, yelp", "mew, bark", "leave it out"]),
        ({"class_weights": "balance"}, 2, ["class_weights", "balanced"]),
        ({"training": {"assistant_only_loss": True}}, 2, ["assistant_only_loss", "belongs to kind: sft"]),
        ({"metrics": ["bits_per_byte"]}, 2, ["bits_per_byte scores text", "class names", "accuracy"]),
        ({"metrics": ["mse"]}, 2, ["mse scores numbers", "class names"]),
        ({"numbers": [0.0, 1.0]}, 5, ["makes a regression", "suite kinds has classes", "Name the classes in `labels`"]),
        ({"columns": {"text": "text"}}, 5, ["`sentence` with `label`", "columns: {sentence:"]),
        ({"right": {"label": "roar"}}, 5, ["suite kinds", "roar are not among the classes", "`labels` of the stage"]),
        ({"right": {"label": "MEW"}, "training": {"max_length": 500}}, 2, ["max_length is 500", "positions for 128"]),
        ({"learned": {"label": None}}, 5, ["12 of 252 rows", "12 without a label", "max_dirty_share"]),
        ({"after": "sft"}, 2, ["'kinds' leaves a classifier", "parent: base"]),
    ],
)
def test_a_mistake_gets_one_paragraph(
    change: dict, code: int, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = written(tmp_path, "one")
    stage = content["stages"][0]
    if "metrics" in change:
        content["evaluate"]["kinds"]["metrics"] = change.pop("metrics")
    if "columns" in change:
        stage["data"][0]["columns"] = change.pop("columns")
    if numbers := change.pop("numbers", None):  # in the suite its metrics say that they are classes
        for file in ("train", "test"):
            lines = [json.dumps({"text": "a cat", "label": numbers[number % 2]}) + "\n" for number in range(8)]
            (tmp_path / f"{file}.jsonl").write_text("".join(lines))
    if "learned" in change or "right" in change:
        count, file = (12, "train") if "learned" in change else (1, "test")
        more = {"text": "a cat", "also": "", **(change.pop("learned", None) or change.pop("right"))}
        with (tmp_path / f"{file}.jsonl").open("a") as lines:
            lines.write("".join(json.dumps({"id": f"m{n}", **more}) + "\n" for n in range(count)))
        content["model"]["architecture"] = tiny.ENCODER
    if change.pop("after", None):
        content["stages"].append(tiny.recipe(tmp_path)["stages"][1])
    assert (
        main(["run", str(tiny.write(tmp_path, {**content, "stages": [{**stage, **change}, *content["stages"][1:]]}))])
        == code
    )
    message = "".join(capsys.readouterr())
    for word in words:
        assert word in message
    assert "Traceback" not in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "block"),
    [
        ("roberta", {"peft": {"type": "ia3"}}),  # whose head has layers of its own
        pytest.param(
            "roberta", {"peft": {"type": "ln_tuning", "target_modules": ["LayerNorm"]}}, marks=pytest.mark.long
        ),
        ("bert", {"lora": {"r": 4}, "quantization": "nf4"}),  # whose head begins within its body
    ],
)
def test_every_adapter_of_an_encoder_merges_with_its_head(family: str, block: dict, tmp_path: Path) -> None:
    if "quantization" in block:
        pytest.importorskip("bitsandbytes")
    base = make_encoder(tmp_path / "base")
    if family == "roberta":
        known = AutoConfig.from_pretrained(base)
        sizes = {key: getattr(known, key) for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
        config = RobertaConfig(**sizes, num_attention_heads=2, intermediate_size=64, pad_token_id=0)
        RobertaForMaskedLM(config).save_pretrained(base)
    content = written(tmp_path, "one", training={"num_train_epochs": 1, "max_length": 40}, **block)
    content |= {"model": {"id": str(base)}, "merge": True, "shift": False, "energy": False}
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    stage, ids = tmp_path / "run/stages/kinds", torch.arange(5, 20)[None]
    merged = AutoModelForSequenceClassification.from_pretrained(stage / "merged").eval()
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(tiny.SOUNDS))
    loaded = PeftModel.from_pretrained(plain, stage / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            merged(ids).logits, loaded(ids).logits, atol=0.05 if "lora" in block else 1e-5, rtol=0
        )


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["one", pytest.param("several", marks=LONG), pytest.param("number", marks=LONG)])
def test_sentences_are_tokenized_once_and_by_prepare(
    problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    content = written(tmp_path, problem, training={"num_train_epochs": 1})
    path = str(tiny.write(tmp_path, content))
    assert main(["prepare", path]) == 0
    assert "tokenized before" not in capsys.readouterr().out
    assert main(["run", path]) == 0
    assert "240 rows, tokenized before" in capsys.readouterr().out
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "other")
    assert main(["run", path, "--set", f"output_dir={tmp_path / 'alone'}"]) == 0
    assert "tokenized before" not in capsys.readouterr().out
    losses = [
        json.loads((tmp_path / f"{name}/stages/kinds/done.json").read_text())["last_loss"] for name in ("run", "alone")
    ]
    assert losses[0] == losses[1]
