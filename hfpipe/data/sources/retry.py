"""Waiting for a network that went away while a stream was read.

What goes wrong in one request is tried again by the libraries: huggingface_hub asks six times within 23 seconds after a
timeout, a closed connection, 408, 429 and 5xx; `datasets` begins that anew up to twenty times, silently, for some of
these and not for 500, 502 and 503, which end the stream. Here they end it all the same, and the reader opens its share
again at its exact place: one patience, and a line each time.
"""

from __future__ import annotations

import time

from hfpipe.core import display
from hfpipe.core.errors import MachineError, Unreachable
from hfpipe.core.upstream import end_streams_at_the_first_fault
from hfpipe.recipe import Source

PATIENCE_SECONDS = 420.0  # the other ranks wait at the next gradient, and with NCCL no longer than 600 s
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 2.0, 60.0

end_streams_at_the_first_fault()


class Retry:
    """Waits between attempts at a source, longer each time and not for ever.

    Args:
        source: What is read, for messages.
    """

    def __init__(self, source: Source) -> None:
        self._name = f"source {source.path!r}"
        self._since: float | None = None
        self._wait = FIRST_WAIT_SECONDS

    def wait(self, error: Unreachable, place: str) -> None:
        """Waits before the next attempt.

        Args:
            error: What went wrong.
            place: Where reading stands.

        Raises:
            MachineError: The source has been away for `PATIENCE_SECONDS`.
        """
        now = time.monotonic()
        if self._since is None:
            self._since, self._wait = now, FIRST_WAIT_SECONDS
        left = self._since + PATIENCE_SECONDS - now
        if left <= 0:
            raise MachineError(
                f"{self._name}: the connection was lost at {place} and did not come back in "
                f"{now - self._since:.0f} s ({error.why}). Nothing is lost: the last checkpoint is whole, and the "
                "same command continues from it once the network and HF_ENDPOINT answer."
            ) from error
        wait = min(self._wait, left)
        display.say(
            f"  {self._name}: no connection at {place} ({error.why}); trying again in {wait:.0f} s, for {left:.0f} s "
            "more at most",
            "warning",
        )
        time.sleep(wait)
        self._wait = min(2 * self._wait, LONGEST_WAIT_SECONDS)

    def over(self, place: str) -> None:
        """An answer came."""
        if self._since is not None:
            seconds = time.monotonic() - self._since
            display.say(f"  {self._name}: goes on where it stood, {place}, after {seconds:.0f} s")
            self._since = None
