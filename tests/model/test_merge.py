"""A merge: in the precision of the base, whole beside its tokenizer, within memory, and with its cost on the suites."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from merging import TEXTS, most_memory, save_adapter
from peft import AutoPeftModelForCausalLM
from plain import make_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from hfpipe.cli import main
from hfpipe.model.create import train_tokenizer
from hfpipe.model.load import ModelRef
from hfpipe.model.merge import merge_adapter
from hfpipe.pipeline.context import warn_of_rounding
from hfpipe.recipe import Model, Quantization

SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of a base of 34 million weights in bfloat16, with a chat template."""
    folder = tmp_path_factory.mktemp("half")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, 300, 128)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=len(tokenizer), **SIZES))
    base.to(torch.bfloat16).save_pretrained(folder / "base", max_shard_size="20MB")
    tokenizer.save_pretrained(folder / "adapter")
    return save_adapter(base, folder / "base", folder / "adapter", task_type="CAUSAL_LM")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_merge_keeps_the_precision_of_the_base_and_holds_little_of_it_in_memory(
    adapter: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    with most_memory() as most:
        found = merge_adapter(ModelRef(str(adapter), Model(id="base")), tokenizer, tmp_path / "merged", TEXTS, 0.1)
    assert (found.base, found.dtype, found.costs) == ("in full precision", "bfloat16", {})
    assert 0 < found.loss < 0.01, "bfloat16 rounds the sum"
    size = 0
    for file in (tmp_path / "merged").glob("*.safetensors"):
        size += file.stat().st_size
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    assert size > 60e6
    assert most[0] < size / 2  # replaced in memory it would be more than the model
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template


@pytest.mark.slow
def test_a_merge_in_float32_loses_nothing_of_an_adapter_on_a_base_in_16_bits(adapter: Path, tmp_path: Path) -> None:
    tokenizer, ref = AutoTokenizer.from_pretrained(adapter), ModelRef(str(adapter), Model(id="base"))
    found = merge_adapter(ref, tokenizer, tmp_path / "merged", TEXTS, 0.1, "float32")
    assert found.dtype == json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"
    assert found.loss < 1e-6
    plain = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).merge_and_unload(safe_merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, merged.state_dict()[name]), name


