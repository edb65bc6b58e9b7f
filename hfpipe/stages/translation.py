"""`kind: translation`: an encoder-decoder model on source + target (translation, summarization), by Seq2SeqTrainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from torch.nn import functional
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer

from hfpipe.core import ranks
from hfpipe.core.errors import DataError
from hfpipe.data.cleaning.text_rules import Read, refuse_dirt, tidy_rows
from hfpipe.data.dataloader import BatchLoader
from hfpipe.data.sources.load import load_rows
from hfpipe.data.token_store import Columns, Concatenated, TokenStore, made_once, told, write_columns
from hfpipe.data.tokenize import IGNORED
from hfpipe.model.seq2seq import decoder_input, encode_pairs, end_token, most_tokens, set_languages
from hfpipe.recipe import Source, Translation
from hfpipe.stages.arguments import clear_refusal
from hfpipe.stages.trainer import (
    StageRun,
    load_parent,
    plan_of,
    require_positions,
    shares_of_rows,
    train,
    trainer_arguments,
    with_adapter,
)

DEFAULT_MAX_LENGTH = 1024
BLOCK = 1_000  # pairs tokenized at a time


def run_translation(run: StageRun) -> dict[str, Any]:
    """Trains a translation stage and saves its model; see `stages.trainer.train` for what is returned and raised."""
    stage = run.stage
    assert isinstance(stage, Translation)
    model = load_parent(run)
    rows, sources = paired_tokens(run, pair_lengths(run, model))
    lengths = rows.lengths
    plan = plan_of(stage, len(rows))
    source = plan.serve(run, rows, lengths)
    arguments = trainer_arguments(run, plan.max_steps, plan.per_device, plan.accumulation)
    collator = DataCollatorForSeq2Seq(run.tokenizer)
    adapted = with_adapter(run, model, task_type="SEQ_2_SEQ_LM")
    loss = Loss(arguments.label_smoothing_factor)
    with clear_refusal(stage, "Seq2SeqTrainer"):
        trainer = Seq2SeqTrainer(model=adapted, args=arguments, processing_class=run.tokenizer, compute_loss_func=loss)
    end = end_token(run.tokenizer)
    loader = BatchLoader(
        source,
        plan.per_device,
        run.tokenizer.pad_token_id,
        collated=lambda batch, *_: _collate(batch, collator, model, end),
    )
    longest = source.longest(rows.lengths_of("input_ids")), source.longest(rows.lengths_of("labels"))
    facts = train(run, trainer, loader, tokens_per_step=plan.tokens_per_step(lengths), longest=longest)
    facts["data"]["sources"] = sources
    return facts


class Loss:
    """Cross-entropy, summed over the target tokens and divided by those of the global batch.

    The models' own losses are means over one micro-batch, whatever Trainer tells them of the global one.
    """

    def __init__(self, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        total = functional.cross_entropy(
            outputs["logits"].flatten(0, 1).float(),
            labels.flatten(),
            ignore_index=IGNORED,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        return total / count


def _collate(
    rows: Sequence[dict[str, Any]], collator: DataCollatorForSeq2Seq, model: Any, end: int
) -> dict[str, torch.Tensor]:
    """A batch of transformers' own collator; rows with `is_padding` fill the last batch and carry no label.

    A padding row says one token while the decoder's input is made: some models look there for the last token.
    """
    padding = torch.tensor([bool(row.get("is_padding")) for row in rows])
    filled = [
        {"input_ids": row["input_ids"].tolist(), "labels": [end] if row.get("is_padding") else row["labels"].tolist()}
        for row in rows
    ]
    batch = dict(collator(filled))
    batch["decoder_input_ids"] = decoder_input(model, batch["labels"])
    batch["labels"][padding] = IGNORED
    return batch


def pair_lengths(run: StageRun, model: Any) -> tuple[int, int]:
    """Tokens to keep of a source and of a target.

    Raises:
        RecipeError: As `require_positions`.
    """
    require_positions(run.stage, model)
    training = run.stage.training
    longest = training.get("max_length") or int(
        min(run.tokenizer.model_max_length, most_tokens(model), DEFAULT_MAX_LENGTH)
    )
    return longest, training.get("max_target_length") or longest


def paired_tokens(run: StageRun, lengths: tuple[int, int]) -> tuple[Concatenated, dict[str, dict[str, Any]]]:
    """Returns the tokens of every pair of the stage, in a fixed order, and what was read of each source."""
    stage = run.stage
    parts, facts = [], {}
    for number, source in enumerate(stage.data):
        part, facts[f"{number}: {source.title}"] = _tokens_of(run, source, lengths)
        parts.append(part)
    if any(source.weight is not None for source in stage.data):
        counts = shares_of_rows([len(part) for part in parts], [source.weight or 1.0 for source in stage.data])
        parts = [part.first(count) for part, count in zip(parts, counts, strict=True)]
    return Concatenated(parts), facts


def _tokens_of(run: StageRun, source: Source, lengths: tuple[int, int]) -> tuple[TokenStore, dict[str, Any]]:
    """Tokenizes a source, or finds its tokens; says what was cut and what the tokenizer cannot write.

    Raises:
        DataError: Too many rows lack a source or a target.
    """
    set_languages(run.tokenizer, source)
    rows, removed = run.cleaner.rows(load_rows(source, kinds=("translation",)), source)

    def make(path: Path) -> dict[str, Any]:
        read, counts = Read(), {"pairs": 0, "cut": 0, "tokens": 0, "unknown": 0}
        clean = tidy_rows(rows, source, read)

        def blocks() -> Iterator[Columns]:
            while batch := list(islice(clean, BLOCK)):
                sources, targets = ([row[side] for row in batch] for side in ("source", "target"))
                pairs = encode_pairs(run.tokenizer, sources, targets, *lengths)
                counts["pairs"] += len(pairs)
                counts["cut"] += sum(pair.cut for pair in pairs)
                counts["tokens"] += sum(len(pair.labels) for pair in pairs)
                counts["unknown"] += sum(pair.labels.count(run.tokenizer.unk_token_id) for pair in pairs)
                columns = {"input_ids": [pair.input_ids for pair in pairs], "labels": [pair.labels for pair in pairs]}
                yield {name: pa.array(ids, pa.list_(pa.int32())) for name, ids in columns.items()}

        write_columns(path, told(blocks(), source.title, len(rows) if isinstance(rows, Dataset) else None))
        refuse_dirt(source, read.dirty, read.rows, run.stage.max_dirty_share)
        if not counts["pairs"]:
            raise DataError(f"stages.{run.stage.name}: {source.path!r} has no row with a source and a target.")
        return {**read.facts(), **counts}

    words: list[Any] = [*lengths, source.src_lang, source.tgt_lang, run.stage.max_dirty_share]
    if not isinstance(rows, Dataset):
        words += [run.hash, source.model_dump()]
    store, found, before = made_once(rows, run.tokenizer, words, make, run.folder / "tokens")
    line = f"  {source.title}: {found['pairs']:,} pairs"
    if found["cut"]:
        line += (
            f", {found['cut']:,} of them cut to {lengths[0]} tokens of source or {lengths[1]} of target (max_length, "
        )
        line += "max_target_length)"
    line += ", tokenized before" if before else ""
    ranks.say(line)
    if found["unknown"]:
        share = found["unknown"] / found["tokens"]
        ranks.say(f"  {source.title}: the tokenizer cannot write {share:.2%} of the target tokens (<unk>)")
    kept = {key: value for key, value in found.items() if key not in ("pairs", "tokens", "unknown")}
    return store, {**kept, **removed}
