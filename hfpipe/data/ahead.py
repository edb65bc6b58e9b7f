"""Builds windows ahead of their use in a background thread, so that the stream runs while the model trains."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")
LAST_BUILD_SECONDS = 10.0  # how long `close` waits for what is being built


class Ahead(Generic[T]):
    """Keeps one result of each builder ready: taking it asks for the next.

    One thread builds in the order in which results were taken, which is the order in which they will be needed. It is a
    daemon, so a download that hangs does not keep the process alive; but one that still computes while the interpreter
    is taken down can abort the process, so it is ended before that.

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
        self._thread = Thread(target=self._work, name="stream", daemon=True)
        for key in builders:
            self._asked.put(key)
        atexit.register(self.close)
        self._thread.start()

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
        """Ends the thread, which finishes what it is building unless that takes too long."""
        atexit.unregister(self.close)
        self._closed = True
        self._asked.put(None)
        self._thread.join(LAST_BUILD_SECONDS)
