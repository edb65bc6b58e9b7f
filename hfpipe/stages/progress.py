"""The words of a stage that trains: its log, the live display, and a warning in time about what goes wrong."""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles, stdev
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfpipe.core import display, ranks, signals
from hfpipe.core.files import write_text
from hfpipe.data.dataloader import BatchLoader
from hfpipe.stages.cost import CostMeter, total_of

WAITING = 0.1  # share of the time that a step may wait for data
WAITED_SECONDS = 20.0  # of training, before that is judged
RECENT = 5  # logged losses whose median is compared with the best such median
RISEN = 1.2  # times the best median
LONG = 40  # logged losses before a plateau is looked for


class LogCallback(TrainerCallback):
    """Writes log.jsonl, and tells each row of it: a line, a part of the live display, or an object of `--json`.

    Args:
        title: The stage's name and kind, for the display.
        loader: Knows how long steps waited for data.
        path: The file.
        tokens_per_step: Tokens of a step over all ranks, without padding; None where that is not known.
        cost: Knows the peak of the memory, and the share of the devices' peak that a speed takes.
    """

    def __init__(
        self, title: str, loader: BatchLoader, path: Path, tokens_per_step: float | None, cost: CostMeter
    ) -> None:
        self.title, self.loader, self.path, self.tokens_per_step = title, loader, path, tokens_per_step
        self.cost = cost
        self._mark = (0, 0.0, 0.0)  # step, clock, seconds waited for data
        self._shown = display.Training(title, 0, 1)
        self._showing = ExitStack()
        self._watch = Watch()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._mark = (state.global_step, time.perf_counter(), self.loader.waited_seconds)
        lines = []
        if args.should_save and self.path.exists():  # drop what was logged after the checkpoint that is continued from
            lines = [line for line in self.path.read_text().splitlines() if _step(line) <= state.global_step]
            write_text(self.path, "".join(f"{line}\n" for line in lines))
        if args.should_save:
            self._shown = self._showing.enter_context(display.training(self.title, state.global_step, state.max_steps))
            self._shown.losses += [json.loads(line)["loss"] for line in lines]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._shown.step = state.global_step
        if signals.pending():
            self._shown.note = "stopping: a checkpoint is saved first; Ctrl-C again ends at once"

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._showing.close()
        if args.should_save and (cost := total_of([self.cost.record]))["steps"]:
            whole = self.cost.total()
            facts = display.speed_facts(cost, whole["peak_memory"] or 0, whole["predicted_memory"])
            ranks.say(f"  trained for {display.clock(cost['training_seconds'])}: {', '.join(facts)}")
            told = ("steps", "tokens", "training_seconds", "tokens_per_second", "mfu", "data_wait")
            memory = {key: whole[key] for key in ("peak_memory", "predicted_memory")}
            display.event("trained", stage=self.title.split()[0], **{key: cost[key] for key in told}, **memory)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs or not args.should_save:
            return
        step, clock, waited = self._mark
        seconds = max(time.perf_counter() - clock, 1e-9)
        steps = max(state.global_step - step, 1)
        row: dict[str, Any] = {"step": state.global_step, "max_steps": state.max_steps}
        row |= {key: value for key, value in logs.items() if key != "epoch"}
        row["seconds_per_step"] = round(seconds / steps, 4)
        row["data_wait"] = round((self.loader.waited_seconds - waited) / seconds, 4)
        if self.tokens_per_step:
            speed = self.tokens_per_step * steps / seconds
            row["tokens_per_second"] = round(speed)
            if (mfu := self.cost.mfu(speed)) is not None:
                row["mfu"] = round(mfu, 4)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        left = (state.max_steps - state.global_step) * seconds / steps
        self._tell(row, state.max_steps, left)
        for warning in self._watch.look(row, seconds):
            ranks.say(f"  step {state.global_step}: {warning}", "warning")
        self._mark = (state.global_step, time.perf_counter(), self.loader.waited_seconds)

    def _tell(self, row: dict[str, Any], max_steps: int, left: float) -> None:
        shown, memory = self._shown, self.cost.total()["peak_memory"] or 0
        shown.row, shown.left, shown.memory = row, left, memory
        shown.losses.append(row["loss"])
        speed = f"  {row['tokens_per_second']:,} tokens/s" if "tokens_per_second" in row else ""
        speed += f"  MFU {row['mfu']:.0%}" if "mfu" in row else ""
        display.logged(
            f"  step {row['step']:>{len(str(max_steps))}}/{max_steps}  loss {row['loss']:.4f}"
            f"  {row['seconds_per_step']:.2f} s/step{speed}  {display.clock(left)} left",
            {"stage": self.title.split()[0], **row, "seconds_left": round(left, 1)} | {"peak_memory": memory},
        )


