"""axolotl: one flat YAML file.

Source: the schemas of axolotl (`src/axolotl/utils/schemas`) and its examples, read in August 2026.
"""

from __future__ import annotations

import re
from typing import Any

from hfpipe.convert import preferences, words
from hfpipe.convert.axolotl_data import (
    PREPARED,
    add_documents,
    add_sources,
    deduplicate,
    follow_template,
    is_chat,
    note_end_of_turn,
)
from hfpipe.convert.draft import OFF, Draft, Lost, Out, OutOfScope, Said, Table, Unneeded, if_set, same, with_another
from hfpipe.convert.trainer_keys import TRAINER

_LOGGED = Unneeded("`training.report_to` takes wandb, tensorboard, trackio and others; see docs/trackers.md")
_SPEED = Unneeded("speed and memory only")
_LAUNCH = Unneeded("how processes are launched belongs in the file of `accelerate launch --config_file`")
_SCORED = Unneeded("suites are scored before and after each stage; `early_stopping:` scores while it trains")
_SAVED = Unneeded("hfpipe keeps whole checkpoints and continues by the same command")
_ELSEWHERE = Unneeded("not of the training")
_IMAGES = "for images or sound, and hfpipe trains on text"
_PREFERENCES = {"dpo": "sigmoid", "ipo": "ipo"}
_OTHERS = {"kto": "answers that are judged one by one", "orpo": "the loss ORPO", "simpo": "the loss SimPO"}
_OPTIMIZERS = {"ao_adamw_8bit": "adamw_torch_8bit", "ao_adamw_4bit": "adamw_torch_4bit"}
_SCHEDULES = ("one_cycle", "rex")
_ROWS_OF_A_WEIGHT = re.compile(r"\[\d*:\d*\]$")  # as in `^lm_head.weight$[32000:]`


def _rl(draft: Draft, value: Any) -> None:
    if value in _PREFERENCES:
        preferences.begin(draft)
        if value != "dpo":
            draft.put("stage.loss", _PREFERENCES[value])
    elif value not in OFF:
        goal = _OTHERS.get(value, "reinforcement learning")
        raise OutOfScope(f"this axolotl config is for {goal} (`rl: {value}`), for which a recipe has no stage.")


def _adapter(draft: Draft, value: Any) -> None:
    if value in OFF:
        return
    if value not in ("lora", "qlora"):
        draft.note("lost", "adapter", f"'{value}' is not among the adapters that are converted: lora and qlora")
        return
    draft.stage.setdefault("lora", {})
    config = draft.config
    if config.get("lora_target_linear") in OFF and config.get("lora_target_modules") in OFF:
        draft.put("stage.lora.target_modules", "all-linear")
    options = config.get("bnb_config_kwargs") or {}
    if config.get("quantize_moe_experts"):
        return
    if config.get("load_in_8bit"):
        words.quantize(draft, 8)
    elif config.get("load_in_4bit") or value == "qlora":
        words.quantize(draft, 4, bnb_4bit_use_double_quant=options.get("bnb_4bit_use_double_quant"))


def _lora(name: str) -> Any:
    """A rule for a key of LoRA, which says nothing without `adapter:`."""

    def follow(draft: Draft, value: Any) -> None:
        if value is not None and draft.config.get("adapter") not in OFF:
            draft.train(name, f"lora.{name}", value)

    return follow


def _modules(draft: Draft, value: Any) -> None:
    if value not in OFF and not draft.config.get("lora_target_linear") and draft.config.get("adapter") not in OFF:
        draft.put("stage.lora.target_modules", words.target_modules(value))


def _linear(draft: Draft, value: Any) -> None:
    if value and draft.config.get("adapter") not in OFF:
        draft.put("stage.lora.target_modules", "all-linear")


def _optimizer(draft: Draft, value: Any) -> None:
    if value == "muon":
        draft.put("stage.muon", {})
        draft.note(
            "changed", "optimizer", "torch's Muon takes the place of axolotl's, with AdamW for the other weights"
        )
    elif value:
        draft.train("optimizer", "training.optim", _OPTIMIZERS.get(value, value))


