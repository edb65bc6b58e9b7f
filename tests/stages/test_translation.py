"""Encoder-decoder models through the command line: scores and files beside plain transformers, peft and sacrebleu."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import AutoPeftModelForSeq2SeqLM
from sacrebleu.metrics import BLEU, CHRF
from safetensors.torch import load_file
from seq2seq_families import letters, saved, sizes, write_marian
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    NllbTokenizer,
    set_seed,
)
from translating import T5, written

from hfpipe.cli import main
from hfpipe.hub.bundle import prepare_artifact
from hfpipe.model.seq2seq import encode_pairs, target_marks
from hfpipe.recipe import Push, load_recipe


def run(folder: Path, content: dict) -> Path:
    assert main(["run", str(tiny.write(folder, content))]) == 0
    return folder / "run"


def answers(run: Path, stage: str) -> list[dict]:
    lines = (run / "stages" / stage / "predictions" / "sounds.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def held_out(folder: Path) -> list[dict]:
    return [json.loads(line)["translation"] for line in (folder / "test.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of a T5 from nothing, trained in full, and an adapter after it."""
    folder = tmp_path_factory.mktemp("sounds")
    content = written(folder, merge=True)
    more = {"name": "more", "lora": {"r": 4}, "training": {"max_steps": 3, "learning_rate": "2e-3"}}
    content["stages"].append(content["stages"][0] | more)
    run(folder, content)
    return folder


@pytest.mark.slow
@pytest.mark.long
def test_scores_are_those_of_plain_transformers_and_sacrebleu(finished: Path) -> None:
    found, pairs = tiny.scores(finished / "run"), held_out(finished)
    assert found["base", "sounds", "exact_match"] == 0
    assert found["words", "sounds", "exact_match"] > 0.4  # machines that round otherwise end between 0.5 and 0.7
    tokenizer = AutoTokenizer.from_pretrained(finished / "run/stages/words/model")
    model = AutoModelForSeq2SeqLM.from_pretrained(finished / "run/stages/words/model").eval()
    said, bits, tokens = [], 0.0, 0
    longest = max(len(tokenizer(pair["de"])["input_ids"]) for pair in pairs)
    for pair in pairs:
        inputs = tokenizer(pair["en"], text_target=pair["de"], return_tensors="pt")
        with torch.no_grad():
            output = model.generate(input_ids=inputs["input_ids"], max_new_tokens=longest + 4, do_sample=False)
            logits = model(**inputs).logits[0].log_softmax(-1)
        labels = inputs["labels"][0]
        assert labels[-1] == tokenizer.eos_token_id
        bits -= float(logits[torch.arange(len(labels) - 1), labels[:-1]].sum()) / torch.log(torch.tensor(2.0)).item()
        tokens += len(labels) - 1
        said.append(tokenizer.decode(output[0], skip_special_tokens=True))
    assert [answer["generation"]["prediction"] for answer in answers(finished / "run", "words")] == said
    right = [pair["de"] for pair in pairs]
    for name, scorer in (("bleu", BLEU()), ("chrf", CHRF())):
        assert found["words", "sounds", name] == pytest.approx(scorer.corpus_score(said, [right]).score)
    assert found["words", "sounds", "bits_per_byte"] == pytest.approx(bits / sum(map(len, right)), rel=1e-4)
    assert found["words", "sounds", "perplexity"] == pytest.approx(2 ** (bits / tokens), rel=1e-4)


