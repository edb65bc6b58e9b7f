"""Answers to a few prompts while a stage trains, kept beside each other: `samples:` of a stage.

The main process generates them, without sampling, so that they change no number that the training draws.
"""

from __future__ import annotations

import json
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfpipe.core import display, ranks
from hfpipe.core.errors import RecipeError
from hfpipe.core.files import read_jsonl, write_jsonl
from hfpipe.core.output import printable
from hfpipe.data.prompts import Asking
from hfpipe.data.sources.load import open_source
from hfpipe.evaluation.generation import encode_prompts, generate
from hfpipe.evaluation.row_text import RowText, text_of_prompt
from hfpipe.model.spread import in_step, is_spread
from hfpipe.recipe import Recipe, Samples, Stage, Suite
from hfpipe.recipe.faults import listed
from hfpipe.recipe.row_formats import formats_of_stage
from hfpipe.stages.saving import is_sharded
from hfpipe.stages.stage_run import StageRun

FILE = "samples.jsonl"
TIMES = 10  # of a stage whose recipe has no `every`
SHOWN = 100  # characters of an answer in a line


def samples_of(stage: Stage) -> Samples | None:
    """The block of a stage; None where it has none, or is of a kind that writes no text."""
    return getattr(stage, "samples", None)


def asked_texts(stage: Stage, tokenizer: Any) -> list[RowText]:
    """The prompts of a stage's `samples` as they are put to the model: as its rows ask, or as plain texts.

    Args:
        stage: The stage.
        tokenizer: The run's tokenizer.

    Raises:
        UserError: The stage's template is made of several columns, or its chat template takes no such turn.
    """
    block = samples_of(stage)
    if block is None:
        return []
    if stage.kind == "sft":
        source = stage.data[0]
        asking = Asking(open_source(source, kinds=formats_of_stage(stage.kind)).taken.format.name, source)
        if len(asking.fields) > 1:
            raise RecipeError(
                f"stages.{stage.name}.samples: the stage's template builds a prompt of the columns "
                f"{listed(asking.fields)}, and one text of `prompts` does not fill them. Leave `samples` out; a suite "
                "with `every: N` asks its rows while the stage trains."
            )
    else:
        asking = Asking("text" if stage.kind == "pretrain" or not tokenizer.chat_template else "messages")
    return [text_of_prompt(asking.of_text(prompt), tokenizer) for prompt in block.prompts]


def require_samples(recipe: Recipe, tokenizer: Any) -> None:
    """Refuses prompts that a stage could not ask.

    Raises:
        UserError: As `asked_texts`.
    """
    for stage in recipe.stages:
        asked_texts(stage, tokenizer)


class Sampling(TrainerCallback):
    """Writes a line to samples.jsonl for each prompt: before the first step, every so many steps, and at the end.

    Args:
        run: The stage; it has `samples`.
        trainer: Its trainer.
    """

    def __init__(self, run: StageRun, trainer: Trainer) -> None:
        block = samples_of(run.stage)
        assert block is not None
        self.run, self.trainer, self.block = run, trainer, block
        self.path = run.folder / FILE
        self.texts = ranks.on_main(lambda: asked_texts(run.stage, run.tokenizer))
        self.possible = not is_sharded(trainer) or is_spread(trainer.model)
        self._every = 0
        if not self.possible:
            text = f"  samples: none of stage {run.stage.name}, as each rank holds a part of a whole model"
            ranks.say(text, "warning")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._every = self.block.every or max(1, state.max_steps // TIMES)
        if ranks.is_main():
            known = read_jsonl(self.path) if self.path.exists() and state.global_step else []
            write_jsonl(self.path, [row for row in known if row["step"] <= state.global_step])
        if not state.global_step:
            self._sample(0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step = state.global_step
        if step % self._every == 0 or step == state.max_steps:
            self._sample(step)

    def _sample(self, step: int) -> None:
        """Has the main process answer all prompts with the model as it is at a step; every rank has to call this."""
        if not self.possible:
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        training = model.training
        model.eval()
        with in_step(model):
            if ranks.is_main():
                self._answer(model, step)
        model.train(training)

    def _answer(self, model: Any, step: int) -> None:
        tokenizer, new = self.run.tokenizer, self.block.max_new_tokens
        suite = Suite.model_validate({"generation": {"max_new_tokens": new}, "batch_size": 8})
        with display.doing(f"samples at step {step}"):
            found = generate(model, encode_prompts(self.texts, tokenizer), tokenizer, suite, new)
        with self.path.open("a", encoding="utf-8") as file:
            for prompt, one in zip(self.block.prompts, found, strict=True):
                answer = tokenizer.decode(one.ids, skip_special_tokens=True)
                row = {"step": step, "prompt": prompt, "answer": answer, "ended": one.ended}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                display.event("sample", stage=self.run.stage.name, **row)
                ranks.say(f"  sample at step {step}: {_short(prompt)} -> {_short(answer)}", "sample")


def _short(text: str) -> str:
    """A text in one line of a terminal."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"