def _schedule(draft: Draft, value: Any) -> None:
    if value in _SCHEDULES:
        draft.note("lost", "lr_scheduler", f"transformers has no schedule '{value}'")
    elif value:
        draft.train("lr_scheduler", "training.lr_scheduler_type", value)


def _lowest(draft: Draft, value: Any) -> None:
    """The cosine ends at a share of the peak; axolotl reads it with `lr_scheduler: cosine` only."""
    if value and draft.config.get("lr_scheduler") in (None, "cosine"):
        draft.put("stage.training.lr_scheduler_type", "cosine_with_min_lr")
        draft.put("stage.training.lr_scheduler_kwargs", {"min_lr_rate": value})


def _checkpointing(draft: Draft, value: Any) -> None:
    if value is not None:
        words.checkpointing(draft, value)
    if value in ("offload", "offload_disk"):
        draft.note("unneeded", "gradient_checkpointing", "activations are computed again, not moved: memory only")


def _attention(draft: Draft, value: Any) -> None:
    if value in ("eager", "sdpa", "flex_attention"):
        draft.put("model.attn_implementation", value)
    elif value:
        why = "hfpipe takes the fastest attention that is installed; `model.attn_implementation` asks for one"
        draft.note("unneeded", "attn_implementation", why)


def _special_tokens(draft: Draft, value: Any) -> None:
    for name, token in (value or {}).items():
        if name in ("eos_token", "pad_token"):
            words.special_token(draft, f"special_tokens.{name}", name, token)
        elif name == "additional_special_tokens" and token:
            draft.put("model.tokenizer.add_special_tokens", token)
        elif token:
            draft.note("changed", f"special_tokens.{name}", f"the tokenizer keeps its own `{name}`")


def _tokens(draft: Draft, value: Any) -> None:
    tokens = list(value.values()) if isinstance(value, dict) else value
    if isinstance(value, dict):
        _special_tokens(draft, value)
    elif tokens:
        draft.put("model.tokenizer.add_tokens", tokens)


def _early(draft: Draft, value: Any) -> None:
    if value and draft.config.get("val_set_size"):
        draft.put("stage.early_stopping", {"suite": next(iter(draft.suites)), "patience": int(value)})


def _plugins(draft: Draft, value: Any) -> None:
    for plugin in value or []:
        name = str(plugin).rsplit(".", 1)[-1]
        if any(word in name for word in ("Diffusion", "KD")):
            raise OutOfScope(
                f"this axolotl config is for a loss of its own (`plugins: {plugin}`), which hfpipe has not."
            )
        if any(
            word in name for word in ("Liger", "CutCrossEntropy", "Kernels", "ExpertParallel", "SwanLab", "Spectrum")
        ):
            draft.note("unneeded", f"plugins: {name}", _SPEED.why)
        else:
            draft.note("lost", f"plugins: {name}", "hfpipe has no such plugin")


def _packing(draft: Draft, value: Any) -> None:
    if value and draft.stage["kind"] == "sft":  # pretraining always packs
        draft.train("sample_packing", "training.packing", True)


def _quantized_experts(draft: Draft, value: Any) -> None:
    if value:
        why = "bitsandbytes leaves experts as they are, so the base keeps its precision, which takes memory"
        word = "quantize_moe_experts" if draft.config.get("quantize_moe_experts") else "llama4_linearized_experts"
        draft.note("changed", word, why)


def _linear_experts(draft: Draft) -> None:
    """Experts as linear layers can be quantized, and be the targets of an adapter."""
    if any("experts." in str(name) for name in draft.config.get("lora_target_modules") or ()):
        draft.note("lost", "llama4_linearized_experts", "experts stay as transformers has them, and are no such layers")
    else:
        _quantized_experts(draft, True)


