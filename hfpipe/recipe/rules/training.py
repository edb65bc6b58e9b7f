"""Rules of what the trainer's arguments must be: keys that hfpipe decides, and the ranges of numbers.

The libraries' classes ask for a number, and seldom say which ones work. A number is not negative, and a float32 or a
count of 64 bits holds it; the table has what is narrower. A class's own default may stand, whatever it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from hfpipe.recipe.faults import Fault, did_you_mean, listed
from hfpipe.recipe.passthrough import stage_fields
from hfpipe.recipe.raw import Block, RawStage, mapping, sequence
from hfpipe.recipe.rules.without_effect import check_training_effect
from hfpipe.recipe.signatures import Field, Fields, compared_with, lora_fields, peft_fields

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
    for word in ("learning_rates", "muon"):
        asked = stage.data.get(word) is not None
        if asked and ("optim_target_modules" in training.data or "lomo" in optimizer):
            text = f"`optim: {optimizer}` divides the weights itself, with one learning rate. Take another, or remove"
            yield Fault((*stage.steps, word), f"{text} this.")


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
    prompt, row = (training.data.get(key) for key in ("max_prompt_length", "max_length"))
    if isinstance(prompt, int) and isinstance(row, int) and prompt >= row:
        text = (
            f"found {prompt}, and `max_length`, of the prompt and an answer, is {row}: a prompt would leave an answer"
        )
        yield Fault((*training.steps, "max_prompt_length"), f"{text} no room. Write less than that.")
    lora = stage.at("lora")
    if lora.data.get("lora_dropout") and training.data.get("disable_dropout") is not False:
        text = "has no effect: DPOTrainer turns every dropout off. Write `training: {disable_dropout: false}` to keep"
        yield Fault((*lora.steps, "lora_dropout"), f"{text} it, or leave this out.")


def _check_scores(training: Block, scored: bool) -> Iterator[Fault]:
    """Checks the keys that ask for scores while a stage trains."""
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


MOST, MOST_WHOLE = 3.4e38, 2**63 - 1  # of a float32, and of a count


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes.

    Args:
        low: The least.
        high: The most.
        above: Whether `low` itself is too small.
        below: Whether `high` itself is too large.
        more: Words for a message, behind the numbers.
    """

    low: float = 0
    high: float = math.inf
    above: bool = False
    below: bool = False
    more: str = ""

    def has(self, value: float) -> bool:
        """Returns True if a number is in the range."""
        most = MOST_WHOLE if isinstance(value, int) else MOST
        low = self.low < value if self.above else self.low <= value
        return low and (value < self.high if self.below else value <= min(self.high, most))

    def words(self, value: float, *, whole: bool) -> str:
        """Returns the range in words.

        Args:
            value: That it has not.
            whole: Whether the option takes no fractions.
        """
        kind = "a whole number" if whole else "a number"
        least = f"{kind} {'above' if self.above else 'from'} {self.low:g}"
        if self.high < math.inf:
            least += f" {'to below' if self.below else 'up to'} {self.high:,}"
        elif value > self.low:
            least += f" up to {MOST_WHOLE if whole else MOST}"
        return f"{least}{self.more}"


COUNT, ABOVE_ZERO, PART = Range(1), Range(above=True), Range(high=1, below=True)
RANGES: dict[str, Range] = {
    **dict.fromkeys(
        (
            "gradient_accumulation_steps",
            "max_length",
            "max_target_length",
            "max_prompt_length",
            "save_total_limit",
            "pad_to_multiple_of",
            "torch_empty_cache_steps",
            "ddp_bucket_cap_mb",
            "ddp_timeout",
            "precompute_ref_batch_size",
            "num_virtual_tokens",
            "r",
        ),
        COUNT,
    ),
    **dict.fromkeys(
        (
            "num_train_epochs",
            "logging_steps",
            "save_steps",
            "eval_steps",
            "save_minutes",
            "beta",
            "adam_epsilon",
            "discopop_tau",
            "lora_alpha",
        ),
        ABOVE_ZERO,
    ),
    "per_device_train_batch_size": Range(1, 2**20),  # rows at once, whose divisors are walked
    "max_steps": Range(1, more=", or -1 for epochs"),
    "label_smoothing_factor": Range(high=1, below=True, more=", as in torch's cross_entropy"),
    "label_smoothing": Range(high=0.5, below=True),
    "ld_alpha": Range(high=1),
    # NEFTune's authors take 5 to 15.
    "neftune_noise_alpha": Range(high=1000, above=True, more=", or leave it out for no noise"),
}


def check_ranges(stage: RawStage) -> Iterator[Fault]:
    """Yields the numbers of a stage's `training:`, `lora:` and `peft:` that their options cannot take."""
    if stage.kind is not None:
        yield from _out_of_range(stage.at("training"), stage_fields(stage.kind))
    yield from _out_of_range(stage.at("lora"), lora_fields() if stage.at("lora").data else None)
    peft = stage.at("peft")
    yield from _out_of_range(peft, peft_fields(str(peft.data.get("type"))) if peft.data else None)


def range_of(name: str) -> Range:
    """Returns the range of an option's numbers."""
    return RANGES.get(name) or (PART if name.endswith(("dropout", "dropout_p")) else Range())


def _out_of_range(block: Block, fields: Fields | None) -> Iterator[Fault]:
    for key, value in block.data.items():
        field = (fields or {}).get(key)
        if field is None or isinstance(value, bool) or not isinstance(value, int | float) or value == field.default:
            continue
        allowed = range_of(key)
        if not allowed.has(value):
            yield Fault(
                (*block.steps, key), f"found {value}; allowed is {allowed.words(value, whole=_is_whole(field))}."
            )


def _is_whole(field: Field) -> bool:
    words = {kind.word for kind in field.kinds}
    return "int" in words and "float" not in words
