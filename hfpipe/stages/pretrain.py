"""`kind: pretrain`: next-token training on packed documents, or masked language modelling, by Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from hfpipe.core import ranks
from hfpipe.core.errors import RecipeError
from hfpipe.core.files import read_json, write_json
from hfpipe.core.upstream import attention_of
from hfpipe.data.cleaning.text_rules import Read, tidy_rows
from hfpipe.data.counterfactual import Collated
from hfpipe.data.dataloader import BatchLoader, collate
from hfpipe.data.masking import Masking, frame_of
from hfpipe.data.mixture import documents_of, mixture
from hfpipe.data.sources.load import load_rows
from hfpipe.data.stream.dataset import TokenStream
from hfpipe.data.stream.packing import isolation_leak
from hfpipe.data.tokenize import IGNORED
from hfpipe.model.adapter import TOLERANCE
from hfpipe.model.create import small_copy
from hfpipe.model.positions import context_of
from hfpipe.recipe import Pretrain, Recipe
from hfpipe.recipe.faults import listed
from hfpipe.recipe.source_config import BASE
from hfpipe.stages.arguments import clear_refusal
from hfpipe.stages.causal_loss import WithFastLoss
from hfpipe.stages.counterfactual import hold_together
from hfpipe.stages.nearness import hold_near, mark_own
from hfpipe.stages.own_texts import LONGEST, own_texts, unended
from hfpipe.stages.trainer import (
    StageRun,
    attend_to_packed_rows,
    divide_batch,
    load_parent,
    row_length,
    train,
    trainer_arguments,
    with_adapter,
)

DEFAULT_MAX_LENGTH = 1024
MUCH_PADDING = 0.05  # of the tokens, from which a remedy is named


class _Trainer(WithFastLoss, Trainer):
    pass


def run_pretrain(run: StageRun) -> dict[str, Any]:
    """Trains a pretrain stage and saves its model; see `stages.trainer.train` for what is returned and raised."""
    stage = run.stage
    assert isinstance(stage, Pretrain)
    masked = stage.objective == "masked"
    masking = Masking(run.tokenizer, stage.masking or {}, run.recipe.seed) if masked else None
    frame = frame_of(run.tokenizer, words=masking.collator.whole_word_mask) if masking else None
    model, new = load_parent(run, with_new_modules=True)
    if new:
        ranks.say(f"  the base has no weights for {listed(new)}, which begin fresh")
    max_length = row_length(run, model, min(context_of(model) or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH))
    per_device, accumulation = divide_batch(stage)
    global_batch = per_device * accumulation * ranks.ranks()
    epochs = _whole_epochs(stage)
    max_steps: int = stage.training.get("max_steps") or 0  # 0: not known yet
    if not max_steps and not epochs:
        max_steps = _steps_of_epochs(run, {}, partial(_rows_of_epochs, run, max_length), global_batch)
    texts = own_texts(run, model, max(max_length, LONGEST), _own_tokens(stage, max_steps, global_batch * max_length))
    parts = mixture(run.recipe, stage, texts)
    tables = [run.cleaner.documents(part.source, partial(documents_of, part, run.tokenizer)) for part in parts]

    def cleaned(number: int, rows: IterableDataset, lanes: int) -> list[np.ndarray] | None:
        """The reasons why rows of a stream are removed, as far as the stage will read it."""
        whole = not parts[number].replayed and (epochs is not None or stage.exhausted == "stop")
        needed = None if whole else math.ceil(max_steps * global_batch * max_length / lanes * parts[number].share)
        return run.cleaner.shares(rows, lanes, parts[number].source, needed)

    stream = TokenStream(
        [rows for rows, _ in tables],
        run.tokenizer,
        max_length=max_length,
        weights=[part.share for part in parts],
        origins=[part.source for part in parts],
        replayed=[part.replayed for part in parts],
        lanes=stage.lanes,
        exhausted="stop" if epochs else stage.exhausted,
        epochs=epochs or 1,
        max_dirty_share=stage.max_dirty_share,
        seed=run.recipe.seed,
        rank=ranks.rank(),
        ranks=ranks.ranks(),
        cleaned=cleaned,
        frame=frame,
        unended=unended(texts),
    )
    for line in stream.notes():
        ranks.say(f"  {line}")
    max_steps = max_steps or _steps_of_epochs(run, {"lanes": stream.lanes}, stream.length, global_batch)
    trainer = _trainer(run, model, trainer_arguments(run, max_steps, per_device, accumulation))
    collated = hold_together(run, trainer, _collated(stage, masking, len(parts) - len(texts)))
    loader = BatchLoader(stream, per_device, run.tokenizer.pad_token_id, collated=collated)
    facts = train(run, trainer, loader, tokens_per_step=global_batch * max_length, longest=(max_length, 0))
    for source, (_, removed) in zip(facts["data"]["sources"].values(), tables, strict=True):
        source |= removed
    ranks.say(_waste(facts["data"]))
    if stream.ended:
        _say_early_end(trainer.state.global_step, max_steps)
    return facts


def _trainer(run: StageRun, model: Any, arguments: TrainingArguments) -> _Trainer:
    """Returns the trainer of a stage's objective, with its adapter on the model, held near its parent where asked."""
    stage = run.stage
    assert isinstance(stage, Pretrain)
    masked = stage.objective == "masked"
    if not masked:
        attend_to_packed_rows(run, model)
    model = with_adapter(run, model)
    if not masked:
        model.config.use_cache = False  # a cache would let packed documents see each other
        _require_isolation(model)
    loss = partial(masked_loss, label_smoothing=arguments.label_smoothing_factor) if masked else None
    with clear_refusal(stage, "Trainer"):
        trainer = _Trainer(model=model, args=arguments, processing_class=run.tokenizer, compute_loss_func=loss)
    if not masked:
        trainer.use_fast_loss()
    hold_near(run, trainer, stage.kept.replay.share if stage.kept.replay is not None else 0.0)
    return trainer


