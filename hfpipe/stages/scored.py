"""Scores of suites while a stage trains: `every` of a suite, which decides nothing, and `early_stopping`.

Early stopping keeps the best checkpoint by a score, and ends a stage whose score no longer improves. Trainer does the
keeping (`load_best_model_at_end`); its evaluation is replaced by the suite, on every rank.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hfpipe.core import ranks
from hfpipe.core.errors import RecipeError
from hfpipe.core.files import read_jsonl, write_jsonl
from hfpipe.core.upstream import override
from hfpipe.evaluation.answers import asked_of, tells_apart
from hfpipe.evaluation.metrics import higher_is_better
from hfpipe.evaluation.suites import score_suite, suite_metrics
from hfpipe.model.spread import is_spread
from hfpipe.stages.saving import is_sharded
from hfpipe.stages.stage_run import StageRun

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
        if self.suites and is_sharded(trainer) and not is_spread(trainer.model):
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


EVALUATIONS = 10  # of a stage whose recipe has no `eval_steps`


class Selection(TrainerCallback):
    """Scores the suite in place of Trainer's evaluation, and stops when the score no longer improves.

    Everything it needs to know at a resume is in Trainer's own state: the step of the best score.

    Args:
        run: The stage; it has `early_stopping`.
        trainer: Its trainer.

    Raises:
        RecipeError: The weights are spread in a way in which they cannot be asked.
    """

    def __init__(self, run: StageRun, trainer: Trainer) -> None:
        assert run.stage.early_stopping is not None
        if is_sharded(trainer) and not is_spread(trainer.model):
            raise RecipeError(
                f"stages.{run.stage.name}.early_stopping: the embeddings grow for added tokens, and such a model is "
                "read whole by every rank under FSDP and cannot be scored while it trains. Start plain ranks, or leave "
                "it out."
            )
        self.run, self.trainer, self.patience = run, trainer, run.stage.early_stopping.patience
        every = run.stage.training.get("eval_steps") or max(1, trainer.args.max_steps // EVALUATIONS)
        metric = suite_metrics(run.recipe.evaluate[run.stage.early_stopping.suite])[_metric_of(run)]
        # Set when the trainer is made: at its making it would ask for an evaluation set of its own.
        trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, every
        trainer.args.save_strategy, trainer.args.save_steps = SaveStrategy.STEPS, every
        trainer.args.load_best_model_at_end, trainer.args.metric_for_best_model = True, _key(run)
        trainer.args.greater_is_better = higher_is_better(_metric_of(run), metric)
        if trainer.args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            given = trainer.args.lr_scheduler_kwargs
            mode = {"mode": "max" if trainer.args.greater_is_better else "min"}
            trainer.args.lr_scheduler_kwargs = mode | given if isinstance(given, dict) else mode
        override(trainer, evaluate=self._score)
        trainer.add_callback(self)

    def _score(self, **_: Any) -> dict[str, float]:
        """Trainer's `evaluate`: the score by Trainer's name for it."""
        suite = self.run.stage.early_stopping.suite  # type: ignore[union-attr]
        self.trainer.control.should_evaluate = False  # Trainer's own does it; asked again at the end of the last epoch
        if self._is_over(self.trainer.state):  # of a run that was ended after its last evaluation and started again
            return {f"eval_{_key(self.run)}": float("nan")}
        model = self.trainer.accelerator.unwrap_model(self.trainer.model).eval()
        scored = score_suite(
            suite, self.run.recipe.evaluate[suite], self.run.rows[suite], model, self.run.tokenizer, self.run.stage.name
        )
        score = next(score for score in scored.scores if score.metric == _metric_of(self.run))
        step = self.trainer.state.global_step
        ranks.say(f"  step {step:>{len(str(self.trainer.state.max_steps))}}  {suite} {score.metric} {score.value:.4f}")
        found = {f"eval_{_key(self.run)}": score.value}
        self.trainer.log(dict(found))
        return found

    def _is_over(self, state: TrainerState) -> bool:
        if self.patience is None or state.best_global_step is None or state.best_metric is None:
            return False
        last = max((row["step"] for row in state.log_history if f"eval_{_key(self.run)}" in row), default=0)
        return last - state.best_global_step >= self.patience * state.eval_steps

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop = self._is_over(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.best_global_step == state.global_step:
            # Trainer leaves it out on a rank that is here before another has made the folder, and then that rank does
            # not take part when the best is read. No issue found.
            state.best_model_checkpoint = str(Path(args.output_dir or "", f"checkpoint-{state.global_step}"))
        if self._is_over(state):  # the evaluation of this step is in the state by now
            control.should_training_stop = True

    def facts(self) -> dict[str, Any]:
        """Returns the choice, for done.json: the suite and metric, `step`, `value`, and every evaluation as (step,
        value).

        The score on this suite is the best of several, so it flatters the model; the report says so.
        """
        state, key = self.trainer.state, f"eval_{_key(self.run)}"
        return {
            "suite": self.run.stage.early_stopping.suite,  # type: ignore[union-attr]
            "metric": _metric_of(self.run),
            "step": state.best_global_step,
            "value": state.best_metric,
            "evaluations": [[row["step"], row[key]] for row in state.log_history if key in row],
            "stopped_early": state.global_step < state.max_steps,
        }


def _metric_of(run: StageRun) -> str:
    block = run.stage.early_stopping
    assert block is not None
    return block.metric or run.recipe.evaluate[block.suite].metrics[0]


def _key(run: StageRun) -> str:
    return f"{run.stage.early_stopping.suite}_{_metric_of(run)}"  # type: ignore[union-attr]
