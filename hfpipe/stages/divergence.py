"""Stops a training whose loss or gradient is no longer a number, within a step or two, and says on which rows.

The losses of a step's micro-batches are summed on the device; the sum is looked at when the next step is done, so that
no step waits for it. Before a checkpoint is saved it is looked at at once, with the weights: every checkpoint is good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfpipe.core import ranks
from hfpipe.core.errors import DataError
from hfpipe.core.upstream import override
from hfpipe.data.dataloader import BatchLoader
from hfpipe.stages.checkpoints import MANIFEST, by_step

ROWS, TOKENS = 4, 24  # of a step that are quoted


class StopWhenNotFinite(TrainerCallback):
    """Watches the losses and gradient norms of a trainer.

    Args:
        trainer: The trainer.
        loader: Serves its batches.
        tokenizer: Says what the rows hold.
        stage: The stage's name.
        folder: Its folder.
    """

    def __init__(self, trainer: Trainer, loader: BatchLoader, tokenizer: Any, stage: str, folder: Path) -> None:
        self.trainer, self.loader, self.tokenizer, self.stage, self.folder = trainer, loader, tokenizer, stage, folder
        self._sum: torch.Tensor | None = None  # of the losses of this step
        self._norm: torch.Tensor | None = None
        self._last: torch.Tensor | None = None  # whether the step before was not finite
        trainer.args.logging_nan_inf_filter = False  # it would show 0.0 for a loss that is no number
        training_step, clip = trainer.training_step, trainer.accelerator.clip_grad_norm_

        def watched_step(*args: Any, **options: Any) -> torch.Tensor:
            loss = training_step(*args, **options)
            self._sum = loss.detach() if self._sum is None else self._sum + loss.detach()
            return loss

        def watched_clip(*args: Any, **options: Any) -> Any:
            norm = clip(*args, **options)
            self._norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP2's is spread over the ranks
            return norm

        override(trainer, training_step=watched_step)
        override(trainer.accelerator, clip_grad_norm_=watched_clip)
        loader.keep = 2 * trainer.args.gradient_accumulation_steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now, self._sum = self._not_finite(), None
        late, self._last = self._last, now
        # A checkpoint or the end of the training waits for the device anyway, and so do several ranks at each step.
        if control.should_save or control.should_training_stop or args.world_size > 1 or now.device.type == "cpu":
            if control.should_save and not self.trainer.is_deepspeed_enabled:
                now = now | self._weights_not_finite()
            if self._on_any_rank(now):
                self._stop(state.global_step, 0, now)
        elif late is not None and bool(late):
            self._stop(state.global_step - 1, 1, late)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and not math.isfinite(logs.get("loss", 0.0)):  # the mean of all ranks
            self._stop(state.global_step, 0, torch.tensor(True))

    def _not_finite(self) -> torch.Tensor:
        """Returns a flag on the device: True if the step's loss or gradient norm is not finite."""
        assert self._sum is not None
        found = ~torch.isfinite(self._sum)
        scaled = self.trainer.accelerator.scaler is not None  # fp16: it leaves out steps whose gradients overflow
        if isinstance(self._norm, torch.Tensor) and not scaled:
            found = found | ~torch.isfinite(self._norm).to(found.device)
        return found.reshape(())

    def _weights_not_finite(self) -> torch.Tensor:
        trained = [weight.detach() for weight in self.trainer.model.parameters() if weight.requires_grad]  # type: ignore[union-attr]
        trained = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in trained]
        return torch.stack([~torch.isfinite(weight.sum()) for weight in trained]).any()

    def _on_any_rank(self, found: torch.Tensor) -> bool:
        if ranks.ranks() > 1:
            flag = found.to(self.trainer.args.device, torch.int32)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            return bool(flag.item())
        return bool(found)

    def _stop(self, step: int, ago: int, mine: torch.Tensor) -> None:
        """Raises the error on every rank.

        Args:
            step: The step.
            ago: Steps since then.
            mine: Whether it was so on this rank.
        """
        accumulation = self.trainer.args.gradient_accumulation_steps
        end = len(self.loader.recent) - ago * accumulation
        batches = list(self.loader.recent)[max(0, end - accumulation) : end]
        rows = [row for batch in batches for row in batch if not row.get("is_padding")] if bool(mine) else []
        told = [line for part in ranks.gather(self._quoted(rows)) for line in part]
        good = next((one for one in by_step(self.folder) if (one / MANIFEST).exists()), None)
        stays = "There is no checkpoint yet, so the same command begins the stage anew"
        if good is not None:
            stays = f"The last good checkpoint, {good.name}, stays, and the same command continues from it"
        more = f", and {len(told) - ROWS} more" if len(told) > ROWS else ""
        raise DataError(
            f"stages.{self.stage}: at step {step} the loss or the gradient is no longer a finite number, and training "
            f"on would spoil the model. The rows of that step: {'; '.join(told[:ROWS])}{more}. Look at these rows; "
            "lower learning_rate, raise warmup_steps or lower max_grad_norm (each is another training, from its first "
            f"step); with fp16, take bf16. {stays}."
        )

    def _quoted(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """The beginning of each row, and its id where it has one."""
        quoted = []
        for row in rows:
            text = " ".join(self.tokenizer.decode([int(token) for token in row["input_ids"][:TOKENS]]).split())
            quoted.append(f"{row['id']}: {text!r}" if row.get("id") is not None else repr(text))
        return quoted
