"""Training that the stages share: arguments, division of a global batch, steps and epochs, resume, saving."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hfpipe.core import ranks, signals
from hfpipe.core.errors import RecipeError, Stopped
from hfpipe.core.files import load_json
from hfpipe.core.upstream import override
from hfpipe.data.dataloader import BatchLoader, ResumableSampler
from hfpipe.data.row_order import PackedRows, ShuffledRows, count_rows
from hfpipe.model.adapter import add_adapter, continue_adapter, original_state
from hfpipe.model.load import load_model, trains_rows
from hfpipe.model.muon import with_muon
from hfpipe.model.parameters import set_learning_rates, train_part
from hfpipe.model.positions import learned_positions
from hfpipe.model.seq2seq import most_tokens
from hfpipe.model.spread import average_gradients, hand_to_deepspeed, is_spread, launched_by_fsdp
from hfpipe.model.tokenizer import train_rows
from hfpipe.model.varlen_attention import use_varlen_attention
from hfpipe.recipe import Stage
from hfpipe.stages.arguments import PRECISION, stage_arguments
from hfpipe.stages.checkpoints import DATA_STATE, MANIFEST, CheckpointCallback, newest_whole, read_across
from hfpipe.stages.divergence import StopWhenNotFinite
from hfpipe.stages.progress import LogCallback
from hfpipe.stages.rounding import RoundingFrom
from hfpipe.stages.samples import Sampling, samples_of
from hfpipe.stages.saving import is_sharded, make_saveable, rehearse, save
from hfpipe.stages.scored import ScoredWhileTraining, Selection
from hfpipe.stages.stage_run import StageRun
from hfpipe.stages.trackers import guard_trackers

DEFAULT_PER_DEVICE = 8


def shares_of_rows(rows: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Returns the largest numbers of rows that stand in the proportion of the weights and repeat none."""
    unit = min(count / weight for count, weight in zip(rows, weights, strict=True))
    return [max(1, int(unit * weight)) for weight in weights]


