"""The linear loss and its gradients are those of plain logits, and it is left alone where it would not be."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from hfpipe.model.linear_loss import PIECE, linear_loss

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "vocab_size": 96, "max_position_embeddings": 512}
PLAIN: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 16},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "phi": {},  # its head has a bias
}
OTHER: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 0.5, "head_dim": 16},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
}


def made(type: str, fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(type, **(SIZES | fields))).eval()


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : length // 3] = -100
    labels[0, length // 2 : length // 2 + 3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def plain(model: Any, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), rows["labels"][:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("type", PLAIN)
def test_loss_and_gradients_are_those_of_plain_logits(type: str, adapter: bool) -> None:
    model = made(type, PLAIN[type])
    if adapter:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).eval()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    rows = batch(3, PIECE // 2 + 20)  # more trained tokens than a piece has
    found = linear_loss(model)
    assert found is not None
    loss = found(model, rows)
    expected = plain(model, rows)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    ours, theirs = gradients(model, loss), gradients(model, expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
    assert model(rows["input_ids"]).logits.shape[1] == rows["input_ids"].shape[1], "the model is left as it was"


@pytest.mark.parametrize("type", OTHER)
def test_logits_that_are_no_linear_layer_are_left_to_the_model(type: str) -> None:
    assert linear_loss(made(type, OTHER[type])) is None


def test_half_precision_and_changed_heads_are_left_to_the_model() -> None:
    assert linear_loss(made("llama", {}).bfloat16()) is None
    options = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    assert linear_loss(get_peft_model(made("llama", {}), options)) is None


def test_a_batch_without_a_trained_token_is_a_zero_with_a_gradient() -> None:
    model = made("llama", {})
    rows = batch(2, 12)
    rows["labels"][:] = -100
    found = linear_loss(model)
    assert found is not None
    loss = found(model, rows)
    assert loss.item() == 0
    assert not any(grad.any() for grad in gradients(model, loss).values())
