"""A base in 4 bits that is spread over ranks from the first byte: the same losses, scores and adapters as on one."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from spreading import QUIET, SHIPPED, assert_same, labelled, run_on, shipped, sized, spread, translated

from hfpipe.cli import main
from hfpipe.core.files import read_json

pytestmark = [pytest.mark.slow, pytest.mark.long]
NF4 = {"type": "nf4", "bnb_4bit_quant_storage": "float32"}
STEPS = {"save_steps": 2, "lr_scheduler_type": "constant", "logging_steps": 1}


def adapters(folder: Path, place: str, count: int) -> Path:
    """Steps of adapters on one parent in 4 bits, with either form of its scales, and with all that PEFT adds."""
    content = tiny.recipe(folder, output_dir=str(folder / place), merge=False, **QUIET)
    prose, sounds = content["stages"]
    sounds |= {"parent": "prose", "training": sounds["training"] | STEPS | {"max_steps": count}}
    single = NF4 | {"bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": "bfloat16"}
    more: dict[str, dict[str, Any]] = {
        "dora": {"use_dora": True},
        "head": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
        "rows": {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [1, 6]}},
    }
    beside = [
        {**sounds, "name": name, "quantization": NF4, "lora": sounds["lora"] | words} for name, words in more.items()
    ]
    content["stages"] = [prose, sounds | {"quantization": single}, *beside]
    for suite in content["evaluate"].values():
        suite["data"]["take"] = 12
    return tiny.write(folder, content, f"{place}.yaml")


def stages_of(run: Path) -> list[str]:
    return [each.name for each in (run / "stages").iterdir() if each.name not in ("base", "prose")]


@pytest.mark.parametrize("counts", [(4, 2, 1), (1, 2)], ids=lambda counts: "-".join(map(str, counts)))
def test_adapters_are_those_of_one_rank_and_are_continued_on_other_ranks(
    tmp_path: Path, counts: tuple[int, ...]
) -> None:
    tiny.write_data(tmp_path)
    total = 2 * len(counts)
    assert main(["run", str(adapters(tmp_path, "one", total))]) == 0
    stages = stages_of(tmp_path / "one")
    for name in ("base", "prose"):
        shutil.copytree(tmp_path / "one/stages" / name, tmp_path / "other/stages" / name)
    for number, ranks in enumerate(counts):
        path = adapters(tmp_path, "other", 2 * (number + 1))
        said = run_on(path, ranks)
        assert ranks == 1 or said.count(f"continuing from checkpoint-{2 * number}") == (len(stages) if number else 0)
    assert_same(tmp_path / "other", tmp_path / "one", stages)


def encoder(folder: Path) -> dict[str, Any]:
    """A head beside an adapter of an encoder in 4 bits, whose linear layers have biases."""
    content = labelled(folder)
    content["stages"][2]["quantization"] = NF4
    content["stages"] = [content["stages"][0], content["stages"][2]]
    return content


def conv(folder: Path) -> dict[str, Any]:
    """Adapters of a GPT-2, whose weights lie on their side and whose head is tied: of texts, and near the parent."""
    content = tiny.recipe(folder, **QUIET)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}  # which depends on the ranks
    content["model"]["architecture"] = {"model_type": "gpt2"} | sizes | dropout
    prose, sounds = content["stages"]
    packed = {"name": "packed", "lora": {"r": 4}, "quantization": NF4}
    near = {"keep": {"replay": {"rows": 8}, "kl": {"weight": 2.0}}, "quantization": NF4, "parent": "prose"}
    content["stages"] = [prose, prose | packed, sounds | near]
    return content


def translating(folder: Path) -> dict[str, Any]:
    """An adapter of an encoder-decoder model, whose layers share embeddings with the head."""
    content = translated(folder)
    whole, part = content["stages"]
    content["stages"] = [whole | {"name": "prose"}, part | {"parent": "prose", "quantization": NF4}]
    return content


def grown(folder: Path) -> dict[str, Any]:
    """The best of an adapter by a suite, on a base in 4 bits whose embeddings grow for added tokens; merged."""
    base = folder / "made/stages/base/model"
    content = tiny.recipe(folder, merge=False, evaluate={}, output_dir=str(folder / "made"), **QUIET)
    content["stages"] = content["stages"][:1]
    assert main(["run", str(tiny.write(folder, content))]) == 0
    content = tiny.recipe(folder, **QUIET)
    content["model"] = {"id": str(base), "tokenizer": {"add_tokens": ["cluck", "the barn"]}}
    training = {"max_steps": 4, "eval_steps": 2, "learning_rate": "2e-3", "max_length": 64}
    best = {"early_stopping": {"suite": "general"}, "training": training}
    content["stages"] = [content["stages"][1] | best | {"quantization": NF4}]
    return content


@pytest.mark.parametrize("made", [encoder, conv, translating, grown], ids=lambda made: made.__name__)
def test_every_kind_is_that_of_one_rank(tmp_path: Path, made: Any) -> None:
    tiny.write_data(tmp_path)
    content = made(tmp_path)
    for place in ("one", "two"):
        path = tiny.write(tmp_path, content | {"output_dir": str(tmp_path / place)}, f"{place}.yaml")
        run_on(path, 1 if place == "one" else 2)
        for name in {"base", "prose"} & set(os.listdir(tmp_path / "one/stages")) if place == "one" else ():
            shutil.copytree(tmp_path / "one/stages" / name, tmp_path / "two/stages" / name)
    assert_same(tmp_path / "two", tmp_path / "one", stages_of(tmp_path / "one"))


@pytest.mark.parametrize("file", SHIPPED)
def test_a_shipped_plan_makes_what_one_rank_makes(tmp_path: Path, file: str) -> None:
    several, plan = shipped(file)
    tiny.write_data(tmp_path)
    for place in ("one", "several"):
        content = tiny.recipe(tmp_path, output_dir=str(tmp_path / place), **QUIET)
        content["stages"][1]["quantization"] = NF4
        path = tiny.write(tmp_path, content, f"{place}.yaml")
        run_on(path, 1 if place == "one" else several, plan)
        for name in ("base", "prose") if place == "one" else ():
            shutil.copytree(tmp_path / "one/stages" / name, tmp_path / "several/stages" / name)
    assert_same(tmp_path / "several", tmp_path / "one", ["sounds"])
    flops = [read_json(tmp_path / place / "stages/sounds/cost.json")["total"]["flops"] for place in ("one", "several")]
    assert flops[0] == flops[1]


def test_no_rank_ever_holds_more_than_its_part_and_a_layer(tmp_path: Path) -> None:
    """The peak beside that of a run on a model of nearly no size: scored, trained beside an adapter, saved, scored."""
    peaks = {}
    for hidden in (32, 320):
        folder = tmp_path / str(hidden)
        content = sized(folder, hidden)
        content["stages"][0]["training"] |= {"max_steps": 2, "activation_checkpointing": True}
        content["stages"][0]["quantization"] = NF4
        spread(tiny.write(folder, content), 4, PEAKS=str(folder / "peaks"))
        peaks[hidden] = [int(path.read_text()) for path in sorted((folder / "peaks").iterdir())]
    size = (tmp_path / "320" / "base" / "model.safetensors").stat().st_size
    assert size >= 200e6
    shares = [(large - small) / size for small, large in zip(peaks[32], peaks[320], strict=True)]
    print(shares)
    assert max(shares) <= 0.4
