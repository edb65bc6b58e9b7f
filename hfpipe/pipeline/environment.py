"""The versions, hardware and launch of a run, for environment.json; no variable's value, so no secret."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from hfpipe.core import ranks
from hfpipe.core.version import __version__
from hfpipe.evaluation.metrics import space_of
from hfpipe.model.load import ModelRef
from hfpipe.recipe import Suite

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


def environment(base: ModelRef, suites: Mapping[str, Suite]) -> dict[str, Any]:
    """The facts that someone needs who wants the same numbers again."""
    state = ranks.state()
    return {
        "hfpipe": __version__,
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
        "remote_metrics": _remote_metrics(suites),
        "git_commit": _git_commit(),
    }


def _remote_metrics(suites: Mapping[str, Suite]) -> list[str]:
    """The Spaces of the Hub, with their commit, whose code measured something on this machine."""
    options = {name: suite.metric_options.get(name) or {} for suite in suites.values() for name in suite.metrics}
    spaces = {name: space for name in options if (space := space_of(name))}
    return [f"{space}@{options[name].get('revision') or 'main'}" for name, space in spaces.items()]


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
