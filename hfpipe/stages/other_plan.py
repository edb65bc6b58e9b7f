"""Continues a stage from a checkpoint of another plan: saved in parts and read whole, or the other way round."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
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
from transformers import Trainer
from transformers.trainer import FSDP_MODEL_NAME, OPTIMIZER_NAME, SCHEDULER_NAME

from hfpipe.core import ranks
from hfpipe.core.errors import MachineError
from hfpipe.core.upstream import read_checkpoint_by
from hfpipe.model.classifier import is_classifier, read_head
from hfpipe.model.load import load_model
from hfpipe.model.spread import is_spread
from hfpipe.stages.context import StageRun

WEIGHTS, OPTIMIZER = f"{FSDP_MODEL_NAME}_0", "optimizer_0"  # accelerate's folders of parts


def read_across(run: StageRun, trainer: Trainer, checkpoint: Path) -> None:
    """Has a trainer read a checkpoint that was saved under another plan than that of this launch.

    Raises:
        MachineError: It was saved whole under FSDP (quantized weights are), or this launch divides weights that it has
            read whole.
    """
    in_parts, spread = (checkpoint / WEIGHTS).is_dir(), is_spread(trainer.model)
    whole_of_fsdp = (checkpoint / f"{FSDP_MODEL_NAME}.bin").exists()
    if (whole_of_fsdp and (spread or not trainer.is_fsdp_enabled)) or (
        trainer.is_fsdp_enabled and not spread and not whole_of_fsdp
    ):
        raise MachineError(
            f"stages.{run.stage.name}: {checkpoint.name} was saved under another plan of FSDP than this launch has "
            "(a model that is quantized, or that writes texts of its own, is read whole and divided later). Start the "
            f"run as before, on any number of ranks. Or move {checkpoint} away: the checkpoint before it is used then."
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
        set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
        return
    head = read_head(checkpoint) if is_classifier(model) else None
    saved = replace(run.parent, path=str(checkpoint), revision=None)
    read = load_model(saved, frozen=False, head=head, spread=True).state_dict()
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
    elif any(isinstance(one, DTensor) for group in optimizer.param_groups for one in group["params"]):
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        whole = _by_name(model, optimizer, checkpoint / OPTIMIZER_NAME) if ranks.is_main() else {}
        set_optimizer_state_dict(model, optimizer, whole, options=options)
    else:
        optimizer.load_state_dict(torch.load(checkpoint / OPTIMIZER_NAME, map_location="cpu", weights_only=True))
    trainer.lr_scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER_NAME, weights_only=True))


def _by_name(model: Any, optimizer: Any, path: Path) -> dict[str, Any]:
    """Returns the state of an optimizer, which numbers its parameters, by their names.

    Both optimizers hold the parameters in one order: Trainer made them in the same way.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(one)] for group in optimizer.param_groups for one in group["params"]]
    saved = torch.load(path, map_location="cpu", weights_only=True)
    groups = [group | {"params": [order[number] for number in group["params"]]} for group in saved["param_groups"]]
    return {"state": {order[number]: state for number, state in saved["state"].items()}, "param_groups": groups}
