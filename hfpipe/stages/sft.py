"""`kind: sft`: fine-tuning on prompt + completion, messages or text, in full, LoRA or QLoRA, by SFTTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from trl import SFTTrainer

from hfpipe.core import ranks
from hfpipe.core.upstream import attention_of
from hfpipe.data.counterfactual import Collated
from hfpipe.data.dataloader import BatchLoader, RowSource, collate
from hfpipe.data.row_order import PackedRows
from hfpipe.data.stream.packing import isolation_leak
from hfpipe.model.adapter import TOLERANCE
from hfpipe.recipe import Sft, Stage
from hfpipe.stages.arguments import clear_refusal
from hfpipe.stages.causal_loss import WithFastLoss
from hfpipe.stages.counterfactual import hold_together
from hfpipe.stages.nearness import hold_near, mark_own
from hfpipe.stages.sft_rows import Marked, is_streamed, sft_length, sft_rows, sft_stream
from hfpipe.stages.trainer import (
    Plan,
    StageRun,
    attend_to_packed_rows,
    load_parent,
    plan_of,
    train,
    trained_weights_kept,
    trainer_arguments,
    with_adapter,
)


class _Trainer(WithFastLoss, SFTTrainer):
    pass


def run_sft(run: StageRun) -> dict[str, Any]:
    """Trains an sft stage and saves its model; see `stages.trainer.train` for what is returned and raised."""
    stage = run.stage
    assert isinstance(stage, Sft)
    model = load_parent(run)
    length = sft_length(run, model)
    data = _streamed(run, model, length) if is_streamed(stage) else _tables(run, model, length)
    plan = data.plan
    arguments = trainer_arguments(run, plan.max_steps, plan.per_device, plan.accumulation)
    model = with_adapter(run, model)
    with trained_weights_kept(model):
        trainer = sft_trainer(stage, model, arguments, run.tokenizer)
    trainer.use_fast_loss()
    hold_near(run, trainer, data.parents_own)
    collated: Collated = _collate_marked if stage.kept.kl is not None else collate
    collated = hold_together(run, trainer, collated)
    multiple = arguments.pad_to_multiple_of or 1
    loader = BatchLoader(data.source, plan.per_device, run.tokenizer.pad_token_id, multiple, collated)
    facts = train(run, trainer, loader, tokens_per_step=data.tokens_per_step, longest=(data.longest, 0))
    if data.sources is not None:
        epochs = {"epochs": round(facts["data"]["epochs"], 4)}
        facts["data"]["sources"] = {name: {**found, **epochs} for name, found in data.sources.items()}
    return facts


def sft_trainer(stage: Stage, model: Any, arguments: Any, tokenizer: Any) -> _Trainer:
    """Makes the trainer of a stage; the one row that it is given is not read.

    Args:
        stage: The stage.
        model: Its model, with its adapter.
        arguments: The trainer's own, which are changed.
        tokenizer: The run's tokenizer.

    Raises:
        RecipeError: It refuses a value.
    """
    # Labels already mask untrained tokens; otherwise SFTTrainer would look for conversations.
    arguments.assistant_only_loss = arguments.packing = False
    arguments.dataset_kwargs = {"skip_prepare_dataset": True}
    with clear_refusal(stage, "SFTTrainer"):
        return _Trainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list([{"input_ids": [0, 0], "labels": [0, 0]}]),
            processing_class=tokenizer,
        )


def _collate_marked(rows: Sequence[dict[str, Any]], pad_token_id: int, multiple: int = 1) -> dict[str, torch.Tensor]:
    """Stacks rows, and marks the tokens of the parent's own texts."""
    return mark_own(rows, collate(rows, pad_token_id, multiple))


class _Data(NamedTuple):
    """The rows of a stage.

    Args:
        source: Serves them.
        plan: Their division.
        tokens_per_step: Over all ranks, on average; None where it is not known before.
        longest: Tokens of the longest row that is trained on.
        sources: What was read of each source, where all is read before the training.
        parents_own: Of the trained tokens, the share of the parent's own texts.
    """

    source: RowSource
    plan: Plan
    tokens_per_step: float | None
    longest: int
    sources: dict[str, dict[str, Any]] | None = None
    parents_own: float = 0.0


def _tables(run: StageRun, model: Any, length: int | None) -> _Data:
    """Returns rows that are tokenized before the training."""
    rows, sources = sft_rows(run, length, model)
    own = [part for part, found in zip(rows.parts, sources.values(), strict=True) if found.get("parents_own")]
    lengths = rows.lengths
    packed = _packed(run, model, lengths, length)
    plan = plan_of(run.stage, len(rows), packed)
    marked = Marked(rows, sum(map(len, own))) if run.stage.kept.kl is not None else rows
    source = plan.serve(run, marked, lengths)
    share = sum(part.trained for part in own) / rows.trained
    return _Data(source, plan, plan.tokens_per_step(lengths), source.longest(), sources, share)


def _streamed(run: StageRun, model: Any, length: int | None) -> _Data:
    """Returns rows that are tokenized while the model trains."""
    packed = bool(run.stage.training.get("packing")) and _keeps_apart(run, model)
    plan = plan_of(run.stage, 0)
    stream = sft_stream(run, length, packed=packed)
    for line in stream.notes():
        ranks.say(f"  {line}")
    shared = f"examples share rows of {length:,} tokens" if packed else "each example is a row"
    ranks.say(f"  rows are read and tokenized while the stage trains, in {stream.lanes} lanes; {shared}")
    tokens = plan.global_batch * stream.max_length if packed else None
    return _Data(stream, plan, tokens, stream.max_length)


def _packed(run: StageRun, model: Any, lengths: np.ndarray, length: int | None) -> PackedRows | None:
    """Returns how examples share rows where the recipe asks for it and the model keeps them apart; says what is done.

    Grouped by length, rows of one step are padded little, and as many examples make a step as the recipe says; that is
    safe on any model, and so what is done by itself.
    """
    if not run.stage.training.get("packing") or not _keeps_apart(run, model):
        return None
    room = length or int(lengths.max())
    packed = PackedRows(lengths, room, run.recipe.seed)
    rows = packed.epoch(0).rows
    share = 1 - lengths.sum() / (rows * room)
    ranks.say(f"  packing: {len(lengths):,} examples in {rows:,} rows of {room:,} tokens, {share:.1%} of them padding")
    return packed


def _keeps_apart(run: StageRun, model: Any) -> bool:
    """Says whether a model keeps the examples of a row apart."""
    model.config.use_cache = False  # a cache would let examples of one row see each other
    attend_to_packed_rows(run, model)
    leak = isolation_leak(model)
    if leak > TOLERANCE.get(model.dtype, 0.25):
        ranks.say(
            f"  packing: this model ({type(model).__name__}, attention {attention_of(model)}) does not "
            "keep the examples of a row apart, so each is a row of its own, beside others of like length"
        )
        return False
    return True
