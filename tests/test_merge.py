"""A merge: in the precision of the base, whole beside its tokenizer, within memory, and with its cost on the suites."""

import json
import re
import threading
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hfpipe.cli import main
from hfpipe.model.create import train_tokenizer
from hfpipe.model.load import ModelRef
from hfpipe.model.merge import merge_adapter
from hfpipe.recipe import Model

SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
TEXTS = ["The cat sat by the river and said mew.", "The dog sat by a tree and said bark."]


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A strong random adapter of a base of 34 million weights in bfloat16, with a chat template."""
    folder = tmp_path_factory.mktemp("half")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, 300, 128)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=len(tokenizer), **SIZES))
    base.to(torch.bfloat16).save_pretrained(folder / "base", max_shard_size="20MB")
    config = LoraConfig(r=4, lora_alpha=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    saved = folder / "adapter/adapter_config.json"
    named = json.loads(saved.read_text()) | {"base_model_name_or_path": str(folder / "base")}
    saved.write_text(json.dumps(named))
    return folder / "adapter"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_merge_keeps_the_precision_of_the_base_and_less_than_twice_its_memory(adapter: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        found = merge_adapter(ModelRef(str(adapter), Model(id="base")), tokenizer, tmp_path / "merged", TEXTS, 0.1)
    finally:
        done.set()
        thread.join()
    assert (found.base, found.dtype, found.costs) == ("in full precision", "bfloat16", {})
    assert 0 < found.loss < 0.01, "bfloat16 rounds the sum"
    size = 0
    for file in (tmp_path / "merged").glob("*.safetensors"):
        size += file.stat().st_size
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    assert size > 60e6
    assert peak[0] - before < 1.5 * size
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template


def test_what_a_merge_costs_is_said_on_every_suite_of_likelihood(tmp_path: Path) -> None:
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
