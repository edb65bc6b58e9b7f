"""Encoder-decoder models spread over ranks: what they learn, generate and save is what one rank makes of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from seq2seq_families import write_marian
from spreading import QUIET, assert_same, run_on, spread
from transformers import AutoModelForSeq2SeqLM, T5Config
from translating import written

from hfpipe.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.long]
# AdamW whose steps follow the size of the gradients: else those that are nothing but rounding make full ones.
PLAIN = {"adam_epsilon": 1.0, "learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
PLAIN |= {"logging_steps": 1}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A T5 and a Marian model that answer some rows; the embeddings of the T5 have an odd number of rows."""
    found = {}
    for family in ("t5", "marian"):
        folder = tmp_path_factory.mktemp(family)
        content = written(folder, merge=False, evaluate={}, **QUIET)
        if family == "marian":
            content["model"] = {"id": str(write_marian(folder) / "model")}
        else:
            content["model"]["tokenizer"]["train"]["vocab_size"] = 291
        assert main(["run", str(tiny.write(folder, content))]) == 0
        found[family] = folder / "run/stages/words/model"
    return found


def asked(folder: Path, place: str, base: Path) -> dict[str, Any]:
    """A recipe whose suites have few rows, so that ranks have different numbers of batches, or none."""
    content = written(folder, rows=60, merge=False, output_dir=str(folder / place), **QUIET)
    content["model"] = {"id": str(base)}
    sounds = content["evaluate"]["sounds"] | {"metrics": ["chrf", "exact_match", "bits_per_byte"], "batch_size": 2}
    rows = sounds["data"]
    content["evaluate"] = {
        "sounds": sounds | {"data": rows | {"take": 9}},
        "beams": sounds | {"metrics": ["chrf"], "generation": {"num_beams": 2}, "data": rows | {"take": 3}},
    }
    return content


def chain(folder: Path, place: str, base: Path) -> Path:
    """All weights, the best of them by what is generated, and an adapter; both are scored while they train."""
    content = asked(folder, place, base)
    (words,) = content["stages"]
    best = {
        "early_stopping": {"suite": "sounds", "metric": "chrf"},
        "training": PLAIN | {"max_steps": 4, "eval_steps": 2},
    }
    part = {"name": "part", "lora": {"r": 4}, "training": PLAIN | {"max_steps": 3}}
    content["stages"] = [words | best, words | part]
    content["evaluate"]["beams"]["every"] = 1
    return tiny.write(folder, content, f"{place}.yaml")


def said(run: Path) -> dict[str, list[Any]]:
    """Returns what was generated in each row, before and behind stages, and the scores while they were trained."""
    found: dict[str, list[Any]] = {}
    for path in run.glob("stages/*/predictions/*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(run))] = [row["generation"]["prediction"] for row in rows]
    for path in run.glob("stages/*/scores.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(run))] = [round(row["value"], 4) for row in rows]
    return found


@pytest.mark.parametrize(("family", "ranks"), [("t5", 2), ("t5", 4), ("marian", 4)])
def test_a_chain_is_that_of_one_rank(bases: dict[str, Path], tmp_path: Path, family: str, ranks: int) -> None:
    assert main(["run", str(chain(tmp_path, "one", bases[family]))]) == 0
    spread(chain(tmp_path, "many", bases[family]), ranks)
    assert_same(tmp_path / "many", tmp_path / "one", ["words", "part"])
    found = said(tmp_path / "many")
    assert found == said(tmp_path / "one")
    assert len(found) == 2 * 3 + 2
    assert len(set(found["stages/base/predictions/sounds.jsonl"])) > 3


def needing_whole_weights(folder: Path, place: str, base: Path, count: int) -> Path:
    """Steps of all weights and of adapters on a base whose embeddings grow, and of one that is taken from its base."""
    content = asked(folder, place, base)
    content["model"]["tokenizer"] = {"add_tokens": ["owl", "hoot", "barn"]}
    (words,) = content["stages"]
    training = PLAIN | {"max_steps": count, "save_steps": 2}
    words = words | {"parent": "base", "global_batch_size": 12, "training": training}
    whole = {"modules_to_save": ["embed_tokens", "lm_head"]}
    taken = {"init_lora_weights": "pissa", "modules_to_save": ["final_layer_norm"]}
    content["stages"] = [
        words | {"name": "grown"},
        words | {"name": "rows", "lora": {"r": 4, "target_modules": "all-linear"}},
        words | {"name": "whole", "lora": {"r": 4} | whole},
        words | {"name": "taken", "lora": {"r": 4} | taken},
    ]
    content["evaluate"]["sounds"]["metrics"] = ["bits_per_byte"]
    return tiny.write(folder, content, f"{place}.yaml")


@pytest.mark.parametrize(("family", "first", "second"), [("t5", 2, 4), ("t5", 1, 3), ("marian", 3, 1)])
def test_stages_that_need_whole_weights_are_those_of_one_rank_and_are_continued_on_others(
    bases: dict[str, Path], tmp_path: Path, family: str, first: int, second: int
) -> None:
    assert main(["run", str(needing_whole_weights(tmp_path, "one", bases[family], 4))]) == 0
    for ranks, count in ((first, 2), (second, 4)):
        path = needing_whole_weights(tmp_path, "many", bases[family], count)
        told = run_on(path, ranks)
        assert ranks == 1 or told.count("continuing from checkpoint-2") == (4 if count == 4 else 0)
    assert_same(tmp_path / "many", tmp_path / "one", ["grown", "rows", "whole", "taken"])


def sized(folder: Path, place: str, base: Path, width: int) -> Path:
    """A stage of an adapter on a T5 of 48 layers, which answers a suite in two beams; 0.25 GB at a width of 320."""
    content = asked(folder, place, folder / f"{place}-base")
    config = T5Config.from_pretrained(base, d_model=width, d_ff=4 * width, num_layers=24, num_heads=4, d_kv=width // 4)
    config.num_decoder_layers = 24
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder / f"{place}-base")
    for file in base.glob("token*"):
        shutil.copy(file, folder / f"{place}-base")
    (words,) = content["stages"]
    training = PLAIN | {"max_steps": 2, "activation_checkpointing": True}
    content["stages"] = [
        words | {"global_batch_size": 4, "lora": {"r": 2, "target_modules": ["q"]}, "training": training}
    ]
    content["evaluate"]["sounds"] |= {"metrics": ["bits_per_byte"]}
    content["evaluate"]["beams"] |= {"generation": {"num_beams": 2, "max_new_tokens": 4}}
    (folder / f"{place}-peaks").mkdir()
    return tiny.write(folder, content, f"{place}.yaml")


def test_no_rank_ever_holds_more_than_its_part_and_a_layer(bases: dict[str, Path], tmp_path: Path) -> None:
    """The peak beside that of a run on a model of nearly no size: generates, is trained and saved, generates again."""
    peaks = {}
    for place, width in (("small", 32), ("large", 320)):
        path = sized(tmp_path, place, bases["t5"], width)
        spread(path, 4, PEAKS=str(tmp_path / f"{place}-peaks"))
        peaks[place] = [int(file.read_text()) for file in sorted((tmp_path / f"{place}-peaks").iterdir())]
    size = (tmp_path / "large-base/model.safetensors").stat().st_size
    assert size >= 200e6
    shares = [(large - small) / size for small, large in zip(peaks["small"], peaks["large"], strict=True)]
    print(shares)
    assert max(shares) <= 0.4
