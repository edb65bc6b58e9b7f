"""Accelerate's process state, in the few words that hfpipe needs.

`PartialState` is asked anew each time because `TrainingArguments` resets it when it is built.
"""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object


def rank() -> int:
    return PartialState().process_index


def ranks() -> int:
    return PartialState().num_processes


def is_main() -> bool:
    return PartialState().is_main_process


def wait() -> None:
    """Waits until every rank is here."""
    PartialState().wait_for_everyone()


def gather(value: Any) -> list[Any]:
    """The values of all ranks in rank order, on every rank."""
    return gather_object([value])


def from_main(value: Any) -> Any:
    """The main process's value, on every rank."""
    return broadcast_object_list([value])[0] if ranks() > 1 else value


def say(text: str = "") -> None:
    """Prints a line, once however many ranks there are."""
    if is_main():
        print(text, flush=True)
