"""Adapters of every kind: trained by a recipe, saved, verified, and loaded by plain PEFT on the base as it came."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from hfpipe.cli import main
from hfpipe.model.adapter import difference, verify_tensors

ADAPTERS = {
    "pissa": {"lora": {"r": 4, "init_lora_weights": "pissa", "use_rslora": True}},
    "olora": {"lora": {"r": 4, "init_lora_weights": "olora", "modules_to_save": ["lm_head"], "use_dora": True}},
    "dora": {"lora": {"r": 4, "use_dora": True, "use_rslora": True, "trainable_token_indices": [1, 2]}},
    "ia3": {"peft": {"type": "ia3"}},
    "oft": {"peft": {"type": "oft", "r": 8, "oft_block_size": 0, "target_modules": "all-linear"}},
    "vera": {"peft": {"type": "vera", "r": 8, "target_modules": ["q_proj"]}},
    "prompt": {"peft": {"type": "prompt_tuning", "num_virtual_tokens": 4}},
}
# In a process that has never seen hfpipe: the logits of every adapter on the base, with and without it.
LOAD = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

run, names, ids = sys.argv[1], sys.argv[2].split(","), torch.arange(5, 25)[None]
found = {}
for name in names:
    base = AutoModelForCausalLM.from_pretrained(f"{run}/stages/base/model", dtype=torch.float32)
    with torch.no_grad():
        found["base"] = base(ids).logits
        found[name] = PeftModel.from_pretrained(base, f"{run}/stages/{name}/model").eval()(ids).logits[:, -20:]
torch.save(found, f"{run}/plain.pt")
assert not [name for name in sys.modules if name.startswith("hfpipe")]
"""


def stage(folder: Path, name: str, **changes: object) -> dict:
    """Three steps from the base on the animals' sounds."""
    sft = tiny.recipe(folder)["stages"][1]
    del sft["lora"]
    training = {"max_steps": 3, "learning_rate": 0.02, "max_length": 64, "save_strategy": "no", "warmup_steps": 0}
    return sft | {"name": name, "parent": "base", "training": training} | changes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a recipe with a stage for every adapter; what each run of a suite gave is in the scorecard."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny.write_data(folder)
    content = tiny.recipe(folder, merge=False, shift=False, energy=False)
    head = {"name": "head", "parent": "base", "lora": {"r": 4, "target_modules": ["q_proj", "lm_head"]}}
    content["stages"] = [content["stages"][0] | head]  # TRL trains no adapter on a head
    content["stages"] += [stage(folder, name, **block) for name, block in ADAPTERS.items()]
    content["evaluate"] = {"sounds": content["evaluate"]["sounds"] | {"metrics": ["bits_per_byte"]}}
    assert main(["run", str(tiny.write(folder, content))]) == 0
    return folder / "run"


