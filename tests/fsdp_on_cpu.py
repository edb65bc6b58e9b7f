"""Runs hfpipe under FSDP2 on CPU ranks over gloo; accelerate itself turns FSDP off where it finds no accelerator.

    torchrun --nproc-per-node 2 tests/fsdp_on_cpu.py run RECIPE

Its state is told that the ranks are of the kind that may shard. `PEAKS=FOLDER` has each rank leave its peak of memory.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.commands import launch
from accelerate.state import DistributedType, PartialState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

SHIPPED = Path(__file__).parent.parent / "recipes" / "accelerate"

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_USE_CPU": "true",
}


def environment_of(file: str, *words: str) -> dict[str, str]:
    """The plan that `accelerate launch` gives its ranks from a shipped file and more of its words."""
    options = ["--config_file", str(SHIPPED / file), "--main_process_port", "0", *words]
    arguments = launch.launch_command_parser().parse_args([*options, "-m", "hfpipe", "run", "recipe.yaml"])
    started: list[tuple[Callable[..., Any], Any]] = []
    with (
        patch.object(launch, "multi_gpu_launcher", lambda read: started.append((prepare_multi_gpu_env, read))),
        patch.object(launch, "deepspeed_launcher", lambda read: started.append((prepare_deepspeed_cmd_env, read))),
    ):
        launch.launch_command(arguments)
    ((prepare, read),) = started
    found = prepare(read)
    environment = found[1] if prepare is prepare_deepspeed_cmd_env else found
    names = ("ACCELERATE_", "FSDP_", "PARALLELISM_")
    return {name: value for name, value in environment.items() if name.startswith(names)}


def set_device(state: PartialState) -> None:
    if state.device is None:
        state.device = torch.device("cpu")


def as_if_on_gpus(
    state: PartialState, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None
) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def main() -> int:
    torch.distributed.init_process_group("gloo")
    torch.Tensor.pin_memory = lambda tensor: tensor  # where CPU offload keeps its parts
    for name, function in {"_prepare_backend": as_if_on_gpus, "set_device": set_device}.items():
        setattr(PartialState, name, function)
    from hfpipe.cli import main as command

    code = command()
    if folder := os.environ.get("PEAKS"):
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM:"))
        Path(folder, os.environ["RANK"]).write_text(str(int(peak.split()[1]) * 1024))
    return code


if __name__ == "__main__":
    sys.exit(main())
