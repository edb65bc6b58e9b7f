"""Weights spread over ranks from the first byte: the same losses, scores and weights as on one rank."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fsdp_on_cpu import FSDP, environment_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from hfpipe.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.long]
LAUNCHER = Path(__file__).parents[1] / "fsdp_on_cpu.py"
QUIET: dict[str, Any] = {"energy": False, "shift": False}


def spread(
    path: Path, ranks: int, *more: str, code: int = 0, plan: dict[str, str] | None = None, **environment: str
) -> str:
    """Runs a recipe under FSDP2 on CPU ranks; what they said."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    ended = subprocess.run(
        [*line, str(LAUNCHER), "run", str(path), *more],
        env=os.environ | FSDP | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (plan or {}) | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert (ended.returncode == 0) == (code == 0), ended.stdout
    return ended.stdout


def losses(run: Path, stage: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "stages" / stage / "log.jsonl").read_text().splitlines()]


def assert_same(run: Path, one: Path, stages: list[str]) -> None:
    for stage in stages:
        assert losses(run, stage) == pytest.approx(losses(one, stage), abs=1e-4)
        assert_same_weights(*(each / "stages" / stage / "model" for each in (run, one)))
    assert tiny.scores(run) == pytest.approx(tiny.scores(one), abs=2e-3)


def assert_same_weights(folder: Path, other: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in other.iterdir())
    for file in folder.glob("*.safetensors"):
        found, expected = load_file(file), load_file(other / file.name)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], atol=2e-4, rtol=1e-3, msg=f"{file} {name}")


def test_a_causal_chain_is_that_of_one_rank(tmp_path: Path) -> None:
    for place, ranks in (("one", 1), ("two", 2)):
        folder = tmp_path / place
        folder.mkdir()
        tiny.write_data(folder)
        path = tiny.write(folder, tiny.recipe(folder, energy=False))
        if ranks == 1:
            assert main(["run", str(path)]) == 0
        else:
            spread(path, ranks)
    assert_same(tmp_path / "two" / "run", tmp_path / "one" / "run", ["prose", "sounds"])


HYBRID = "--parallelism_config_dp_replicate_size", "2", "--parallelism_config_dp_shard_size", "2"


@pytest.mark.parametrize(
    ("file", "ranks", "words"),
    [("fsdp2_hybrid.yaml", 4, HYBRID), ("fsdp2_offload.yaml", 2, ())],
    ids=["hybrid", "offload"],
)
def test_a_shipped_plan_makes_what_one_rank_makes_and_is_continued_by_it(
    tmp_path: Path, file: str, ranks: int, words: tuple[str, ...]
) -> None:
    """All weights, the best of them by a suite, an adapter beside the parent's texts; then more steps on one rank."""
    plan = environment_of(file, "--num_processes", str(ranks), *words)
    plan |= {"ACCELERATE_USE_CPU": "true"}
    for place in ("one", "several"):
        folder = tmp_path / place
        folder.mkdir()
        tiny.write_data(folder)
        path = tiny.write(folder, chosen_and_kept(folder))
        if place == "one":
            assert main(["run", str(path)]) == 0
        else:
            spread(path, ranks, plan=plan)
    assert_same(tmp_path / "several" / "run", tmp_path / "one" / "run", ["prose", "best", "kept"])
    assert main(["run", str(steps(tmp_path / "long", 6))]) == 0
    for count in (4, 6):
        path = steps(tmp_path / "other", count)
        if count == 4:
            spread(path, ranks, plan=plan)
        else:
            assert main(["run", str(path)]) == 0
    assert_same(tmp_path / "other" / "run", tmp_path / "long" / "run", ["prose"])


def labelled(folder: Path) -> dict[str, Any]:
    """Three stages on an encoder from nothing: masked text, a head trained in full, and one beside an adapter."""
    content = tiny.recipe(folder, merge=False, energy=False)
    content["model"]["architecture"] = dict(tiny.ENCODER)
    source = {"path": "json", "data_files": str(folder / "sounds.jsonl"), "split": "train"}
    meaning = {"template": {"sentence": "{note}: the {animal}"}, "columns": {"label": "sound"}}
    training = {"num_train_epochs": 1, "learning_rate": "2e-3", "max_length": 64}
    kinds = {"kind": "classification", "data": [source | meaning], "global_batch_size": 16, "training": training}
    content["stages"] = [
        content["stages"][0] | {"objective": "masked"},
        kinds | {"name": "whole"},
        kinds | {"name": "beside", "parent": "prose", "lora": {"r": 4, "target_modules": "all-linear"}},
    ]
    held = {"path": "json", "data_files": str(folder / "held.jsonl"), "split": "train"}
    asked = {"path": "json", "data_files": str(folder / "asked.jsonl"), "split": "train"}
    content["evaluate"] = {
        "masked": {"data": held, "metrics": ["masked_accuracy"]},
        "kinds": {"data": asked | meaning, "metrics": ["accuracy"]},
    }
    return content


