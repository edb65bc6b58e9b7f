"""`kind: preference`: DPO and its kin on pairs of a chosen and a rejected answer, full, LoRA or QLoRA, by DPOTrainer.

The reference is the stage's parent. Beside a new adapter it is the same model with the adapter switched off. Else the
parent's log-probabilities of all pairs are computed before the first step and kept, so it takes no memory of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from trl import DPOTrainer
from trl.models import prepare_fsdp
from trl.trainer.utils import add_fused_lm_head

from hfpipe.core import display, ranks
from hfpipe.core.errors import RecipeError
from hfpipe.core.files import read_json, write_json
from hfpipe.core.upstream import override
from hfpipe.data.dataloader import SIDES, BatchLoader, collate
from hfpipe.data.preference import PairTokenizer, pair_collator
from hfpipe.data.token_store import Concatenated, TokenStore
from hfpipe.model.head import hidden_by
from hfpipe.model.load import load_model
from hfpipe.model.positions import learned_positions
from hfpipe.model.spread import is_spread
from hfpipe.recipe import Sft, Source, Stage, hash_of
from hfpipe.recipe.row_formats import formats_of_stage
from hfpipe.recipe.stage_config import Preference
from hfpipe.stages.arguments import clear_refusal
from hfpipe.stages.nearness import OWN, NearParent, near_parent
from hfpipe.stages.saving import is_sharded
from hfpipe.stages.sft_rows import own_rows, tokens_of_source
from hfpipe.stages.sharding import plan_of_launch
from hfpipe.stages.trainer import (
    StageRun,
    load_parent,
    plan_of,
    read_share,
    row_length,
    shares_of_rows,
    train,
    trained_weights_kept,
    trainer_arguments,
    with_adapter,
)

DEFAULT_MAX_LENGTH = 1024  # TRL's


def run_preference(run: StageRun) -> dict[str, Any]:
    """Trains a preference stage and saves its model; see `stages.trainer.train` for what is returned and raised."""
    stage = run.stage
    assert isinstance(stage, Preference)
    model = load_parent(run)
    length = pair_length(run, model)
    tokens, sources = pair_rows(run, length)
    own, own_sources = _own_rows(run, model, length, tokens)
    plan = plan_of(stage, len(tokens))
    # The loss is a mean over pairs: the last step is filled with pairs of the next epoch, so that all count alike.
    plan = replace(plan, total=plan.max_steps * plan.global_batch)
    rows = ReferencedPairs(tokens, own)
    source = plan.serve(run, rows, tokens.lengths)
    arguments = trainer_arguments(run, plan.max_steps, plan.per_device, plan.accumulation)
    adapted = with_adapter(run, model)
    with trained_weights_kept(adapted):
        trainer = preference_trainer(stage, adapted, arguments, run.tokenizer)
    collated = pair_collator(run.tokenizer.pad_token_id, arguments.pad_to_multiple_of)
    loader = BatchLoader(source, plan.per_device, run.tokenizer.pad_token_id, collated=_beside(collated))
    as_it_is = stage.adapter is None or run.continued is not None or stage.changes_base
    if as_it_is or stage.training.get("precompute_ref_log_probs"):
        ReferencePass(run, trainer, rows, source.examples(), collated, as_it_is).fill()
    trainer.ref_model = None
    _keep_parent(run, trainer, own, plan.per_device / len(tokens))
    longest = max(source.longest(tokens.lengths_of(side)) for side in SIDES)
    per_step = plan.tokens_per_step(tokens.lengths)
    if own is not None:
        per_step += plan.global_batch * float(own.lengths.sum()) / len(tokens)
    facts = train(run, trainer, loader, tokens_per_step=per_step, longest=(longest, 0))
    epochs = {"epochs": round(facts["data"]["epochs"], 4)}
    facts["data"]["sources"] = {name: {**found, **epochs} for name, found in (sources | own_sources).items()}
    return facts


def preference_trainer(stage: Stage, model: Any, arguments: Any, tokenizer: Any) -> DPOTrainer:
    """Makes the trainer; the one row that it is given is not read.

    Raises:
        RecipeError: It refuses a value.
    """
    with clear_refusal(stage, "DPOTrainer"):
        return DPOTrainer(
            model=model,
            ref_model=cast(Any, NoModel(model.config)),
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=tokenizer,
        )


def require_ranks(stage: Stage) -> None:
    """Refuses DeepSpeed, and under FSDP a reference that is no model of its own."""
    plan = plan_of_launch(stage)
    if plan.startswith("zero") or stage.training.get("deepspeed"):
        raise RecipeError(
            f"stages.{stage.name}: a preference stage is not trained with DeepSpeed: it was never tried. Start plain "
            "ranks or FSDP2, with `lora:` or `quantization: nf4` where the model is large."
        )
    adapter = stage.adapter or {}
    before = {
        "parent_adapter: continue": stage.parent_adapter == "continue",
        f"init_lora_weights: {adapter.get('init_lora_weights')}": stage.changes_base,
        "precompute_ref_log_probs": adapter and stage.training.get("precompute_ref_log_probs"),
    }
    if plan == "fsdp" and (words := next((word for word, is_said in before.items() if is_said), None)):
        raise RecipeError(
            f"stages.{stage.name}: `{words}` is not trained with FSDP by a preference stage: its reference is asked "
            "before the weights are spread over the ranks. Start plain ranks, or leave it out."
        )


def pair_length(run: StageRun, model: Any) -> int | None:
    """Returns the most tokens of a prompt with an answer; None where the recipe says `max_length: null`, as in TRL."""
    if run.stage.training.get("max_length", DEFAULT_MAX_LENGTH) is None and learned_positions(model) is None:
        return None
    return row_length(run, model, DEFAULT_MAX_LENGTH)


def pair_tokenizer(stage: Stage, tokenizer: Any, length: int | None) -> PairTokenizer:
    """Returns what makes tokens of the pairs of a stage."""
    return PairTokenizer(tokenizer, length, stage.training.get("max_prompt_length"))


def pair_rows(run: StageRun, length: int | None) -> tuple[Concatenated, dict[str, dict[str, Any]]]:
    """Returns the pairs of the stage as tokens, in a fixed order, and what was read of each source."""
    stage = run.stage
    read = [_pairs_of(run, source, length) for source in stage.data]
    parts = [part for part, _ in read]
    if any(source.weight is not None for source in stage.data):
        counts = shares_of_rows([len(part) for part in parts], [source.weight or 1.0 for source in stage.data])
        parts = [part.first(count) for part, count in zip(parts, counts, strict=True)]
    names = [f"{number}: {source.title}" for number, source in enumerate(stage.data)]
    return Concatenated(parts), dict(zip(names, [found for _, found in read], strict=True))


def _pairs_of(run: StageRun, source: Source, length: int | None) -> tuple[TokenStore, dict[str, Any]]:
    """Tokenizes a source, or finds its tokens from before; says which pairs were left out and which were cut."""
    most = run.stage.training.get("max_prompt_length")
    words = ["pairs", length, *([] if most is None else [most]), run.stage.max_dirty_share]
    tokenizer = partial(pair_tokenizer, run.stage, run.tokenizer, length)
    store, found = tokens_of_source(run, source, formats_of_stage("preference"), tokenizer, words)
    if found["untrained"]:
        why = "their prompt fills max_length, or both answers are the same"
        ranks.say(f"  {source.title}: {found['untrained']:,} of {found['rows']:,} pairs are left out: {why}")
    if found["long"]:
        limits = f"{length} tokens a side" + (f", or {most} in the prompt," if most is not None else "")
        ranks.say(f"  {source.title}: {found['long']:,} pairs have more than {limits} and are cut")
    return store, found


def _own_rows(
    run: StageRun, model: Any, length: int | None, tokens: Concatenated
) -> tuple[Concatenated | None, dict[str, dict[str, Any]]]:
    """Returns the texts that the stage's parent makes of itself, and what is told of them; None without `keep:`.

    They are tokenized as an sft stage would. Of the trained tokens they are the share that the recipe says: of the
    answers on both sides and these texts.
    """
    stage = run.stage
    if stage.kept.replay is None:
        return None, {}
    share = stage.kept.replay.share
    answers = sum(
        len(row["rejected_ids"]) + len(row["labels"]) - 2 * int((row["labels"] < 0).sum()) for row in _each(tokens)
    )
    words = {"name": stage.name, "kind": "sft", "data": stage.data, "keep": stage.kept}
    texts = replace(run, stage=Sft.model_validate(words))
    made = own_rows(texts, model, length, share / (1 - share) * answers, read_share(stage, len(tokens)))
    own = Concatenated([part for part, _, _ in made])
    whole = answers + own.trained
    told = {source.title: {**found, "token_share": round(part.trained / whole, 4)} for part, found, source in made}
    return own, {f"{len(stage.data) + number}: {title}": told[title] for number, title in enumerate(told)}


def _each(rows: Concatenated) -> Iterator[dict[str, np.ndarray]]:
    return (rows[number] for number in range(len(rows)))


def _beside(collated: Any) -> Any:
    """Returns what makes a batch of pairs and of the parent's own texts that come with them, the latter under `OWN`."""

    def collate_both(rows: Sequence[dict[str, Any]], pad_token_id: int, multiple: int) -> dict[str, Any]:
        own = [text for row in rows for text in row.get(OWN, ())]
        return collated(rows) | ({OWN: collate(own, pad_token_id, multiple)} if own else {})

    return collate_both


