"""Refuses a launch whose processes cannot work together: asked of the environment, before a library is imported."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from hfpipe.core.errors import MachineError, RecipeError

_NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")  # that a launcher writes


def require_ranks() -> None:
    """Refuses numbers of ranks in the environment that no launcher writes: a left-over would fail or wait for others.

    Raises:
        MachineError: One is no number, or they do not go together.
    """
    given = {name: os.environ[name] for name in _NUMBERS if os.environ.get(name)}
    wrong = [name for name, value in given.items() if not (value.isascii() and value.isdigit())]
    if not wrong and int(given.get("WORLD_SIZE", "1")) > 1 and "RANK" not in given:
        wrong = ["WORLD_SIZE"]
    if not wrong and int(given.get("RANK", "0")) >= int(given.get("WORLD_SIZE", "0")) > 0:
        wrong = ["RANK"]
    if wrong:
        told = ", ".join(f"{name}={value}" for name, value in given.items())
        os.environ.pop("RANK", None)  # which would keep all but the main process silent
        raise MachineError(
            f"the environment has {told}, which no launcher writes so: {wrong[0]} does not fit. Start several "
            "processes by `accelerate launch` or `torchrun`, and one without these variables (unset them)."
        )


def require_launch() -> None:
    """Refuses a launch that would hang, or that started fewer processes than were asked for.

    Raises:
        RecipeError: `accelerate launch` was asked for several processes and started one, as it does without a word.
        MachineError: On several machines, the name of this one leads to itself only.
    """
    world, local = (int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world == 1 and "RANK" not in os.environ and (asked := _asked_of_accelerate()) > 1:
        raise RecipeError(
            f"accelerate launch was asked for {asked} processes and started one: without GPUs it does so unless its "
            "config says how. Start it with --config_file recipes/accelerate/cpu.yaml (distributed_type: MULTI_GPU and "
            "use_cpu: true), or with --num_processes 1."
        )
    if world == local or "LOCAL_WORLD_SIZE" not in os.environ:
        return
    if _is_loopback(os.environ.get("MASTER_ADDR", "")):
        raise MachineError(
            f"the ranks are on several machines, and MASTER_ADDR is {os.environ['MASTER_ADDR']}, which is each machine "
            "itself. Give the address of the first machine in their network (--main_process_ip)."
        )
    if _is_loopback(socket.gethostname()) and not os.environ.get("GLOO_SOCKET_IFNAME"):
        raise MachineError(
            f"the name of this machine, {socket.gethostname()}, stands for 127.0.0.1 here, where ranks on other "
            "machines cannot reach it. Name the network interface that leads to them, such as "
            "GLOO_SOCKET_IFNAME=eth0 (and NCCL_SOCKET_IFNAME), or correct /etc/hosts."
        )


def _is_loopback(host: str) -> bool:
    with suppress(OSError):
        return bool(host) and socket.gethostbyname(host).startswith("127.")
    return False


def _asked_of_accelerate() -> int:
    """The number of processes that the `accelerate launch` which started this one was asked for; 1 if unknown."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        return 1
    if not any("accelerate" in word for word in words[:3]):
        return 1
    import yaml

    given: dict[str, str] = {}
    for number, word in enumerate(words[:-1]):
        name, _, value = word.partition("=")
        given.setdefault(name.replace("-", "_"), value or words[number + 1])
    with suppress(OSError, ValueError, yaml.YAMLError):
        if "__num_processes" in given:
            return int(given["__num_processes"])
        config = yaml.safe_load(Path(given.get("__config_file", os.devnull)).read_text())
        return int((config or {}).get("num_processes") or 1)
    return 1
