"""`kind: sft`: fine-tuning on prompt + completion, messages or text, in full, LoRA or QLoRA, by SFTTrainer."""

from __future__ import annotations

import math
from typing import Any

from datasets import Dataset, concatenate_datasets
from trl import SFTConfig, SFTTrainer

from hfpipe import ranks
from hfpipe.data.encode import encode_for_training
from hfpipe.data.loader import BatchLoader
from hfpipe.data.rows import ShuffledRows
from hfpipe.data.source_errors import readable
from hfpipe.data.sources import TEXT_KINDS, load_rows
from hfpipe.errors import DataError
from hfpipe.model.load import load_model
from hfpipe.recipe import Sft, Source
from hfpipe.stages.common import StageRun, divide_batch, train, trainer_arguments, with_adapter


def run_sft(run: StageRun) -> dict[str, Any]:
    """Trains an sft stage and saves its model; see `stages.common.train` for what is returned and raised."""
    stage = run.stage
    assert isinstance(stage, Sft)
    rows = _tokenized_rows(run, stage)
    lengths = [len(ids) for ids in rows["input_ids"]]
    per_device, accumulation = divide_batch(stage)
    global_batch = per_device * accumulation * ranks.ranks()
    total = round(len(rows) * stage.training.get("num_train_epochs", 1))
    max_steps = stage.training.get("max_steps", -1)
    if max_steps > 0:
        total = max_steps * global_batch
    source = ShuffledRows(
        rows,
        lengths,
        total=total,
        per_device=per_device,
        accumulation=accumulation,
        seed=run.recipe.seed,
        rank=ranks.rank(),
        ranks=ranks.ranks(),
    )
    max_steps = math.ceil(total / global_batch)
    arguments = trainer_arguments(
        SFTConfig,
        run,
        max_steps,
        per_device,
        accumulation,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    model = with_adapter(run, load_model(run.parent, frozen=stage.adapter is not None))
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=run.tokenizer,
    )
    loader = BatchLoader(source, per_device, run.tokenizer.pad_token_id, arguments.pad_to_multiple_of or 1)
    return train(run, trainer, loader, tokens_per_step=global_batch * sum(lengths) / len(lengths))


def _tokenized_rows(run: StageRun, stage: Sft) -> Dataset:
    """Tokens and labels of every row of the stage and of the rows it replays, in a fixed order."""
    parts = [_tokenize(run, source) for source in stage.data]
    if any(source.weight is not None for source in stage.data):
        parts = _weighted(parts, [source.weight or 1.0 for source in stage.data])
    if stage.replay is not None:
        replayed = stage.replay.stage
        earlier = next(other for other in run.recipe.stages if other.name == replayed)
        wanted = round(sum(map(len, parts)) * stage.replay.share / (1 - stage.replay.share))
        each = math.ceil(wanted / len(earlier.data))
        parts += [_tokenize(run, source, at_most=each) for source in earlier.data]
    return concatenate_datasets(parts)


def _weighted(parts: list[Dataset], weights: list[float]) -> list[Dataset]:
    """The largest numbers of rows that stand in the proportion of the weights and repeat none."""
    unit = min(len(part) / weight for part, weight in zip(parts, weights, strict=True))
    return [part.select(range(max(1, int(unit * weight)))) for part, weight in zip(parts, weights, strict=True)]


def _tokenize(run: StageRun, source: Source, at_most: int | None = None) -> Dataset:
    """Reads and tokenizes a source in batches, on every rank alike."""
    training = run.stage.training
    rows = load_rows(source, seed=run.recipe.seed, kinds=TEXT_KINDS)
    tokenized: list[dict[str, list[int]]] = []
    read = dirty = 0
    for batch in readable(rows.iter(batch_size=1000), source):
        columns = list(batch)
        chunk = [dict(zip(columns, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        whole = [row for row in chunk if all(row[key] is not None for key in columns if key != "id")]
        dirty, chunk = dirty + len(chunk) - len(whole), whole
        if at_most is not None:
            chunk = chunk[: at_most - read]
        read += len(chunk)
        tokenized += encode_for_training(
            chunk,
            run.tokenizer,
            max_length=training.get("max_length", 1024),
            completion_only=training.get("completion_only_loss"),
            assistant_only=training.get("assistant_only_loss", False),
        )
        if at_most is not None and read >= at_most:
            break
    if dirty > run.stage.max_dirty_share * (read + dirty):
        raise DataError(
            f"stages.{run.stage.name}: {dirty:,} of {read + dirty:,} rows of {source.path!r} lack a value, more than "
            f"the {run.stage.max_dirty_share:.2%} that max_dirty_share allows. Mend them, leave them out with `where`, "
            "or raise max_dirty_share of the stage."
        )
    if not tokenized:
        raise DataError(
            f"stages.{run.stage.name}: {source.path} gave {read} rows and none of them has a token to train on. Look "
            "at them with `hfpipe preview`; a prompt longer than max_length leaves no room for its completion."
        )
    if read > len(tokenized):
        ranks.say(f"  {source.path}: {read - len(tokenized)} of {read} rows have no token to train on and are left out")
    return Dataset.from_list(tokenized)
