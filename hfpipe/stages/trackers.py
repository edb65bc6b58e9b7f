"""Trackers of `report_to:` (wandb, trackio, tensorboard, mlflow): asked early, and never the end of a training."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks

from hfpipe.core import display
from hfpipe.core.errors import MachineError
from hfpipe.core.hub_errors import one_line


def require_login(stage: str, report_to: Iterable[str]) -> None:
    """Lets wandb look for its key, or ask for it, before anything is trained: it would do so when a stage begins.

    Args:
        stage: The name of the stage.
        report_to: The trackers it names.

    Raises:
        MachineError: There is no key, and nobody to ask.
    """
    if "wandb" not in report_to:
        return
    import wandb

    try:
        wandb.login()
    except Exception as error:  # wandb's own types
        raise MachineError(
            f"stages.{stage}.training.report_to: wandb says: {one_line(str(error))}. Or set WANDB_API_KEY, or "
            "WANDB_MODE=offline, which keeps everything on this machine."
        ) from error


def guard_trackers(trainer: Trainer) -> None:
    """Keeps the training apart from the trackers that it reports to, which depend on servers and disks elsewhere."""
    kinds = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
    handler = trainer.callback_handler
    handler.callbacks = [_Guarded(one) if isinstance(one, kinds) else one for one in handler.callbacks]


class _Guarded:
    """A callback that gets every event until it fails, which is said once."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.name = type(callback).__name__.removesuffix("Callback")
        self.failed = False

    def __getattr__(self, event: str) -> Any:
        return partial(self.call, event)

    def call(self, event: str, *given: Any, **named: Any) -> Any:
        if self.failed:
            return None
        try:
            done = getattr(self.callback, event)(*given, **named)
            if event == "on_train_end" and self.name == "Wandb":  # else the next stage would go on in this one's run
                import wandb

                wandb.finish()
        except Exception as error:  # a dozen libraries with types of their own
            self.failed = True
            display.say(
                f"  {self.name} failed and gets nothing more of this stage; the training goes on: "
                f"{one_line(str(error)) or type(error).__name__}",
                "warning",
            )
            return None
        return done
