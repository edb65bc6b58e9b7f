"""A merge from 4 or 8 bits: of the base as it was trained on, to the bit, within memory, disk and a GPU's room."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from merging import TEXTS, most_memory, save_adapter
from peft import IA3Config, PeftModel, get_peft_model
from plain import make_encoder, make_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hfpipe.core.errors import MachineError, RecipeError
from hfpipe.model.create import train_tokenizer
from hfpipe.model.load import ModelRef, has_room, load_model, quantization_config
from hfpipe.model.merge import merge_adapter
from hfpipe.model.quantized import quantized_layers, write_quantized
from hfpipe.recipe import Model, Quantization

pytest.importorskip("bitsandbytes")
SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 8}
BLOCKS = {
    "nf4": {"type": "nf4"},
    "one statistic": {"type": "nf4", "bnb_4bit_use_double_quant": False},
    "stored as bfloat16": {"type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"type": "int8"},
}
HEAD = {"problem_type": "single_label_classification", "id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}


def block(**words: Any) -> Quantization:
    return Quantization.model_validate(words)


def llama(folder: Path, **sizes: Any) -> Any:
    """Writes a random Llama in bfloat16."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=300, **(SIZES | sizes)))
    base.to(torch.bfloat16).save_pretrained(folder)
    return base


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it lies in memory: packed weights may look like NaN, which is equal to nothing."""
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("family", ["llama", "tied", "gpt2", "bert"])
def test_the_base_in_files_is_the_one_that_was_trained_on_to_the_bit(family: str, kind: str, tmp_path: Path) -> None:
    """Layers, packed weights, statistics, precision, rows that were added, and so what it says."""
    place, head = tmp_path / "base", None
    if family == "gpt2":
        make_model(place, llama=False)
    elif family == "bert":
        make_encoder(place)
        head = HEAD | {"pad_token_id": 0}
    else:
        llama(place, hidden_size=64, intermediate_size=64, num_hidden_layers=2, tie_word_embeddings=family == "tied")
    skipped = {"llm_int8_skip_modules": ["o_proj", "lm_head"]} if family == "llama" else {}
    ref = ModelRef(str(place), Model(id="base"), quantization=block(**BLOCKS[kind], **skipped), vocabulary=330)
    dtype = "bfloat16" if family in ("llama", "tied") else "float32"
    stored = dataclasses.replace(ref, quantization=None, options=Model(id="base", dtype=dtype))
    torch.manual_seed(1)
    loaded = load_model(ref, head=head)
    written = write_quantized(ref, stored, tmp_path / "files", head)
    torch.manual_seed(1)  # of the new head
    mapped = load_model(written, head=head)
    assert quantized_layers(mapped).keys() == quantized_layers(loaded).keys() != set()
    expected, found = loaded.state_dict(), mapped.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(bits(found[name]), bits(tensor)), name
    ids = torch.randint(0, 300, (2, 9))
    assert torch.equal(mapped(input_ids=ids).logits, loaded(input_ids=ids).logits)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("kind", "in_files"), [("nf4", False), ("nf4", True), pytest.param("int8", False, marks=pytest.mark.long)]
)
def test_a_merge_of_a_quantized_base_is_pefts_on_the_rounded_weights_and_holds_a_layer(
    kind: str, in_files: bool, tmp_path: Path
) -> None:
    place, few = tmp_path / "base", block(type=kind)
    base = llama(place)
    save_adapter(base, place, tmp_path / "adapter", task_type="CAUSAL_LM")
    options = {"quantization_config": quantization_config(few, "causal"), "device_map": "cpu"}
    dtype = torch.bfloat16 if in_files else torch.float32  # that in which the weights are rounded
    quantized = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **options)
    if in_files:
        shutil.rmtree(place)
        quantized.save_pretrained(place)
    plain = PeftModel.from_pretrained(quantized.dequantize(dtype).to(torch.bfloat16), tmp_path / "adapter")
    expected = {name: tensor.clone() for name, tensor in plain.merge_and_unload(safe_merge=True).state_dict().items()}
    del base, quantized, plain
    ref = ModelRef(str(tmp_path / "adapter"), Model(id="base"), quantization=None if in_files else few)
    tokenizer = train_tokenizer(TEXTS, 300, 128)
    with most_memory() as most:
        found = merge_adapter(ref, tokenizer, tmp_path / "merged", TEXTS, 0.1)
    assert found.base == "dequantized"
    assert found.loss < 0.01
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]
    size = sum(tensor.nbytes for tensor in merged.values())
    assert most[0] < 0.6 * size  # quantized as transformers does it, it is more


@pytest.mark.parametrize(("dtype", "loss"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_quantized_files_with_transposed_weights_are_merged_as_they_lie(
    dtype: torch.dtype, loss: float, tmp_path: Path
) -> None:
    """In half precision all of the base is, also on a CPU: transformers would cast its biases and leave its weights."""
    place = make_model(tmp_path / "full", llama=False)
    few = quantization_config(block(type="nf4"), "causal")
    base = AutoModelForCausalLM.from_pretrained(place, quantization_config=few, dtype=dtype)
    base.save_pretrained(tmp_path / "base")
    options = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True}
    folder = save_adapter(
        AutoModelForCausalLM.from_pretrained(place), tmp_path / "base", tmp_path / "adapter", **options
    )
    tokenizer = AutoTokenizer.from_pretrained(place)
    found = merge_adapter(ModelRef(str(folder), Model(id="base")), tokenizer, tmp_path / "merged", TEXTS, 0.1)
    assert found.loss < loss
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "merged/model.safetensors").items()}
    assert shapes == {name: tensor.shape for name, tensor in load_file(place / "model.safetensors").items()}


@pytest.fixture
def adapter(tmp_path: Path) -> ModelRef:
    """A 4-bit adapter of a Llama of 2 layers."""
    base = llama(tmp_path / "base", hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    save_adapter(base, tmp_path / "base", tmp_path / "adapter", task_type="CAUSAL_LM", use_dora=True)
    return ModelRef(str(tmp_path / "adapter"), Model(id="base"), quantization=block(type="nf4"))


def test_another_method_than_lora_is_merged_into_quantized_files(adapter: ModelRef, tmp_path: Path) -> None:
    few = {"quantization_config": quantization_config(block(type="nf4"), "causal"), "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(tmp_path / "base", **few).save_pretrained(tmp_path / "few")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    words = {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"], "task_type": "CAUSAL_LM"}
    scaled = get_peft_model(base, IA3Config(init_ia3_weights=False, **words))
    scaled.peft_config["default"].base_model_name_or_path = str(tmp_path / "few")
    scaled.save_pretrained(tmp_path / "ia3")
    ref = ModelRef(str(tmp_path / "ia3"), Model(id="base"))
    found = merge_adapter(ref, train_tokenizer(TEXTS, 300, 128), tmp_path / "merged", TEXTS, 0.1)
    assert found.base == "dequantized"
    assert found.loss < 0.01


def test_a_merge_that_was_killed_is_made_anew(adapter: ModelRef, tmp_path: Path) -> None:
    left = tmp_path / ".merged.writing"
    (left / "quantized").mkdir(parents=True)
    (left / "quantized/model-00000.safetensors").write_bytes(b"half")
    (left / "model.safetensors").write_bytes(b"half")
    merge_adapter(adapter, train_tokenizer(TEXTS, 300, 128), tmp_path / "merged", TEXTS, 0.1)
    assert not left.exists()
    assert not (tmp_path / "merged/quantized").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize(
    ("free", "said"), [(1000, "the merged model"), (300_000, "the quantized base and the merged model")]
)
def test_a_disk_without_room_is_said_before_anything_is_written(
    adapter: ModelRef, free: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    with pytest.raises(
        MachineError, match=f"merging: {said} takes about .* GiB of disk, and .* free. Nothing was written"
    ):
        merge_adapter(adapter, train_tokenizer(TEXTS, 300, 128), tmp_path / "merged", TEXTS, 0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.filterwarnings("ignore:.*")
def test_a_bias_that_the_base_has_no_place_for_is_said(adapter: ModelRef, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    save_adapter(base, tmp_path / "base", tmp_path / "adapter", task_type="CAUSAL_LM", lora_bias=True)
    with pytest.raises(RecipeError, match=r"peft cannot merge the adapter in .*base layer has no bias"):
        merge_adapter(adapter, train_tokenizer(TEXTS, 300, 128), tmp_path / "merged", TEXTS, 0.1)


def test_a_model_goes_where_there_is_room_for_it_and_for_computing() -> None:
    gib = 2**30
    assert has_room(14 * gib, 24 * gib)  # a 7B model in half precision on a consumer's card
    assert not has_room(26 * gib, 24 * gib)
    assert not has_room(24 * gib, 24 * gib)  # it fits, and nothing beside it
    assert has_room(0, gib)
