"""Builds windows ahead of their use in background threads, so that the stream runs while the model trains."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")
LAST_BUILD_SECONDS = 10.0  # how long `close` waits for what is being built
MOST_THREADS = 8  # more would wait for the interpreter's lock, for the part that is Python
RUST_THREADS = "TOKENIZERS_PARALLELISM"


def cores() -> int:
    """The processor's cores for this rank."""
    return max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


class Prefetch(Generic[T]):
    """Keeps one result of each builder ready: taking it asks for the next.

    Results are built in the order in which they were taken, which is the order in which they will be needed. A few are
    built at a time and never two of one builder, which is asked for the next only when its last was taken: what comes
    of a builder does not depend on the threads. They are daemons, so a download that hangs does not keep the process
    alive; but one that still computes while the interpreter is taken down can abort the process, so they are ended
    before that.

    Args:
        builders: What to build, by key.
    """

    def __init__(self, builders: Mapping[int, Callable[[], T]]) -> None:
        self._builders = builders
        self._asked: SimpleQueue[int | None] = SimpleQueue()
        self._ready: dict[int, SimpleQueue[tuple[T | None, BaseException | None]]] = {
            key: SimpleQueue() for key in builders
        }
        self._closed = False
        self._threads = [
            Thread(target=self._work, name=f"stream {number}", daemon=True)
            for number in range(min(cores() + 1, MOST_THREADS, len(builders)))
        ]
        self._tells = len(self._threads) > cores() and RUST_THREADS not in os.environ
        if self._tells:
            os.environ[RUST_THREADS] = "false"
        for key in builders:
            self._asked.put(key)
        atexit.register(self.close)
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while (key := self._asked.get()) is not None and not self._closed:
            try:
                self._ready[key].put((self._builders[key](), None))
            except BaseException as error:  # raised again where the result is taken
                self._ready[key].put((None, error))

    def take(self, key: int) -> T:
        """The next result of a builder, or the error it raised."""
        result, error = self._ready[key].get()
        if error is not None:
            raise error
        self._asked.put(key)
        return result  # type: ignore[return-value]

    def close(self) -> None:
        """Ends the threads, which finish what they are building unless that takes too long."""
        atexit.unregister(self.close)
        self._closed = True
        if self._tells:
            os.environ.pop(RUST_THREADS, None)
        for _ in self._threads:
            self._asked.put(None)
        deadline = time.monotonic() + LAST_BUILD_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
