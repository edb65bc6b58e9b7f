"""Small copies of models, on which an architecture is measured where its weights are not at hand."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hfpipe.model.create import small_copy


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
