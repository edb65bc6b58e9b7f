"""The words of a stage that decide its weights. Two recipes that agree on them share what was trained.

A word counts unless it is listed here: a word that is new in a later version of the libraries trains a stage again
rather than pass for one that does nothing. Words that change the order of sums only (how a batch is divided, what is
recomputed to save memory) do not count: the weights are the same up to rounding.
"""

from __future__ import annotations

from typing import Any

from hfpipe.recipe import Pretrain, Stage
from hfpipe.recipe.signatures import training_fields

LENGTH = ("max_steps", "num_train_epochs")
REPORTS = """
    logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_on_each_node log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id include_num_input_tokens_seen skip_memory_metrics debug
"""
SAVING = """
    save_strategy save_steps save_minutes save_total_limit save_on_each_node save_only_model enable_jit_checkpoint
    restore_callback_states_from_checkpoint
"""
SCORING = """
    eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size prediction_loss_only
    eval_do_concat_batches eval_use_gather_object eval_accumulation_steps eval_packing include_for_metrics
    batch_eval_metrics bf16_full_eval fp16_full_eval load_best_model_at_end metric_for_best_model greater_is_better
    predict_with_generate generation_max_length generation_num_beams generation_config do_train do_eval do_predict
"""
MACHINE = """
    use_cpu local_rank dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order dataset_num_proc ddp_backend
    ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters ddp_static_graph
    activation_checkpointing activation_checkpointing_kwargs activation_offloading gradient_checkpointing
    gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
    use_cache
"""
WITHOUT_EFFECT = frozenset(" ".join((REPORTS, SAVING, SCORING, MACHINE)).split())
# hfpipe's own defaults, where the arguments' class has another; None of those that depend on the machine or the length.
OWN_DEFAULTS = {
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "average_tokens_across_devices": True,
    "per_device_train_batch_size": 8,
    "bf16": None,
    "fp16": None,
    "tf32": None,
    "warmup_steps": None,
    "max_length": None,
}
# Schedules whose learning rate at a step does not depend on how many steps there are.
OPEN_ENDED = ("constant", "constant_with_warmup", "inverse_sqrt")


def identity(stage: Stage, *, with_length: bool = True) -> Any:
    """Returns what decides the weights of a stage, beside its parent and the seed, as something to be hashed.

    Args:
        stage: The stage.
        with_length: Whether the number of its steps or epochs belongs to it.
    """
    training = dict(stage.training)
    # With early stopping the best of the checkpoints that are scored becomes the model.
    words = WITHOUT_EFFECT - ({"eval_steps", "eval_delay"} if stage.early_stopping is not None else set())
    per_device = training.pop("per_device_train_batch_size", OWN_DEFAULTS["per_device_train_batch_size"])
    rows = stage.global_batch_size or per_device * training.pop("gradient_accumulation_steps", 1)
    if training.get("max_steps", -1) > 0:
        training.pop("num_train_epochs", None)
    else:
        training.pop("max_steps", None)
    counted = {
        key: _plain_number(value)
        for key, value in training.items()
        if key not in words and (with_length or key not in LENGTH) and value != _default(stage.kind, key)
    }
    unsaid = {
        "global_batch_size": None,
        "max_dirty_share": 0.01,
        **({"samples": None} if hasattr(stage, "samples") else {}),
    }
    plain = stage.model_copy(update={"training": counted, **unsaid})
    return [plain, rows, stage.global_batch_size is None]


def _default(kind: str, key: str) -> Any:
    """The value that a word has where the recipe does not say it."""
    if key in OWN_DEFAULTS:
        return OWN_DEFAULTS[key]
    field = (training_fields(kind) or {}).get(key)
    return field.default if field else None


def _plain_number(value: Any) -> Any:
    """1.0 as 1: a recipe may write either."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def bound_to_length(stage: Stage) -> str | None:
    """Returns why a longer training of a stage differs from its first step on; None where it only goes on longer."""
    schedule = str(stage.training.get("lr_scheduler_type", OWN_DEFAULTS["lr_scheduler_type"]))
    warmup = stage.training.get("warmup_steps")
    if stage.early_stopping is not None:
        return "early_stopping scores it at steps that follow from its length"
    if schedule not in OPEN_ENDED:
        return (
            f"the schedule `{schedule}` plans the learning rate up to the last step (lr_scheduler_type: constant, "
            "constant_with_warmup and inverse_sqrt do not, and go on from a checkpoint)"
        )
    if schedule != "constant" and not (isinstance(warmup, int) and warmup >= 1):
        return "its warmup is a share of the steps (with `warmup_steps: NUMBER` it would go on from a checkpoint)"
    if isinstance(stage, Pretrain) and (stage.exhausted == "stop" or not stage.training.get("max_steps")):
        return "the end of the data is packed otherwise (with max_steps and `exhausted: repeat` it would go on)"
    if isinstance(stage, Pretrain) and stage.kept.replay is not None and stage.kept.replay.rows is None:
        return "its parent makes as many texts as its length has room for (with `rows: NUMBER` it would go on)"
    if any(source.cleaned and source.passed_through.get("streaming") for source in stage.data):
        return "its streams are cleaned as far as they are read"
    return None