def chosen_and_kept(folder: Path) -> dict[str, Any]:
    """On tied embeddings of odd rows: all weights, the best by a suite, an adapter beside the parent's own texts."""
    content = tiny.recipe(folder, merge=False, **QUIET)
    content["model"]["architecture"]["tie_word_embeddings"] = True
    content["model"]["tokenizer"]["train"]["vocab_size"] = 321
    first, adapter = content["stages"]
    training = {"max_steps": 4, "learning_rate": "2e-3", "max_length": 64}
    best = {"name": "best", "early_stopping": {"suite": "general"}, "training": training | {"eval_steps": 2}}
    kept = {"name": "kept", "keep": {"replay": {"rows": 8}}, "training": training | {"max_steps": 2}}
    content["stages"] = [first, {key: value for key, value in adapter.items() if key != "lora"} | best, adapter | kept]
    content["evaluate"]["sounds"]["metrics"] = ["bits_per_byte"]
    return content


def translated(folder: Path) -> dict[str, Any]:
    """All weights of an encoder-decoder model from nothing, and an adapter on it."""
    content = tiny.recipe(folder, merge=False, **QUIET)
    sizes = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    content["model"]["architecture"] = {"model_type": "t5"} | sizes
    template = {"source": "{note}: {animal}", "target": "{sound}"}
    source = {"path": "json", "data_files": str(folder / "sounds.jsonl"), "split": "train", "template": template}
    training = {"max_steps": 4, "learning_rate": "2e-3", "max_length": 64}
    stage = {"kind": "translation", "data": [source], "global_batch_size": 16, "training": training}
    content["stages"] = [stage | {"name": "all"}, stage | {"name": "part", "lora": {"r": 4}}]
    asked = source | {"data_files": str(folder / "asked.jsonl")}
    content["evaluate"] = {"sounds": {"data": asked, "metrics": ["exact_match", "bits_per_byte"]}}
    return content


@pytest.mark.parametrize("made", [labelled, chosen_and_kept, translated], ids=lambda made: made.__name__)
def test_every_kind_is_that_of_one_rank(tmp_path: Path, made: Any) -> None:
    for place, ranks in (("one", 1), ("two", 2)):
        folder = tmp_path / place
        folder.mkdir()
        tiny.write_data(folder)
        content = made(folder)
        path = tiny.write(folder, content)
        if ranks == 1:
            assert main(["run", str(path)]) == 0
        else:
            spread(path, ranks)
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


def steps(folder: Path, count: int, **training: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tiny.write_data(folder)
    content = tiny.recipe(folder, merge=False, evaluate={}, **QUIET)
    content["stages"] = content["stages"][:1]
    training = {"max_steps": count, "lr_scheduler_type": "constant", "logging_steps": 1} | training
    content["stages"][0]["training"] |= training
    return tiny.write(folder, content)


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
        if ranks == 1:
            assert main(["run", str(path)]) == 0
        else:
            said = spread(path, ranks)
            assert said.count("continuing from checkpoint-2") == (len(stages) if count == 4 else 0)
    assert_same(tmp_path / "9", tmp_path / "0", stages)


def test_an_adapter_taken_from_weights_that_are_divided_later_is_that_of_one_rank(tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    for place in ("one", "two"):
        content = tiny.recipe(tmp_path, output_dir=str(tmp_path / place), **QUIET)
        content["stages"][1] |= {"keep": {"replay": {"rows": 8}}}
        content["stages"][1]["lora"]["init_lora_weights"] = "pissa"
        path = tiny.write(tmp_path, content, f"{place}.yaml")
        if place == "one":
            assert main(["run", str(path)]) == 0
            for name in ("base", "prose"):
                shutil.copytree(tmp_path / "one/stages" / name, tmp_path / "two/stages" / name)
        else:
            spread(path, 2)
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
        if ranks == 1:
            assert main(["run", str(path)]) == 0
        else:
            spread(path, ranks)
    assert_same(tmp_path / "other" / "run", tmp_path / "one" / "run", ["prose"])


def base(folder: Path, hidden: int) -> str:
    """A Llama with random weights and a tokenizer of a run from nothing; 0.3 GB at a hidden size of 320."""
    (folder / "made").mkdir(parents=True)
    tiny.write_data(folder / "made")
    content = tiny.recipe(folder / "made", merge=False, evaluate={}, **QUIET)
    content["stages"] = content["stages"][:1]
    content["stages"][0]["training"] |= {"max_steps": 1}
    assert main(["run", str(tiny.write(folder / "made", content))]) == 0
    made = folder / "made" / "run" / "stages" / "base" / "model"
    config = LlamaConfig.from_pretrained(
        made, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=48, num_attention_heads=4
    )
    config.num_key_value_heads, config.head_dim = 4, hidden // 4
    target = folder / "base"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    for file in made.glob("token*"):
        (target / file.name).write_bytes(file.read_bytes())
    return str(target)


def sized(folder: Path, hidden: int, adapter: bool = True) -> dict[str, Any]:
    """One stage, of an adapter or of all weights, and one small suite on a model of some size; makes `peaks` too."""
    (folder / "peaks").mkdir(parents=True)
    tiny.write_data(folder)
    content = tiny.recipe(folder, merge=False, **QUIET)
    content["model"] = {"id": base(folder, hidden)}
    stage, suite = content["stages"][adapter] | {"global_batch_size": 4}, content["evaluate"]["sounds"]
    if adapter:
        stage["lora"] = {"r": 2, "target_modules": ["q_proj"]}
    suite |= {"metrics": ["bits_per_byte"], "batch_size": 2}
    suite["data"]["take"] = 8
    return content | {"stages": [stage], "evaluate": {"sounds": suite}}


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
