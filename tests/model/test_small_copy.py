"""Small copies of models, on which an architecture is measured where its weights are not at hand."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hfpipe.data.stream.packing import isolation_leak
from hfpipe.model.create import FEW_WEIGHTS, small_copy


def test_a_small_copy_has_every_type_of_layer_and_its_own_weights() -> None:
    types = ["sliding_attention"] * 3 + ["full_attention"]
    words = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = AutoConfig.for_model("gemma3_text", **words, num_hidden_layers=8, layer_types=types * 2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    toy = small_copy(model)
    assert toy.config.layer_types == types
    assert toy.config.hidden_size == 32
    assert toy.device.type == "cpu"
    assert model.config.num_hidden_layers == 8, "the model itself stays as it was"


LARGE: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": (
        {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_key_value_heads": 8},
        True,
    ),
    "bloom": ({"hidden_size": 14336, "n_head": 112}, False),
}


@pytest.mark.parametrize("model_type", LARGE)
def test_a_model_with_very_wide_layers_is_measured_with_fewer_heads(model_type: str) -> None:
    """So that `check` tells of documents that see each other, as a run would of the model itself."""
    sizes, keeps_apart = LARGE[model_type]
    config = AutoConfig.for_model(model_type, num_hidden_layers=2, vocab_size=100, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    toy = small_copy(model)
    assert toy.num_parameters() <= FEW_WEIGHTS
    heads, width = toy.config.num_attention_heads, toy.config.hidden_size
    assert width // heads == config.hidden_size // config.num_attention_heads
    toy.config.use_cache = False
    assert (isolation_leak(toy) < 1e-3) is keeps_apart
