"""Weights spread over ranks from the first byte: the same losses, scores and weights as on one rank."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from spreading import QUIET, SHIPPED, assert_same, labelled, run_on, shipped, sized, spread, steps, translated

from hfpipe.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_a_causal_chain_is_that_of_one_rank(tmp_path: Path) -> None:
    for place, ranks in (("one", 1), ("two", 2)):
        folder = tmp_path / place
        folder.mkdir()
        tiny.write_data(folder)
        path = tiny.write(folder, tiny.recipe(folder, energy=False))
        run_on(path, ranks)
    assert_same(tmp_path / "two" / "run", tmp_path / "one" / "run", ["prose", "sounds"])


@pytest.mark.parametrize("file", SHIPPED)
def test_a_shipped_plan_makes_what_one_rank_makes_and_is_continued_by_it(tmp_path: Path, file: str) -> None:
    """All weights, the best of them by a suite, an adapter beside the parent's texts; then more steps on one rank."""
    several, plan = shipped(file)
    for place, ranks in (("one", 1), ("several", several)):
        folder = tmp_path / place
        folder.mkdir()
        tiny.write_data(folder)
        run_on(tiny.write(folder, chosen_and_kept(folder)), ranks, plan)
    assert_same(tmp_path / "several" / "run", tmp_path / "one" / "run", ["prose", "best", "kept"])
    assert main(["run", str(steps(tmp_path / "long", 6))]) == 0
    for count, ranks in ((4, several), (6, 1)):
        run_on(steps(tmp_path / "other", count), ranks, plan)
    assert_same(tmp_path / "other" / "run", tmp_path / "long" / "run", ["prose"])


def chosen_and_kept(folder: Path) -> dict[str, Any]:
    """On tied embeddings of odd rows: all weights, the best by a suite, an adapter beside the parent's own texts."""
    content = tiny.recipe(folder, merge=False, **QUIET)
    content["model"]["architecture"]["tie_word_embeddings"] = True
    content["model"]["tokenizer"]["train"]["vocab_size"] = 321
    first, adapter = content["stages"]
    training = {"max_steps": 4, "learning_rate": "2e-3", "max_length": 64}
    first["samples"] = {"prompts": ["The cat said", "I heard a dog. It"], "every": 2, "max_new_tokens": 8}
    best = {"name": "best", "early_stopping": {"suite": "general"}, "training": training | {"eval_steps": 2}}
    kept = {"name": "kept", "keep": {"replay": {"rows": 8}}, "early_stopping": {"suite": "sounds"}}
    kept |= {"training": training | {"max_steps": 2, "eval_steps": 1}}
    content["stages"] = [first, {key: value for key, value in adapter.items() if key != "lora"} | best, adapter | kept]
    content["evaluate"]["sounds"]["metrics"] = ["bits_per_byte"]
    return content


@pytest.mark.parametrize("made", [labelled, chosen_and_kept, translated], ids=lambda made: made.__name__)
def test_every_kind_is_that_of_one_rank(tmp_path: Path, made: Any) -> None:
    for place, ranks in (("one", 1), ("two", 2)):
        folder = tmp_path / place
        folder.mkdir()
        tiny.write_data(folder)
        content = made(folder)
        path = tiny.write(folder, content)
        run_on(path, ranks)
    assert_same(tmp_path / "two" / "run", tmp_path / "one" / "run", [stage["name"] for stage in content["stages"]])