@pytest.mark.slow
@pytest.mark.long
def test_an_adapter_and_its_merge_say_the_same_to_plain_peft_and_transformers(finished: Path) -> None:
    stage = finished / "run/stages/more"
    assert json.loads((stage / "model/adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    adapter = AutoPeftModelForSeq2SeqLM.from_pretrained(stage / "model").eval()
    merged = AutoModelForSeq2SeqLM.from_pretrained(stage / "merged").eval()
    inputs = AutoTokenizer.from_pretrained(stage / "merged")("cat and dog", text_target="mew", return_tensors="pt")
    with torch.no_grad():
        trained, plain = adapter(**inputs).logits, merged(**inputs).logits
        with adapter.disable_adapter():
            base = adapter(**inputs).logits
    torch.testing.assert_close(trained, plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(trained, base, atol=1e-3)


@pytest.mark.slow
def test_an_adapter_on_a_base_in_four_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    content = written(tmp_path, rows=24, merge=True)
    content["stages"][0] |= {"lora": {"r": 4, "target_modules": "all-linear"}, "quantization": "nf4"}
    content["stages"][0]["training"] = {"max_steps": 3, "learning_rate": "2e-3"}
    content["evaluate"]["sounds"]["metrics"] = ["perplexity"]
    stage = run(tmp_path, content) / "stages/words"
    row = json.loads((stage / "merge.json").read_text())["suites"][0]
    assert row["merged"] == pytest.approx(row["adapter"], rel=0.01)
    assert not any("absmax" in name for name in load_file(stage / "merged/model.safetensors"))


@pytest.mark.slow
@pytest.mark.long
def test_the_card_says_what_it_is_for_and_how_it_is_loaded(finished: Path) -> None:
    folder = prepare_artifact(
        finished / "run", Push(repo_id="me/sounds", what="merged"), load_recipe(finished / "run/recipe.yaml")
    )
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: translation" in card
    assert "AutoModelForSeq2SeqLM.from_pretrained" in card
    assert "tok:13a" in card, "how BLEU was counted"
    assert "vllm" not in card


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, the last of them not full: 45 rows in global batches of 8."""
    folder = tmp_path_factory.mktemp("short")
    run(folder, few_steps(folder))
    return folder


def few_steps(folder: Path) -> dict:
    content = written(folder, rows=45)
    content["evaluate"]["sounds"]["metrics"] = ["bleu", "perplexity", "accuracy"]
    content["evaluate"]["sounds"]["choices"] = sorted({pair["de"] for pair in held_out(folder)})
    content["stages"][0]["training"] = {
        "num_train_epochs": 1,
        "learning_rate": "2e-3",
        "save_steps": 2,
        "label_smoothing_factor": 0.1,
    }
    return content


def assert_same(one: Path, other: Path, tolerance: float) -> None:
    first, second = (load_file(place / "run/stages/words/model/model.safetensors") for place in (one, other))
    assert first.keys() == second.keys()
    for name in first:
        assert (first[name] - second[name]).abs().max() <= tolerance, name


@pytest.mark.slow
def test_division_of_a_global_batch_does_not_matter(short: Path, tmp_path: Path) -> None:
    content = few_steps(tmp_path)
    content["stages"][0]["training"]["per_device_train_batch_size"] = 1
    run(tmp_path, content)
    assert_same(short, tmp_path, 2e-4)


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks_are_one_rank(short: Path, tmp_path: Path) -> None:
    path = tiny.write(tmp_path, few_steps(tmp_path))
    config = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu.yaml"
    process = tiny.start("run", str(path), launch=("accelerate.commands.launch", "--config_file", str(config)))
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert json.loads((tmp_path / "run/environment.json").read_text())["launch"]["processes"] == 2
    assert_same(short, tmp_path, 2e-4)
    assert tiny.scores(tmp_path / "run") == pytest.approx(tiny.scores(short / "run"), rel=1e-3)
    assert [row["row"] for row in answers(tmp_path / "run", "words")] == list(range(31))


@pytest.mark.slow
def test_interrupted_is_uninterrupted(short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.write(tmp_path, few_steps(tmp_path))
    stage = tmp_path / "run/stages/words"

    def interrupt() -> None:
        while not (stage / "checkpoint-2/manifest.json").exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # in case that the run is done first
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        assert main(["run", str(path)]) == 75
    finally:
        signal.signal(signal.SIGTERM, before)
    assert main(["run", str(path)]) == 0
    assert "continuing from checkpoint-" in capsys.readouterr().out
    assert_same(short, tmp_path, 0.0)


@pytest.mark.slow
def test_rows_that_are_cut_or_empty_are_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = written(tmp_path, rows=40, evaluate={})
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"translation": {"en": "cat", "de": " "}}) + "\n")
        file.write(json.dumps({"translation": {"en": None, "de": "mew"}}) + "\n")
    stage = content["stages"][0]
    stage["training"] = {"max_steps": 1, "max_length": 8, "max_target_length": 6}
    assert main(["run", str(tiny.write(tmp_path, content))]) == 5
    assert "2 of 42 rows read are dirty" in capsys.readouterr().err
    stage["max_dirty_share"] = 0.1
    run(tmp_path, content)
    told = capsys.readouterr().out
    assert re.search(r"40 pairs, \d+ of them cut to 8 tokens of source or 6 of target", told)


# The families, with tokenizers of a few letters.


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_marian(tmp_path_factory.mktemp("marian"))


def from_folder(folder: Path, model: Path, **languages: str) -> dict:
    content = written(folder, rows=40, model={"id": str(model)})
    content["stages"][0]["training"] = {"max_steps": 3, "learning_rate": "2e-3"}
    content["evaluate"]["sounds"]["metrics"] = ["exact_match", "perplexity"]
    for block in (content["stages"][0]["data"][0], content["evaluate"]["sounds"]["data"]):
        block.update(languages)
    return content


@pytest.mark.slow
def test_marian_is_trained_with_its_own_tokenizer(marian: Path, tmp_path: Path) -> None:
    content = from_folder(tmp_path, marian / "model")
    content["evaluate"]["sounds"]["generation"] = {"num_beams": 2}
    run(tmp_path, content)
    stage = tmp_path / "run/stages/words"
    assert answers(tmp_path / "run", "base")[0]["likelihood"]["tokens"] > 1
    assert tiny.scores(tmp_path / "run")["words", "sounds", "perplexity"] > 1
    recipe = load_recipe(tmp_path / "run/recipe.yaml")
    pushed = prepare_artifact(tmp_path / "run", Push(repo_id="me/marian", what="model"), recipe)
    assert {"source.spm", "target.spm", "vocab.json"} <= {file.name for file in pushed.iterdir()}
    tokenizer, model = AutoTokenizer.from_pretrained(pushed), AutoModelForSeq2SeqLM.from_pretrained(stage / "model")
    for pair, answer in zip(held_out(tmp_path)[:5], answers(tmp_path / "run", "words"), strict=False):
        ids = tokenizer(pair["en"], return_tensors="pt")["input_ids"]
        output = model.generate(input_ids=ids, num_beams=2, do_sample=False, max_new_tokens=31)
        assert tokenizer.decode(output[0], skip_special_tokens=True).startswith(answer["generation"]["prediction"][:8])


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_added_tokens_are_trained_for_encoder_and_decoder(whole: bool, marian: Path, tmp_path: Path) -> None:
    content = from_folder(tmp_path, marian / "model") | {"merge": True}
    content["model"]["tokenizer"] = {"add_tokens": ["owl", "hoot"]}
    content["stages"][0]["lora"] = {"r": 4, **({"modules_to_save": ["embed_tokens", "lm_head"]} if whole else {})}
    stage = run(tmp_path, content) / "stages/words"
    ids = AutoTokenizer.from_pretrained(stage / "model")("owl and owl", return_tensors="pt")["input_ids"]
    adapter = AutoPeftModelForSeq2SeqLM.from_pretrained(stage / "model").eval()
    merged = AutoModelForSeq2SeqLM.from_pretrained(stage / "merged")
    with torch.no_grad():
        found = [model(input_ids=ids, decoder_input_ids=ids).logits for model in (adapter, merged)]
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)
    sides = [merged.get_encoder().embed_tokens.weight, merged.get_decoder().embed_tokens.weight]
    assert torch.equal(*sides) is not whole
    for weight in sides:
        assert (weight[-1] - weight[:-2].mean(0)).abs().max() > 1e-4, "the row is where it began"


def test_embeddings_that_nothing_reads_are_not_trained(
    marian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = from_folder(tmp_path, marian / "model")
    content["stages"][0]["lora"] = {"r": 4, "modules_to_save": ["shared"]}
    assert main(["check", str(tiny.write(tmp_path, content))]) == 2
    message = capsys.readouterr().err
    assert "stages.words" in message
    assert "which the model reads as model.encoder.embed_tokens and model.decoder.embed_tokens too" in message
    assert "Write `modules_to_save: [embed_tokens]`, or train all weights" in message


@pytest.mark.slow
@pytest.mark.parametrize("family", ["nllb", "mbart", "mbart50", "m2m100"])
def test_language_codes_stand_where_each_family_has_them(family: str, marian: Path, tmp_path: Path) -> None:
    ids = {piece: place for place, piece in enumerate(letters("<s>", "<pad>", "</s>", "<unk>"))}
    pieces = [(piece, 0.0) for piece in ids]
    languages = {"src_lang": "en_XX", "tgt_lang": "de_DE"}
    if family == "nllb":
        languages = {"src_lang": "eng_Latn", "tgt_lang": "deu_Latn"}
        tokenizer: Any = NllbTokenizer(vocab=ids, merges=[], **languages)
    elif family == "m2m100":
        languages = {"src_lang": "en", "tgt_lang": "de"}
        tokenizer = M2M100Tokenizer(str(marian / "vocab.json"), str(marian / "pieces.model"), **languages)
    else:
        tokenizer = {"mbart": MBartTokenizer, "mbart50": MBart50Tokenizer}[family](vocab=pieces, **languages)
    target = tokenizer.convert_tokens_to_ids("__de__" if family == "m2m100" else languages["tgt_lang"])
    end = tokenizer.eos_token_id
    first = family == "mbart"  # its code stands behind the text, and turned round before the decoder's input
    assert target_marks(tokenizer) == (([], [end, target]) if first else ([target], [end]))
    pair = encode_pairs(tokenizer, ["a cat"], ["mew"], 32, 32)[0]
    assert pair.labels == tokenizer(text_target="mew")["input_ids"]
    assert [label for label, is_text in zip(pair.labels, pair.scored, strict=True) if is_text] == pair.labels[
        0 if first else 1 : -2 if first else -1
    ]

    set_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": end, "bos_token_id": tokenizer.bos_token_id}
    configs = {"mbart": MBartConfig, "mbart50": MBartConfig}
    special |= {"encoder_layerdrop": 1.0, "decoder_layerdrop": 1.0}  # every layer is trained nevertheless
    models = {"mbart": MBartForConditionalGeneration, "mbart50": MBartForConditionalGeneration}
    config = configs.get(family, M2M100Config)(
        **sizes(len(tokenizer) + 120 * (family == "m2m100")),
        **special,
        decoder_start_token_id=target if first else end,
        forced_eos_token_id=None,
    )
    saved(models.get(family, M2M100ForConditionalGeneration)(config), tokenizer, tmp_path / "base")
    run(tmp_path, from_folder(tmp_path, tmp_path / "base", **languages))
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run/stages/words/model")
    before = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    for one, other in zip(
        before.model.decoder.layers.parameters(), model.model.decoder.layers.parameters(), strict=True
    ):
        assert not torch.equal(one, other)
    plain = AutoTokenizer.from_pretrained(tmp_path / "base", **languages)
    inputs = plain(held_out(tmp_path)[0]["en"], return_tensors="pt")
    begins = {"decoder_start_token_id": target} if first else {"forced_bos_token_id": target}
    output = model.generate(**inputs, **begins, do_sample=False, max_new_tokens=31)
    said = answers(tmp_path / "run", "words")[0]["generation"]["prediction"]
    assert said in plain.decode(output[0])  # codes of languages that this model says in the middle are kept


def test_languages_that_are_missing_or_unknown_are_told(
    marian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = M2M100Tokenizer(str(marian / "vocab.json"), str(marian / "pieces.model"))
    config = M2M100Config(**sizes(len(tokenizer)), pad_token_id=tokenizer.pad_token_id, decoder_start_token_id=0)
    saved(M2M100ForConditionalGeneration(config), tokenizer, tmp_path / "base")
    cases: list[tuple[Path, dict[str, str], str]] = [
        (tmp_path / "base", {"src_lang": "en"}, "`tgt_lang` is missing"),
        (tmp_path / "base", {"src_lang": "en", "tgt_lang": "german"}, "none of the 100 languages"),
        (marian / "model", {"src_lang": "en", "tgt_lang": "de"}, "MarianTokenizer has none"),
    ]
    for model, languages, message in cases:
        content = from_folder(tmp_path, model, **languages)
        assert main(["run", str(tiny.write(tmp_path, content))]) == 2
        assert message in capsys.readouterr().err


PROMPTS = {"prompt": "{translation}", "completion": "{translation}"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": {"kind": "sft", "columns": {}}}, "Take `kind: translation`"),
        ({"stage": {"kind": "pretrain", "columns": {}}}, "Take `kind: translation`"),
        ({"architecture": {"model_type": "llama"}}, "Take `kind: sft`"),
        ({"training": {"predict_with_generat": True}}, "Did you mean predict_with_generate?"),
        ({"data": {"streaming": True}}, "add `take:`"),
        ({"data": {"columns": {}, "template": PROMPTS}}, "trained on `source` and `target`"),
        ({"data": {"columns": {"source": "a"}}}, "`source` is given without `target`"),
        ({"suite": {"columns": {}, "template": PROMPTS}}, "reads `source` and says `target`"),
        ({"stage": {"kind": "sft"}, "architecture": {"model_type": "llama"}}, "no stage is of `kind: translation`"),
        (
            {"stage": {"kind": "sft"}, "architecture": {"model_type": "llama"}, "data": {"src_lang": "en"}},
            "belongs to `kind: translation`",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, message: str
) -> None:
    content = written(tmp_path)
    stage = content["stages"][0]
    stage |= {key: value for key, value in change.get("stage", {}).items() if key != "columns"}
    stage["training"] |= change.get("training", {})
    stage["data"][0] |= change.get("data", {})
    content["evaluate"]["sounds"]["data"] |= change.get("suite", {})
    content["model"]["architecture"] = change.get("architecture", T5)
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    assert message in capsys.readouterr().err


def test_a_loaded_model_is_trained_for_what_it_is(
    marian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = tiny.recipe(tmp_path, model={"id": str(marian / "model")}, evaluate={}, merge=False)
    del content["stages"][0]
    tiny.write_data(tmp_path)
    assert main(["run", str(tiny.write(tmp_path, content))]) == 2
    assert "take kind: translation" in capsys.readouterr().err
