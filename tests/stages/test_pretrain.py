"""A pretrain stage through the command line: whole epochs, what the model is fed, and a model that cannot be packed."""

import json
from collections import Counter
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import LlamaForCausalLM

from hfpipe.cli import main
from hfpipe.model.linear_loss import LinearLoss


def recipe(folder: Path, training: dict[str, Any], **stage: Any) -> Path:
    tiny.write_data(folder)
    content = tiny.recipe(folder, evaluate={}, merge=False)
    content["stages"] = [{**content["stages"][0], **stage}]
    content["stages"][0]["training"] = {"learning_rate": "2e-3", "max_length": 64, "save_strategy": "no", **training}
    return tiny.write(folder, content)


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Records the inputs of the model's calls, and whether it was being trained."""
    calls: list[dict[str, Any]] = []
    forward = LlamaForCausalLM.forward

    @wraps(forward)
    def recorded(self: Any, *args: Any, **words: Any) -> Any:
        assert not args
        if words["input_ids"].device.type != "meta":  # not the trace that predicts the memory
            calls.append({**words, "training": self.training, "cache": self.config.use_cache})
        return forward(self, *args, **words)

    loss = LinearLoss.__call__

    def labelled(self: LinearLoss, model: Any, inputs: dict[str, Any]) -> Any:
        before = len(calls)
        found = loss(self, model, inputs)
        calls[before]["labels"] = inputs["labels"]  # the model itself gets none
        return found

    monkeypatch.setattr(LlamaForCausalLM, "forward", recorded)
    monkeypatch.setattr(LinearLoss, "__call__", labelled)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "per_device"), [(1, 4), (3, 1)])
def test_epochs_train_on_every_document_as_often(
    tmp_path: Path, fed: list[dict[str, Any]], epochs: int, per_device: int, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    path = recipe(tmp_path, {"num_train_epochs": epochs, "per_device_train_batch_size": per_device}, lanes=4)
    assert main(["run", str(path)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "stages" / "prose" / "model")
    keys = ("input_ids", "labels", "position_ids")
    rows = [row for call in fed if call["training"] for row in zip(*(call[key] for key in keys), strict=True)]
    found: Counter[str] = Counter()
    for lane in range(4):
        ids: list[int] = []
        for row, labels, positions in rows[lane::4]:
            ids += row[: int(torch.nonzero((labels != -100) | (positions == 0))[-1]) + 1].tolist()
        found.update(filter(None, tokenizer.decode(ids).split(tokenizer.eos_token)))
    documents = [json.loads(line)["text"] for line in (tmp_path / "prose.jsonl").read_text().splitlines()]
    assert found == Counter(documents * epochs)
    done = json.loads((tmp_path / "run" / "stages" / "prose" / "done.json").read_text())
    assert done["steps"] == len(rows) // 4
    assert done["data"]["documents"] == epochs * len(documents)
    assert "padding" in capsys.readouterr().out


def test_the_isolation_test_feeds_the_model_as_the_training_does(tmp_path: Path, fed: list[dict[str, Any]]) -> None:
    assert main(["run", str(recipe(tmp_path, {"max_steps": 2}, global_batch_size=2))]) == 0
    trained = next(call for call in fed if call["training"])
    tested = next(call for call in fed if call.get("position_ids") is not None and not call["training"])
    of_the_loss = {"labels", "num_items_in_batch", "training", "return_dict", "use_cache"}
    assert set(tested) - of_the_loss == set(trained) - of_the_loss
    assert trained["cache"] is tested["cache"] is False
    assert trained["input_ids"].shape[0] == tested["input_ids"].shape[0] == 2
    for call in (trained, tested):
        assert call.get("attention_mask") is None
        assert call["position_ids"].shape == call["input_ids"].shape
        assert ((call["position_ids"] == 0).sum(dim=1) > 1).any(), "rows of more than one document"


SEES_PAST_POSITIONS: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128, "num_attention_heads": 2},
    "bloom": {"num_attention_heads": 2},
    "mamba": {"state_size": 4},
}


@pytest.mark.parametrize("model_type", SEES_PAST_POSITIONS)
def test_a_model_that_cannot_keep_packed_documents_apart_is_refused(
    model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`check` knows no weights of the base, and says so all the same."""
    path = recipe(tmp_path, {"max_steps": 2})
    architecture = {"model_type": model_type, "hidden_size": 32, "num_hidden_layers": 2}
    content = tiny.recipe(tmp_path, evaluate={}, merge=False)
    content["model"]["architecture"] = architecture | SEES_PAST_POSITIONS[model_type]
    content["stages"] = content["stages"][:1]
    path = tiny.write(tmp_path, content)
    told = []
    for command in ("check", "run"):
        assert main([command, str(path)]) == 2
        told += [line for line in capsys.readouterr().err.splitlines() if line.startswith("hfpipe: ")]
    assert "packed documents are not kept apart" in told[0]
    assert told[0] == told[1]