def kept_near(folder: Path, place: str, tied: bool, count: int = 4) -> Path:
    """Steps of three stages that are held near prose: by both words, by its weights alone, and beside an adapter."""
    content = tiny.recipe(folder, merge=False, output_dir=str(folder / place), **QUIET)
    content["model"]["architecture"]["tie_word_embeddings"] = tied
    prose, sounds = content["stages"]
    # AdamW whose steps follow the size of the gradients: else those that are nothing but rounding make full ones.
    plain = {"adam_epsilon": 1.0, "learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    plain |= {"max_steps": count, "save_steps": 2, "logging_steps": 1, "max_length": 64}
    plain |= {"per_device_train_batch_size": 1}  # micro-batches with and without a text of the parent's own
    held = {"parent": "prose", "global_batch_size": 8, "training": plain}
    kl, l2 = {"weight": 2.0}, {"weight": 0.5}
    asked = kl | ({"parent": "nf4"} if tied else {})
    few, many = {"share": "25%", "rows": 24}, {"share": "80%", "rows": 24}
    with_head = {"r": 4, "target_modules": ["q_proj", "lm_head"]}
    content["stages"] = [
        prose,
        {**prose, **held, "name": "near", "keep": {"replay": few, "kl": asked, "l2": l2}},
        {**prose, **held, "name": "drawn", "keep": {"l2": l2}},
        {**sounds, **held, "name": "beside", "keep": {"replay": many, "kl": kl}}
        if tied
        else {**prose, **held, "name": "beside", "keep": {"replay": few, "kl": kl}, "lora": with_head},
    ]
    for suite in content["evaluate"].values():
        suite["metrics"] = ["bits_per_byte"]
        suite["data"]["take"] = 8
    return tiny.write(folder, content, f"{place}.yaml")


@pytest.mark.parametrize(("tied", "policy"), [(False, "TRANSFORMER_BASED_WRAP"), (True, "NO_WRAP")])
def test_stages_held_near_their_parent_are_those_of_one_rank_and_continue_exactly(
    tmp_path: Path, tied: bool, policy: str
) -> None:
    tiny.write_data(tmp_path)
    assert main(["run", str(kept_near(tmp_path, "one", tied))]) == 0
    for place, counts in (("two", [4]), ("halves", [2, 4])):
        for name in ("base", "prose"):  # the parent is the same to the last bit, and so are its own texts
            shutil.copytree(tmp_path / "one/stages" / name, tmp_path / place / "stages" / name)
        for count in counts:
            said = spread(kept_near(tmp_path, place, tied, count), 2, FSDP_AUTO_WRAP_POLICY=policy)
            assert said.count("continuing from checkpoint-2") == (3 if place == "halves" and count == 4 else 0)
    held = ["near", "drawn", "beside"]
    assert_same(tmp_path / "two", tmp_path / "one", held)
    for stage in held:
        (file,) = (tmp_path / "two/stages" / stage / "model").glob("*.safetensors")
        found, again = (load_file(tmp_path / place / file.relative_to(tmp_path / "two")) for place in ("two", "halves"))
        assert all(torch.equal(found[name], again[name]) for name in found)


def beside(folder: Path, ranks: int, count: int) -> Path:
    """Steps of an adapter that trains embeddings, head and a norm beside it; embeddings alone where they are tied."""
    tiny.write_data(folder)
    content = tiny.recipe(folder, merge=False, output_dir=str(folder / str(ranks)), **QUIET)
    prose, sounds = content["stages"]
    words = {"max_steps": count, "save_steps": 2, "lr_scheduler_type": "constant", "logging_steps": 1}
    sounds["training"] |= words
    whole = {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}
    nested = {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}
    content["stages"] = [
        prose,
        {**sounds, "lora": sounds["lora"] | whole},
        {**sounds, "name": "nested", "parent": "prose", "lora": sounds["lora"] | nested},
    ]
    return tiny.write(folder, content, f"{ranks}.yaml")


def taken(folder: Path, ranks: int, count: int) -> Path:
    """Steps of adapters that are taken out of the weights of their base, the last of which is merged."""
    tiny.write_data(folder)
    content = tiny.recipe(folder, output_dir=str(folder / str(ranks)), **QUIET)
    prose, sounds = content["stages"]
    sounds["training"] |= {"max_steps": count, "save_steps": 2, "lr_scheduler_type": "constant", "logging_steps": 1}
    each: dict[str, dict[str, Any]] = {
        "pissa": {},
        "pissa_niter_4": {"modules_to_save": ["lm_head"]},
        "mica": {},
        "olora": {"use_dora": True},
    }
    content["stages"] = [
        prose,
        *(
            {**sounds, "name": name, "parent": "prose", "lora": sounds["lora"] | {"init_lora_weights": name} | more}
            for name, more in each.items()
        ),
    ]
    return tiny.write(folder, content, f"{ranks}.yaml")


def rows(folder: Path, ranks: int, count: int) -> Path:
    """Steps of all weights and of adapters on a base whose embeddings grow, and of rows that it has already."""
    base = folder / "made/stages/base/model"
    if not base.is_dir():
        tiny.write_data(folder)
        content = tiny.recipe(folder, merge=False, evaluate={}, output_dir=str(folder / "made"), **QUIET)
        content["stages"] = content["stages"][:1]
        assert main(["run", str(tiny.write(folder, content))]) == 0
    content = tiny.recipe(folder, output_dir=str(folder / str(ranks)), **QUIET)
    content["model"] = {"id": str(base), "tokenizer": {"add_tokens": ["cluck", "the barn"]}}
    (_, sounds), own = content["stages"], {"embed_tokens": [1, 5, 40], "lm_head": [1, 6]}
    sounds["training"] |= {"max_steps": count, "save_steps": 2, "lr_scheduler_type": "constant", "logging_steps": 1}
    content["stages"] = [
        {key: value for key, value in sounds.items() if key != "lora"} | {"name": "whole"},
        {**sounds, "name": "own", "parent": "base", "lora": sounds["lora"] | {"trainable_token_indices": own}},
        {**sounds, "name": "added", "parent": "base"},
        {**sounds, "name": "onto", "parent": "base", "lora": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}},
    ]
    return tiny.write(folder, content, f"{ranks}.yaml")