def _keep_parent(run: StageRun, trainer: DPOTrainer, own: Concatenated | None, share: float) -> None:
    """Makes a trainer hold its model near the stage's parent, as the recipe's `keep:` says.

    Args:
        run: The stage.
        trainer: Its trainer.
        own: The parent's own texts.
        share: Of all pairs, those of a micro-batch.
    """
    near, replay = near_parent(run, trainer, 0.0), run.stage.kept.replay
    if own is None or replay is None:
        return
    weight = run.stage.kept.kl.weight if run.stage.kept.kl is not None else replay.share / (1 - replay.share)
    tokens = sum(int((row["labels"][1:] >= 0).sum()) for row in _each(own))
    override(trainer, compute_loss=PairsAndOwn(trainer, near, weight / (tokens * share)))


class PairsAndOwn:
    """The loss of pairs, with that of the parent's own texts beside it: of their tokens, or the divergence from it.

    What is added is `weight` times a sum over the tokens of a micro-batch, so that a step is the same however its batch
    is divided.

    Args:
        trainer: The trainer.
        near: Tells the divergence from the parent; None for the loss of the tokens.
        weight: Of a token.
    """

    def __init__(self, trainer: DPOTrainer, near: NearParent | None, weight: float) -> None:
        self._trainer, self._near, self._weight = trainer, near, weight
        self._loss = trainer.compute_loss

    def __call__(self, model: Any, inputs: dict[str, Any], *more: Any, **words: Any) -> Any:
        """Returns the loss of a micro-batch, in the place of `Trainer.compute_loss`."""
        own, weight = inputs.get(OWN), self._weight
        found = self._loss(model, {key: value for key, value in inputs.items() if key != OWN}, *more, **words)
        if own is None and not is_sharded(self._trainer):
            return found
        if own is None:  # another rank may have some, and then gathers the weights of all ranks
            begin = {key: inputs[key][:1, :2] for key in ("input_ids", "attention_mask")}
            own, weight = {**begin, "labels": begin["input_ids"]}, 0.0
        loss, *outputs = found if isinstance(found, tuple) else (found,)
        loss = loss + weight * self._of_own(self._trainer.accelerator.unwrap_model(model), own)
        return (loss, *outputs) if outputs else loss

    def _of_own(self, inner: Any, own: dict[str, torch.Tensor]) -> torch.Tensor:
        if self._near is None:
            with self._trainer.accelerator.autocast():
                return -inner(**own, fused_lm_head=True).log_probs.sum()
        words, wanted = {**own}, own["labels"][:, 1:] >= 0
        del words["labels"]
        parents = self._near.parents(inner, own, torch.ones_like(wanted[:, 0]))
        with self._trainer.accelerator.autocast():
            hidden = hidden_by(inner, **words)
        return self._near.divergence(inner, hidden[:, :-1][wanted], parents[:, :-1][wanted])


