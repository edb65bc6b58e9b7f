"""Keys that configs share because their tools hand them to transformers' Trainer."""

from __future__ import annotations

from typing import Any

from hfpipe.convert.draft import Draft, Lost, Table, Unneeded, rule_of
from hfpipe.convert.words import checkpointing, warmup
from hfpipe.recipe.passthrough import stage_fields

_FOLDER = Unneeded("a run's files lie in `runs/NAME`; `output_dir:` of the recipe names another folder")
_SCORED = Unneeded("suites are scored before and after each stage; `early_stopping:` scores while it trains")
_SAVED = Unneeded("hfpipe keeps whole checkpoints and continues by the same command")
_PUSHED = Unneeded("write a `push:` block, or `hfpipe push RUN`")
_LOGGED = Unneeded("`training.report_to` takes wandb, tensorboard, trackio and others; see docs/trackers.md")
_LAUNCH = Unneeded("how processes are launched belongs in the file of `accelerate launch --config_file`")
_ROWS = Unneeded("hfpipe makes the rows itself")
_SPEED = Unneeded("speed and memory only")
_PRECISION = Unneeded("hfpipe computes in bfloat16 where the hardware does")


def _checkpointing(draft: Draft, value: Any) -> None:
    if value is not None:
        checkpointing(draft, value)


def _kwargs(draft: Draft, value: Any) -> None:
    if value:
        draft.train("gradient_checkpointing_kwargs", "training.gradient_checkpointing_kwargs", value)
        checkpointing_is = draft.take("stage.training.activation_checkpointing")
        if checkpointing_is is not None:  # the deprecated name and its options go together
            draft.stage["training"].pop("activation_checkpointing")
            draft.put("stage.training.gradient_checkpointing", checkpointing_is)


def _group_by_length(draft: Draft, value: Any) -> None:
    if value:
        draft.note("changed", "group_by_length", "rows are shuffled, and sorted by length within a global batch only")


def _best(draft: Draft, value: Any) -> None:
    if value:
        why = "add `early_stopping: {suite: NAME}` to the stage: it keeps the checkpoint that scores best on a suite"
        draft.note("lost", "load_best_model_at_end", why)


TRAINER: Table = {
    "output_dir": _FOLDER,
    "overwrite_output_dir": _FOLDER,
    "logging_dir": _FOLDER,
    "run_name": _LOGGED,
    "report_to": _LOGGED,
    "log_level": _LOGGED,
    "log_level_replica": _LOGGED,
    "logging_strategy": _LOGGED,
    "disable_tqdm": _LOGGED,
    "do_train": Unneeded("a stage trains"),
    "do_eval": _SCORED,
    "do_predict": _SCORED,
    "eval_strategy": _SCORED,
    "evaluation_strategy": _SCORED,
    "eval_steps": _SCORED,
    "eval_delay": _SCORED,
    "eval_on_start": _SCORED,
    "eval_accumulation_steps": _SCORED,
    "eval_packing": _SCORED,
    "per_device_eval_batch_size": _SCORED,
    "predict_with_generate": _SCORED,
    "metric_for_best_model": _SCORED,
    "greater_is_better": _SCORED,
    "load_best_model_at_end": _best,
    "save_strategy": _SAVED,
    "save_steps": _SAVED,
    "save_total_limit": _SAVED,
    "save_only_model": _SAVED,
    "save_safetensors": _SAVED,
    "save_on_each_node": _SAVED,
    "resume_from_checkpoint": _SAVED,
    "ignore_data_skip": _SAVED,
    "push_to_hub": _PUSHED,
    "hub_*": _PUSHED,
    "push_to_hub_model_id": _PUSHED,
    "push_to_hub_organization": _PUSHED,
    "deepspeed": _LAUNCH,
    "fsdp": _LAUNCH,
    "fsdp_*": _LAUNCH,
    "fsdp_config": _LAUNCH,
    "fsdp_config.*": _LAUNCH,
    "ddp_*": _LAUNCH,
    "local_rank": _LAUNCH,
    "accelerator_config": _LAUNCH,
    "dataloader_num_workers": _ROWS,
    "dataloader_prefetch_factor": _ROWS,
    "dataloader_pin_memory": _ROWS,
    "dataloader_persistent_workers": _ROWS,
    "dataset_num_proc": _ROWS,
    "dataset_kwargs": _ROWS,
    "dataset_batch_size": _ROWS,
    "remove_unused_columns": _ROWS,
    "label_names": _ROWS,
    "bf16": _PRECISION,
    "bf16_full_eval": _PRECISION,
    "tf32": _PRECISION,
    "fp16_full_eval": _PRECISION,
    "use_liger_kernel": _SPEED,
    "liger_*": _SPEED,
    "torch_empty_cache_steps": _SPEED,
    "padding_free": _SPEED,
    "include_*": _LOGGED,
    "use_cpu": _LAUNCH,
    "no_cuda": _LAUNCH,
    "seed": "seed",
    "data_seed": Unneeded("one seed, the recipe's `seed`, orders the rows"),
    "gradient_checkpointing": _checkpointing,
    "gradient_checkpointing_kwargs": _kwargs,
    "warmup_ratio": lambda draft, value: warmup(draft, "warmup_ratio", value),
    "group_by_length": _group_by_length,
    "length_column_name": _ROWS,
    "full_determinism": _SPEED,
    "auto_find_batch_size": Lost("the batches follow from the recipe; write `per_device_train_batch_size`"),
}

MEGATRON: Table = dict.fromkeys(
    (
        "use_mca",
        "use_megatron_bridge",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "sequence_parallel",
        "use_distributed_optimizer",
        "overlap_*",
        "bias_activation_fusion",
        "apply_rope_fusion",
        "masked_softmax_fusion",
        "cross_entropy_loss_fusion",
        "moe_grouped_gemm",
        "moe_token_dispatcher_type",
        "recompute_*",
        "mixed_precision",
        "export_hf_on_finish",
    ),
    Unneeded("how Megatron splits a model and computes it is no part of a recipe"),
)


def trainer_table(kind: str, taken: Table) -> Table:
    """The table of a tool that hands its keys to the trainer: its own rules, the shared ones, and every other field.

    Args:
        kind: The kind of stage.
        taken: The tool's own rules, which come first.
    """
    shared = {**TRAINER, **taken}
    fields = [name for name in stage_fields(kind) or {} if rule_of(shared, name) is None]
    return {**{name: f"stage.training.{name}" for name in fields}, **shared}
