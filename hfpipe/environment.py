"""What a run ran on: versions, hardware, launch. It goes into environment.json; no variable's value, so no secret."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import hfpipe
from hfpipe import ranks
from hfpipe.model.load import ModelRef

PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "evaluate",
    "huggingface_hub",
    "numpy",
    "peft",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
)


def environment(base: ModelRef) -> dict[str, Any]:
    """The facts that someone needs who wants the same numbers again."""
    state = ranks.state()
    return {
        "hfpipe": hfpipe.__version__,
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "hardware": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpus": os.cpu_count(),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
        "launch": {"processes": state.num_processes, "distributed_type": str(state.distributed_type.value)},
        "base": {"id": base.path, "revision": base.revision},
        "trust_remote_code": base.options.trust_remote_code,
        "git_commit": _git_commit(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the project the run was started in."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
