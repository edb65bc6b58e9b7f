"""A recipe that does everything in seconds: a tiny Llama from nothing, six steps of each stage, on made-up prose."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

ANIMALS = ["cat", "dog", "cow", "hen", "fox", "owl"]
SOUNDS = {"cat": "mew", "dog": "bark", "cow": "moo", "hen": "cluck", "fox": "yelp", "owl": "hoot"}
ENCODER = {
    "model_type": "bert",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,  # what dropout draws depends on the ranks
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 128,
}


def write_data(folder: Path) -> None:
    """prose.jsonl and held.jsonl (text), sounds.jsonl and asked.jsonl (animal, sound)."""
    chance = random.Random(3)

    def sentence() -> str:
        animal = chance.choice(ANIMALS)
        place = chance.choice(["the hill", "the barn", "the river", "a tree"])
        return f"The {animal} sat by {place} and said {SOUNDS[animal]}. "

    def document(number: int) -> dict:
        return {"id": f"d{number}", "text": f"{number}. " + "".join(sentence() for _ in range(chance.randint(1, 12)))}

    def pair(number: int) -> dict:
        animal = ANIMALS[number % len(ANIMALS)]
        return {"id": f"s{number}", "animal": animal, "sound": SOUNDS[animal], "note": f"number {number}"}

    tables = {
        "prose": [document(n) for n in range(300)],
        "held": [document(n) for n in range(1000, 1040)],
        "sounds": [pair(n) for n in range(97)],
        "asked": [pair(n) for n in range(500, 530)],
    }
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(folder: Path, **changes: object) -> dict:
    """The recipe as a mapping, its data in `folder`, its run in `folder/run`."""
    template = {"prompt": "{note}: what does the {animal} say?", "completion": " {sound}"}

    def source(name: str) -> dict:
        return {"path": "json", "data_files": str(folder / f"{name}.jsonl"), "split": "train"}

    return {
        "name": "tiny",
        "output_dir": str(folder / "run"),
        "model": {
            "architecture": {
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128,
            },
            "tokenizer": {"train": {"vocab_size": 320}},
        },
        "stages": [
            {
                "name": "prose",
                "kind": "pretrain",
                "data": [source("prose")],
                "global_batch_size": 4,
                "training": {"max_steps": 6, "learning_rate": "2e-3", "max_length": 64, "save_steps": 2},
            },
            {
                "name": "sounds",
                "kind": "sft",
                "data": [{**source("sounds"), "template": template}],
                "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
                "global_batch_size": 16,
                "training": {"num_train_epochs": 1, "learning_rate": "2e-3", "max_length": 64, "save_steps": 3},
            },
        ],
        "evaluate": {
            "general": {"data": source("held"), "metrics": ["bits_per_byte"]},
            "sounds": {
                "data": {**source("asked"), "template": template},
                "metrics": ["accuracy", "exact_match", "bits_per_byte"],
            },
        },
        "merge": True,
        "overlap": "report",  # the prose is made of 24 sentences, so what is held out says what was trained on
        **changes,
    }


def write(folder: Path, content: dict, name: str = "tiny.yaml") -> Path:
    """Writes a recipe; numbers such as 2e-3 go out as a person writes them."""
    path = folder / name
    path.write_text(yaml.safe_dump(content, sort_keys=False).replace("'2e-3'", "2e-3"))
    return path


def start(*arguments: str, launch: tuple[str, ...] = (), **environment: str) -> subprocess.Popen:
    """Starts the command line in a process of its own."""
    command = [sys.executable, "-m", *launch, "hfpipe", *arguments]
    if launch:
        command = [sys.executable, "-m", *launch, "-m", "hfpipe", *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Waits until a process that runs has made a file."""
    deadline = time.monotonic() + 200
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def run_interrupted(recipe: Path, file: Path) -> None:
    """Runs a recipe until a file is there, stops it as a scheduler does, and runs it again to its end."""
    process = start("run", str(recipe))
    wait_for(file, process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 75
    again = start("run", str(recipe))
    said = again.communicate()[0]
    assert again.returncode == 0, said


def scores(run: Path) -> dict:
    """(stage, suite, metric) -> value."""
    rows = json.loads((run / "scorecard.json").read_text())
    return {(row["stage"], row["suite"], row["metric"]): row["value"] for row in rows}