@pytest.mark.slow
@pytest.mark.long
def test_plain_peft_loads_every_adapter_on_the_base_as_it_came(trained: Path) -> None:
    from hfpipe.model.load import ModelRef, load_model
    from hfpipe.recipe import load_recipe

    command = [sys.executable, "-c", LOAD, str(trained), ",".join(ADAPTERS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plain, ids = torch.load(trained / "plain.pt"), torch.arange(5, 25)[None]
    options = load_recipe(trained / "recipe.yaml").model
    for name in ADAPTERS:
        with torch.no_grad():
            ours = load_model(ModelRef(str(trained / "stages" / name / "model"), options))(ids).logits[:, -20:]
        torch.testing.assert_close(plain[name], ours, atol=1e-5, rtol=0)
        assert (plain[name] - plain["base"]).abs().max() > 1e-4, f"{name} has learned nothing"


@pytest.mark.slow
@pytest.mark.long
def test_an_adapter_on_the_head_carries_no_weight_of_the_base(trained: Path) -> None:
    tensors = load_file(trained / "stages/head/model/adapter_model.safetensors")
    assert any("lm_head" in name for name in tensors)
    assert all("lora_" in name for name in tensors)


@pytest.mark.slow
@pytest.mark.long
def test_every_adapter_lowers_the_loss_and_is_scored(trained: Path) -> None:
    found = tiny.scores(trained)
    for name in ADAPTERS:
        if name not in ("vera", "prompt", "ia3"):  # which move little in three steps
            assert found[name, "sounds", "bits_per_byte"] < found["base", "sounds", "bits_per_byte"] - 0.01, name


@pytest.mark.slow
@pytest.mark.long
def test_a_4_bit_base_is_the_same_after_an_evaluation_for_dora_and_for_gradients(trained: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from hfpipe.model.adapter import add_adapter
    from hfpipe.model.load import ModelRef, load_model
    from hfpipe.recipe import Quantization, load_recipe

    options, ids = load_recipe(trained / "recipe.yaml").model, torch.arange(5, 25)[None]
    nf4 = Quantization.model_validate({"type": "nf4"})
    base = load_model(ModelRef(str(trained / "stages/base/model"), options, quantization=nf4))
    model = add_adapter(base, {"type": "lora", "r": 4, "use_dora": True, "init_lora_weights": False}, 0)
    found = []
    for _ in range(2):
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        with torch.no_grad():
            found.append((model.eval()(ids).logits, grads))
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(before, after)


@pytest.mark.slow
@pytest.mark.long
def test_what_was_taken_from_the_base_is_in_the_adapter_at_twice_its_rank(trained: Path) -> None:
    for name, more in (("pissa", set()), ("olora", {"magnitude", "lm_head"})):
        folder = trained / "stages" / name / "model"
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        assert (config["r"], config["init_lora_weights"]) == (8, True)
        assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {8}
        assert all(any(word in key for key in tensors) for word in more), "PEFT's own conversion leaves these out"


@pytest.mark.slow
@pytest.mark.long
def test_a_saved_adapter_that_is_not_the_trained_one_is_an_error(trained: Path, tmp_path: Path) -> None:
    whole = load_file(trained / "stages" / "dora" / "model" / "adapter_model.safetensors")
    first = next(name for name in whole if "lora_B" in name)
    other = {**whole, first: torch.zeros_like(whole[first])}
    faults = {
        "lacks": {name: tensor for name, tensor in whole.items() if name != first},
        "has others": whole | {"more.weight": torch.ones(1)},
        "not what was trained": other,
        "not finite": {**whole, first: whole[first] * float("nan")},
    }
    verify_tensors(trained / "stages" / "dora" / "model", whole)
    for message, tensors in faults.items():
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(RuntimeError, match=message):
            verify_tensors(tmp_path, whole)


@pytest.mark.slow
def test_a_fault_of_the_disk_ends_the_run_and_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    save = PeftModel.save_pretrained

    def loses_a_tensor(self: PeftModel, folder: str, **options: object) -> None:
        save(self, folder, **options)
        file = Path(folder) / "adapter_model.safetensors"
        if file.exists():
            tensors = load_file(file)
            tensors.popitem()
            save_file(tensors, file)

    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, merge=False, evaluate={})
    content["stages"] = [stage(tmp_path, "lost", lora={"r": 4})]
    path = tiny.write(tmp_path, content)
    with monkeypatch.context() as patched:
        patched.setattr(PeftModel, "save_pretrained", loses_a_tensor)
        assert main(["run", str(path)]) == 1
    assert "the adapter lacks tensors" in capsys.readouterr().err
    assert not (tmp_path / "run/stages/lost/model").exists()
    assert main(["run", str(path)]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft": {"type": "ia4"}}, "Did you mean ia3?"),
        ({"peft": {"r": 4}}, "peft.type: missing"),
        ({"peft": {"type": "oft", "oft_blok_size": 4}}, "unknown key of OFTConfig. Did you mean oft_block_size?"),
        ({"peft": {"type": "poly"}}, "needs the number of a task in every row"),
        ({"peft": {"type": "p_tuning"}}, "is not kept in a checkpoint"),
        ({"peft": {"type": "prefix_tuning", "prefix_projection": True}}, "a run could not be continued"),
        ({"peft": {"type": "ia3"}, "lora": {}}, "Keep one of the two"),
        ({"peft": {"type": "vera"}, "quantization": "int7"}, "nf4"),
        ({"lora": {"init_lora_weights": "pissa"}, "quantization": "nf4"}, "full precision"),
        ({"lora": {"init_lora_weights": "eva"}}, "made from data"),
        ({"lora": {"layers_to_transform": [0]}}, "target_modules: [q_proj, v_proj]"),
        ({"lora": {"init_lora_weights": "olora", "rank_pattern": {"q_proj": 2}}}, "Remove `rank_pattern`"),
        ({"peft": {"type": "prompt_tuning"}, "kind": "pretrain"}, "Take `kind: sft`, or an adapter of the weights"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, message: str
) -> None:
    content = tiny.recipe(tmp_path, merge=False)
    content["stages"] = [stage(tmp_path, "one", **change)]
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    assert message in capsys.readouterr().err


def test_a_prompt_is_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = tiny.recipe(tmp_path, merge=True, push={"repo_id": "me/x", "what": "merged"})
    prompt = stage(tmp_path, "prompt", peft={"type": "prompt_tuning", "num_virtual_tokens": 4})
    content["stages"] = [prompt, stage(tmp_path, "after", parent="prompt", peft=prompt["peft"])]
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    message = capsys.readouterr().err
    assert message.count("cannot be merged into the weights") == 3


@pytest.mark.slow
@pytest.mark.long
def test_the_merge_of_a_prompt_is_refused_in_words(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(trained), "--stage", "prompt"]) == 2
    message = capsys.readouterr().err
    assert "is of type prompt_tuning, which PEFT cannot merge into the weights" in message
    assert "hfpipe push" in message
    assert not (trained / "stages/prompt/merged").exists()


def test_peft_s_own_refusal_is_one_paragraph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, merge=False, evaluate={})
    wrong = ["no_such_module"]
    for change in ({"target_modules": wrong}, {"target_modules": ["q_proj", *wrong]}, {"modules_to_save": wrong}):
        content["stages"] = [stage(tmp_path, "one"), stage(tmp_path, "two", lora={"r": 4, **change})]
        assert main(["run", str(tiny.write(tmp_path, content))]) == 2
        message = capsys.readouterr().err
        assert "stages.two: lora: peft refuses it on this model" in message
        assert "no_such_module" in message
        assert ("linear layers are named down_proj, gate_proj, k_proj" in message) == ("target_modules" in change)
        assert "Traceback" not in message
        assert not (tmp_path / "run/stages/one").exists()  # before the first stage begins


@pytest.mark.parametrize("command", ["run", "check"])
def test_weights_that_are_quantized_already_are_refused_before_there_are_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    base = tmp_path / "base"  # a config alone
    base.mkdir()
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "quantization_config": quantized}
    (base / "config.json").write_text(json.dumps(config))
    for change, remedy in (({}, "Add `lora"), ({"lora": {}, "quantization": "int8"}, "Remove `quantization`")):
        content = tiny.recipe(tmp_path, merge=False, evaluate={}, model={"id": str(base)})
        content["stages"] = [stage(tmp_path, "one", **change)]
        assert main([command, str(tiny.write(tmp_path, content))]) == 2
        message = capsys.readouterr().err
        assert "is quantized already (bitsandbytes)" in message
        assert remedy in message


def test_a_model_to_which_every_token_is_as_likely_is_compared_too() -> None:
    uniform = torch.zeros(3, 50_000).log_softmax(-1)
    assert difference(uniform, uniform) == 0
    assert difference(uniform, uniform + 0.1) == pytest.approx(0.1, rel=1e-3)
