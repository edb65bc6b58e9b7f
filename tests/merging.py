"""Shared by the tests of merges: a random adapter of a base, and the memory that a block of code holds."""

import ctypes
import gc
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model

TEXTS = ["The cat sat by the river and said mew.", "The dog sat by a tree and said bark."]


def save_adapter(base: Any, place: Path, folder: Path, **options: Any) -> Path:
    """A strong random adapter of the base that is saved in `place`."""
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 2, "target_modules": "all-linear", "init_lora_weights": False} | options
    )
    get_peft_model(base, config).save_pretrained(folder)
    saved = folder / "adapter_config.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"base_model_name_or_path": str(place)}))
    return folder


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0])


@contextmanager
def most_memory() -> Iterator[list[int]]:
    """The most that this process holds of its own while the block runs, beyond what it held before, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would be used again, uncounted
    before, most, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], anonymous_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()
