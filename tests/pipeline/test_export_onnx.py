"""`hfpipe export --to onnx`: a graph that says what the model says, or one paragraph on what is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import talking
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfpipe.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    assert main(["run", str(tiny.write(folder, talking.recipe(folder, merge=True)))]) == 0
    return folder / "run"


def test_without_the_packages_one_paragraph_says_what_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["export", str(run), "--to", "onnx"]) == 4
    told = capsys.readouterr().err.strip()
    assert "pip install 'hfpipe[onnx]'" in told
    assert "\n" not in told


def test_a_form_of_gguf_is_none_of_onnx(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--to", "onnx", "--quant", "q8_0"]) == 2
    assert "--quant is of gguf" in capsys.readouterr().err


def test_the_graph_says_what_the_model_says(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    from transformers.exporters import ExportedModel

    assert main(["export", str(run), "--to", "onnx", "-o", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "read again by ONNX Runtime" in said
    assert "torch.onnx" not in said
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer(["the cow says moo", "the hen"], return_tensors="pt", padding=True)
    graph = ExportedModel.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(run / "stages" / "chat" / "merged", dtype=torch.float32).eval()
    read = inputs["attention_mask"].bool()
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        wanted = model(**inputs).logits[read]
    assert torch.allclose(torch.as_tensor(graph(**inputs).logits)[read], wanted, atol=1e-3)