class ReferencedPairs:
    """Pairs as tokens, each with the log-probabilities of its answers under the reference once they are known.

    Args:
        tokens: The pairs.
        own: The parent's own texts, which come with the pairs, each with its part of them; None without.
    """

    def __init__(self, tokens: Concatenated, own: Concatenated | None = None) -> None:
        self._tokens, self._own, self.lengths = tokens, own, tokens.lengths
        self.reference: np.ndarray | None = None  # (N, 2)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row: dict[str, Any] = self._tokens[number]
        if self._own is not None:
            first, last = (len(self._own) * place // len(self) for place in (number, number + 1))
            row = {**row, OWN: [self._own[place] for place in range(first, last)]}
        return row if self.reference is None else {**row, "reference": self.reference[number].tolist()}


class NoModel(torch.nn.Linear):
    """Stands for a reference model while a DPOTrainer is made.

    Without one it would load the parent a second time, or copy the adapter, and PEFT's start of such a copy may change
    the weights of the base.

    Args:
        config: transformers' config of the model that is trained.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(1, 1)
        self.config = config


class ReferencePass:
    """The log-probabilities of the pairs under the parent, computed once and kept in the stage's folder.

    Args:
        run: The stage.
        trainer: Its trainer, before its first step.
        rows: The pairs, which are given what is found.
        wanted: (N,) numbers of the pairs that are trained on.
        collated: Makes a batch of pairs.
        as_it_is: Whether the model as it is before its first step is the parent; else it is with its adapter off.
    """

    def __init__(
        self,
        run: StageRun,
        trainer: DPOTrainer,
        rows: ReferencedPairs,
        wanted: np.ndarray,
        collated: Any,
        as_it_is: bool,
    ) -> None:
        self.run, self.trainer, self.rows, self.wanted = run, trainer, rows, wanted
        self.collated, self.as_it_is = collated, as_it_is
        self.path = run.folder / "reference.json"
        trainer.precompute_ref_logps = True

    def fill(self) -> None:
        """Gives the pairs what is kept, or what the model says now. Every rank has to call this."""
        found = ranks.on_main(self._kept)
        if found is None:
            with display.doing("log-probabilities of the parent"):
                found = self._computed(self.trainer.model)
            if ranks.is_main():
                write_json(self.path, {"key": self._key(), "log_probabilities": found})
            ranks.wait()
        self.rows.reference = np.zeros((len(self.rows), 2))
        self.rows.reference[self.wanted] = found

    def _key(self) -> str:
        return hash_of([self.run.trajectory, len(self.rows), self.wanted.tolist()])

    def _kept(self) -> list[list[float]] | None:
        try:
            kept = read_json(self.path)
        except ValueError:
            return None
        return kept["log_probabilities"] if kept.get("key") == self._key() else None

    def _asked(self, model: Any) -> Any:
        """Returns the model that is asked: of one that FSDP divides later, a copy of the parent that is divided now."""
        if not self.trainer.is_fsdp_enabled or self.run.stage.adapter is not None or is_spread(model):
            return model
        parent = load_model(self.run.parent, frozen=True)
        add_fused_lm_head(parent)
        return prepare_fsdp(parent, self.trainer.accelerator)

    def _computed(self, model: Any) -> list[list[float]]:
        """Asks the model for each pair, every rank for a part of them in as many batches as the others."""
        begin, count = time.monotonic(), ranks.ranks()
        model = self._asked(model)
        training = model.training
        arguments: Any = self.trainer.args
        size = arguments.precompute_ref_batch_size or arguments.per_device_train_batch_size
        order = self.wanted[np.argsort(-self.rows.lengths[self.wanted], kind="stable")]
        steps = -(-len(order) // (size * count))
        mine = np.resize(order, steps * size * count).reshape(steps, count, size)[:, ranks.rank()]
        if not self.as_it_is:
            self.trainer.ref_model = None  # then it switches the adapter off
        model.eval()
        found: dict[int, list[float]] = {}
        for place, numbers in enumerate(mine.tolist()):
            display.count(place, steps)
            batch = send_to_device(self.collated([self.rows[number] for number in numbers]), arguments.device)
            sides = self.trainer.compute_ref_log_probs(model, batch)
            said = torch.stack(sides, dim=1).double().cpu().tolist()
            found |= dict(zip(numbers, said, strict=True))
        model.train(training)
        everywhere: dict[int, list[float]] = {}
        for part in ranks.gather(found):
            everywhere |= part
        took = time.monotonic() - begin
        ranks.say(f"  reference: the parent's log-probabilities of {len(self.wanted):,} pairs, once, {took:,.0f} s")
        return [everywhere[number] for number in self.wanted.tolist()]
