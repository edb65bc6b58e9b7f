"""Trainer's losses are the same in each form of the loss, whatever the accumulation, and wait for no device more."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hfpipe.cli import main
from hfpipe.stages import causal_loss
from hfpipe.stages.causal_loss import WithFastLoss, fuse_head

SIZE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


class Fast(WithFastLoss, Trainer):
    pass


def losses(form: str, folder: Path, accumulation: int) -> list[float]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **SIZE))
    ids = torch.randint(0, 64, (16, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[::2, :7] = -100  # micro-batches differ in their trained tokens
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    trainer = (Trainer if form == "plain" else Fast)(model=model, args=arguments, train_dataset=rows)
    if isinstance(trainer, Fast):
        trainer.use_fast_loss()
        assert trainer.linear is not None
        if form == "fused":  # as on a GPU
            trainer.linear, trainer.fused = None, fuse_head(model)
            assert trainer.fused
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("form", ["linear", "fused"])
def test_losses_are_those_of_plain_trainer(form: str, accumulation: int, tmp_path: Path) -> None:
    ours, theirs = (losses(kind, tmp_path / kind, accumulation) for kind in (form, "plain"))
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_head_that_is_more_than_a_linear_layer_keeps_its_own_loss() -> None:
    class Shifted(LlamaForCausalLM):
        def forward(self, *given: Any, **named: Any) -> Any:
            out = super().forward(*given, **named)
            return out if out.loss is None else type(out)(loss=out.loss + 1, logits=out.logits)

    model = Shifted(LlamaConfig(vocab_size=64, **SIZE))
    assert not fuse_head(model)
    assert "forward" not in vars(model)


class Waits(TorchDispatchMode):
    """Counts the times that a value is asked of a tensor, for which a GPU would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() == "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_a_micro_batch_waits_for_the_device_once_at_most(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, steps = Waits(), []
    step = Trainer.training_step

    def counted(*given: Any, **named: Any) -> Any:
        steps.append(kind)
        with waits:
            return step(*given, **named)

    monkeypatch.setattr(Trainer, "training_step", counted)
    monkeypatch.setattr(causal_loss, "linear_loss", lambda model: None)
    monkeypatch.setattr(causal_loss, "FUSED_ON", ("cpu",))
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False)
    content["stages"] = content["stages"][: 1 if kind == "pretrain" else 2]
    content["stages"][-1]["training"] |= {"per_device_train_batch_size": 1, "max_steps": 3}
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    assert len(steps) > 6
    assert waits.count <= len(steps)  # transformers asks each batch whether its rows are packed or padded
