"""Accelerate's process state, in the few words that hfpipe needs.

The state is asked anew each time because `TrainingArguments` resets it when it is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from hfpipe.errors import UserError

Found = TypeVar("Found")


def state() -> PartialState:
    """This launch as accelerate sees it; without an accelerator the ranks meet over gloo, if they are told to."""
    return PartialState(cpu=not torch.accelerator.is_available())


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
    """What the main process finds, on every rank; if that is a `UserError`, every rank raises it."""
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


def say(text: str = "") -> None:
    """Prints a line, once however many ranks there are."""
    if is_main():
        print(text, flush=True)