def _qat(draft: Draft, value: dict[str, Any]) -> None:
    names = {"fp8": "float8", "float8_e4m3fn": "float8"}
    given = (value.get("weight_dtype") or "int8", value.get("activation_dtype"))
    weights, activations = (one and names.get(one, one) for one in given)
    if activations not in ((None, "int8") if weights in ("int4", "int8") else (weights,)):
        draft.note("lost", "qat", f"a stage does not round weights to {weights} with activations {activations}")
        return
    block: words.Block = {
        "weights": weights,
        **({"activations": activations} if activations else {}),
        "target_modules": "all",
    }
    if weights in ("int4", "int8"):
        block["group_size"] = value.get("group_size") or 32
        if value.get("fake_quant_after_n_steps"):
            block["after_steps"] = value["fake_quant_after_n_steps"]
    if weights == "int4":
        why = (
            "weights are rounded as torchao's quantization for this pair rounds them, not as its kernel for int4 alone"
        )
        draft.note("changed", "qat.weight_dtype", why)
    if value.get("quantize_embedding"):
        draft.note("lost", "qat.quantize_embedding", "embeddings keep their precision")
    draft.put("stage.qat", block)


def _fp8(draft: Draft, value: Any) -> None:
    if value:
        draft.note("changed", "fp8", words.EIGHT_BIT_FLOATS)


def _packed_length(draft: Draft, value: Any) -> None:
    """The word for packing of axolotl's first versions."""
    draft.train("max_packed_sequence_len", "training.packing", True)
    draft.put("stage.training.max_length", value)


def _base_config(draft: Draft, value: Any) -> None:
    if value not in (None, draft.config.get("base_model")):
        draft.note("lost", "base_model_config", "the model is made by its own config")


def _unfrozen(draft: Draft, value: Any) -> None:
    patterns = [str(pattern) for pattern in value or ()]
    if patterns and draft.config.get("adapter"):
        draft.note("changed", "unfrozen_parameters", "an adapter trains its own weights, and no others")
        return
    for pattern in patterns:
        if _ROWS_OF_A_WEIGHT.search(pattern):
            draft.note("lost", "unfrozen_parameters", f"`{pattern}`: a weight is trained whole, not some of its rows")
    if patterns:
        draft.put("stage.train_only", [_ROWS_OF_A_WEIGHT.sub("", pattern) for pattern in patterns])


def _half(draft: Draft, value: Any) -> None:
    if value and not draft.config.get("bf16"):
        draft.train("fp16", "training.fp16", True)


