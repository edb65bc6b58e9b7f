"""Masked pretraining through the command line: what is hidden, resume, ranks, scores, and what follows it."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hfpipe.cli import main
from hfpipe.core.errors import RecipeError
from hfpipe.data.masking import WORD, Masking, frame_of, tokens_of_texts
from hfpipe.data.stream.dataset import TokenStream
from hfpipe.evaluation.likelihood import OPTIONS
from hfpipe.model.create import create_model, train_tokenizer
from hfpipe.model.load import ModelRef, load_model
from hfpipe.model.positions import learned_positions
from hfpipe.recipe import Model, load_recipe
from hfpipe.report.card import model_card
from hfpipe.report.usage import Usage
from hfpipe.stages import checkpoints

LORA = {"r": 4, "target_modules": "all-linear"}


def written(folder: Path, **changes: Any) -> dict:
    """A recipe of one masked stage and a suite of masked tokens."""
    tiny.write_data(folder)
    content = tiny.recipe(folder, merge=False, **changes)
    content["model"]["architecture"] = tiny.ENCODER
    prose = {**content["stages"][0], "objective": "masked"}
    data = content["evaluate"]["general"]["data"]
    content["stages"] = [prose]
    content["evaluate"] = {"general": {"data": data, "metrics": ["masked_accuracy", "masked_perplexity"]}}
    return content


def weights(run: Path, stage: str = "prose") -> dict[str, torch.Tensor]:
    return load_file(run / "stages" / stage / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masked from nothing, then an adapter for masked tokens on it, then classes on top."""
    folder = tmp_path_factory.mktemp("masked")
    content = written(folder)
    more = {**content["stages"][0], "name": "more", "lora": LORA, "masking": {"whole_word_mask": True}}
    source = {**content["stages"][0]["data"][0], "data_files": str(folder / "sounds.jsonl")}
    roles = {"template": {"sentence": "{note}: a {animal}"}, "columns": {"label": "sound"}}
    training = {"num_train_epochs": 4, "learning_rate": "2e-3", "max_length": 64}
    kinds = {"name": "kinds", "kind": "classification", "data": [{**source, **roles}], "training": training}
    content["stages"] += [more, kinds]
    asked = {**source, "data_files": str(folder / "asked.jsonl"), **roles}
    content["evaluate"]["kinds"] = {"data": asked, "metrics": ["accuracy"]}
    assert main(["run", str(tiny.write(folder, content))]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.long
def test_scores_are_those_of_plain_transformers_one_row_at_a_time(chain: Path) -> None:
    place = chain / "run/stages/prose/model"
    tokenizer, model = AutoTokenizer.from_pretrained(place), AutoModelForMaskedLM.from_pretrained(place).eval()
    masking = Masking(tokenizer, OPTIONS, seed=0)
    hits = tokens = 0
    loss = 0.0
    for number, line in enumerate((chain / "held.jsonl").read_text().splitlines()):
        row = masking.row(tokenizer(json.loads(line)["text"], truncation=True, max_length=128).input_ids, number)
        where = row["labels"] >= 0
        assert (row["input_ids"][where] == tokenizer.mask_token_id).all()
        with torch.no_grad():
            logits = model(input_ids=row["input_ids"][None]).logits[0][where]
        hits += int((logits.argmax(-1) == row["labels"][where]).sum())
        tokens += int(where.sum())
        loss += float(torch.nn.functional.cross_entropy(logits, row["labels"][where], reduction="sum"))
    found = tiny.scores(chain / "run")
    assert found["prose", "general", "masked_accuracy"] == pytest.approx(hits / tokens)
    assert found["prose", "general", "masked_perplexity"] == pytest.approx(np.exp(loss / tokens), rel=1e-4)
    assert found["prose", "general", "masked_perplexity"] < found["base", "general", "masked_perplexity"]


@pytest.mark.slow
@pytest.mark.long
def test_a_classifier_is_built_on_the_encoder_and_each_suite_is_scored_where_it_can_be(chain: Path) -> None:
    found = tiny.scores(chain / "run")
    assert {stage for stage, suite, _ in found if suite == "general"} == {"base", "prose", "more"}
    assert {stage for stage, suite, _ in found if suite == "kinds"} == {"kinds"}
    encoder = load_file(chain / "run/stages/more/merged/model.safetensors")
    place = chain / "run/stages/kinds/model"
    classifier = AutoModelForSequenceClassification.from_pretrained(place).state_dict()
    name = "bert.embeddings.LayerNorm.weight"
    assert (classifier[name] - encoder[name]).abs().max() < 0.1  # trained on from there, not from anew
    assert set(AutoTokenizer.from_pretrained(place).special_tokens_map) >= {"mask_token", "cls_token", "sep_token"}


@pytest.mark.slow
@pytest.mark.long
def test_an_adapter_for_masked_tokens_loads_by_plain_peft_and_is_its_merge(chain: Path) -> None:
    stage = chain / "run/stages/more"
    tokenizer = AutoTokenizer.from_pretrained(stage / "model")
    base = AutoModelForMaskedLM.from_pretrained(chain / "run/stages/prose/model")
    adapter = PeftModel.from_pretrained(base, stage / "model").eval()
    merged = AutoModelForMaskedLM.from_pretrained(stage / "merged").eval()
    ids = tokenizer("The fox sat by [MASK] hill", return_tensors="pt").input_ids
    assert tokenizer.mask_token_id in ids[0]
    with torch.no_grad():
        assert torch.allclose(adapter(ids).logits, merged(ids).logits, atol=1e-4)
    usage = Usage("me/x", "adapter", "more", base="org/base")
    card = model_card(usage, load_recipe(chain / "run/recipe.yaml"), chain / "run")
    assert "pipeline_tag: fill-mask" in card
    assert "AutoModelForMaskedLM" in card


@pytest.mark.slow
@pytest.mark.long
def test_interrupted_is_uninterrupted_and_two_ranks_are_one(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = written(tmp_path)
    path = tiny.write(tmp_path, content)
    write_manifest = checkpoints.write_manifest

    def and_stop(*arguments: Any) -> None:
        write_manifest(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "write_manifest", and_stop)
        assert main(["run", str(path)]) == 75
    shutil.copytree(tmp_path / "run", tmp_path / "two")
    assert main(["run", str(path)]) == 0
    one, again = weights(chain / "run"), weights(tmp_path / "run")
    assert one.keys() == again.keys()
    assert all(torch.equal(one[name], again[name]) for name in one)
    launch = ("accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml")
    process = tiny.start("run", str(path), "--set", f"output_dir={tmp_path / 'two'}", launch=launch)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert "continuing from checkpoint-" in output
    two = weights(tmp_path / "two")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
    found, expected = tiny.scores(tmp_path / "two"), tiny.scores(tmp_path / "run")
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts = ["The quick brown foxes jumped over unbelievably lazy dogs, twice.", "Schöne Grüße", "今天天气很好"] * 9
    return train_tokenizer(texts, 300, 128, task="masked")


def test_rows_are_hidden_alike_wherever_they_are_and_by_the_shares_of_the_paper(tokenizer: Any) -> None:
    text = "The quick brown foxes jumped over unbelievably lazy dogs, twice. " * 600
    frame = frame_of(tokenizer)
    row = frame.row(np.array(next(tokens_of_texts([text], tokenizer.backend_tokenizer, False))))
    first, same, other = (Masking(tokenizer, {}, 7).row(row, number) for number in (3, 3, 4))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["labels"], other["labels"])
    chosen = first["labels"] >= 0
    assert torch.equal(torch.where(chosen, first["labels"], first["input_ids"]), torch.from_numpy(row))
    masked = first["input_ids"][chosen] == tokenizer.mask_token_id
    kept = first["input_ids"][chosen] == first["labels"][chosen]
    assert float(chosen.float().mean()) == pytest.approx(0.15, abs=0.01)
    assert float(masked.float().mean()) == pytest.approx(0.8, abs=0.03)
    assert float(kept.float().mean()) == pytest.approx(0.1, abs=0.03)
    assert not chosen[0]
    assert not chosen[-1]


def test_whole_words_are_hidden_whole(tokenizer: Any) -> None:
    frame = frame_of(tokenizer, words=True)
    marked = np.array(
        next(tokens_of_texts(["unbelievably lazy, Grüße zebras xyzzy " * 40], tokenizer.backend_tokenizer, True))
    )
    row = Masking(tokenizer, {"whole_word_mask": True, "mlm_probability": 0.3}, 1).row(frame.row(marked), 0)
    chosen = (row["labels"][1:-1] >= 0).numpy()
    words = np.cumsum(marked >= WORD)
    assert 0.2 < chosen.mean() < 0.4
    for word in range(1, words[-1] + 1):
        assert len(set(chosen[words == word])) == 1
    assert max(np.bincount(words)) > 1


def test_every_token_of_a_document_is_in_a_row_between_cls_and_sep(tokenizer: Any) -> None:
    rows = Dataset.from_dict({"text": [f"{number} quick foxes" for number in range(40)]})
    stream = TokenStream(
        [rows], tokenizer, max_length=16, lanes=1, exhausted="stop", frame=frame_of(tokenizer), window_documents=7
    )
    served = [row for batch in stream.batches(1) for row in batch]
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert all(row["input_ids"][0] == begin and row["input_ids"][-1] == end for row in served)
    assert all(len(row["input_ids"]) == 16 for row in served[:-1])
    assert [row["number"] for row in served] == list(range(len(served)))
    body = np.concatenate([row["input_ids"][1:-1] for row in served]).tolist()
    texts = tokenizer.decode(body).split("[SEP]")
    assert sorted(text for text in texts if text) == sorted(rows["text"])


@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert", "distilbert", "electra", "deberta-v2"])
def test_encoders_from_nothing_take_rows_as_long_as_they_say(tokenizer: Any, model_type: str) -> None:
    names = {"distilbert": {"dim": 32, "n_heads": 2, "n_layers": 1, "hidden_dim": 32}}
    usual = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields = {"model_type": model_type, "max_position_embeddings": 24, **names.get(model_type, usual)}
    model = create_model(fields, tokenizer, seed=0).eval()
    longest = learned_positions(model) or 24
    assert model(input_ids=torch.full((1, longest), 7)).logits.shape == (1, longest, len(tokenizer))
    if model_type in ("bert", "roberta"):
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, longest + 1), 7))


