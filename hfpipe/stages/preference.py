"""`kind: preference`: DPO and its kin on pairs of a chosen and a rejected answer, full, LoRA or QLoRA, by DPOTrainer.

The reference is the stage's parent. Beside a new adapter it is the same model with the adapter switched off. Else the
parent's log-probabilities of all pairs are computed before the first step and kept, so it takes no memory of its own.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig
from trl import DPOTrainer

from hfpipe.core import ranks
from hfpipe.core.errors import RecipeError
from hfpipe.core.files import read_json, write_json
from hfpipe.data.dataloader import SIDES, BatchLoader
from hfpipe.data.preference import PairTokenizer, pair_collator
from hfpipe.data.token_store import Concatenated, TokenStore
from hfpipe.model.load import load_model
from hfpipe.model.positions import learned_positions
from hfpipe.recipe import Preference, Recipe, Source, hash_of
from hfpipe.recipe.row_formats import formats_of_stage
from hfpipe.stages.arguments import SHARDING_WORDS, clear_refusal, stage_arguments
from hfpipe.stages.sft_rows import tokens_of
from hfpipe.stages.trainer import (
    StageRun,
    plan_of,
    row_length,
    shares_of_rows,
    train,
    trained_weights_kept,
    trainer_arguments,
    with_adapter,
)

DEFAULT_MAX_LENGTH = 1024  # TRL's
MOVES_THE_BASE = ("pissa", "olora", "mica")  # values of init_lora_weights whose adapter is a part of the parent


def run_preference(run: StageRun) -> dict[str, Any]:
    """Trains a preference stage and saves its model; see `stages.trainer.train` for what is returned and raised."""
    stage = run.stage
    assert isinstance(stage, Preference)
    model = load_model(run.parent, frozen=stage.adapter is not None)
    tokens, sources = pair_rows(run, pair_length(run, model))
    plan = plan_of(stage, len(tokens))
    # The loss is a mean over pairs: the last step is filled with pairs of the next epoch, so that all count alike.
    plan = replace(plan, total=plan.max_steps * plan.global_batch)
    rows = ReferencedPairs(tokens)
    source = plan.serve(run, rows, tokens.lengths)
    arguments = trainer_arguments(run, plan.max_steps, plan.per_device, plan.accumulation, **_decided(stage))
    adapted = with_adapter(run, model)
    with trained_weights_kept(adapted):
        trainer = _trainer(stage, adapted, arguments, run.tokenizer)
    collated = pair_collator(run.tokenizer.pad_token_id, arguments.pad_to_multiple_of)
    loader = BatchLoader(source, plan.per_device, run.tokenizer.pad_token_id, collated=collated)
    init = str(getattr(adapted.peft_config["default"], "init_lora_weights", "")) if stage.adapter is not None else ""
    as_it_is = stage.adapter is None or run.continued is not None or init.startswith(MOVES_THE_BASE)
    if as_it_is or stage.training.get("precompute_ref_log_probs"):
        Reference(run, trainer, rows, source.examples(), collated, as_it_is).fill()
    trainer.ref_model = None
    longest = max(map(tokens.longest, SIDES))
    per_step = plan.tokens_per_step(tokens.lengths)
    facts = train(run, trainer, loader, tokens_per_step=per_step, longest=(longest, 0))
    epochs = {"epochs": round(facts["data"]["epochs"], 4)}
    facts["data"]["sources"] = {name: {**found, **epochs} for name, found in sources.items()}
    return facts


def _decided(stage: Preference) -> dict[str, Any]:
    """Returns what hfpipe decides of the trainer's arguments: log-probabilities are computed by `Reference`."""
    return {"loss_type": stage.losses, "precompute_ref_log_probs": False}


def _trainer(stage: Preference, model: Any, arguments: Any, tokenizer: Any) -> DPOTrainer:
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


def require_losses(recipe: Recipe, tokenizer: Any) -> None:
    """Refuses what DPOTrainer would refuse when a preference stage begins, such as two words that do not go together.

    It is tried on a model of one small layer. Every rank has to call this.

    Raises:
        RecipeError: It refuses a value, or the weights would be spread over ranks in a way that it was not tried with.
    """
    for stage in recipe.stages:
        if not isinstance(stage, Preference):
            continue
        _require_ranks(stage)
        plain = {key: value for key, value in stage.training.items() if key not in SHARDING_WORDS}
        alone = stage.model_copy(update={"training": plain})
        arguments = stage_arguments(alone, Path("."), recipe.seed, 1, **_decided(stage))
        small: dict[str, Any] = {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
        }
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **small))
        _trainer(stage, model, arguments, tokenizer)


def _require_ranks(stage: Preference) -> None:
    """Refuses weights that are spread over ranks: the log-probabilities of the parent are asked of a whole model."""
    launched = [
        name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"
    ]
    named = [word for word in ("fsdp", "deepspeed") if stage.training.get(word)]
    if launched or named:
        raise RecipeError(
            f"stages.{stage.name}: a preference stage is not trained with {(launched + named)[0].upper()}: each rank "
            "needs the whole model. Start plain ranks, with `lora:` or `quantization: nf4` where the model is large."
        )


def pair_length(run: StageRun, model: Any) -> int | None:
    """Returns the most tokens of a prompt with an answer; None where the recipe says `max_length: null`, as in TRL."""
    if run.stage.training.get("max_length", DEFAULT_MAX_LENGTH) is None and learned_positions(model) is None:
        return None
    return row_length(run, model, DEFAULT_MAX_LENGTH)


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
    words = ["pairs", length, run.stage.max_dirty_share]
    tokenizer = partial(PairTokenizer, run.tokenizer, length)
    store, found = tokens_of(run, source, formats_of_stage("preference"), tokenizer, words)
    if found["untrained"]:
        why = "their prompt fills max_length, or both answers are the same"
        ranks.say(f"  {source.title}: {found['untrained']:,} of {found['rows']:,} pairs are left out: {why}")
    if found["long"]:
        ranks.say(f"  {source.title}: {found['long']:,} pairs have more than {length} tokens a side and are cut")
    return store, found


class ReferencedPairs:
    """Pairs as tokens, each with the log-probabilities of its answers under the reference once they are known.

    Args:
        tokens: The pairs.
    """

    def __init__(self, tokens: Concatenated) -> None:
        self._tokens, self.lengths = tokens, tokens.lengths
        self.reference: np.ndarray | None = None  # (N, 2)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row: dict[str, Any] = self._tokens[number]
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


class Reference:
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

    def _computed(self, model: Any) -> list[list[float]]:
        """Asks the model for each pair, every rank for a part of them in as many batches as the others."""
        begin, count, training = time.monotonic(), ranks.ranks(), model.training
        arguments: Any = self.trainer.args
        size = arguments.precompute_ref_batch_size or arguments.per_device_train_batch_size
        order = self.wanted[np.argsort(-self.rows.lengths[self.wanted], kind="stable")]
        steps = -(-len(order) // (size * count))
        mine = np.resize(order, steps * size * count).reshape(steps, count, size)[:, ranks.rank()]
        if not self.as_it_is:
            self.trainer.ref_model = None  # then it switches the adapter off
        model.eval()
        found: dict[int, list[float]] = {}
        for numbers in mine.tolist():
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