@pytest.mark.slow
def test_the_files_are_those_of_peft_and_transformers_to_the_bit(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfpipe.model.shards.SHARD_SIZE", "20MB")
    ours, plain = tmp_path / "ours", tmp_path / "plain"
    merge_adapter(ModelRef(str(adapter), Model(id="base")), AutoTokenizer.from_pretrained(adapter), ours, TEXTS, 0.1)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.bfloat16)
    model.merge_and_unload(safe_merge=True).save_pretrained(plain, max_shard_size="20MB")
    shards = sorted(file.name for file in plain.glob("*.safetensors"))
    assert len(shards) > 3
    assert sorted(file.name for file in ours.glob("*.safetensors")) == shards
    for name in ("model.safetensors.index.json", "config.json", "generation_config.json"):
        assert json.loads((ours / name).read_text()) == json.loads((plain / name).read_text())
    for name in shards:
        found, expected = load_file(ours / name), load_file(plain / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_4_bit_base_with_transposed_weights_is_made_whole_for_its_adapter(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    place = make_model(tmp_path / "base", llama=False)
    tokenizer = AutoTokenizer.from_pretrained(place)
    base = AutoModelForCausalLM.from_pretrained(place)
    folder = save_adapter(base, place, tmp_path / "adapter", task_type="CAUSAL_LM", fan_in_fan_out=True)
    ref = ModelRef(str(folder), Model(id="base"), quantization=Quantization.model_validate({"type": "nf4"}))
    found = merge_adapter(ref, tokenizer, tmp_path / "merged", TEXTS, 0.1)
    assert found.base == "dequantized"
    assert found.loss < 1e-3 < found.costs["in full precision"]
    assert not (tmp_path / "merged" / "rounded").exists()
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_an_adapter_of_a_base_that_came_in_4_bits_is_merged_into_it_made_whole(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    full, place = make_model(tmp_path / "full", llama=True), tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(full)
    few = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(full, quantization_config=few, dtype=torch.float32)
    base.save_pretrained(place)
    folder = save_adapter(base, place, tmp_path / "adapter", task_type="CAUSAL_LM")
    found = merge_adapter(ModelRef(str(folder), Model(id="base")), tokenizer, tmp_path / "merged", TEXTS, 0.1)
    assert list(found.costs) == [found.base] == ["dequantized"]
    assert found.loss < 1e-3
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@pytest.mark.slow
def test_what_a_merge_costs_is_said_on_every_suite_of_likelihood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, shift=False, energy=False)
    content["stages"] = [content["stages"][1]]
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    merge = json.loads((tmp_path / "run/stages/sounds/merge.json").read_text())
    found = tiny.scores(tmp_path / "run")
    assert [(row["suite"], row["metric"]) for row in merge["suites"]] == [
        ("general", "bits_per_byte"),
        ("sounds", "bits_per_byte"),
    ]
    for row in merge["suites"]:
        assert row["adapter"] == found["sounds", row["suite"], "bits_per_byte"]
        assert row["merged"] == pytest.approx(row["adapter"], abs=1e-4)
    report = (tmp_path / "run/report.md").read_text()
    assert "## What merging cost" in report
    assert "sounds, general bits_per_byte:" in report
    said = tmp_path / "run/stages/sounds/merge.json"
    written = (tmp_path / "run/stages/sounds/merged/model.safetensors").stat().st_mtime_ns
    said.write_text(json.dumps({key: value for key, value in merge.items() if key != "suites"}))  # as if killed there
    assert main(["merge", str(tmp_path / "run")]) == 0
    assert json.loads(said.read_text()) == merge
    assert (tmp_path / "run/stages/sounds/merged/model.safetensors").stat().st_mtime_ns == written
    said.write_text(json.dumps({key: value for key, value in merge.items() if key != "suites"}))
    monkeypatch.setattr("hfpipe.pipeline.context.free_memory", lambda place: 2**20)
    assert main(["merge", str(tmp_path / "run")]) == 0
    assert "not scored: the merged model takes 0.0 GiB, which are not free" in capsys.readouterr().out
    assert json.loads(said.read_text()) == merge | {"suites": []}


@pytest.mark.parametrize(("dtype", "merged", "told"), [("bfloat16", 1.2, True), ("bfloat16", 1.0, False)])
def test_what_rounding_takes_away_is_told_with_what_to_do(
    dtype: str, merged: float, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "merge.json").write_text(json.dumps({"dtype": dtype}))
    warn_of_rounding(tmp_path, [{"adapter": 1.0, "merged": merged}])
    assert ("up to 20.0% of a score. The adapter itself loses nothing" in capsys.readouterr().out) == told


@pytest.mark.slow
def test_a_base_that_is_gone_is_said_with_where_it_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, shift=False, energy=False, merge=False, evaluate={})
    content |= {"model": {"id": str(make_model(tmp_path / "base", llama=True))}, "stages": [content["stages"][1]]}
    content["stages"][0]["quantization"] = "nf4"
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    (tmp_path / "base").rename(tmp_path / "moved")
    assert main(["merge", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert f"was trained on the base {tmp_path / 'base'}, and there is no such folder now" in message
    for named in ("run/recipe.yaml", "run/stages/sounds/model/adapter_config.json"):
        file = tmp_path / named
        assert file.name in message
        file.write_text(file.read_text().replace(str(tmp_path / "base"), str(tmp_path / "moved")))
    assert main(["merge", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/stages/sounds/merged/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.long
def test_a_merge_is_made_again_in_another_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, shift=False, merge={"dtype": "bfloat16"})
    content["stages"].append({**content["stages"][1], "name": "more"})
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    run = tmp_path / "run"
    weights = run / "stages" / "more" / "merged" / "model.safetensors"
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}
    parent = load_file(run / "stages" / "sounds" / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in parent.values()} == {torch.float32}, "what is trained on stays as it was"
    for words in (["--dtype", "float32"], ["--stage", "more", "--dtype", "float32"]):
        assert main(["merge", str(run), *words]) == 0
        assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float32}
    assert main(["merge", str(run), "--stage", "sounds", "--dtype", "bfloat16"]) == 2
    assert "starts from the merged weights of sounds" in capsys.readouterr().err