TABLE: Table = {
    **{key: rule for key, rule in TRAINER.items() if key != "remove_unused_columns"},
    # Out
    "rl": _rl,
    "rl_beta": "stage.training.beta",
    "dpo_beta": "stage.training.beta",
    "dpo_label_smoothing": "stage.training.label_smoothing",
    "dpo_use_weighting": "stage.training.use_weighting",
    "dpo_loss_type": if_set(lambda draft, value: preferences.loss(draft, "dpo_loss_type", value)),
    "dpo_loss_weights": "stage.training.loss_weights",
    "dpo_norm_loss": Lost("write `loss: sigmoid_norm`"),
    "precompute_ref_log_probs": "stage.training.precompute_ref_log_probs",
    "rpo_alpha": with_another,
    "processor_type": Out(_IMAGES),
    "freeze_mm_modules": Unneeded("only the text part of a model is loaded"),
    **same(Out("for a reward model"), "reward_model process_reward_model"),
    "num_labels": Out("for a classifier, whose labels a stage of `kind: classification` has", (None, False)),
    "skip_prepare_dataset": Out(_IMAGES),
    "hatchery.reward_funcs": Out("for reinforcement learning"),
    # Model
    "base_model": "model.id",
    "revision_of_model": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "tokenizer_config": "model.tokenizer.id",
    "base_model_config": _base_config,
    **same(Unneeded("the class follows from the model's config"), "model_type type_of_model cls_model_config is_*"),
    "tokenizer_type": Unneeded("the class follows from the tokenizer's files"),
    "tokenizer_use_fast": Unneeded("the tokenizer's fast form is taken where there is one"),
    "tokenizer_legacy": Unneeded("the tokenizer's own files say it"),
    "tokenizer_use_mistral_common": Unneeded("the model's own chat template is taken"),
    "attn_implementation": _attention,
    "sage_attention": Lost("its attention is quantized"),
    "s2_attention": Lost("hfpipe attends to the whole row"),
    "special_tokens": _special_tokens,
    "tokens": _tokens,
    "added_tokens_overrides": Lost("a recipe adds tokens and does not rename those that a tokenizer has"),
    "resize_token_embeddings_to_32x": Unneeded("rows of the embeddings without a token are never trained"),
    "mean_resizing_embeddings": Unneeded("new embeddings begin around the mean of the others"),
    "shrink_embeddings": Lost("embeddings keep the rows that the model has"),
    "overrides_of_model_config": words.model_config,
    "model_config.*": with_another,
    "model_config": words.model_config,
    "rope_scaling": if_set(lambda draft, value: words.model_config(draft, {"rope_scaling": value})),
    **same(
        Unneeded("a base that comes quantized is read as its files are"),
        "model_quantization_config model_quantization_config_kwargs gptq gptq_*",
    ),
    "reinit_weights": with_another,
    "use_onebitllms": Lost("hfpipe has no 1.58-bit layers"),
    "llama4_linearized_experts": if_set(lambda draft, value: _linear_experts(draft)),
    "quantize_moe_experts": _quantized_experts,
    # Data
    "datasets": with_another,
    "pretraining_dataset": with_another,
    "test_datasets": with_another,
    "val_set_size": with_another,
    "dataset_exact_deduplication": deduplicate,
    "shuffle_merged_datasets": Lost("rows are shuffled", (None, True)),
    "shuffle_before_merging_datasets": Unneeded("rows are shuffled over all sources"),
    "dataset_shard_num": Lost("write `fold: {of: N, keep: M}` at the source"),
    "dataset_shard_idx": Unneeded("see dataset_shard_num"),
    "streaming": with_another,
    "chat_template": follow_template,
    "chat_template_jinja": "model.tokenizer.chat_template",
    "chat_template_kwargs": Lost("the template is rendered with its own defaults"),
    "eot_tokens": note_end_of_turn,
    "default_system_message": Lost("rows keep the system message that they have, or none"),
    "train_on_inputs": with_another,
    "sequence_len": "stage.training.max_length",
    "excess_length_strategy": with_another,
    "min_sample_len": Lost("short rows are kept"),
    "sample_packing": _packing,
    "sample_packing_sequentially": Lost("rows are shuffled"),
    "curriculum_sampling": Lost("rows are shuffled"),
    "max_packed_sequence_len": if_set(_packed_length),
    # Adapter
    "adapter": _adapter,
    "load_in_8bit": with_another,
    "load_in_4bit": with_another,
    "bnb_config_kwargs": with_another,
    "lora_model_dir": Lost("a stage starts from the base, or from a stage before it"),
    "lora_r": _lora("r"),
    "lora_alpha": _lora("lora_alpha"),
    "lora_dropout": _lora("lora_dropout"),
    "lora_target_modules": _modules,
    "lora_target_linear": _linear,
    "lora_target_parameters": _lora("target_parameters"),
    "lora_modules_to_save": if_set(_lora("modules_to_save")),
    "lora_fan_in_fan_out": _lora("fan_in_fan_out"),
    "lora_rank_pattern": _lora("rank_pattern"),
    "lora_alpha_pattern": _lora("alpha_pattern"),
    "peft_layers_to_transform": _lora("layers_to_transform"),
    "peft_layers_pattern": _lora("layers_pattern"),
    "peft_use_dora": _lora("use_dora"),
    "peft_use_rslora": _lora("use_rslora"),
    "peft_layer_replication": _lora("layer_replication"),
    "peft_init_lora_weights": _lora("init_lora_weights"),
    "peft_trainable_token_indices": _lora("trainable_token_indices"),
    "peft_ensure_weight_tying": _lora("ensure_weight_tying"),
    "peft.loftq_config": Lost("LoftQ quantizes the base by a call of its own"),
    "loraplus_lr_ratio": if_set(lambda draft, value: words.lora_plus(draft, "loraplus_lr_ratio", value)),
    "loraplus_lr_embedding": Unneeded("see loraplus_lr_ratio"),
    "relora": Lost("an adapter is trained once"),
    "relora_*": Unneeded("see relora"),
    "jagged_restart_*": Lost("the learning rate starts anew"),
    "merge_lora": words.merge,
    "unfrozen_parameters": _unfrozen,
    "lisa_n_layers": Lost("LISA trains other layers in turn"),
    "lisa_*": Unneeded("see lisa_n_layers"),
    # Training
    "micro_batch_size": "stage.training.per_device_train_batch_size",
    "gradient_accumulation_steps": "stage.training.gradient_accumulation_steps",
    "batch_size": Unneeded("micro_batch_size and gradient_accumulation_steps say it"),
    "num_epochs": "stage.training.num_train_epochs",
    "max_steps": words.max_steps,
    "learning_rate": Said("stage.training.learning_rate", float),
    "embedding_lr": if_set(lambda draft, value: _embeddings_rate(draft, float(value))),
    "embedding_lr_scale": if_set(
        lambda draft, value: _embeddings_rate(draft, float(value) * float(draft.config["learning_rate"]))
    ),
    "lr_groups": if_set(lambda draft, value: draft.put("stage.learning_rates", _groups(value))),
    "optimizer": _optimizer,
    "optim_args": "stage.training.optim_args",
    "optim_target_modules": "stage.training.optim_target_modules",
    "lr_scheduler": _schedule,
    "lr_scheduler_kwargs": "stage.training.lr_scheduler_kwargs",
    "cosine_min_lr_ratio": _lowest,
    "cosine_constant_lr_ratio": Lost("the cosine runs to the end of the training", (None, 0, 1)),
    "lr_quadratic_warmup": Lost("warm-up is linear"),
    "warmup_steps": lambda draft, value: words.warmup(draft, "warmup_steps", value),
    "weight_decay": "stage.training.weight_decay",
    "max_grad_norm": "stage.training.max_grad_norm",
    "adam_beta1": "stage.training.adam_beta1",
    "adam_beta2": "stage.training.adam_beta2",
    "adam_eps": Unneeded("axolotl reads `adam_epsilon`, and passes over this"),
    "eta_min": Unneeded("axolotl reads `cosine_min_lr_ratio`, and passes over this"),
    "adam_epsilon": "stage.training.adam_epsilon",
    "adam_beta3": Unneeded("for the optimizer CAME only"),
    "adam_epsilon2": Unneeded("for the optimizer CAME only"),
    "neftune_noise_alpha": "stage.training.neftune_noise_alpha",
    "noisy_embedding_alpha": "stage.training.neftune_noise_alpha",
    "gradient_checkpointing": _checkpointing,
    "dataloader_drop_last": "stage.training.dataloader_drop_last",
    "bfloat16": Unneeded("the weights keep the precision of their files; `model.dtype` asks for another"),
    "float16": if_set(lambda draft, value: draft.put("model.dtype", "float16")),
    "fp16": _half,
    "float32": if_set(lambda draft, value: draft.put("model.dtype", "float32")),
    "torch_dtype": "model.dtype",
    "fp32_norms": Lost("norms have the precision of the other weights"),
    "fp8": _fp8,
    "fp8_*": Unneeded("see fp8"),
    "qat": if_set(_qat),
    **same(Unneeded("quantize the finished model"), "quantization nvfp4_merge_aware"),
    "torch_compile": words.compiled,
    "use_eaft": Lost("the loss is cross-entropy"),
    "eaft_*": Unneeded("see use_eaft"),
    "scaling_softmax*": Lost("attention is the model's own"),
    "use_pose": Lost("positions are the rows' own"),
    "early_stopping_patience": _early,
    "plugins": _plugins,
    "llmcompressor.*": Unneeded("see plugins"),
    "loss_watchdog_*": Unneeded("a loss that is not a number ends the run"),
    "logging_steps": "stage.training.logging_steps",
    "remove_unused_columns": Unneeded("hfpipe makes the rows itself"),
    # Without a part in a recipe, by the reason
    **same(
        _SPEED,
        "dpo_padding_free flash_attention flash_attn_* flash_optimum sdp_attention xformers_attention flex_attention "
        "flex_attn_compile_kwargs eager_attention gemma4_hybrid_attn_impl fused_attn_kernel use_kernels "
        "use_scattermoe use_sonicmoe experts_implementation use_dsv4_kernels use_glm_dsa_kernels dsv4_* "
        "batch_flattening pad_to_sequence_len pad_to_multiple_of peft_autocast_adapter_dtype lora_*_kernel "
        "lora_on_cpu qlora_sharded_model_loading merge_method torchdistx_path activation_offloading "
        "selective_checkpointing layer_offloading torch_compile_* cut_cross_entropy chunked_cross_entropy* tiled_mlp* "
        "unsloth_* gc_steps gc_collect_steps",
    ),
    **same(
        _ELSEWHERE,
        "base_model_ignore_patterns tokenizer_save_jinja_files gradio_* generate_samples generation_* "
        "num_generation_samples strict debug project_name",
    ),
    **same(
        PREPARED,
        "dataset_prepared_path push_dataset_to_hub hf_use_auth_token dataset_processes dataset_keep_in_memory "
        "streaming_multipack_buffer_size pretrain_multipack_* sample_packing_* multipack_real_batches "
        "total_num_tokens",
    ),
    **same(
        _SCORED,
        "eval_sequence_len eval_sample_packing eval_batch_size evals_per_epoch eval_table_size eval_max_new_tokens "
        "do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_*",
    ),
    **same(_SAVED, "saves_per_epoch save_first_step auto_resume_from_checkpoints"),
    **same(
        _LOGGED,
        "wandb_* use_wandb mlflow_* use_mlflow comet_* use_comet swanlab_* use_swanlab trackio_* use_trackio "
        "use_tensorboard use_otel_metrics otel_* profiler_*",
    ),
    **same(
        _LAUNCH,
        "fsdp_version dp_shard_size dp_replicate_size tensor_parallel_size context_parallel_size "
        "sequence_parallel_degree expert_parallel_* ring_attn_func heads_k_stride device device_map device_map.* "
        "max_memory gpu_memory_limit world_size ddp use_ray ray_* low_cpu_mem_usage experimental_skip_move_to_device",
    ),
}