def _collated(stage: Pretrain, masking: Masking | None, first: int) -> Collated:
    """Returns what makes a batch of rows; `first` is the number of the first source of the parent's own texts."""
    if stage.kept.kl is not None:
        return partial(_collate_marked, first)
    return masking.collate if masking else collate


def _collate_marked(
    first: int, rows: Sequence[dict[str, Any]], pad_token_id: int, multiple: int = 1
) -> dict[str, torch.Tensor]:
    """Stacks rows, and marks those of the sources from `first` on, which are the parent's own texts."""
    marked = [{**row, "own": row["source"] is not None and row["source"] >= first} for row in rows]
    return mark_own(marked, collate(rows, pad_token_id, multiple))


def _waste(found: dict[str, Any]) -> str:
    """Returns a line of the log: the tokens read, and the shares padded and cut."""
    unequal = found["padding_share"] > MUCH_PADDING and found["lanes"] > ranks.ranks()
    return (
        f"  {found['tokens']:,} tokens, {found['documents']:,} documents; padding {found['padding_share']:.2%}"
        f"{' (some lanes ended long before others: fewer `lanes` pad less)' if unequal else ''}, "
        f"documents cut {found['cut_share']:.1%}"
    )


def _say_early_end(step: int, max_steps: int) -> None:
    """Says so where the data ended before the last step."""
    if step < max_steps:
        ranks.say(
            f"  the data ended at step {step:,} of {max_steps:,}, and the learning rate was planned for all of them; "
            f"write `max_steps: {step}` to let it fall to its end"
        )


def _whole_epochs(stage: Pretrain) -> int | None:
    """Returns the number of times that every document is read, where that is what ends the training.

    Not with several sources that repeat: their weights say how much each gives. Nor with a part of an epoch.
    """
    epochs = stage.training.get("num_train_epochs", 1)
    one = len(stage.data) == 1 or stage.exhausted == "stop"
    replays = stage.replay is not None or stage.kept.replay is not None
    if stage.training.get("max_steps") or replays or not one or epochs != int(epochs):
        return None
    return int(epochs)


