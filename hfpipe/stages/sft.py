"""`kind: sft`: fine-tuning on prompt + completion, messages or text, in full, LoRA or QLoRA, by SFTTrainer."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

from datasets import Dataset, concatenate_datasets
from trl import SFTTrainer

from hfpipe.core import ranks
from hfpipe.core.errors import DataError
from hfpipe.data.cleaning.text_rules import Read, refuse_dirt, tidy_rows
from hfpipe.data.dataloader import BatchLoader
from hfpipe.data.mixture import mixture
from hfpipe.data.sources.load import load_rows
from hfpipe.data.tokenize import sft_tokenizer
from hfpipe.model.load import load_model
from hfpipe.model.positions import learned_positions
from hfpipe.recipe import Sft, Source
from hfpipe.recipe.row_formats import TEXT_KINDS
from hfpipe.stages.arguments import clear_refusal
from hfpipe.stages.trainer import StageRun, plan_of, row_length, train, trainer_arguments, weighted, with_adapter

DEFAULT_MAX_LENGTH = 1024  # TRL's


def run_sft(run: StageRun) -> dict[str, Any]:
    """Trains an sft stage and saves its model; see `stages.common.train` for what is returned and raised."""
    stage = run.stage
    assert isinstance(stage, Sft)
    if stage.training.get("packing"):
        ranks.say("  packing has no effect here: every example is a row of its own, padded to the longest of its batch")
    model = load_model(run.parent, frozen=stage.adapter is not None)
    rows, sources = _tokenized_rows(run, stage, _length(run, model))
    lengths = [len(ids) for ids in rows["input_ids"]]
    plan = plan_of(stage, len(rows))
    source = plan.serve(run, rows, lengths)
    # What of a row is trained on stands in its labels by now; asked again, SFTTrainer looks for conversations.
    labelled = {"assistant_only_loss": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    arguments = trainer_arguments(run, plan.max_steps, plan.per_device, plan.accumulation, **labelled)
    model = with_adapter(run, model)
    exact = {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}
    with clear_refusal(stage, "SFTTrainer"):
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=run.tokenizer)
    for name, weight in model.named_parameters():
        if name in exact:  # SFTTrainer rounds an adapter on a quantized base to bfloat16, where small updates vanish
            weight.data = exact[name]
    exact.clear()  # it would keep the weights after the trainer has let them go
    loader = BatchLoader(source, plan.per_device, run.tokenizer.pad_token_id, arguments.pad_to_multiple_of or 1)
    facts = train(run, trainer, loader, tokens_per_step=plan.tokens_per_step(lengths), longest=(max(lengths), 0))
    epochs = {"epochs": round(facts["data"]["epochs"], 4)}
    facts["data"]["sources"] = {name: {**found, **epochs} for name, found in sources.items()}
    return facts


def _length(run: StageRun, model: Any) -> int | None:
    """Tokens to keep of a row; all of them where the recipe says `max_length: null`, as in TRL."""
    if run.stage.training.get("max_length", DEFAULT_MAX_LENGTH) is None and learned_positions(model) is None:
        return None
    return row_length(run, model, DEFAULT_MAX_LENGTH)


def _tokenized_rows(run: StageRun, stage: Sft, length: int | None) -> tuple[Dataset, dict[str, dict[str, Any]]]:
    """Tokens and labels of every row of the stage and of those it replays, in a fixed order; what was read of each."""
    read = [_tokenize(run, source, length) for source in stage.data]
    parts, facts = [part for part, _ in read], [found for _, found in read]
    if any(source.weight is not None for source in stage.data):
        parts = weighted(parts, [source.weight or 1.0 for source in stage.data])
    sources = list(stage.data)
    replayed = [part for part in mixture(run.recipe, stage) if part.replayed]
    if replayed:
        whole = sum(map(len, parts)) / (1 - sum(part.share for part in replayed))  # rows of the stage
        for earlier in replayed:
            wanted = math.ceil(whole * earlier.share)
            part, found = _tokenize(run, earlier.source, length, at_most=wanted)
            if len(part) < wanted:
                ranks.say(f"  {earlier.source.title}: {len(part):,} rows to replay, {wanted:,} would make up its share")
            parts.append(part)
            facts.append({**found, "replayed": True})
            sources.append(earlier.source)
    tokens = [sum(map(len, part["input_ids"])) for part in parts]
    for found, given in zip(facts, tokens, strict=True):
        found["token_share"] = round(given / sum(tokens), 4)
    names = [f"{number}: {source.title}" for number, source in enumerate(sources)]
    return concatenate_datasets(parts), dict(zip(names, facts, strict=True))


def _tokenize(
    run: StageRun, source: Source, length: int | None, at_most: int | None = None
) -> tuple[Dataset, dict[str, Any]]:
    """Reads and tokenizes a source in batches, on every rank alike; and what was read of it."""
    assert isinstance(run.stage, Sft)
    read, rows_to_tokens = Read(), sft_tokenizer(run.stage, run.tokenizer, length, source)
    rows, removed = run.cleaner.rows(load_rows(source, seed=run.recipe.seed, kinds=TEXT_KINDS), source)
    clean = islice(tidy_rows(rows, source, read), at_most)
    tokenized: list[dict[str, list[int]]] = []
    while chunk := [*islice(clean, 1000)]:
        made = rows_to_tokens.encode(chunk)
        tokenized += made
        for number, word in made.refused:
            read.dirty.add([f"the chat template refuses it ({word})"], str(chunk[number].get("id", "without an id")))
    refuse_dirt(source, read.dirty, read.rows, run.stage.max_dirty_share)
    left = read.rows - len(read.dirty)
    if not tokenized:
        raise DataError(
            f"stages.{run.stage.name}: {source.title} gave {left} rows and none of them has a token to train on. Look "
            "at them with `hfpipe preview`; a prompt longer than max_length leaves no room for its completion."
        )
    if left > len(tokenized):
        told = f"{left - len(tokenized)} of {left} rows have no token to train on and are left out"
        ranks.say(f"  {source.title}: {told}")
    return Dataset.from_list(tokenized), read.facts() | removed
