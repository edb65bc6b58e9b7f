"""Accelerate's process state, in the few words that hfpipe needs.

The state is asked anew each time because `TrainingArguments` resets it when it is built.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

from hfpipe.core import display, peers
from hfpipe.core.errors import MachineError, UserError
from hfpipe.core.upstream import default_store

Found = TypeVar("Found")


def state() -> PartialState:
    """This launch as accelerate sees it; without an accelerator the ranks meet over gloo, if they are told to."""
    return _opened()


def _opened(lost_after: float = peers.LOST_AFTER, **options: Any) -> PartialState:
    found = PartialState(cpu=on_cpu() or not torch.accelerator.is_available(), **options)
    if found.num_processes > 1:
        store = default_store()
        peers.join(store, found.process_index, found.num_processes, lost_after)
    return found


def on_cpu() -> bool:
    """Returns True if the launch asks for the CPU (`use_cpu: true` of its file) where there may be an accelerator."""
    return parse_flag_from_env("ACCELERATE_USE_CPU")


def rank() -> int:
    return state().process_index


def ranks() -> int:
    return state().num_processes


def is_main() -> bool:
    return state().is_main_process


def open_group(timeout_seconds: float, lost_after: float) -> None:
    """Lets the ranks find each other. Later calls do nothing.

    Args:
        timeout_seconds: A collective call waits at most so long.
        lost_after: Seconds within which every rank ends once one is lost.

    Raises:
        MachineError: The launch has several ranks, and this process sees itself alone.
    """
    _opened(lost_after, timeout=timedelta(seconds=timeout_seconds))
    asked = int(os.environ.get("WORLD_SIZE") or 1)
    if asked != ranks():
        raise MachineError(f"the launch has {asked} ranks, and {ranks()} of them found each other. Start it again.")


def wait() -> None:
    """Waits until every rank is here, outside of a collective call, which is given up on after `ddp_timeout`.

    Raises:
        LostRank: A rank has failed, or is gone.
    """
    if ranks() > 1:
        peers.meet()


@contextmanager
def main_first() -> Iterator[None]:
    """Lets the main process do a piece of work before the others, such as a download that they then find."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def require_shared(folder: Path) -> None:
    """Refuses a run folder that not every rank sees.

    Raises:
        MachineError: It lies on another disk for some of them.
    """
    if ranks() == 1:
        return
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / from_main(f".ranks-{os.getpid()}-{time.time_ns()}")
    if is_main():
        probe.touch()
    wait()
    for _ in range(100):  # a network file system may show a new file seconds later
        if found := probe.exists():
            break
        time.sleep(0.1)
    told = gather((found, socket.gethostname()))
    if is_main():
        probe.unlink()
    blind = [f"rank {number} on {host}" for number, (sees, host) in enumerate(told) if not sees]
    if blind:
        raise peers.of_all(
            MachineError(
                f"the run folder {folder} is not the same on every machine: {', '.join(blind)} cannot see what rank 0 "
                "writes there. Put it on a disk that all machines share (`output_dir`)."
            )
        )


def gather(value: Any) -> list[Any]:
    """The values of all ranks in rank order, on every rank."""
    wait()
    return gather_object([value]) if ranks() > 1 else [value]


def from_main(value: Any) -> Any:
    """The main process's value, on every rank."""
    wait()
    return broadcast_object_list([value])[0] if ranks() > 1 else value


def on_main(ask: Callable[[], Found]) -> Found:
    """Returns on every rank the value that the main process finds; if that is a `UserError`, every rank raises it."""
    found: Any = None
    if is_main():
        try:
            found = ask()
        except UserError as error:
            found = error
    found = from_main(found)
    if isinstance(found, UserError):
        raise peers.of_all(found)
    return found


def each(work: Callable[[], Found]) -> list[Found]:
    """Returns on every rank the values that all ranks find, in rank order; one of them may take any time.

    An error of one rank ends it, and with it the others.
    """
    return gather(work())


def say(text: str = "", kind: str = "line") -> None:
    """Says a line, once however many ranks there are; see `display.say`."""
    if is_main():
        display.say(text, kind)
