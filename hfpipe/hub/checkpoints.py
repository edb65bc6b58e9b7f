"""Checkpoints on the Hub while a stage trains: `push: {checkpoints: every_save}`, the word of Trainer's `hub_strategy`.

Trainer's own push sends its whole output folder (pickles, a card of its own, an adapter that names a local base), and
stops the training when the Hub refuses. Here each whole checkpoint goes to the branch `checkpoints-<stage>` of the
run's repository as safetensors, in a process of its own that no failure of the Hub takes the training with. As with
Trainer, a checkpoint that comes while an earlier one is under way is left out.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfpipe.core import display
from hfpipe.core.command import python_command
from hfpipe.core.files import link_or_copy, load_json, whole_folder, write_json, write_text
from hfpipe.core.run_layout import ADAPTER_CONFIG
from hfpipe.hub.bundle import pushed_suffixes
from hfpipe.hub.push import deadline_of
from hfpipe.recipe import Recipe, Stage
from hfpipe.recipe.config import is_on_hub

NOT_PUSHED = {"trainer_state.json", "manifest.json", "data_state.json", "loss_state.json"}
PATIENCE = 60.0  # seconds that the end of a stage waits for the push that is under way; then that goes on alone

CARD = """---
library_name: {library}
tags:
- hfpipe
- checkpoint
---

A checkpoint of a training that goes on: step {step} of stage `{stage}` of the hfpipe recipe `{recipe}`.
"""


class PushCheckpoints(TrainerCallback):
    """Pushes every checkpoint that CheckpointCallback, which comes before, has declared whole.

    Args:
        run_dir: The run folder.
        recipe: Its recipe, which has a `push:`.
        stage: The stage that trains.
        parent: Hub id or folder of the model that it starts from, and its revision.
    """

    def __init__(self, run_dir: Path, recipe: Recipe, stage: Stage, parent: tuple[str, str | None]) -> None:
        assert recipe.push is not None
        self.recipe, self.push, self.stage, self.parent = recipe, recipe.push, stage, parent
        self.folder = run_dir / "push" / f"checkpoint-{stage.name}"
        self.log = self.folder.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None
        self.step = 0

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero or (self.process is not None and self.process.poll() is None):
            return
        self._tell()
        checkpoint = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        if self.stage.changes_base or not list(checkpoint.glob("*.safetensors")):
            return  # it fits no base that others have before it is converted at the end; its weights are in shards
        self.step = state.global_step
        try:
            self._start(self._bundle(checkpoint))
        except OSError as error:  # such as a full disk
            display.say(f"  the checkpoint of step {self.step} was not pushed, training goes on: {error}", "warning")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.process is None:
            return
        try:
            self.process.wait(PATIENCE if state.global_step >= state.max_steps else 0.0)
        except subprocess.TimeoutExpired:
            return
        self._tell()

    def _start(self, size: int) -> None:
        task: dict[str, Any] = {
            "folder": str(self.folder),
            "repo_id": self.push.repo_id,
            "private": self.push.private,
            "revision": f"checkpoints-{self.stage.name}",
            "tag": None,
            "create_pr": False,
            "message": f"{self.stage.name}, step {self.step}",
            "seconds": deadline_of(self.push, size),
        }
        file = self.log.with_suffix(".json")
        write_json(file, task)
        with file.open() as told, self.log.open("w") as log:
            self.process = subprocess.Popen(
                python_command("hfpipe.hub.upload"),
                stdin=told,
                stdout=log,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is for the training, which saves a checkpoint
            )

    def _bundle(self, checkpoint: Path) -> int:
        """Puts together what is pushed of a checkpoint; returns its size in bytes."""
        with whole_folder(self.folder) as folder:
            for file in checkpoint.iterdir():
                if file.is_file() and file.suffix in pushed_suffixes(self.recipe) and file.name not in NOT_PUSHED:
                    link_or_copy(file, folder / file.name)
            adapter = folder / ADAPTER_CONFIG
            if (
                adapter.is_file()
            ):  # never a local path: what is not on the Hub yet is pushed there at the end of the run
                config = load_json(adapter)
                base, commit = self.parent
                if not is_on_hub(base):
                    base, commit = self.push.parent_repo_id or f"{self.push.repo_id}-base", None
                write_json(adapter, config | {"base_model_name_or_path": base, "revision": commit})
            library = "peft" if adapter.is_file() else "transformers"
            names = {"stage": self.stage.name, "recipe": self.recipe.name}
            write_text(folder / "README.md", CARD.format(library=library, step=self.step, **names))
        return sum(file.stat().st_size for file in self.folder.iterdir())

    def _tell(self) -> None:
        """Says how the last push went, if there was one."""
        if self.process is None:
            return
        lines = self.log.read_text(encoding="utf-8").strip().splitlines()
        answer = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
        if self.process.returncode == 0:
            display.say(f"  the checkpoint of step {self.step} is at {answer['url']}")
        else:
            reason = answer.get("error") or "the Hub was not done in time."
            display.say(f"  the checkpoint of step {self.step} was not pushed, training goes on: {reason}", "warning")
        self.process = None
