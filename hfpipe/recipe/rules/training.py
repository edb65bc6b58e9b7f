"""Rules of `training:`: what hfpipe decides itself, and what a trainer would pass over or refuse hours later."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hfpipe.recipe.faults import Fault, did_you_mean, listed
from hfpipe.recipe.raw import Block, RawStage, mapping, sequence
from hfpipe.recipe.rules.ranges import check_ranges
from hfpipe.recipe.rules.without_effect import check_training_effect
from hfpipe.recipe.signatures import compared_with

# Keys of the trainer's arguments that hfpipe decides itself, and what to write instead.
_DECIDED = {
    "output_dir": "Use the recipe's `output_dir`.",
    "resume_from_checkpoint": "Run the same command again: a run continues from its last whole checkpoint.",
    "ignore_data_skip": "Leave it out: a resumed run continues in its data exactly where it stopped.",
    "push_to_hub": "Use the recipe's `push:` block.",
    "hub_model_id": "Use `push: {repo_id: ...}`.",
    "hub_strategy": "Use `push: {checkpoints: every_save}`.",
    "hub_private_repo": "Use `push: {private: ...}`: what it makes is private unless it says otherwise.",
    "hub_revision": "Use `push: {revision: ...}`.",
    "hub_always_push": "Leave it out: a checkpoint that comes while another is pushed is left out.",
    "hub_token": "Leave it out: a token does not belong in a file. Log in with `hf auth login`, or set HF_TOKEN.",
    "dataset_text_field": "Use `columns: {text: ...}` of the source.",
    "dataset_kwargs": "Leave it out: hfpipe makes the rows, token by token as TRL would.",
    "remove_unused_columns": "Leave it out: rows hold what the model takes and nothing else.",
    "seed": "Use the recipe's `seed`.",
    "data_seed": "Use the recipe's `seed`.",
    "model_init_kwargs": "Use the words of `model:`, such as `dtype` and `attn_implementation`.",
    "trust_remote_code": "Use `model: {trust_remote_code: true}`.",
    "chat_template_path": "Use `model: {tokenizer: {chat_template: ...}}`.",
    "eos_token": "It is the tokenizer's: write `model: {tokenizer: {eos_token: ...}}`.",
    "pad_token": "It is the tokenizer's: write `model: {tokenizer: {pad_token: ...}}`.",
    "parallelism_config": "Write it in the file that `accelerate launch --config_file` is given.",
}
# Keys of which one value alone is what happens.
_ONLY = {
    "save_only_model": (False, "a run could not be continued exactly without its optimizer."),
    "auto_find_batch_size": (False, "the batches follow from the recipe; write `per_device_train_batch_size`."),
    "debug": ("", "a loss or gradient that is no finite number stops the stage, and its rows are told."),
    "truncation_mode": ("keep_start", "rows that are too long are cut at their end."),
    "sync_ref_model": (False, "the reference is the stage's parent, and stays it."),
    "padding_free": (False, "rows of one step are of like length; with `packing: true` examples share rows."),
    "packing_strategy": ("bfd", "whole examples share a row, best fit first, and none is cut that fits."),
    "train_sampling_strategy": ("random", "rows are shuffled by the recipe's `seed`, and grouped by length."),
}
# Losses without a reference that TRL has in `trl.experimental` alone, in trainers of their own.
_OF_EXPERIMENTS = {
    loss: f" TRL has {loss} in a trainer of its own, which it calls experimental; hfpipe does not."
    for loss in ("simpo", "alphapo", "cpo", "orpo", "kto", "tpo")
}
_FOLLOW_A_SCORE = ("reduce_lr_on_plateau", "greedy")


def check_training(stage: RawStage) -> Iterator[Fault]:
    """Yields what `training:` of a stage may not say."""
    training = stage.at("training")
    for key, value in training.data.items():
        place = (*training.steps, key)
        if key in _DECIDED:
            yield Fault(place, f"hfpipe decides this itself. {_DECIDED[key]}")
        if key in _ONLY and value not in (None, _ONLY[key][0]):
            yield Fault(place, f"cannot be {value!r}: {_ONLY[key][1]} Leave it out.")
    yield from check_ranges(stage)
    if stage.data.get("global_batch_size") is not None and "gradient_accumulation_steps" in training.data:
        text = "follows from `global_batch_size`, which is set too. Keep one of the two."
        yield Fault((*training.steps, "gradient_accumulation_steps"), text)
    if stage.kind == "preference":
        yield from _check_preference(stage, training)
    if stage.data.get("train_on") is not None:
        for key in ("assistant_only_loss", "completion_only_loss"):
            if training.data.get(key) is not None:
                text = "says the same as `train_on` of the stage, which is set too. Keep one of the two."
                yield Fault((*training.steps, key), text)
    yield from check_training_effect(stage)
    yield from _check_parts(stage, training)
    yield from _check_scores(training, "early_stopping" in stage.data)


def _check_parts(stage: RawStage, training: Block) -> Iterator[Fault]:
    """Yields what a stage says wrongly of the weights that it trains, and of their learning rates."""
    adapter = next((key for key in ("lora", "peft") if key in stage.data), None)
    for word in ("train_only", "freeze", "learning_rates"):
        for pattern in [*mapping(stage.data.get(word)), *sequence(stage.data.get(word))]:
            try:
                re.compile(str(pattern))
            except (re.error, OverflowError, RecursionError) as error:
                yield Fault((*stage.steps, word), f"'{pattern}' is no regular expression: {error}.")
        if adapter and word != "learning_rates" and stage.data.get(word) is not None:
            text = f"an adapter trains its own weights, and all others stay as they are. Remove it, or `{adapter}`."
            yield Fault((*stage.steps, word), text)
    optimizer = str(training.data.get("optim", ""))
    if stage.data.get("learning_rates") and ("optim_target_modules" in training.data or "lomo" in optimizer):
        text = f"`optim: {optimizer}` divides the weights itself, with one learning rate. Take another, or remove this."
        yield Fault((*stage.steps, "learning_rates"), text)


def preference_losses() -> tuple[str, ...]:
    """Returns the losses of TRL's DPOTrainer, read from where it asks for each; empty where they cannot be read."""
    return compared_with("trl.trainer.dpo_trainer", "loss_type")


