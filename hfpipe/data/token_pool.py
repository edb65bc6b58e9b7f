"""Rows tokenized over all cores: the Rust tokenizer takes them all by itself, and chat templates are Python's."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

from hfpipe.core.errors import MachineError
from hfpipe.data.text_tokens import TokenRows
from hfpipe.data.tokenize import RowTokenizer

Rows = list[dict[str, Any]]
ALONE = 20_000  # conversations that this process tokenizes by itself, as long as it takes to start others
AHEAD = 2  # blocks that wait for each process


def encoded(
    tokenizer: RowTokenizer, blocks: Iterable[Rows], processes: int | None = None
) -> Iterator[tuple[Rows, TokenRows]]:
    """Yields blocks of rows with their tokens, in order; the tokens do not depend on the processes.

    Args:
        tokenizer: Tokenizes them.
        blocks: The rows of a source.
        processes: Processes for conversations; all cores when absent.

    Raises:
        DataError: As `RowTokenizer`.
        MachineError: A process was ended from outside.
    """
    count = processes or len(os.sched_getaffinity(0))
    rows, left = 0, iter(blocks)
    some = False
    for block in left:
        made = tokenizer.anew().encode(block, refuse=not some)
        some = some or len(made.refused) < len(block)
        yield block, made
        rows += len(block)
        if rows >= ALONE and count > 1 and "messages" in block[0]:
            yield from _spread(tokenizer, left, count)


def _spread(tokenizer: RowTokenizer, blocks: Iterator[Rows], count: int) -> Iterator[tuple[Rows, TokenRows]]:
    """Yields blocks with their tokens, made by so many processes."""
    pool = ProcessPoolExecutor(count, get_context("spawn"), _begin, (tokenizer,))
    waiting: deque[tuple[Rows, Future[TokenRows]]] = deque()
    try:
        for block in blocks:
            waiting.append((block, pool.submit(_encode, block)))
            if len(waiting) >= AHEAD * count:
                first, made = waiting.popleft()
                yield first, made.result()
        for first, made in waiting:
            yield first, made.result()
    except BrokenProcessPool as error:
        raise MachineError(
            "a process that tokenizes was ended from outside, most often for memory. Run again with more memory free, "
            "or with fewer cores (`taskset -c 0,1 hfpipe ...`)."
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_tokenizer: RowTokenizer  # of such a process


def _begin(tokenizer: RowTokenizer) -> None:
    """Prepares a process, which ends with its parent and leaves signals to it."""
    global _tokenizer
    _tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=follow, daemon=True).start()


def _encode(block: Rows) -> TokenRows:
    return _tokenizer.anew().encode(block, refuse=False)
