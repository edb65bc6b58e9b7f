"""Trainer's losses are the same with the linear loss and without, whatever the accumulation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hfpipe.stages.causal_loss import WithLinearLoss

SIZE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


class Linear(WithLinearLoss, Trainer):
    pass


def losses(kind: type[Trainer], folder: Path, accumulation: int) -> list[float]:
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
    trainer = kind(model=model, args=arguments, train_dataset=rows)
    if isinstance(trainer, Linear):
        trainer.use_linear_loss()
        assert trainer.linear is not None
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_losses_are_those_of_plain_trainer(accumulation: int, tmp_path: Path) -> None:
    ours, theirs = (losses(kind, tmp_path / kind.__name__, accumulation) for kind in (Linear, Trainer))
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, abs=1e-5)