def test_a_tokenizer_without_a_mask_is_refused(tokenizer: Any) -> None:
    with pytest.raises(RecipeError, match="needs a tokenizer with a mask token"):
        frame_of(train_tokenizer(["a few words"], 260, 64))


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"objective": "causal"}, 2, ["objective: the architecture bert is an encoder", "objective: masked"]),
        ({"masking": {"mlm_probabilty": 0.3}}, 2, ["Did you mean mlm_probability?"]),
        ({"masking": {"whole_word_mask": True, "mask_replace_prob": 0.5}}, 2, ["mask_replace_prob", "Remove it"]),
        ({"masking": {"mlm_probability": 1.5}}, 2, ["transformers refuses", "between 0 and 1"]),
        ({"mlm_probability": 0.3}, 2, ["It belongs below `masking:`"]),
        ({"max_length": 200}, 2, ["max_length is 200", "positions for 128"]),
        ({"metrics": ["masked_accuracy", "bits_per_byte"]}, 2, ["Make two suites"]),
        ({"after": "sft"}, 2, ["'prose' leaves an encoder", "trains a model of next tokens"]),
        ({"architecture": "llama"}, 2, ["llama is a model of next tokens", "objective: causal"]),
    ],
)
def test_a_mistake_gets_one_paragraph(
    change: dict, code: int, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = written(tmp_path)
    stage = content["stages"][0]
    if "max_length" in change:
        stage["training"]["max_length"] = change.pop("max_length")
    if "metrics" in change:
        content["evaluate"]["general"]["metrics"] = change.pop("metrics")
    if change.pop("after", None):
        content["stages"].append(tiny.recipe(tmp_path)["stages"][1])
    if "architecture" in change:
        content["model"] = tiny.recipe(tmp_path)["model"]
        del change["architecture"]
    stage |= change
    assert main(["run", str(tiny.write(tmp_path, content))]) == code
    message = "".join(capsys.readouterr())
    for word in words:
        assert word in message
    assert "Traceback" not in message
    if "transformers refuses" in words:
        assert "base: general" not in message  # before anything is scored


@pytest.mark.slow
@pytest.mark.long
def test_the_small_recipe_runs_to_a_score(tmp_path: Path) -> None:
    changes = {
        "output_dir": tmp_path / "run",
        "model.tokenizer.train.take": 300,
        "stages.prose.training.max_steps": 12,
        "stages.packages.training.max_steps": 3,
        "evaluate.general.data.take": 40,
        "evaluate.packages.data.take": 20,
    }
    options = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    assert main(["run", "recipes/masked-quickstart.yaml", *options]) == 0
    found = tiny.scores(tmp_path / "run")
    assert found["prose", "general", "masked_perplexity"] < found["base", "general", "masked_perplexity"]
    assert 0 <= found["packages", "packages", "accuracy"] <= 1


@pytest.mark.slow
@pytest.mark.long
def test_what_a_model_cannot_answer_is_not_asked_of_it(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(chain / "tiny.yaml")
    assert main(["evaluate", str(chain / "run/stages/prose/model"), path]) == 0
    said = capsys.readouterr().out
    assert "masked_accuracy" in said
    assert "not scored" in said
    text = tiny.write(chain, tiny.recipe(chain), "text.yaml")
    assert main(["evaluate", str(chain / "run/stages/prose/model"), str(text)]) == 2
    assert "it is a masked model" in capsys.readouterr().err
    assert main(["check", path]) == 0
    assert main(["preview", path, "--rows", "1"]) == 0
    assert "[MASK]" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.long
def test_a_checkpoint_without_the_head_gets_the_same_one_at_every_load(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = chain / "run/stages/prose/model"
    AutoModel.from_pretrained(place).save_pretrained(tmp_path / "body")
    AutoTokenizer.from_pretrained(place).save_pretrained(tmp_path / "body")
    ref = ModelRef(str(tmp_path / "body"), Model(id=str(tmp_path / "body")))
    one, again = (load_model(ref).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    content = written(tmp_path)
    content["model"] = {"id": str(tmp_path / "body")}
    content["stages"][0]["objective"] = "causal"
    for command in ("check", "run"):
        assert main([command, str(tiny.write(tmp_path, content))]) == 2
        message = capsys.readouterr().err
        assert "trains a causal language model" in message
        assert "objective: masked" in message
