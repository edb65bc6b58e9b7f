"""Bytes that come from the Hub are told as they come: of weights, whole or in parts, and of files of data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from hub_server import HubServer
from transformers import AutoConfig, AutoModelForCausalLM

DOWNLOAD = """
import sys
from hfpipe.core import display
from hfpipe.model.load import ModelRef, load_model
from hfpipe.pipeline.context import quiet_libraries
from hfpipe.recipe import load_recipe
from datasets import load_dataset

quiet_libraries()
recipe = load_recipe(sys.argv[1])
display.EVERY_SECONDS = 0.0
display.start("json")
for name in ("me/whole", "me/parts"):
    display.event("begin", of=name)
    load_model(ModelRef(name, recipe.model))
display.event("begin", of="data")
load_dataset("me/data", split="train")
display.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("xet", [pytest.param(True, marks=pytest.mark.long), False])
def test_the_bytes_of_a_download_are_told(hub: HubServer, tmp_path: Path, xet: bool) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=2048, **sizes))
    total = {}
    for name, most in (("whole", "1GB"), ("parts", "1MB")):
        model.save_pretrained(tmp_path / name, max_shard_size=most)
        hub.add_repo("model", f"me/{name}", {path.name: path for path in (tmp_path / name).iterdir()})
        total[f"me/{name}"] = sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors"))
    rows = b"".join(b'{"text": "%06d %s"}\n' % (number, b"x" * 100) for number in range(20_000))
    hub.add_repo("dataset", "me/data", {"rows.jsonl": rows})
    total["data"] = len(rows)
    tiny.write_data(tmp_path)
    path = str(tiny.write(tmp_path, tiny.recipe(tmp_path)))
    environment = os.environ | hub.env(tmp_path / "home", xet=xet)
    command = [sys.executable, "-c", DOWNLOAD, path]
    done = subprocess.run(command, env=environment, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, list[int]] = {}
    for row in map(json.loads, done.stdout.splitlines()):
        if row["event"] == "begin":
            now = told.setdefault(row["of"], [])
        elif row.get("what") == "downloading" and row["total"] in (None, total[list(told)[-1]]):
            now.append(row["done"])
    assert told.keys() == total.keys()
    for name, counts in told.items():
        assert counts[-1:] == [total[name]], (name, counts, total[name])
        assert counts == sorted(counts), name