def masked_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None, *, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropy summed over the masked tokens and divided by those of the global batch.

    The models' own loss is a mean over a micro-batch, and micro-batches differ in their number of masked tokens.
    """
    where = labels != IGNORED
    count = where.sum() if num_items_in_batch is None else num_items_in_batch
    logits = outputs["logits"][where].float()  # only these: the logits of all tokens are the largest tensor by far
    return functional.cross_entropy(logits, labels[where], reduction="sum", label_smoothing=label_smoothing) / count


def require_isolation(recipe: Recipe, model: Any) -> None:
    """Refuses a base on which a stage would pack documents that see each other: it would be worse, without a sign.

    Args:
        recipe: The recipe.
        model: The base; of one that is shapes alone a small copy is measured, where one can be made.

    Raises:
        RecipeError: They do.
    """
    packing = [stage for stage in recipe.stages if isinstance(stage, Pretrain) and stage.objective == "causal"]
    if any(recipe.parent_of(stage.name) == BASE for stage in packing):
        if model.device.type == "meta" and (model := small_copy(model)) is None:
            return
        cached, model.config.use_cache = getattr(model.config, "use_cache", None), False  # as the stage does
        _require_isolation(model)
        model.config.use_cache = cached


def _require_isolation(model: Any) -> None:
    """Refuses a model on which packed documents see each other."""
    leak = isolation_leak(model)
    if leak > TOLERANCE.get(model.dtype, 0.25):
        raise RecipeError(
            f"packed documents are not kept apart on this model ({type(model).__name__}, attention "
            f"{attention_of(model)}): log-probabilities change by {leak:.2g} nats. Set "
            "model.attn_implementation to sdpa or eager; an architecture that ignores position_ids cannot be packed."
        )


def _own_tokens(stage: Pretrain, max_steps: int, tokens_per_step: int) -> float | None:
    """Tokens of its parent's own texts that a stage has room for."""
    block = stage.kept.replay
    return None if block is None or not max_steps else max_steps * tokens_per_step * block.share


def _steps_of_epochs(run: StageRun, key: dict[str, Any], count: Callable[[], float], global_batch: int) -> int:
    """Steps of `num_train_epochs`, for which the data is tokenized once: the schedule has to know where it ends.

    The rows are kept in the stage's folder, so that a resume does not count them again.

    Args:
        run: The stage.
        key: What the count depends on, beside the stage.
        count: Counts the rows. Every rank calls it.
        global_batch: Rows of a step.
    """
    path = run.folder / "length.json"
    key = {"hash": run.hash, **key}
    kept = ranks.from_main(read_json(path))
    if {name: value for name, value in kept.items() if name != "rows"} != key:
        kept = key | {"rows": count()}
        if ranks.is_main():
            write_json(path, kept)
    return max(1, math.ceil(kept["rows"] / global_batch))


def _rows_of_epochs(run: StageRun, length: int) -> float:
    """Rows that hold as many tokens as `num_train_epochs` of the stage's own data."""
    tokens, own = 0, sum(part.share for part in mixture(run.recipe, run.stage) if not part.replayed)
    special = run.stage.task == "causal"  # a row's, and not a document's, with a masked model
    for source in run.stage.data:
        rows, _ = run.cleaner.documents(source, partial(load_rows, source, kinds=("text",), together=True))
        if not hasattr(rows, "num_rows"):
            raise RecipeError(
                f"stages.{run.stage.name}.training: a streamed source has no known end, so epochs cannot be counted; "
                "give max_steps."
            )
        documents = tidy_rows(rows, source, Read())
        while texts := [row["text"] for row in islice(documents, 1000)]:
            ids = run.tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]
            tokens += sum(map(len, ids)) + len(texts)
    return tokens / own * run.stage.training.get("num_train_epochs", 1) / length
