"""Tokens that a recipe adds: their embeddings are trained, saved with an adapter, merged, and load in plain PEFT."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfpipe.cli import main

WORDS, MARK = ["bark", "moo", "cluck"], "<|call|>"
STEPS = {"max_steps": 4, "learning_rate": 0.02, "max_length": 64, "save_strategy": "no", "warmup_steps": 0}
TEMPLATE = "{% for message in messages %}<|user|>{{ message.content }}[INST]<|call|>{% endfor %}"


def grown(folder: Path, base: Path) -> dict:
    """A LoRA stage, the same in 4 bits with whole embeddings, and full training, on a base that lacks three words."""
    content = tiny.recipe(folder, merge=True, shift=False, energy=False)
    content["model"] = {"id": str(base), "tokenizer": {"add_tokens": WORDS, "add_special_tokens": [MARK]}}
    prose, sounds = content["stages"]
    sounds = sounds | {"parent": "base", "training": STEPS}
    whole = sounds["lora"] | {"modules_to_save": ["embed_tokens", "lm_head"]}
    content["stages"] = [
        prose | {"name": "full", "parent": "base"},
        sounds | {"name": "whole", "lora": whole, "quantization": "nf4"},
        sounds | {"name": "rows"},
    ]
    content["evaluate"] = {"sounds": content["evaluate"]["sounds"] | {"metrics": ["bits_per_byte"]}}
    return content


@pytest.fixture(scope="module", params=[True, pytest.param(False, marks=pytest.mark.long)], ids=["tied", "untied"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    tiny.write_data(folder)
    base = tiny.recipe(folder, merge=False, shift=False, energy=False, evaluate={}, output_dir=str(folder / "start"))
    base["model"]["architecture"]["tie_word_embeddings"] = request.param
    base["stages"] = [base["stages"][0] | {"training": base["stages"][0]["training"] | {"max_steps": 1}}]
    assert main(["run", str(tiny.write(folder, base))]) == 0
    content = grown(folder, folder / "start/stages/prose/model")
    assert main(["run", str(tiny.write(folder, content))]) == 0
    return folder


@pytest.mark.slow
def test_every_word_is_one_token_in_everything_that_is_saved(trained: Path) -> None:
    for name in ("full", "whole", "rows"):
        tokenizer = AutoTokenizer.from_pretrained(trained / "run/stages" / name / "model")
        for word in (*WORDS, MARK):
            assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
        ids = tokenizer(f"a {MARK}moo")["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "a moo"


@pytest.mark.slow
def test_an_adapter_holds_the_new_rows_alone_and_has_trained_them(trained: Path) -> None:
    folder = trained / "run/stages/rows/model"
    tensors = load_file(folder / "adapter_model.safetensors")
    rows = {name: tensor for name, tensor in tensors.items() if "lora" not in name}
    tied = json.loads((trained / "start/stages/prose/model/config.json").read_text())["tie_word_embeddings"]
    assert len(rows) == (1 if tied else 2)
    base = AutoModelForCausalLM.from_pretrained(trained / "start/stages/prose/model", dtype=torch.float32)
    mean = base.get_input_embeddings().weight.detach().mean(0)
    for name, tensor in rows.items():
        assert tensor.shape == (len(WORDS) + 1, base.config.hidden_size)
        moved = (tensor[:-1] - (mean if "embed" in name else base.lm_head.weight.detach().mean(0))).abs().amax(1)
        assert (moved > 0.01).all(), "a row is where it began"


@pytest.mark.slow
def test_whole_embeddings_are_saved_once(trained: Path) -> None:
    tensors = load_file(trained / "run/stages/whole/model/adapter_model.safetensors")
    assert sum("lora" not in name for name in tensors) == 2


@pytest.mark.slow
def test_plain_peft_loads_what_was_trained(trained: Path) -> None:
    from hfpipe.model.load import ModelRef, load_model
    from hfpipe.recipe import load_recipe

    folder = trained / "run/stages/rows/model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(f"what does the dog say? {MARK} bark", return_tensors="pt")["input_ids"]
    ref = ModelRef(str(folder), load_recipe(trained / "run/recipe.yaml").model, vocabulary=len(tokenizer))
    base = AutoModelForCausalLM.from_pretrained(trained / "start/stages/prose/model", dtype=torch.float32)
    base.resize_token_embeddings(len(tokenizer))
    loaded = {
        "by hand": PeftModel.from_pretrained(base, folder),
        "by AutoPeft": AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        "merged": AutoModelForCausalLM.from_pretrained(folder.parent / "merged", dtype=torch.float32),
    }
    with torch.no_grad():
        ours = load_model(ref)(ids).logits
        for name, model in loaded.items():
            torch.testing.assert_close(model.eval()(ids).logits, ours, atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
def test_tokens_are_learned_by_every_way_of_training(trained: Path) -> None:
    found = tiny.scores(trained / "run")
    for name in ("rows", "whole"):
        assert found[name, "sounds", "bits_per_byte"] < found["base", "sounds", "bits_per_byte"] - 0.1
    model = AutoModelForCausalLM.from_pretrained(trained / "run/stages/full/model")
    assert model.config.vocab_size == 320 + len(WORDS) + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft": {"type": "ia3"}}, "'ia3' does not train the embeddings of tokens that `model.tokenizer.add_tokens`"),
        ({"add_tokens": [""]}, "add_tokens"),
        ({"add_token": ["x"]}, "Did you mean add_tokens?"),
    ],
)
def test_tokens_that_would_not_be_trained_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, message: str
) -> None:
    content = grown(tmp_path, tmp_path)
    if "peft" in change:
        del content["stages"][2]["lora"]
        content["stages"][2] |= change
    else:
        content["model"]["tokenizer"] |= change
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_marks_of_a_chat_template_that_are_no_tokens_are_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = grown(trained, trained / "start/stages/prose/model")
    content["model"]["tokenizer"]["chat_template"] = TEMPLATE
    assert main(["check", str(tiny.write(tmp_path, content))]) == 0
    output = capsys.readouterr().out
    assert 'writes "<|user|>", "[INST]", which the tokenizer does not know' in output
    assert 'add_special_tokens: ["<|user|>", "[INST]"]' in output
