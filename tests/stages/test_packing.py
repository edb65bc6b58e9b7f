"""Packed rows: gradients, steps, resume and ranks are as those of the examples alone."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hfpipe.cli import main
from hfpipe.data.dataloader import BatchLoader, ResumableSampler
from hfpipe.data.row_order import GroupedRows, PackedRows, count_rows
from hfpipe.data.text_tokens import IGNORED

CHANCE = np.random.default_rng(5)
SIZES = CHANCE.integers(2, 30, 41)
EXAMPLES = [{"input_ids": CHANCE.integers(3, 90, size), "labels": CHANCE.integers(3, 90, size)} for size in SIZES]
for one in EXAMPLES:
    one["labels"] = np.where(CHANCE.random(len(one["input_ids"])) < 0.5, one["input_ids"], IGNORED)
    one["labels"][0] = IGNORED


def sampler(packed: bool, per_device: int = 4, accumulation: int = 1, **more: Any) -> ResumableSampler:
    order = PackedRows(SIZES, 32, seed=3) if packed else None
    rows = order.epoch(0).rows if order else len(SIZES)
    return ResumableSampler(
        EXAMPLES,
        SIZES,
        total=more.pop("total", 2 * rows),
        per_device=per_device,
        accumulation=accumulation,
        seed=3,
        order=order,
        packed=packed,
        **more,
    )


def gradients(model: Any, packed: bool) -> list[torch.Tensor]:
    """The summed gradients of one epoch, by the loss of each trained token."""
    model.zero_grad()
    rows = PackedRows(SIZES, 32, seed=3).epoch(0).rows if packed else len(SIZES)
    for batch in BatchLoader(sampler(packed, total=rows), 4, 0):
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(
            logits.double(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        loss.backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_packed_gradient_is_the_sum_of_its_examples(kind: str, adapter: bool, attention: str) -> None:
    torch.manual_seed(0)
    if kind == "llama":
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=97, attn_implementation=attention, **size))
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64, attn_implementation=attention,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        )  # fmt: skip
    model = model.double()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        model = model.double()
    alone, packed = gradients(model, False), gradients(model, True)
    assert len(alone) == len(packed) > 0
    for one, other in zip(alone, packed, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_a_packed_gradient_of_an_adapter_on_four_bits_is_the_sum_of_its_examples(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=97, **size)).save_pretrained(tmp_path)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=four_bits, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    alone, packed = gradients(model, False), gradients(model, True)
    assert len(alone) == len(packed) > 0
    for one, other in zip(alone, packed, strict=True):
        assert (one - other).norm() < 1e-5 * one.norm()  # in float32


@pytest.mark.parametrize("packed", [False, True])
def test_every_example_is_given_once_an_epoch_and_none_is_cut(packed: bool) -> None:
    source = sampler(packed)
    rows = [row for batch in source.batches(4) for row in batch if not row.get("is_padding")]
    given = np.concatenate([row["input_ids"] for row in rows])
    assert len(given) == 2 * SIZES.sum()
    if packed:
        assert all(len(row["input_ids"]) <= 32 for row in rows)
        begins = sum(int((row["position_ids"] == 0).sum()) for row in rows)
        assert begins == 2 * len(SIZES)
    assert source.facts()["epochs"] == pytest.approx(2)


@pytest.mark.parametrize("packed", [False, True])
def test_division_and_resume_change_no_global_batch(packed: bool) -> None:
    def steps(per_device: int, accumulation: int, ranks: int, skip: int = 0) -> list[list[list[int]]]:
        given = []
        for rank in range(ranks):
            source = sampler(packed, per_device, accumulation, rank=rank, ranks=ranks)
            source.load_state_dict({"progress": 4 * skip})
            given.append(list(source.batches(per_device)))
        return [
            sorted(
                list(map(int, row["input_ids"]))
                for batches in given
                for batch in batches[start : start + accumulation]
                for row in batch
                if not row.get("is_padding")
            )
            for start in range(0, len(given[0]), accumulation)
        ]

    whole = steps(4, 1, 1)
    assert steps(1, 4, 1) == steps(2, 1, 2) == steps(1, 2, 2) == whole
    for skip in range(len(whole)):
        assert steps(2, 2, 1, skip) == whole[skip:]


def test_rows_of_a_step_are_of_like_length_and_each_comes_once() -> None:
    sizes = np.random.default_rng(0).integers(20, 500, 3001)
    order = GroupedRows(sizes, 8, seed=1)
    sequence = np.concatenate([order.epoch(number).examples for number in range(3)])
    for number in range(3):
        assert sorted(sequence[3001 * number : 3001 * (number + 1)]) == list(range(3001))
    assert not np.array_equal(sequence[:3001], sequence[3001:6002])
    steps = sizes[sequence[: len(sequence) // 8 * 8]].reshape(-1, 8)
    assert 1 - steps.sum() / (8 * steps.max(axis=1)).sum() < 0.03
    packed = PackedRows(sizes, 512, seed=1)
    assert 1 - sizes.sum() / (512 * packed.epoch(0).rows) < 0.03
    assert count_rows(packed, 2.0) == packed.epoch(0).rows + packed.epoch(1).rows


def recipe(folder: Path, output: str, **training: Any) -> Path:
    tiny.write_data(folder)
    content = tiny.recipe(folder, merge=False, evaluate={}, output_dir=str(folder / output))
    stage = content["stages"][1]
    stage["training"] = {**stage["training"], "packing": True, "num_train_epochs": 4, "save_steps": 2, **training}
    content["stages"] = [{**stage, "global_batch_size": 4}]
    return tiny.write(folder, content, f"{output}.yaml")


def weights(folder: Path, output: str) -> dict[str, torch.Tensor]:
    return load_file(folder / output / "stages/sounds/model/adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.long
def test_a_packed_stage_is_the_same_interrupted_divided_and_on_two_ranks(tmp_path: Path) -> None:
    assert main(["run", str(recipe(tmp_path, "whole"))]) == 0
    done = json.loads((tmp_path / "whole/stages/sounds/done.json").read_text())
    assert done["data"]["epochs"] == pytest.approx(4)
    assert 4 * done["steps"] < 97 * 4 / 2  # a row holds several examples
    assert main(["run", str(recipe(tmp_path, "divided", per_device_train_batch_size=1))]) == 0
    stopped = tiny.start("run", str(recipe(tmp_path, "stopped")))
    while stopped.poll() is None and not list((tmp_path / "stopped/stages/sounds").glob("checkpoint-*/manifest.json")):
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    said = stopped.communicate()[0]
    assert stopped.returncode in (0, 75), said
    assert main(["run", str(tmp_path / "stopped.yaml")]) == 0
    launch = ("accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml")
    both = tiny.start("run", str(recipe(tmp_path, "ranks")), launch=launch)
    said = both.communicate(timeout=300)[0]
    assert both.returncode == 0, said
    whole = weights(tmp_path, "whole")
    for other in ("divided", "stopped", "ranks"):
        found = weights(tmp_path, other)
        exact = other == "stopped"
        for name, weight in whole.items():
            torch.testing.assert_close(found[name], weight, atol=0 if exact else 1e-5, rtol=0 if exact else 1e-4)


@pytest.mark.slow
def test_a_model_that_cannot_keep_examples_apart_is_trained_unpacked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, "bloom", max_steps=2)
    architecture = "architecture: {model_type: bloom, hidden_size: 32, n_layer: 1, n_head: 2}"
    lines = path.read_text().splitlines()
    begin = next(place for place, line in enumerate(lines) if "architecture:" in line)
    end = next(place for place, line in enumerate(lines) if "tokenizer:" in line)
    path.write_text("\n".join([*lines[:begin], f"  {architecture}", *lines[end:]]) + "\n")
    assert main(["run", str(path)]) == 0
    assert "does not keep the examples of a row apart" in capsys.readouterr().out


@pytest.mark.slow
def test_tokens_are_made_once_and_prepared_without_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = str(recipe(tmp_path, "run", max_steps=2))
    assert main(["prepare", path]) == 0
    assert "97 rows" in (said := capsys.readouterr().out)
    assert "tokenized before" not in said
    assert not list((tmp_path / "run").rglob("adapter_model.safetensors"))
    (file,) = (tmp_path / "cache/hfpipe-tokens").glob("*.arrow")
    assert main(["run", path]) == 0
    assert "tokenized before" in capsys.readouterr().out
    again = tmp_path / "sounds.jsonl"
    again.write_text(again.read_text().replace("hoot", "whoo"))  # other rows, other tokens
    assert main(["run", path, "--set", f"output_dir={tmp_path / 'other'}"]) == 0
    assert "tokenized before" not in capsys.readouterr().out
    assert len(list(file.parent.glob("*.arrow"))) == 2
