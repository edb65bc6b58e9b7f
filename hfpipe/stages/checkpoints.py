"""Checkpoints that count only when they are whole, the position in the data, and stopping on a signal.

Trainer writes a checkpoint file by file. The position of the data is added to it, then a manifest with the size and
hash of every file, last: a folder without a matching manifest was cut short and is passed over. A checkpoint of
another plan of the launch (saved in parts and read whole, or the other way round) is read by `read_across`.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from heapq import heapify, heapreplace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import FSDP_MODEL_NAME, OPTIMIZER_NAME, SCHEDULER_NAME

from hfpipe.core import peers, ranks, signals
from hfpipe.core.errors import MachineError
from hfpipe.core.files import fault_in, hash_of_file, load_json, write_json
from hfpipe.core.run_layout import EDITABLE
from hfpipe.core.upstream import loss_sums, read_checkpoint_by, set_loss_sums
from hfpipe.data.dataloader import BatchLoader
from hfpipe.model.classifier import is_classifier, read_head
from hfpipe.model.load import load_model
from hfpipe.model.spread import is_spread
from hfpipe.stages.stage_run import StageRun

MANIFEST = "manifest.json"
DATA_STATE = "data_state.json"
LOSS = "loss_state.json"
# The rank that wrote a file: of torch's distributed checkpoint, DeepSpeed's states, Trainer's random states.
BY_RANK = re.compile(r"(?:/__|zero_pp_rank_|^rng_state_)(\d+)[_.]")
WEIGHTS, OPTIMIZER = f"{FSDP_MODEL_NAME}_0", "optimizer_0"  # accelerate's folders of parts


def write_manifest(folder: Path, stage_hash: str) -> None:
    """Declares a checkpoint whole; `stage_hash` says of which stage it is. Every rank has to call this."""
    mine = shared_out(ranks.on_main(lambda: sizes_of(folder)), ranks.ranks())[ranks.rank()]
    found = ranks.each(lambda: {name: [size, hash_of_file(folder / name)] for name, size in mine.items()})
    files = {name: facts for part in found for name, facts in part.items()}
    if ranks.is_main():
        write_json(folder / MANIFEST, {"stage": stage_hash, "files": dict(sorted(files.items()))})


def sizes_of(folder: Path) -> dict[str, int]:
    """Bytes of every file of a checkpoint, by its path there."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def shared_out(sizes: Mapping[str, int], count: int) -> list[dict[str, int]]:
    """Shares out the files of a checkpoint to the ranks: to each those that it wrote, of the others about as much.

    Args:
        sizes: Bytes by name.
        count: Number of ranks.
    """
    shares: list[dict[str, int]] = [{} for _ in range(count)]
    rest: dict[str, int] = {}
    for name, size in sizes.items():
        rank = int(named[1]) if (named := BY_RANK.search(name)) else count
        (shares[rank] if rank < count else rest)[name] = size
    loads = [(sum(share.values()), rank) for rank, share in enumerate(shares)]
    heapify(loads)
    for name, size in sorted(rest.items(), key=lambda one: (-one[1], one[0])):
        load, rank = loads[0]
        shares[rank][name] = size
        heapreplace(loads, (load + size, rank))
    return shares


def _manifest(folder: Path) -> dict[str, Any]:
    return load_json(folder / MANIFEST)


def version_of(folder: Path) -> str | None:
    """The version of a stage that a checkpoint belongs to, by its manifest; None where it has none."""
    try:
        return _manifest(folder).get("stage")
    except (OSError, ValueError, AttributeError):
        return None


def fault_of(folder: Path, versions: Collection[str]) -> str | None:
    """The reason why a checkpoint cannot be continued; None if it is whole and of one of its stage's versions.

    Every rank has to call this: each reads its share of the files.
    """
    files, fault = ranks.on_main(lambda: _listed(folder, versions))
    if fault is not None:
        return fault
    whole = {name: facts for name, facts in files.items() if isinstance(facts, list) and len(facts) == 2}
    sizes = {name: size for name, (size, _) in whole.items() if isinstance(size, int)}
    mine = shared_out(dict.fromkeys(files, 0) | sizes, ranks.ranks())  # a manifest may be spoilt
    faults = ranks.each(lambda: fault_in(folder, {name: files[name] for name in mine[ranks.rank()]}, EDITABLE))
    return next(filter(None, faults), None)