def _check_preference(stage: RawStage, training: Block) -> Iterator[Fault]:
    """Yields what a preference stage says wrongly of its losses, and of a dropout that is turned off."""
    if "loss_type" in training.data:
        text = "is the `loss` of a preference stage. Write `loss: ...` beside `training`, and leave this out."
        yield Fault((*training.steps, "loss_type"), text)
    given = stage.data.get("loss", "sigmoid")
    losses, known = given if isinstance(given, list) else [given], preference_losses()
    for loss in losses:
        if isinstance(loss, str) and known and loss not in known:
            text = f"found '{loss}'; the losses of TRL's DPOTrainer are {listed(known)}.{did_you_mean(loss, known)}"
            yield Fault((*stage.steps, "loss"), text + _OF_EXPERIMENTS.get(loss, ""))
    weights = training.data.get("loss_weights")
    if isinstance(weights, list) and len(weights) != len(losses):
        text = f"found {len(weights)} weights for {len(losses)} losses; each of `loss` has one."
        yield Fault((*training.steps, "loss_weights"), text)
    if training.data.get("label_smoothing") and not {"robust", "exo_pair", "aot", "aot_unpaired"} & {*map(str, losses)}:
        text = "belongs to the losses robust, exo_pair, aot and aot_unpaired, and this is none of them. Leave it out."
        yield Fault((*training.steps, "label_smoothing"), text)
    lora = stage.at("lora")
    if lora.data.get("lora_dropout") and training.data.get("disable_dropout") is not False:
        text = "has no effect: DPOTrainer turns every dropout off. Write `training: {disable_dropout: false}` to keep"
        yield Fault((*lora.steps, "lora_dropout"), f"{text} it, or leave this out.")


def _check_scores(training: Block, scored: bool) -> Iterator[Fault]:
    """Checks the words that ask for scores while a stage trains."""
    text = "a stage is scored while it trains by `early_stopping: {suite: ...}`, which keeps the best checkpoint."
    for key in ("eval_strategy", "load_best_model_at_end", "eval_on_start"):
        if training.data.get(key) not in (None, False, "no") and not (scored and key != "eval_on_start"):
            yield Fault((*training.steps, key), f"{text} Write that instead.")
    if training.data.get("save_strategy") == "best":
        yield Fault((*training.steps, "save_strategy"), f"{text} Write that, and leave this out.")
    if training.data.get("lr_scheduler_type") in _FOLLOW_A_SCORE and not scored:
        text = "follows a score, and this stage has none while it trains. Add `early_stopping: {suite: ...}` (with "
        text += "`patience: null` it is trained to its end), or take another schedule, such as cosine."
        yield Fault((*training.steps, "lr_scheduler_type"), text)
