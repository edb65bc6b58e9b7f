"""Runs hfpipe under FSDP2 on CPU ranks over gloo; accelerate itself turns FSDP off where it finds no accelerator.

    torchrun --nproc-per-node 2 tests/fsdp_on_cpu.py run RECIPE

Its state is told that the ranks are of the kind that may shard. `PEAKS=FOLDER` has each rank leave its peak of memory.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate.state import DistributedType, PartialState

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


def set_device(state: PartialState) -> None:
    if state.device is None:
        state.device = torch.device("cpu")


def as_if_on_gpus(
    state: PartialState, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None
) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def main() -> int:
    torch.distributed.init_process_group("gloo")
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
