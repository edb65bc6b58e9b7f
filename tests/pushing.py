"""A run folder that needs no training, pushed in a process of its own to a Hub of the test's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from hub_server import HubServer
from safetensors.numpy import save_file

PLANTED = "hf_PlantedTokenThatNobodyMaySee01"
RECIPE = {
    "name": "toy",
    "model": {"id": "me/base", "revision": "main"},
    "stages": [
        {"name": "law", "kind": "pretrain", "data": [{"path": "team/law"}], "training": {"max_steps": 10}},
        {"name": "chat", "kind": "sft", "data": [{"path": "json", "data_files": "chat.jsonl"}], "lora": {"r": 4}},
    ],
    "evaluate": {"general": {"data": {"path": "team/general", "split": "test"}, "metrics": ["bits_per_byte"]}},
    "push": {"repo_id": "me/toy"},
}
SCORES = [  # stage, suite, metric, value, stderr, n, higher_is_better
    ("base", "general", "bits_per_byte", 1.0, 0.01, 500, False),
    ("law", "general", "bits_per_byte", 0.8, 0.01, 500, False),
    ("chat", "general", "bits_per_byte", 0.9, 0.01, 500, False),
    ("base", "task", "exact_match", 0.0, 0.0, 200, True),
    ("chat", "task", "exact_match", 0.75, 0.03, 200, True),
]
FIELDS = ("stage", "suite", "metric", "value", "stderr", "n", "higher_is_better")


def make_run(folder: Path, recipe: dict[str, Any] = RECIPE) -> Path:
    """A run folder as a run leaves it, with weights that no one needs to load."""
    stages = folder / "stages"
    for name, weights in [("law/model", "model"), ("chat/model", "adapter_model"), ("chat/merged", "model")]:
        (stages / name).mkdir(parents=True)
        save_file({"w": np.arange(30_000, dtype=np.float32)}, stages / name / f"{weights}.safetensors")
        (stages / name / "tokenizer.json").write_text('{"version": "1.0"}')
        (stages / name / "chat_template.jinja").write_text("{{ messages }}")
        (stages / name / "training_args.bin").write_bytes(b"a pickle")
        if weights == "model":
            (stages / name / "config.json").write_text('{"model_type": "llama"}')
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "me/base", "r": 4}
    (stages / "chat/model/adapter_config.json").write_text(json.dumps(adapter))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "scorecard.json").write_text(json.dumps([dict(zip(FIELDS, row, strict=True)) for row in SCORES]))
    environment = {"hfpipe": "0.1", "python": "3.11", "packages": {"torch": "2.13"}, "launch": {"processes": 1}}
    environment |= {"hardware": {"system": "Linux", "cpus": 2, "gpus": []}, "trust_remote_code": False}
    environment["base"] = {"id": "me/base", "revision": "c" * 40}
    (folder / "environment.json").write_text(json.dumps(environment))
    base = {"revision": "c" * 40, "license": "apache-2.0", "language": "en"}
    law = {"revision": "d" * 40, "license": "cc-by-nc-4.0", "language": ["de", "en", "Bavarian"]}
    (folder / "hub.json").write_text(json.dumps({"model me/base@main": base, "dataset team/law@main": law}))
    return folder


PROGRAM = """
import json
import sys
from pathlib import Path
from hfpipe import hub
from hfpipe.core.errors import UserError
from hfpipe.recipe import load_recipe

def asked(name):
    try:
        return " ".join(hub.check_access(load_recipe(name)))
    except UserError as error:
        return str(error)

try:
    print(CALL)
except UserError as error:
    print("ERROR", error)
    sys.exit(error.exit_code)
"""


@dataclass
class Pusher:
    """Pushes in a process of its own, as a user does; its output is kept."""

    hub: HubServer
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)  # of HubServer.env

    def __call__(self, **arguments: Any) -> subprocess.CompletedProcess[str]:
        return self.run(f"'URL', hub.push(Path('run'), **{arguments!r})")

    def check(self, pushes: list[dict[str, Any]], recipe: dict[str, Any] = RECIPE) -> list[str]:
        """Returns the words of `check_access` on recipes with these `push:` blocks, or its error."""
        for number, push in enumerate(pushes):
            (self.folder / f"asked{number}.yaml").write_text(json.dumps(recipe | {"push": push}))
        done = self.run(f"json.dumps([asked(f'asked{{n}}.yaml') for n in range({len(pushes)})])")
        return json.loads(done.stdout)

    def run(self, call: str) -> subprocess.CompletedProcess[str]:
        program = PROGRAM.replace("CALL", call)
        env = os.environ | self.hub.env(self.folder / "home", **self.options)
        env["PYTHONPATH"] = str(Path(__file__).parent.parent)
        return subprocess.run(
            [sys.executable, "-c", program], env=env, cwd=self.folder, text=True, capture_output=True, timeout=60
        )


class Outcome(NamedTuple):
    name: str
    pusher: Pusher
    process: subprocess.CompletedProcess[str]


def pushes(hub: HubServer, repo_id: str = "me/toy") -> int:
    """Commits behind the one that made the repository, if it was made."""
    return len(hub.commits(repo_id)) - 1 if ("model", repo_id) in hub.repos else 0


COMMIT = "POST /api/models/me/toy/commit"
Plant = Callable[[HubServer], None]


def at_once(folder: Path, cases: dict[str, tuple[Plant, dict[str, Any], dict[str, Any]]]) -> Iterator[Outcome]:
    """Pushes once per case, each to a Hub of its own with its fault planted, all at the same time.

    Args:
        folder: Where each case gets a folder.
        cases: By name, the fault, the client's environment (see HubServer.env), and the arguments of `push`.
    """
    with ExitStack() as hubs, ThreadPoolExecutor(8) as threads:
        running = []
        for name, (plant, options, arguments) in cases.items():
            pusher = Pusher(hubs.enter_context(HubServer()), folder / name, options)
            make_run(folder / name / "run")
            pusher.hub.tells_oids = False  # the real one may leave them out, and then only our look prevents doubles
            plant(pusher.hub)
            running.append((name, pusher, threads.submit(pusher, **arguments)))
        for name, pusher, process in running:
            yield Outcome(name, pusher, process.result())
