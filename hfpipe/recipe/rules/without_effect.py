"""Keys of the libraries that would be accepted and do nothing here: each is refused with the reason.

A word at the library's own default changes nothing, and may stand. A test walks every field of the installed classes:
what is not listed here has its effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hfpipe.recipe.faults import Fault
from hfpipe.recipe.raw import Block, RawStage, RawSuite
from hfpipe.recipe.signatures import Fields, generation_fields, lora_fields, training_fields
from hfpipe.recipe.stage_config import KINDS

_SUITES = "a stage is scored by the recipe's suites, whose `batch_size`, `max_length` and `generation` say how"
_LOADER = "hfpipe's own loader makes the batches, in a thread beside the training"
_INIT = (
    "the start of an adapter from data is not built in; `init_lora_weights` takes pissa, olora, orthogonal, gaussian"
)
_GENERATED = "a suite reads one text a row, and nothing beside it"


def _each(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


TRAINING: dict[str, str] = {
    **_each(
        """
        per_device_eval_batch_size prediction_loss_only eval_do_concat_batches eval_use_gather_object
        eval_accumulation_steps eval_packing include_for_metrics batch_eval_metrics bf16_full_eval
        fp16_full_eval metric_for_best_model greater_is_better predict_with_generate generation_max_length
        generation_num_beams generation_config do_eval do_predict do_train
        """,
        _SUITES,
    ),
    **_each(
        """
        dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
        dataloader_prefetch_factor dataloader_in_order dataloader_multiprocessing_context dataset_num_proc
        length_column_name sortish_sampler
        """,
        _LOADER,
    ),
    "shuffle_dataset": "rows are shuffled by the recipe's `seed` in any case",
    "label_names": "the rows are hfpipe's, and their labels are called labels",
    "local_rank": "the launcher says it",
    "ddp_backend": "the ranks are connected before a stage begins",
    "enable_jit_checkpoint": "a signal saves a checkpoint in any case",
    "restore_callback_states_from_checkpoint": "a run continues with the state of every callback of hfpipe",
    "save_on_each_node": "all nodes share the run folder",
}
# With early stopping a stage is scored while it trains.
SCORED_WHILE_TRAINED = ("eval_steps", "eval_delay")
_ACCELERATOR = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler")

LORA: dict[str, str] = {
    "base_model_name_or_path": "the adapter's base is the stage's parent",
    "revision": "the adapter's base is the stage's parent, at its commit",
    "inference_mode": "a stage trains its adapter",
    "peft_type": "`lora:` is of one type; another is named by `peft: {type: ...}`",
    "peft_version": "PEFT writes its own version",
    "auto_mapping": "PEFT finds the class of the base by itself",
    "megatron_config": "hfpipe does not train by Megatron",
    "megatron_core": "hfpipe does not train by Megatron",
    "arrow_config": "it routes between adapters that are trained already",
    **dict.fromkeys(("corda_config", "eva_config", "loftq_config", "lora_ga_config"), _INIT),
}

GENERATION: dict[str, str] = {
    **_each(
        """
        output_attentions output_hidden_states output_logits output_scores return_dict_in_generate
        num_return_sequences
        """,
        _GENERATED,
    ),
    **_each(
        """
        is_assistant assistant_early_exit assistant_confidence_threshold assistant_ensemble_weight
        """,
        "no second model assists",
    ),
    **dict.fromkeys(("assistant_lookbehind", "target_lookbehind"), "no second model assists"),
    "continuous_batching_config": "rows are generated in batches of the suite's `batch_size`",
    "transformers_version": "transformers writes its own version",
}
_TASKS = {"classification": "SEQ_CLS", "translation": "SEQ_2_SEQ_LM"}


def check_training_effect(stage: RawStage) -> Iterator[Fault]:
    """Yields the keys of a stage's `training:` and `lora:` that have no effect."""
    training = stage.at("training")
    fields = training_fields(stage.kind) if stage.kind else None
    of_kind = KINDS[stage.kind].WITHOUT_EFFECT if stage.kind in KINDS else {}
    yield from _without_effect(training, TRAINING | of_kind, fields)
    for key in SCORED_WHILE_TRAINED if "early_stopping" not in stage.data else ():
        if training.data.get(key) is not None and not (fields and key in fields and _is_default(training, key, fields)):
            text = "has no effect: a stage is scored while it trains by `early_stopping: {suite: ...}` alone."
            yield Fault((*training.steps, key), f"{text} Add that, or leave it out.")
    inner = training.at("accelerator_config")
    yield from _without_effect(inner, dict.fromkeys(_ACCELERATOR, _LOADER), None)
    lora = stage.at("lora")
    yield from _without_effect(lora, LORA, lora_fields() if lora.data else None)
    task = _TASKS.get(str(stage.kind), "CAUSAL_LM")
    if lora.data.get("task_type") not in (None, task):
        yield Fault((*lora.steps, "task_type"), f"has no effect: it follows from the kind of the stage, {task} here.")
    if lora.data.get("qalora_group_size") is not None and not lora.data.get("use_qalora"):
        yield Fault((*lora.steps, "qalora_group_size"), "has no effect without `use_qalora: true`. Leave it out.")


def check_generation_effect(suite: RawSuite) -> Iterator[Fault]:
    """Yields the keys of a suite's `generation:` that have no effect."""
    block = suite.at("generation")
    yield from _without_effect(block, GENERATION, generation_fields() if block.data else None)


def _without_effect(block: Block, reasons: Mapping[str, str], fields: Fields | None) -> Iterator[Fault]:
    for key in block.data:
        known = fields is None or key in fields  # an unknown key is told as such
        if key in reasons and known and not (fields and _is_default(block, key, fields)):
            yield Fault((*block.steps, key), f"has no effect: {reasons[key]}. Leave it out.")


def _is_default(block: Block, key: str, fields: Fields) -> bool:
    return bool(block.data[key] == fields[key].default) and type(block.data[key]) is type(fields[key].default)
