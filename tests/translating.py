"""Shared by the tests of translation: a recipe of it, on made-up rows."""

import json
import random
from pathlib import Path
from typing import Any

import tiny

T5 = {
    "model_type": "t5",
    "d_model": 64,
    "d_ff": 128,
    "d_kv": 16,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,  # what dropout draws depends on the ranks
}


def written(folder: Path, *, rows: int = 200, **changes: Any) -> dict:
    """A recipe that translates animals into what they say, its rows in the Hub's form of translations."""
    chance = random.Random(5)

    def row() -> dict:
        animals = chance.choices(tiny.ANIMALS, k=chance.randint(1, 3))
        return {"translation": {"en": " and ".join(animals), "de": " ".join(tiny.SOUNDS[name] for name in animals)}}

    for name, count in (("train", rows), ("test", 31)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row()) + "\n" for _ in range(count)))

    def source(name: str) -> dict:
        columns = {"source": "translation.en", "target": "translation.de"}
        return {"path": "json", "data_files": str(folder / f"{name}.jsonl"), "split": "train", "columns": columns}

    return {
        "name": "sounds",
        "output_dir": str(folder / "run"),
        "model": {"architecture": dict(T5), "tokenizer": {"train": {"vocab_size": 290}}},
        "stages": [
            {
                "name": "words",
                "kind": "translation",
                "data": [source("train")],
                "global_batch_size": 8,
                "training": {"max_steps": 120, "learning_rate": 0.005, "lr_scheduler_type": "constant"},
            }
        ],
        "evaluate": {
            "sounds": {
                "data": source("test"),
                "metrics": ["bleu", "chrf", "exact_match", "bits_per_byte", "perplexity"],
                "batch_size": 8,
            }
        },
        "overlap": "report",  # there are not that many animals
        **changes,
    }
