"""A run with a chat: a tiny Llama from nothing, steps of prose, and a LoRA on conversations by the chatml template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

SYSTEM = "You know the animals."


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """The recipe; its run goes to `folder/run`."""
    rows = [
        {"messages": [{"role": "user", "content": f"{number}: the {animal}?"}, {"role": "assistant", "content": sound}]}
        for number, (animal, sound) in enumerate(list(tiny.SOUNDS.items()) * 8)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny.write_data(folder)
    content = tiny.recipe(folder, evaluate={}, merge=False, shift=False)
    content["model"]["tokenizer"] |= {"chat_template": "chatml", "eos_token": "<|im_end|>"}
    content["stages"][1] |= {"name": "chat", "data": [{"path": str(folder / "chats.jsonl")}], "global_batch_size": 8}
    return content | changes
