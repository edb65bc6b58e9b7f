"""Scores of suites while a stage trains: `every` of a suite. They are looked at, and decide nothing."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfpipe.core import ranks
from hfpipe.core.files import read_jsonl, write_jsonl
from hfpipe.evaluation.answers import asked_of, tells_apart
from hfpipe.evaluation.suites import score_suite
from hfpipe.model.spread import is_spread
from hfpipe.stages.context import StageRun
from hfpipe.stages.saving import is_sharded

FILE = "scores.jsonl"


class ScoredWhileTraining(TrainerCallback):
    """Scores suites every so many steps, on every rank, and writes a line of scores.jsonl for each score.

    The random numbers of the training are those of a stage that is not scored.

    Args:
        run: The stage.
        trainer: Its trainer.
    """

    def __init__(self, run: StageRun, trainer: Trainer) -> None:
        self.run, self.trainer = run, trainer
        self.path = run.folder / FILE
        self.suites = [name for name, suite in run.recipe.evaluate.items() if suite.every and self._is_asked(name)]
        asked_whole = run.stage.task == "seq2seq" or not is_spread(trainer.model)
        if self.suites and is_sharded(trainer) and asked_whole:
            self.suites = []
            text = f"  no suite is scored while stage {run.stage.name} trains: each rank holds a part of a whole model"
            ranks.say(text, "warning")

    def _is_asked(self, name: str) -> bool:
        """Returns True if a suite asks what the model of this stage can answer."""
        suite, rows = self.run.recipe.evaluate[name], self.run.rows[name]
        if self.run.stage.task not in asked_of(suite, rows):
            return False
        model: Any = self.trainer.model
        config = model.config
        return "sentence" not in rows[0] or tells_apart(rows, config.problem_type, list(config.id2label.values()))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if ranks.is_main() and self.path.exists():  # drop what came after the checkpoint that is continued from
            write_jsonl(self.path, [row for row in read_jsonl(self.path) if row["step"] <= state.global_step])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step = state.global_step
        due = [name for name in self.suites if not step % (self.run.recipe.evaluate[name].every or step)]
        if not due or step == state.max_steps:  # after the last step every suite is scored on what was saved
            return
        model: Any = self.trainer.accelerator.unwrap_model(self.trainer.model)
        training = model.training
        with torch.random.fork_rng():
            for name in due:
                self._score(name, model.eval(), step)
        model.train(training)

    def _score(self, name: str, model: Any, step: int) -> None:
        run = self.run
        found = score_suite(name, run.recipe.evaluate[name], run.rows[name], model, run.tokenizer, run.stage.name)
        rows: list[dict[str, Any]] = [
            {"step": step, "suite": name, "metric": one.metric, "value": one.value} for one in found.scores
        ]
        for row in rows:
            ranks.say(
                f"  step {step:>{len(str(self.trainer.state.max_steps))}}  {name} {row['metric']} {row['value']:.4f}"
            )
        if ranks.is_main():
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        self.trainer.log({f"eval_{name}_{row['metric']}": row["value"] for row in rows})