class Watch:
    """Looks at the rows of a log for what is worth a word: each fault is told once a stage."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._rates: list[float] = []
        self._steps: list[int] = []
        self._waits: list[tuple[float, float]] = []  # seconds, and the share of them that waited
        self._best = math.inf
        self._flat = 0  # rows in a row that look like a plateau
        self._told: set[str] = set()

    def look(self, row: dict[str, Any], seconds: float) -> list[str]:
        """Returns what is wrong as of a row, with what to try.

        Args:
            row: The row: `step`, `loss`, `data_wait`, and `learning_rate` where the trainer logs it.
            seconds: The time since the row before.
        """
        self._steps.append(row["step"])
        self._losses.append(row["loss"])
        self._rates.append(row.get("learning_rate", 0.0))
        self._waits.append((seconds, row["data_wait"]))
        found = {"wait": self._waiting(), "rise": self._risen()}
        if "rise" not in self._told and found["rise"] is None:
            found["plateau"] = self._plateau()
        new = {name: text for name, text in found.items() if text and name not in self._told}
        self._told |= new.keys()
        return list(new.values())

    def _waiting(self) -> str | None:
        rows = self._waits[1:][-RECENT:]  # the first one has the start of the reading in it
        total = sum(seconds for seconds, _ in rows)
        share = sum(seconds * wait for seconds, wait in rows) / total if total else 0.0
        if total < WAITED_SECONDS or share <= WAITING:
            return None
        return (
            f"{share:.0%} of the time is spent waiting for data. Tokenize before (`hfpipe prepare`), read from a "
            "nearer or faster disk, use more files than `lanes`, or give the process more cores"
        )

    def _risen(self) -> str | None:
        if len(self._losses) < 2 * RECENT:
            return None
        # Medians, and beyond the scatter of single losses, so that one hard batch does not count.
        now, earlier = median(self._losses[-RECENT:]), self._losses[-2 * RECENT : -RECENT]
        self._best = min(self._best, median(earlier))
        if now <= RISEN * self._best or now <= self._best + 2 * stdev(earlier):
            return None
        return (
            f"the loss rises: it was {self._best:.4f} at its lowest and is {now:.4f} (medians of {RECENT} lines). If "
            "it goes on, lower learning_rate, raise warmup_steps or lower max_grad_norm"
        )

    def _plateau(self) -> str | None:
        count = len(self._losses)
        if count < LONG or self._rates[-1] < 0.5 * max(self._rates):  # a rate that has decayed explains it
            return None
        half = count // 4
        now, earlier = self._losses[-half:], self._losses[-2 * half : -half]
        noise = math.hypot(_spread(now), _spread(earlier)) / math.sqrt(half)
        before, after = median(earlier), median(now)
        self._flat = self._flat + 1 if before - after <= noise else 0
        if self._flat < RECENT:  # a jump looks like one at first
            return None
        return (
            f"the loss has not fallen since step {self._steps[-2 * half]}: {before:.4f} then, {after:.4f} now, within "
            "the noise. Another learning_rate or more varied data may go on; early_stopping ends in time"
        )


def _spread(values: list[float]) -> float:
    """The standard deviation by the middle half of the values, which a spike does not move."""
    low, _, high = quantiles(values, n=4)
    return (high - low) / 1.35


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a line cut short by a kill
