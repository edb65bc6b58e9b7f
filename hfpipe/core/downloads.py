"""Downloads from the Hub as a part of the live display: bars of huggingface_hub that draw nothing themselves."""

from __future__ import annotations

from typing import Any

from huggingface_hub.utils import tqdm

from hfpipe.core import display


class Download(tqdm):
    """A bar that tells the display how many bytes of a file, or of several at once, have come.

    It is given as `tqdm_class`. Bars of files and of bytes on the network, which stand beside those of bytes on the
    disk, tell nothing.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        is_bytes = options.get("unit") == "B" and not str(options.get("name")).endswith(".transfer")
        self._work = display.begin("downloading", unit="B") if is_bytes else None
        super().__init__(*args, **options | {"disable": True})

    def update(self, n: float | None = 1) -> None:
        self.n += n or 0
        if self._work is not None:
            display.count(int(self.n), self.total or None, self._work)

    def close(self) -> None:
        super().close()
        if self._work is not None:
            display.end(self._work)
