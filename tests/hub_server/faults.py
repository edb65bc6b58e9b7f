"""Faults that can be planted, of a server and of the way to it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import BinaryIO

# A page that asks for a login would do as well: what a client waits for is the end of the header.
DRIPPED = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nX-Padding: " + b"." * 3600


@dataclass
class Fault:
    """Answers the next `times` requests whose `METHOD /path?query` holds `match` with a fault."""

    match: str
    kind: str  # status, drop, stall, drip, page, cut (amid the reply), or lose (carried out, the reply never comes)
    times: int
    status: int = 503
    seconds: float = 3600.0
    headers: dict[str, str] = field(default_factory=dict)

    def is_instead_of_an_answer(self, connection: BinaryIO, stopping: threading.Event) -> bool:
        """Plays what leaves a request without an answer; False where there will be one, right or wrong."""
        if self.kind == "stall":
            stopping.wait(self.seconds)
        if self.kind == "drip":
            for byte in DRIPPED:
                if stopping.wait(1.0):
                    break
                connection.write(bytes([byte]))
        return self.kind in ("drop", "stall", "drip")