def divide_batch(stage: Stage) -> tuple[int, int]:
    """Rows of a micro-batch on one rank, and micro-batches of a step.

    With `global_batch_size`, `per_device_train_batch_size` is what a device has room for: where there are so many ranks
    that a rank's share is not made of such micro-batches, they are smaller, and the step is the same.

    Raises:
        RecipeError: `global_batch_size` does not divide over the ranks; the message says which counts would.
    """
    count = ranks.ranks()
    per_device = stage.training.get("per_device_train_batch_size")
    if stage.global_batch_size is None:
        return per_device or DEFAULT_PER_DEVICE, stage.training.get("gradient_accumulation_steps", 1)
    size = stage.global_batch_size
    if size % count or size % (per_device or 1):
        rows = f"{per_device} rows on each of " if per_device else ""
        unit = math.lcm(count, per_device or 1)
        fits = [] if size % (per_device or 1) else [n for n in range(1, min(size, 2 * count) + 1) if size % n == 0]
        nearest = sorted({max(size // unit * unit, unit), (size // unit + 1) * unit})
        advice = f"It divides over {_list(fits)} ranks; " if fits else ""
        raise RecipeError(
            f"stages.{stage.name}.global_batch_size is {size}, which does not divide over {rows}{count} ranks. {advice}"
            f"on {count} ranks, {_list(nearest)} would do."
        )
    share = size // count
    per_device = next(n for n in range(min(share, per_device or DEFAULT_PER_DEVICE), 0, -1) if share % n == 0)
    return per_device, share // per_device


def _list(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers)) if len(numbers) < 3 else ", ".join(map(str, numbers))


def row_length(run: StageRun, model: Any, default: int) -> int:
    """Tokens of a row: the recipe's `max_length`, or the default, or what the model has positions for.

    Raises:
        RecipeError: As `require_positions`.
    """
    require_positions(run.stage, model)
    return run.stage.training.get("max_length") or min(default, learned_positions(model) or default)


def require_positions(stage: Stage, model: Any) -> None:
    """Refuses rows that are longer than what a model has positions for.

    Args:
        stage: The stage.
        model: Its model, or the base; the shapes are enough.

    Raises:
        RecipeError: They are.
    """
    pairs = stage.kind == "translation"
    most = most_tokens(model) if pairs else learned_positions(model)
    for key in ("max_length", "max_target_length") if pairs else ("max_length",):
        asked = stage.training.get(key)
        if most is not None and asked is not None and asked > most:
            raise RecipeError(
                f"stages.{stage.name}.training.{key} is {asked}, and this model has positions for {most} tokens. "
                "Write at most that, or leave it out."
            )


def trainer_arguments(run: StageRun, max_steps: int, per_device: int, accumulation: int, **more: Any) -> Any:
    """The trainer's own arguments of a stage on its way; see `stage_arguments`."""
    wanted = run.stage.training.get("per_device_train_batch_size", per_device)
    if wanted != per_device:
        ranks.say(
            f"  {per_device} rows at once on a rank, not {wanted}: global_batch_size is {run.stage.global_batch_size}"
        )
    if warning := warmup_warning(run.stage, max_steps):
        ranks.say(f"  {warning}", "warning")
    batch = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
    # Where a tracker takes a run of the same name for the same one, it has to be.
    name = run.stage.training.get("run_name", f"{run.recipe.name}-{run.stage.name}-{run.hash[:6]}")
    arguments = stage_arguments(run.stage, run.folder, run.recipe.seed, max_steps, run_name=name, **batch, **more)
    launched, taken = os.environ.get(PRECISION, "no"), arguments.mixed_precision
    if launched not in ("no", taken):
        shown = "float32" if taken == "no" else taken
        ranks.say(
            f"  trains in {shown}, and not in {launched} as the launch says (mixed_precision): the stage decides, by "
            "`training:` (bf16, fp16) or else by what this machine computes in"
        )
    return arguments


def warmup_warning(stage: Stage, max_steps: int) -> str | None:
    """Warns of a warmup that does not end before the training does, which a trainer takes without a word."""
    warmup = stage.training.get("warmup_steps") or 0
    if warmup <= max_steps:
        return None
    return f"warmup_steps is {warmup:,} and the stage has {max_steps:,} steps: learning_rate is never reached"


def attend_to_packed_rows(run: StageRun, model: Any) -> None:
    """Chooses the attention of a model for packed rows, where the recipe does not name one."""
    if run.recipe.model.attn_implementation is None and use_varlen_attention(model):
        ranks.say("  attention: document by document, which takes the packed rows without a mask")


def load_parent(run: StageRun, **options: Any) -> Any:
    """Loads the model that a stage starts from, spread over the ranks where the launch does that.

    Args:
        run: The stage.
        options: As of `load_model`.
    """
    spread = not run.stage.training.get("deepspeed")  # its file may be of any level
    return load_model(run.parent, frozen=run.stage.adapter is not None, spread=spread, **options)


def with_adapter(run: StageRun, model: Any, **fields: Any) -> Any:
    """The model with the adapter that the stage trains: a new one, the parent's, or none where all weights are trained.

    Weights that the stage does not train are frozen.

    Args:
        run: The stage.
        model: Its parent, loaded.
        fields: Fields of a new adapter's config, over those of the recipe.
    """
    adapted = model
    rows = run.stage.adapter is not None and (run.added_tokens or trains_rows(run.stage.adapter))
    if rows and launched_by_fsdp() and not is_spread(model):
        raise RecipeError(
            f"stages.{run.stage.name}: rows of this model's embeddings are not trained beside an adapter with FSDP: "
            "more than its embeddings and head depends on the number of tokens, and each rank reads it whole. Name the "
            "whole modules in `modules_to_save`, or start plain ranks."
        )
    if run.continued is not None:
        adapted = continue_adapter(model, run.continued.path)
    elif run.stage.adapter is not None:
        block = train_rows(model, run.stage.adapter | fields, run.added_tokens)
        adapted = add_adapter(model, block, run.recipe.seed)
    if adapted is not model and launched_by_fsdp() and is_spread(model):
        average_gradients(adapted)
    train_part(adapted, run.stage)
    return adapted


@contextmanager
def trained_weights_kept(model: Any) -> Iterator[None]:
    """Keeps the weights that are trained as they are.

    TRL rounds an adapter on a quantized base to bfloat16, where small updates vanish.
    """
    exact = {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}
    yield
    for name, weight in model.named_parameters():
        if name in exact and weight.dtype != exact[name].dtype:
            weight.data = exact[name]


def train(
    run: StageRun,
    trainer: Trainer,
    loader: BatchLoader,
    tokens_per_step: float | None,
    longest: tuple[int, int],
) -> dict[str, Any]:
    """Trains from the last whole checkpoint, or from the start, to the end, and saves the model.

    Args:
        run: The stage.
        trainer: Trainer or SFTTrainer, with its model and arguments.
        loader: Serves this rank's batches in place of the trainer's own loader.
        tokens_per_step: Tokens of a step over all ranks, for the log.
        longest: Tokens of the longest row that is trained on, and of the longest target, before they are padded.

    Returns:
        Facts about the training for done.json.

    Raises:
        Stopped: A signal came; a checkpoint is saved.
        DataError: The loss is not a number.
    """
    original = original_state(trainer.model) if run.stage.adapter is not None else {}
    _keep_every_layer(trainer.model)
    in_parts = is_spread(trainer.model)
    if in_parts and trainer.is_deepspeed_enabled:
        _hand_over(trainer)
        in_parts = run.stage.adapter is None  # DeepSpeed has divided an adapter too, and gathers it to save it
    checkpoint = _taken_up(run, trainer, loader)
    # Trainer would let accelerate shard the loader again, or let one rank read for all.
    override(trainer, get_train_dataloader=lambda: loader)
    if run.stage.learning_rates or run.stage.muon is not None:
        override(trainer, create_optimizer=partial(_create_optimizer, trainer, trainer.create_optimizer, run.stage))
    if trainer.is_fsdp_enabled:
        _hold_to_plan(trainer)
    selection = Selection(run, trainer) if run.stage.early_stopping is not None else None
    make_saveable(trainer.model)
    checkpoints = _add_callbacks(run, trainer, loader, tokens_per_step)
    run.cost.predict(*(size + -size % loader.multiple for size in longest))
    with signals.held():
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if checkpoints.stopped_at is not None:
        raise Stopped(
            f"stopped by a signal at step {checkpoints.stopped_at} of {trainer.state.max_steps} of stage "
            f"{run.stage.name}; a checkpoint is saved in {run.folder}. Run the same command again to continue."
        )
    last = run.folder / f"checkpoint-{trainer.state.global_step}" / MANIFEST
    if last.exists():
        signals.heed()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    with nullcontext() if last.exists() else signals.held():  # without a checkpoint the training would be lost
        save(run, trainer, original, in_parts=in_parts)
    chosen = {"early_stopping": selection.facts()} if selection else {}
    return {
        **chosen,
        "steps": trainer.state.global_step,
        "train_loss": result.training_loss,
        "last_loss": losses[-1] if losses else None,
        "data": loader.source.facts(),
    }


def _hand_over(trainer: Trainer) -> None:
    """Has DeepSpeed divide a model that was read in parts, in the precision in which it trains all weights."""
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
    config.trainer_config_finalize(trainer.args, trainer.model, trainer.args.max_steps)
    hand_to_deepspeed(trainer.model, config)


def _hold_to_plan(trainer: Trainer) -> None:
    """Keeps accelerate from dividing a model again that was loaded in parts, and tells it how checkpoints are saved.

    Each rank saves its own part. What accelerate divides itself is saved whole, which Trainer needs for the last save.
    """
    accelerator, spread = trainer.accelerator, is_spread(trainer.model)
    plugin = accelerator.state.fsdp_plugin
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # those of the type that the launch asks for
    plugin.set_state_dict_type("SHARDED_STATE_DICT" if spread else "FULL_STATE_DICT")

    def prepare(model: Any, optimizer: Any) -> tuple[Any, Any]:
        prepared = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return prepared, accelerator.prepare_optimizer(optimizer, device_placement=False)

    if spread:
        override(accelerator, prepare=prepare)
        if plugin.activation_checkpointing:
            trainer.args.activation_checkpointing = True  # accelerate's is a part of its `prepare`


def _add_callbacks(
    run: StageRun, trainer: Trainer, loader: BatchLoader, tokens_per_step: float | None
) -> CheckpointCallback:
    """Gives a trainer the callbacks of a stage, in the order in which they act, and returns the one that saves."""
    words = run.stage.training
    saving = words.get("save_total_limit", 2), words.get("save_minutes")
    checkpoints = CheckpointCallback(trainer, loader, run.hash, run.trajectory, *saving)
    trainer.remove_callback(PrinterCallback)  # LogCallback prints
    guard_trackers(trainer)
    watch = StopWhenNotFinite(trainer, loader, run.tokenizer, run.stage.name, run.folder)
    run.cost.watch(trainer.model, loader, tokens_per_step)
    place = [stage.name for stage in run.recipe.stages].index(run.stage.name) + 1
    title = f"{run.stage.name} ({run.stage.kind}, stage {place} of {len(run.recipe.stages)})"
    log = LogCallback(title, loader, run.folder / "log.jsonl", tokens_per_step, run.cost)
    looks: list[TrainerCallback] = [ScoredWhileTraining(run, trainer)]
    if samples_of(run.stage) is not None:
        looks.append(Sampling(run, trainer))
    if run.stage.fake_quantized is not None and run.stage.fake_quantized.after_steps:
        trainer.add_callback(RoundingFrom(trainer, run.stage.fake_quantized.after_steps))
    for callback in (_Rehearsal(run, trainer), watch, checkpoints, *run.callbacks, run.cost, log, *looks):
        trainer.add_callback(callback)
    return checkpoints


def _taken_up(run: StageRun, trainer: Trainer, loader: BatchLoader) -> Path | None:
    """Takes up the position of the newest whole checkpoint, and returns its folder; None at the start of a stage."""
    versions = {run.hash, run.trajectory}
    checkpoint, passed_over = newest_whole(run.folder, versions, trainer.args.max_steps)
    for line in passed_over:
        ranks.say(f"  {line}")
    if checkpoint:
        read_across(run, trainer, checkpoint)
        loader.source.load_state_dict(load_json(checkpoint / DATA_STATE))
        ranks.say(f"  continuing from {checkpoint.name}")
    return checkpoint


def _create_optimizer(trainer: Trainer, create: Callable[..., Any], stage: Stage, model: Any = None) -> Any:
    """Makes the trainer's own optimizer, once, with the learning rates of the stage, and Muon beside it if asked."""
    if trainer.optimizer is None:
        made, own = create(model), trainer.model if model is None else model
        set_learning_rates(made, own, stage.learning_rates or {})
        if stage.muon is not None:
            trainer.optimizer = with_muon(made, own, stage.muon)
    return trainer.optimizer


class _Rehearsal(TrainerCallback):
    """Tries the save once the trainer has made its changes to the configs, before the first step."""

    def __init__(self, run: StageRun, trainer: Trainer) -> None:
        self.run, self.trainer = run, trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_fp32_wrapper=False)
        rehearse(self.run, model, sharded=is_sharded(self.trainer))


def _keep_every_layer(model: Any) -> None:
    """Turns LayerDrop off (https://arxiv.org/abs/1909.11556), which M2M100 has.

    A step that skips a layer has no gradient for it: several ranks fail then, and so does an adapter that lies in
    skipped layers only.
    """
    dropping = [module for module in model.modules() if getattr(module, "layerdrop", 0)]
    for module in dropping:
        module.layerdrop = 0.0
    if dropping:
        ranks.say("  the model's config drops layers at random (layerdrop): here every layer is trained at every step")


@dataclass(frozen=True)
class Plan:
    """The division of a stage's rows.

    Args:
        per_device: Rows of a micro-batch on one rank.
        accumulation: Micro-batches of a step.
        total: Rows to give in all, over all epochs.
        packed: Packs examples into rows; None where each is a row.
    """

    per_device: int
    accumulation: int
    total: int
    packed: PackedRows | None = None

    @property
    def global_batch(self) -> int:
        """Rows of a step over all ranks."""
        return self.per_device * self.accumulation * ranks.ranks()

    @property
    def max_steps(self) -> int:
        return math.ceil(self.total / self.global_batch)

    def tokens_per_step(self, lengths: Sequence[int] | np.ndarray) -> float:
        """Tokens of a step over all ranks, on average."""
        rows = len(lengths) if self.packed is None else self.packed.epoch(0).rows
        return self.global_batch * float(np.sum(lengths)) / rows

    def serve(
        self, run: StageRun, rows: Any, lengths: Sequence[int] | np.ndarray, *, grouped: bool = True
    ) -> ResumableSampler:
        """Returns the sampler of this rank's rows, those of a step of like length if `grouped`."""
        order = self.packed if grouped else ShuffledRows(len(lengths), run.recipe.seed)
        return ResumableSampler(
            rows,
            lengths,
            total=self.total,
            per_device=self.per_device,
            accumulation=self.accumulation,
            seed=run.recipe.seed,
            order=order,
            packed=self.packed is not None,
            rank=ranks.rank(),
            ranks=ranks.ranks(),
        )


def read_share(stage: Stage, rows: float) -> float:
    """Returns the part of so many rows that a stage reads; at most 1, also where it reads them several times."""
    steps = stage.training.get("max_steps", -1)
    per_device, accumulation = divide_batch(stage)
    return min(1.0, steps * per_device * accumulation * ranks.ranks() / max(rows, 1.0)) if steps > 0 else 1.0


def plan_of(stage: Stage, examples: int, packed: PackedRows | None = None) -> Plan:
    """Divides the rows of so many examples by the recipe's `max_steps`, or else its `num_train_epochs`.

    Raises:
        RecipeError: As `divide_batch`.
    """
    per_device, accumulation = divide_batch(stage)
    epochs, steps = stage.training.get("num_train_epochs", 1), stage.training.get("max_steps", -1)
    if steps > 0:
        total = steps * per_device * accumulation * ranks.ranks()
    elif packed is None:
        total = max(1, round(examples * epochs))  # a small part of an epoch is one step, at least
    else:
        total = max(1, count_rows(packed, epochs))
    return Plan(per_device, accumulation, total, packed)
