"""Nothing of the training takes memory any more when a stage's model is loaded again to be verified."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from hfpipe.cli import main
from hfpipe.model.create import create_model, train_tokenizer


def alive() -> int:
    """Bytes of all tensors of this process, each storage once."""
    gc.collect()
    found = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor) and one.device.type == "cpu":
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            if one.grad is not None:
                found[one.grad.untyped_storage().data_ptr()] = one.grad.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [pytest.param(False, marks=pytest.mark.long), True])
def test_no_second_model_stands_beside_trainer_and_optimizer(
    adapter: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_data(tmp_path)
    texts = [json.loads(line)["text"] for line in (tmp_path / "prose.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer(texts, 320, 128)
    base = create_model(tiny.recipe(tmp_path)["model"]["architecture"] | {"hidden_size": 256}, tokenizer, 0)
    size = sum(parameter.nbytes for parameter in base.parameters())
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    del base
    held, loads = alive(), []
    load = AutoModelForCausalLM.from_pretrained.__func__  # type: ignore[attr-defined]

    def noted(cls: Any, path: str, *arguments: Any, **words: Any) -> Any:
        loads.append((str(path), alive() - held))
        return load(cls, path, *arguments, **words)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(noted))
    recipe = tiny.recipe(tmp_path, model={"id": str(tmp_path / "base")}, merge=False, evaluate={})
    stage = recipe["stages"][1] | {"training": {"max_steps": 2, "max_length": 64}}
    recipe["stages"] = [stage if adapter else {key: value for key, value in stage.items() if key != "lora"}]
    assert main(["run", str(tiny.write(tmp_path, recipe))]) == 0
    assert len(loads) >= 2, "the base, and the saved model again"
    beside = loads[-1][1]
    assert beside < size / 10, f"{beside / size:.2f} models in memory when the saved one is loaded: {loads}"
