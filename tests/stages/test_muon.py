"""`muon`: torch's Muon trains the matrices of the layers, and the trainer's optimizer all other weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from hfpipe.cli import main
from hfpipe.model.muon import with_muon


def write(folder: Path, stage: dict[str, Any], **training: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_data(folder)
    recipe = tiny.recipe(folder, merge=False, evaluate={})
    chosen = recipe["stages"][0]
    chosen["training"] |= {"save_strategy": "no", "lr_scheduler_type": "constant", "warmup_steps": 0, **training}
    recipe["stages"] = [{**chosen, **stage}]
    return tiny.write(folder, recipe)


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run/stages/prose/model/model.safetensors")


def run(folder: Path, stage: dict[str, Any], **training: Any) -> dict[str, torch.Tensor]:
    assert main(["run", str(write(folder, stage, **training))]) == 0
    return trained(folder)


@pytest.mark.slow
def test_a_step_is_orthogonal_in_matrices_and_of_adamw_elsewhere(tmp_path: Path) -> None:
    first = run(tmp_path / "first", {}, max_steps=1, learning_rate=1e-30)
    words = {"max_steps": 1, "learning_rate": 1e-3, "weight_decay": 0.0}
    stage = {"muon": {"adjust_lr_fn": "original"}, "learning_rates": {r"layers\.1\.mlp\.down": 2e-3}}
    after = run(tmp_path / "after", stage, **words)
    for name, rate in (("layers.0.mlp.down_proj", 1e-3), ("layers.1.mlp.down_proj", 2e-3)):  # wide: not adjusted
        (key,) = (one for one in after if name in one)
        values = torch.linalg.svdvals((after[key] - first[key]).float()) / rate
        assert values.median() > 0.5, name  # five steps of Newton and Schulz leave the smallest behind
        assert values.max() < 1.3, name
    (embeddings,) = (one for one in after if "embed_tokens" in one)
    assert (after[embeddings] - first[embeddings]).abs().max().item() == pytest.approx(1e-3, rel=2e-2)


@pytest.mark.slow
@pytest.mark.long
def test_an_interrupted_stage_goes_on_with_the_momentum_of_both(tmp_path: Path) -> None:
    stage, words = {"muon": {}}, {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    words["lr_scheduler_type"] = "cosine"
    whole = run(tmp_path / "whole", stage, **words)
    path = write(tmp_path / "cut", stage, **words)
    tiny.run_interrupted(path, tmp_path / "cut/run/stages/prose/checkpoint-2/manifest.json")
    after = trained(tmp_path / "cut")
    assert all(torch.equal(whole[name], after[name]) for name in whole)


class Small(torch.nn.Module):
    """An embedding, a matrix and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer, self.head = (
            torch.nn.Embedding(10, 8),
            torch.nn.Linear(8, 16),
            torch.nn.Linear(16, 10),
        )
        matrices = torch.optim.AdamW([{"params": list(self.parameters()), "weight_decay": 0.1}], lr=1e-2)
        self.optimizer = with_muon(matrices, self, {})
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def learn(self, steps: int) -> None:
        for _ in range(steps):
            self.head(self.layer(self.embedding.weight).relu()).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()

    def state(self) -> tuple[Any, ...]:
        return copy.deepcopy((self.state_dict(), self.optimizer.state_dict(), self.schedule.state_dict()))

    def take_up(self, state: tuple[Any, ...]) -> None:
        for part, saved in zip((self, self.optimizer, self.schedule), state, strict=True):
            part.load_state_dict(saved)


@pytest.mark.parametrize("whole", [True, False])
def test_a_saved_state_has_the_momentum_and_the_rates_of_both(whole: bool) -> None:
    straight, first, second = Small(), Small(), Small()
    straight.learn(4)
    first.learn(2)
    state = first.state()
    second.take_up(state if whole else (state[0], second.optimizer.state_dict(), state[2]))
    second.learn(2)
    same = [torch.equal(one, other) for one, other in zip(straight.parameters(), second.parameters(), strict=True)]
    assert all(same) if whole else not any(same)


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ({"muon": {"momemtum": 0.9}}, "Did you mean momentum?"),
        ({"muon": {"ns_steps": "five"}}, "ns_steps"),
        ({"muon": {}, "training": {"max_steps": 1, "optim": "lomo"}}, "divides the weights itself"),
    ],
)
def test_words_that_cannot_be(
    stage: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--fast", str(write(tmp_path, stage))]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_what_torch_refuses_is_told_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, {"muon": {"adjust_lr_fn": "no such"}})
    for command in ("check", "run"):
        assert main([command, str(path)]) == 2
        said = capsys.readouterr()
        assert "torch.optim.Muon refuses it" in " ".join((said.out + said.err).split())
