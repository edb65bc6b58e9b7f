"""Tells what a bug report needs: `hfpipe env`. No secret is in it, and one broken library hides nothing else.

Imports nothing heavy itself: whoever reports that torch cannot be imported needs this page most.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path

from hfpipe.core.files import GIB
from hfpipe.core.secrets import own_tokens, without_secrets
from hfpipe.core.version import __version__

# Variables whose value is harmless and changes what a run does; of others of these families only the name is told.
SHOWN = (
    *(
        "HF_HUB_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "HF_HUB_DISABLE_XET",
        "HF_HUB_ENABLE_HF_TRANSFER",
        "TRANSFORMERS_OFFLINE",
    ),
    *(
        "CUDA_VISIBLE_DEVICES",
        "PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_ALLOC_CONF",
        "OMP_NUM_THREADS",
        "TOKENIZERS_PARALLELISM",
    ),
    *("WORLD_SIZE", "LOCAL_RANK", "RANK", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP"),
    *("NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"),
)
FAMILY = re.compile(
    r"^(HF_|HUGGING_FACE_|TRANSFORMERS_|DATASETS_|ACCELERATE_|NCCL_|GLOO_|CUDA_|PYTORCH_|TORCH_|WANDB_)"
)
BESIDE = ("bitsandbytes", "datasketch", "codecarbon", "lm_eval", "liger-kernel", "flash-attn", "deepspeed", "kernels")


def bug_report() -> str:
    """The page, one fact a line; tokens, passwords and the user's home are made unreadable."""
    facts: list[tuple[str, Callable[[], str | None]]] = [
        ("hfpipe", _hfpipe),
        ("python", lambda: f"{platform.python_version()} ({sys.executable})"),
        ("system", lambda: f"{platform.platform()}, {os.cpu_count()} CPUs"),
        ("memory", _memory),
        ("disk", lambda: f"{shutil.disk_usage(Path.cwd()).free / GIB:.0f} GiB free here"),
        ("torch", _torch),
        ("gpus", _gpus),
        ("driver", _driver),
        ("packages", _packages),
        ("hub", _hub),
        ("variables", _variables),
    ]
    lines = [f"{name:10} {found}" for name, ask in facts if (found := _asked(ask))]
    return without_secrets("\n".join(lines).replace(str(Path.home()), "~"))


def _asked(ask: Callable[[], str | None]) -> str | None:
    try:
        return ask()
    except Exception as error:  # whatever is broken is what the report is about
        return f"not known: {type(error).__name__}: {str(error)[:300]}"


def _hfpipe() -> str:
    place = Path(__file__).absolute().parents[1]
    try:
        commit = subprocess.run(
            ["git", "-C", str(place), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    checkout = (place.parent / "pyproject.toml").is_file()
    return f"{__version__} ({place}{f', commit {commit}' if checkout and commit else ''})"


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB free"


def _torch() -> str:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    hip = f", ROCm {torch.version.hip}" if torch.version.hip else ""
    return f"{torch.__version__}, built for {built}{hip}"


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use"
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return ", ".join(f"{one.name} {one.total_memory / GIB:.0f} GiB (sm_{one.major}{one.minor})" for one in found)


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.split()
    return said[0] if said else None


def _packages() -> str:
    return ", ".join(f"{name} {found}" for name, found in _versions())


def _versions() -> Iterator[tuple[str, str]]:
    """The packages that hfpipe needs or uses, with their versions; those that are missing too."""
    try:
        needed = [re.split(r"[\s<>=!~;\[]", one)[0] for one in requires("hfpipe") or () if "extra ==" not in one]
    except PackageNotFoundError:  # a checkout that is not installed
        needed = ["accelerate", "datasets", "evaluate", "huggingface_hub", "peft", "torch", "transformers", "trl"]
    for name in dict.fromkeys([*sorted(needed), "tokenizers", "safetensors", "pyarrow"]):
        try:
            yield name, version(name) + _editable(name)
        except PackageNotFoundError:
            yield name, "MISSING"
    for name in BESIDE:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _editable(name: str) -> str:
    """Says of a package that was not installed from an index where it comes from: such a one may hold anything."""
    url = distribution(name).read_text("direct_url.json")
    return " (from a file or a repository)" if url else ""


def _hub() -> str:
    endpoint = os.environ.get("HF_ENDPOINT")
    at = " at another address than huggingface.co (HF_ENDPOINT)" if endpoint else ""
    return f"{'logged in' if own_tokens() else 'not logged in'}{at}"


def _variables() -> str | None:
    found = [f"{name}={os.environ[name]}" for name in SHOWN if name in os.environ]
    names = sorted(name for name in os.environ if FAMILY.match(name) and name not in SHOWN)
    return "; ".join([*found, *(f"{name} is set" for name in names)]) or None