@pytest.mark.parametrize(("first", "second"), [(2, 4), (2, 1), (1, 2)])
@pytest.mark.parametrize("made", [beside, rows, taken], ids=lambda made: made.__name__)
def test_an_adapter_that_needs_whole_weights_is_that_of_one_rank(
    tmp_path: Path, made: Any, first: int, second: int
) -> None:
    """And a checkpoint of it is continued on other ranks."""
    assert main(["run", str(made(tmp_path, 0, 4))]) == 0
    for name in ("base", "prose") if made is not rows else ():
        shutil.copytree(tmp_path / "0/stages" / name, tmp_path / "9/stages" / name)
    stages = [each.name for each in (tmp_path / "0/stages").iterdir() if each.name not in ("base", "prose")]
    for ranks, count in ((first, 2), (second, 4)):
        path = made(tmp_path, 9, count)
        said = run_on(path, ranks)
        assert ranks == 1 or said.count("continuing from checkpoint-2") == (len(stages) if count == 4 else 0)
    assert_same(tmp_path / "9", tmp_path / "0", stages)


def test_an_adapter_taken_from_its_base_beside_own_texts_is_that_of_one_rank(tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    for place in ("one", "two"):
        content = tiny.recipe(tmp_path, output_dir=str(tmp_path / place), **QUIET)
        content["stages"][1] |= {"keep": {"replay": {"rows": 8}}}
        content["stages"][1]["lora"]["init_lora_weights"] = "pissa"
        path = tiny.write(tmp_path, content, f"{place}.yaml")
        run_on(path, 1 if place == "one" else 2)
        for name in ("base", "prose") if place == "one" else ():
            shutil.copytree(tmp_path / "one/stages" / name, tmp_path / "two/stages" / name)
    assert_same(tmp_path / "two", tmp_path / "one", ["sounds"])


STATELESS = {"optim": "sgd", "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10, "learning_rate": 1.0}


@pytest.mark.parametrize("training", [{}, STATELESS], ids=["adamw", "sgd"])
@pytest.mark.parametrize(("first", "second"), [(2, 4), (2, 1), (1, 2)])
def test_a_checkpoint_is_continued_on_other_ranks_and_without_fsdp(
    tmp_path: Path, first: int, second: int, training: dict[str, Any]
) -> None:
    assert main(["run", str(steps(tmp_path / "one", 6, **training))]) == 0
    for ranks, count in ((first, 4), (second, 6)):
        path = steps(tmp_path / "other", count, **training)
        run_on(path, ranks)
    assert_same(tmp_path / "other" / "run", tmp_path / "one" / "run", ["prose"])


def test_no_rank_ever_holds_more_than_its_part_and_a_layer(tmp_path: Path) -> None:
    """The peak beside that of a run on a model of nearly no size: scored, trained beside an adapter, saved, scored."""
    peaks = {}
    for hidden in (32, 320):
        folder = tmp_path / str(hidden)
        content = sized(folder, hidden)
        content["stages"][0]["training"] |= {"max_steps": 2, "activation_checkpointing": True}
        spread(tiny.write(folder, content), 4, PEAKS=str(folder / "peaks"))
        peaks[hidden] = [int(path.read_text()) for path in sorted((folder / "peaks").iterdir())]
    size = (tmp_path / "320" / "base" / "model.safetensors").stat().st_size
    assert size >= 200e6
    shares = [(large - small) / size for small, large in zip(peaks[32], peaks[320], strict=True)]
    print(shares)
    assert max(shares) <= 0.4
