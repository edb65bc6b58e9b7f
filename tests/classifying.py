"""Shared by the tests of classifiers: a recipe of one, on made-up rows."""

import json
import random
from pathlib import Path
from typing import Any

import tiny


def written(folder: Path, problem: str, *, skewed: bool = False, **stage: Any) -> dict:
    """A recipe with one classification stage on made-up rows, whose animals say the label."""
    chance = random.Random(1)

    def row(number: int) -> dict:
        first, second = chance.choices(tiny.ANIMALS, [12, 1, 1, 1, 1, 1] if skewed else None, k=2)
        if problem == "several":
            label: Any = sorted({tiny.SOUNDS[first], tiny.SOUNDS[second]})
        else:
            label = tiny.ANIMALS.index(first) / 5 if problem == "number" else tiny.SOUNDS[first]
        return {"id": f"c{number}", "text": f"{number}: a {first}", "also": f" and a {second}", "label": label}

    tiny.write_data(folder)
    for name, count in (("train", 240), ("test", 50)):
        lines = [json.dumps(row(number)) for number in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    def source(name: str) -> dict:
        meaning: dict = {"columns": {"sentence": "text"}}
        if problem == "several":
            meaning = {"template": {"sentence": "{text}{also}"}, "columns": {"label": "label"}}
        return {"path": "json", "data_files": str(folder / f"{name}.jsonl"), "split": "train", **meaning}

    content = tiny.recipe(folder, overlap="report", merge="lora" in stage)
    training = {"num_train_epochs": 4, "learning_rate": 5e-3, "max_length": 64, **stage.pop("training", {})}
    stages = [{"name": "kinds", "kind": "classification", "data": [source("train")], "training": training, **stage}]
    names = {"one": ["accuracy", "f1", "f1_micro", "matthews_correlation", "calibration_error"]}
    names |= {"several": ["accuracy", "f1", "f1_micro", "precision_micro", "recall"], "number": ["mse", "pearsonr"]}
    content["stages"] = stages
    content["evaluate"] = {"kinds": {"data": source("test"), "metrics": names[problem]}}
    return content
