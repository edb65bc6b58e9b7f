"""The command line. Each command imports what it needs when it runs: `--help` and `check --fast` are instant."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

from hfpipe.cli.parser import build_parser
from hfpipe.core import display, ending, peers, signals
from hfpipe.core.errors import UserError
from hfpipe.core.launch import require_ranks
from hfpipe.core.machine import machine_error
from hfpipe.core.output import forgive_closed_pipes
from hfpipe.core.secrets import without_secrets


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code (see `hfpipe.core.errors`)."""
    with signals.watched():
        forgive_closed_pipes()
        try:
            code = signals.finish(_run_command(arguments))
            display.event("end", exit_code=code)
        finally:
            display.close()
        ending.record(code)
        return code


def _run_command(arguments: Sequence[str] | None) -> int:
    try:
        options = build_parser().parse_args(arguments)
        require_ranks()
        for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # imported, they warn of what they can spare
            logging.getLogger(name).setLevel(logging.ERROR)
        display.start(options.voice)
        options.command(options)
        display.clear()
        if sys.stdout is not None:
            sys.stdout.flush()  # or a full disk would be told behind the last line of Python
        _part()
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        if not isinstance(error, UserError):
            with suppress(KeyboardInterrupt):
                signals.heed()  # it went to a whole group of processes, and a compiler or a worker ended of it first
        if signals.exit_code() is not None:  # a library has made another error of the interruption
            return _interrupted()
        with signals.held():  # a launcher stops the other ranks at once, and they have something to say
            return _tell(error)
    return 0


def _interrupted() -> int:
    display.clear()
    if found := peers.is_lost():  # the launcher ends all ranks once one is gone
        with signals.held():
            return _tell(found)
    signals.tell()
    peers.leave(last=False)
    return signals.exit_code() or 130


def _tell(error: Exception) -> int:
    """Says what went wrong, with the rank where it is not the main one, and returns the exit code."""
    known = error if isinstance(error, UserError) else machine_error(error) or _lost_rank(error)
    text = without_secrets(str(known or error))
    display.clear()
    code = 1 if known is None else known.exit_code
    if not peers.fail(known or error, text, code) and known is not None:
        return code
    rank = os.environ.get("RANK", "0")
    who = "hfpipe" if rank == "0" else f"hfpipe: rank {rank}"
    if known is None:
        print(without_secrets("".join(traceback.format_exception(error))), file=sys.stderr)
        text = "this is a fault of hfpipe, not of your recipe; please report it with the lines above"
    display.event("error", text=text, exit_code=code)
    print(f"{who}: {text}", file=sys.stderr, flush=True)
    return code


def _lost_rank(error: Exception) -> UserError | None:
    """The error of a collective call whose peer is lost, in words; None where an error is about something else."""
    if not peers.has_joined():
        return None
    signs = ("gloo/transport", "[c10d]", "NCCL")
    if type(error).__name__.startswith("Dist") or any(sign in str(error) for sign in signs):
        return peers.lost(str(error).split("\n")[0][:200])
    return None


def _part() -> None:
    """Ends what the ranks spoke through: its threads can abort a process that exits while they run."""
    peers.leave()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
