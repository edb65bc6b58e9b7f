"""Checkpoints that count only when they are whole, the position in the data, and stopping on a signal.

Trainer writes a checkpoint file by file. The position of the data is added to it, then a manifest with the size and
hash of every file, last: a folder without a matching manifest was cut short and is passed over.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfpipe.core import peers, ranks, signals
from hfpipe.core.files import fault_in, hashes_of, load_json, write_json
from hfpipe.core.run_layout import EDITABLE
from hfpipe.core.upstream import loss_sums, set_loss_sums
from hfpipe.data.dataloader import BatchLoader

MANIFEST = "manifest.json"
DATA_STATE = "data_state.json"
LOSS = "loss_state.json"


def write_manifest(folder: Path, stage_hash: str) -> None:
    """Declares a checkpoint whole; `stage_hash` says of which stage it is."""
    write_json(folder / MANIFEST, {"stage": stage_hash, "files": hashes_of(folder, without=MANIFEST)})


def _manifest(folder: Path) -> dict[str, Any]:
    return load_json(folder / MANIFEST)


def version_of(folder: Path) -> str | None:
    """The version of a stage that a checkpoint belongs to, by its manifest; None where it has none."""
    try:
        return _manifest(folder).get("stage")
    except (OSError, ValueError, AttributeError):
        return None


def fault_of(folder: Path, versions: Collection[str]) -> str | None:
    """The reason why a checkpoint cannot be continued; None if it is whole and of one of its stage's versions."""
    try:
        manifest = _manifest(folder)
        stage, files = manifest["stage"], manifest["files"]
    except FileNotFoundError:
        return "it has no manifest: writing it was cut short"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    if stage not in versions:
        return "it belongs to another version of this stage"
    return fault_in(folder, files, EDITABLE)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def by_step(stage_folder: Path) -> list[Path]:
    """Checkpoint folders, the newest first."""
    found = [path for path in stage_folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def newest_whole(stage_folder: Path, versions: Collection[str], last_step: int) -> tuple[Path | None, list[str]]:
    """Finds the checkpoint to continue from.

    Args:
        stage_folder: `stages/<stage>`.
        versions: Whose checkpoints fit, by the hash in their manifest.
        last_step: Of the stage; later checkpoints are those of a longer version.

    Returns:
        The newest checkpoint that is whole, and a line on each newer one that was passed over.
    """
    passed_over: list[str] = []
    for folder in by_step(stage_folder):
        if step_of(folder) > last_step:
            continue
        fault = fault_of(folder, versions)
        if fault is None:
            return folder, passed_over
        passed_over.append(f"{folder.name} was passed over: {fault}")
    return None, passed_over


def running_loss(trainer: Trainer) -> dict[str, float]:
    """The sums of losses that a trainer has not logged yet, and has logged, which its own checkpoints lack."""
    sums = loss_sums(trainer)
    return sums | {"sum": fmean(ranks.gather(sums["sum"]))}


def restore_running_loss(trainer: Trainer, checkpoint: Path) -> None:
    """Gives a trainer that continues from a checkpoint the sums back, for the mean in the next line of the log."""
    if (checkpoint / LOSS).exists():
        set_loss_sums(trainer, load_json(checkpoint / LOSS))


class CheckpointCallback(TrainerCallback):
    """Completes every checkpoint, and stops at the end of a step once a signal has come.

    Old checkpoints are removed here, and not by Trainer, which removes them before the new one is whole.

    Args:
        trainer: Has the sums of the losses.
        loader: Its source knows the position in the data.
        stage_hash: The version of the stage.
        trajectory: What all versions share that a checkpoint can be continued by. One of these goes into the manifest.
        keep: Checkpoints to keep; None for all.
        minutes: A checkpoint is saved when so many have passed since the last one; None for never.
    """

    def __init__(
        self,
        trainer: Trainer,
        loader: BatchLoader,
        stage_hash: str,
        trajectory: str,
        keep: int | None,
        minutes: float | None = None,
    ) -> None:
        self.trainer, self.minutes = trainer, minutes
        self.saved_at = time.monotonic()
        self.loader, self.stage_hash, self.trajectory, self.keep = loader, stage_hash, trajectory, keep
        self.stopped_at: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        restore_running_loss(self.trainer, Path(args.output_dir or "") / f"checkpoint-{state.global_step}")
        self.loader.is_done = state.global_step >= state.max_steps or control.should_training_stop
        self.saved_at = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        signalled = signals.pending()
        due = self.minutes is not None and time.monotonic() - self.saved_at >= 60 * self.minutes
        if args.world_size > 1:  # one rank may hear of it a step before another, and all must stop at the same step
            flags = torch.tensor([signalled, due], dtype=torch.int32, device=args.device)
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
            signalled, due = map(bool, flags.tolist())
        if due:
            control.should_save = True
        if signalled:  # at the last step too: saving the model may take longer than what is left of the time
            self.stopped_at = state.global_step
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        states = ranks.gather(self.loader.source.state_dict())  # also waits for the files of every rank
        sums = running_loss(self.trainer)
        if args.should_save:
            write_json(folder / LOSS, sums)
            write_json(folder / DATA_STATE, self.loader.source.merge_states(states))
            # The last batch of an epoch may be filled with blank rows, and no longer run goes on from there.
            write_manifest(folder, self.trajectory if self.loader.source.goes_on else self.stage_hash)
            if self.keep is not None:
                best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else None
                for old in by_step(folder.parent)[max(self.keep, 1) :]:
                    if old.name != best:  # which early stopping goes back to
                        shutil.rmtree(old, ignore_errors=True)
        ranks.wait()
        peers.keep()
        self.saved_at = time.monotonic()