def _listed(folder: Path, versions: Collection[str]) -> tuple[dict[str, list[Any]], str | None]:
    """The files that a manifest lists; and why they do not count, whatever is in them."""
    try:
        manifest = _manifest(folder)
        stage, files = manifest["stage"], dict(manifest["files"])
    except FileNotFoundError:
        return {}, "it has no manifest: writing it was cut short"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, "its manifest cannot be read"
    return files, None if stage in versions else "it belongs to another version of this stage"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def by_step(stage_folder: Path) -> list[Path]:
    """Checkpoint folders, the newest first."""
    found = [path for path in stage_folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def newest_whole(stage_folder: Path, versions: Collection[str], last_step: int) -> tuple[Path | None, list[str]]:
    """Finds the checkpoint to continue from. Every rank has to call this.

    Args:
        stage_folder: `stages/<stage>`.
        versions: Whose checkpoints fit, by the hash in their manifest.
        last_step: Of the stage; later checkpoints are those of a longer version.

    Returns:
        The newest checkpoint that is whole, and a line on each newer one that was passed over.
    """
    passed_over: list[str] = []
    for folder in ranks.from_main(by_step(stage_folder)):
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
        # The last batch of an epoch may be filled with padding rows, and no longer run goes on from there.
        write_manifest(folder, self.trajectory if self.loader.source.goes_on else self.stage_hash)
        if args.should_save and self.keep is not None:
            best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else None
            for old in by_step(folder.parent)[max(self.keep, 1) :]:
                if old.name != best:  # which early stopping goes back to
                    shutil.rmtree(old, ignore_errors=True)
        ranks.wait()
        peers.keep()
        self.saved_at = time.monotonic()


def read_across(run: StageRun, trainer: Trainer, checkpoint: Path) -> None:
    """Has a trainer read a checkpoint that was saved under another plan than that of this launch.

    Raises:
        MachineError: It was saved whole under FSDP (of quantized files it is), this launch divides weights that it has
            read whole, or it is DeepSpeed's, which continues on as many ranks alone.
    """
    saved = list(checkpoint.glob("global_step*"))  # DeepSpeed's folder
    count = len([file for folder in saved for file in folder.glob("*zero_pp_rank_*_optim_states.pt")])  # of each rank
    if bool(saved) != trainer.is_deepspeed_enabled or count not in (0, ranks.ranks()):
        before = f"DeepSpeed on {max(1, count)} rank(s)" if saved else "no DeepSpeed"
        now = f"{'DeepSpeed' if trainer.is_deepspeed_enabled else 'no DeepSpeed'} on {ranks.ranks()} rank(s)"
        raise MachineError(
            f"stages.{run.stage.name}: {checkpoint.name} was saved by a launch with {before}, and this one has {now}; "
            "such a checkpoint is continued as it was saved. Start the run as before. Or move "
            f"{checkpoint} away: the checkpoint before it is used then."
        )
    in_parts, spread = (checkpoint / WEIGHTS).is_dir(), is_spread(trainer.model)
    whole_of_fsdp = (checkpoint / f"{FSDP_MODEL_NAME}.bin").exists()
    if (whole_of_fsdp and (spread or not trainer.is_fsdp_enabled)) or (
        trainer.is_fsdp_enabled and not spread and not whole_of_fsdp
    ):
        raise MachineError(
            f"stages.{run.stage.name}: {checkpoint.name} was saved under another plan of FSDP than this launch has "
            "(a model of quantized files is read whole and divided later). Start the run as before, on any number of "
            f"ranks. Or move {checkpoint} away: the checkpoint before it is used then."
        )
    rest = partial(_rest, trainer, checkpoint)
    if in_parts and not spread:
        read_checkpoint_by(trainer, partial(_weights_of_parts, trainer, checkpoint), rest)
    elif spread and not in_parts:
        read_checkpoint_by(trainer, partial(_parts_of_weights, run, trainer, checkpoint), rest)


def _model(trainer: Trainer) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def _weights_of_parts(trainer: Trainer, checkpoint: Path) -> None:
    """Reads weights that were saved in parts into a whole model."""
    model = _model(trainer)
    state = get_peft_model_state_dict(model) if hasattr(model, "peft_config") else model.state_dict()
    dcp.load({"model": state}, storage_reader=dcp.FileSystemReader(checkpoint / WEIGHTS))
    if hasattr(model, "peft_config"):
        set_peft_model_state_dict(model, state)
    else:
        model.load_state_dict(state)


@torch.no_grad()
def _parts_of_weights(run: StageRun, trainer: Trainer, checkpoint: Path) -> None:
    """Reads each rank's part of weights that were saved whole."""
    model = _model(trainer)
    if hasattr(model, "peft_config"):
        own, saved = model.state_dict(), load_file(checkpoint / "adapter_model.safetensors")
        # PEFT saves embeddings that have grown, and are not trained, too.
        trained = {name: whole for name, whole in saved.items() if not isinstance(own.get(name), DTensor)}
        set_peft_model_state_dict(model, trained)
        return
    head = read_head(checkpoint) if is_classifier(model) else None
    parent = replace(run.parent, path=str(checkpoint), revision=None)
    read = load_model(parent, frozen=False, head=head, spread=True).state_dict()
    for name, part in model.state_dict().items():
        part.copy_(read[name])


def _rest(trainer: Trainer, checkpoint: Path) -> None:
    """Reads the state of the optimizer, whole or in parts, and that of the schedule."""
    optimizer, model = trainer.optimizer, _model(trainer)
    assert optimizer is not None
    assert trainer.lr_scheduler is not None
    if (checkpoint / OPTIMIZER).is_dir():
        state = get_optimizer_state_dict(model, optimizer)
        dcp.load({"optimizer": state}, storage_reader=dcp.FileSystemReader(checkpoint / OPTIMIZER))
        set_optimizer_state_dict(model, optimizer, state)
    else:
        spread = any(isinstance(one, DTensor) for group in optimizer.param_groups for one in group["params"])
        saved = torch.load(checkpoint / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=spread)
        if spread and saved["state"]:  # plain SGD has none, which torch cannot spread
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            whole = _by_name(model, optimizer, saved) if ranks.is_main() else {}
            set_optimizer_state_dict(model, optimizer, whole, options=options)
        else:
            optimizer.load_state_dict(saved)
    trainer.lr_scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER_NAME, weights_only=True))


def _by_name(model: Any, optimizer: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """Returns the state of an optimizer, which numbers its parameters, by their names.

    Both optimizers hold the parameters in one order: Trainer made them in the same way.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(one)] for group in optimizer.param_groups for one in group["params"]]
    groups = [group | {"params": [order[number] for number in group["params"]]} for group in saved["param_groups"]]
    return {"state": {order[number]: state for number, state in saved["state"].items()}, "param_groups": groups}
