"""Accelerate's process state, in the few words that hfpipe needs.

The state is asked anew each time because `TrainingArguments` resets it when it is built.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

from hfpipe.core.errors import UserError

Found = TypeVar("Found")
EXCHANGE_SECONDS = 60.0


def state() -> PartialState:
    """This launch as accelerate sees it; without an accelerator the ranks meet over gloo, if they are told to."""
    return PartialState(cpu=on_cpu() or not torch.accelerator.is_available())


def on_cpu() -> bool:
    """Returns True if the launch asks for the CPU (`use_cpu: true` of its file) where there may be an accelerator."""
    return parse_flag_from_env("ACCELERATE_USE_CPU")


def rank() -> int:
    return state().process_index


def ranks() -> int:
    return state().num_processes


def is_main() -> bool:
    return state().is_main_process


def wait() -> None:
    """Waits until every rank is here."""
    state().wait_for_everyone()


def gather(value: Any) -> list[Any]:
    """The values of all ranks in rank order, on every rank."""
    return gather_object([value]) if ranks() > 1 else [value]


def from_main(value: Any) -> Any:
    """The main process's value, on every rank."""
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
        raise found
    return found


def each(work: Callable[[], Found]) -> list[Found]:
    """Returns on every rank the values that all ranks find, in rank order; one of them may take any time.

    Whoever waits in a collective call is given up on after minutes (600 s with NCCL). So the work goes on in a thread
    beside, and the ranks tell each other every `EXCHANGE_SECONDS` who is done. An error of one is raised there and a
    `UserError` on every rank, instead of a wait for the one that is gone.
    """
    if ranks() == 1:
        return [work()]
    result: list[Any] = []

    def run() -> None:
        try:
            result.append((work(), None))
        except BaseException as error:  # raised again below
            result.append((None, error))

    thread = Thread(target=run, name="work of a rank", daemon=True)
    thread.start()
    while True:
        thread.join(EXCHANGE_SECONDS)
        value, error = result[0] if result else (None, None)
        if error is not None and not isinstance(error, UserError):
            raise error
        said = gather((bool(result), value, error))
        for _, _, other in said:
            if other is not None:
                raise other
        if all(done for done, _, _ in said):
            return [found for _, found, _ in said]


def say(text: str = "") -> None:
    """Prints a line, once however many ranks there are."""
    if is_main():
        print(text, flush=True)
