"""The first step of a stage that rounds, where it learns in full precision before: `after_steps` of `qat:`."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RoundingFrom(TrainerCallback):
    """Lets a model learn in full precision until a step, and round from there on.

    Args:
        trainer: Has the model.
        step: The first step that rounds.
    """

    def __init__(self, trainer: Trainer, step: int) -> None:
        self._trainer, self._step = trainer, step

    def _set(self, enabled: bool) -> None:
        from torchao.quantization.qat.linear import enable_linear_fake_quant

        self._trainer.accelerator.unwrap_model(self._trainer.model).apply(
            partial(enable_linear_fake_quant, enabled=enabled)
        )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._set(state.global_step >= self._step)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self._step:
            self._set(True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._set(True)