def _embeddings_rate(draft: Draft, rate: float) -> None:
    """axolotl gives this rate to the weights whose names end so, adapter or not."""
    draft.put("stage.learning_rates", {r"(embed_tokens|lm_head)[^.]*\.weight$": rate})


def _groups(value: list[dict[str, Any]]) -> dict[str, float]:
    return {"|".join(one["modules"]): float(one["lr"]) for one in value}


def convert(draft: Draft) -> None:
    """Fills a draft from an axolotl config.

    Raises:
        OutOfScope: The config is for preferences, rewards, images or a classifier.
    """
    config = draft.config
    for key in ("rl", "reward_model", "process_reward_model", "processor_type", "skip_prepare_dataset", "num_labels"):
        draft.follow(key, TABLE[key], config.get(key))
    documents = [one for one in config.get("datasets") or [] if (one or {}).get("type") in ("completion", "pretrain")]
    if config.get("pretraining_dataset") or (documents and len(documents) == len(config.get("datasets") or [])):
        draft.stage.update(kind="pretrain", name="pretrain")
        add_documents(draft, config.get("pretraining_dataset") or documents)
    else:
        add_sources(draft)
    words.hold_out(draft, "val_set_size", config.get("val_set_size"))
    draft.apply(TABLE)
    if config.get("reinit_weights"):
        words.fresh(draft)
    _defaults(draft)
    if draft.stage["kind"] == "preference":
        preferences.with_sft(draft, "rpo_alpha", config.get("rpo_alpha"))
        preferences.finish(draft)


def _defaults(draft: Draft) -> None:
    """Writes out axolotl's defaults where its config is silent."""
    config = draft.config
    draft.default("stage.training.per_device_train_batch_size", 1)
    draft.default("stage.training.num_train_epochs", 1)
    draft.default("stage.training.optim", "adamw_torch_fused")
    draft.default("stage.training.lr_scheduler_type", "cosine")
    if draft.take("stage.training.warmup_steps") is None:
        draft.put("stage.training.warmup_steps", 0.03)
        draft.note("changed", "warmup_steps", "axolotl warms up over 3 % of the steps, but at most 100 of them")
    draft.default("stage.training.max_length", 512)
    if draft.stage["kind"] == "sft":
        words.too_long(draft, "cut" if config.get("excess_length_strategy") == "truncate" else "drop")
        answers: words.Trained = "assistant" if is_chat(draft) else "completion"
        words.train_on(draft, "all" if config.get("train_on_inputs") else answers)
    if not config.get("adapter") and config.get("bf16") not in (False, None):
        draft.default("model.dtype", "bfloat16")
    draft.default("seed", 42)
