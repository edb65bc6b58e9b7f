"""`kind: sft`: fine-tuning on prompt + completion, messages or text, in full, LoRA or QLoRA, by SFTTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from trl import SFTTrainer

from hfpipe.core import ranks
from hfpipe.core.upstream import attention_of
from hfpipe.data.dataloader import BatchLoader, collate
from hfpipe.data.row_order import PackedRows
from hfpipe.data.stream.packing import isolation_leak
from hfpipe.model.adapter import TOLERANCE
from hfpipe.model.load import load_model
from hfpipe.recipe import Sft
from hfpipe.stages.arguments import clear_refusal
from hfpipe.stages.causal_loss import WithLinearLoss
from hfpipe.stages.nearness import hold_near, mark_own
from hfpipe.stages.sft_rows import Marked, sft_length, sft_rows
from hfpipe.stages.trainer import StageRun, plan_of, train, trained_weights_kept, trainer_arguments, with_adapter


class _Trainer(WithLinearLoss, SFTTrainer):
    pass


def run_sft(run: StageRun) -> dict[str, Any]:
    """Trains an sft stage and saves its model; see `stages.common.train` for what is returned and raised."""
    stage = run.stage
    assert isinstance(stage, Sft)
    model = load_model(run.parent, frozen=stage.adapter is not None)
    length = sft_length(run, model)
    rows, sources = sft_rows(run, length, model)
    own = [part for part, found in zip(rows.parts, sources.values(), strict=True) if found.get("parents_own")]
    lengths = rows.lengths
    packed = _packed(run, model, lengths, length)
    plan = plan_of(stage, len(rows), packed)
    source = plan.serve(run, Marked(rows, sum(map(len, own))) if stage.kept.kl is not None else rows, lengths)
    # What of a row is trained on stands in its labels by now; asked again, SFTTrainer looks for conversations.
    labelled = {"assistant_only_loss": False, "packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    arguments = trainer_arguments(run, plan.max_steps, plan.per_device, plan.accumulation, **labelled)
    model = with_adapter(run, model)
    with clear_refusal(stage, "SFTTrainer"), trained_weights_kept(model):
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list([{key: value.tolist() for key, value in rows[0].items()}]),  # not read
            processing_class=run.tokenizer,
        )
    trainer.use_linear_loss()
    hold_near(run, trainer, sum(part.trained for part in own) / rows.trained)
    collated = _collate_marked if stage.kept.kl is not None else collate
    multiple = arguments.pad_to_multiple_of or 1
    loader = BatchLoader(source, plan.per_device, run.tokenizer.pad_token_id, multiple, collated)
    longest = (packed is not None and length) or int(lengths.max())
    facts = train(run, trainer, loader, tokens_per_step=plan.tokens_per_step(lengths), longest=(longest, 0))
    epochs = {"epochs": round(facts["data"]["epochs"], 4)}
    facts["data"]["sources"] = {name: {**found, **epochs} for name, found in sources.items()}
    return facts


def _collate_marked(rows: Sequence[dict[str, Any]], pad_token_id: int, multiple: int = 1) -> dict[str, torch.Tensor]:
    """Stacks rows, and marks the tokens of the parent's own texts."""
    return mark_own(rows, collate(rows, pad_token_id, multiple))


def _packed(run: StageRun, model: Any, lengths: np.ndarray, length: int | None) -> PackedRows | None:
    """Returns how examples share rows where the recipe asks for it and the model keeps them apart; says what is done.

    Grouped by length, rows of one step are padded little, and as many examples make a step as the recipe says; that is
    safe on any model, and so what is done by itself.
    """
    if not run.stage.training.get("packing"):
        return None
    model.config.use_cache = False  # a cache would let examples of one row see each other
    leak = isolation_leak(model)
    if leak > TOLERANCE.get(model.dtype, 0.25):
        ranks.say(
            f"  packing: this model ({type(model).__name__}, attention {attention_of(model)}) does not "
            "keep the examples of a row apart, so each is a row of its own, beside others of like length"
        )
        return None
    room = length or int(lengths.max())
    packed = PackedRows(lengths, room, run.recipe.seed)
    rows = packed.epoch(0).rows
    share = 1 - lengths.sum() / (rows * room)
    ranks.say(f"  packing: {len(lengths):,} examples in {rows:,} rows of {room:,} tokens, {share:.1%} of them padding")
    return packed
