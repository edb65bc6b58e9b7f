"""oumi: YAML with the blocks `model`, `data`, `training` and `peft`.

Source: the parameter classes of oumi (`src/oumi/core/configs/params`), its data sets and configs, read in August 2026.
"""

from __future__ import annotations

from typing import Any

from hfpipe.convert import preferences, words
from hfpipe.convert.draft import Draft, Lost, Out, OutOfScope, Said, Table, Unneeded, if_set, with_another

_SPEED = Unneeded("speed and memory only")
_LOGGED = Unneeded("`training.report_to` takes wandb, tensorboard, trackio and others; see docs/trackers.md")
_LAUNCH = Unneeded("how processes are launched belongs in the file of `accelerate launch --config_file`")
_SAVED = Unneeded("hfpipe keeps whole checkpoints and continues by the same command")
_SCORED = Unneeded("suites are scored before and after each stage; `early_stopping:` scores while it trains")
_ROWS = Unneeded("hfpipe makes the rows itself")
_FOLDER = Unneeded("a run's files lie in `runs/NAME`; `output_dir:` of the recipe names another folder")
_GOALS = {
    "TRL_KTO": "answers that are judged one by one",
    "TRL_GRPO": "reinforcement learning",
    "VERL_GRPO": "reinforcement learning",
    "TRL_GKD": "distillation from another model",
    "TRL_GOLD": "distillation from another model",
}
_ALPACAS = ("yahma/alpaca-cleaned", "tatsu-lab/alpaca")
_CHATS = {
    "HuggingFaceH4/ultrachat_200k": "messages",
    "allenai/tulu-3-sft-mixture": "messages",
    "allenai/WildChat-1M": "conversation",
}
_TEXTS = {  # sets to pretrain on, and the column of their text
    "HuggingFaceFW/fineweb-edu": "text",
    "allenai/c4": "text",
    "allenai/dolma": "text",
    "tiiuae/falcon-refinedweb": "content",
    "EleutherAI/pile": "text",
    "togethercomputer/RedPajama-Data-1T": "text",
    "togethercomputer/RedPajama-Data-V2": "raw_content",
    "cerebras/SlimPajama-627B": "text",
    "gmongaras/SlimPajama-627B_Reupload": "text",
    "bigcode/starcoderdata": "content",
    "bigcode/the-stack": "content",
    "roneneldan/TinyStories": "text",
    "nampdn-ai/tiny-textbooks": "text",
    "wikimedia/wikipedia": "text",
    "Salesforce/wikitext": "text",
}
_PAIRS = {
    "argilla/databricks-dolly-15k-curated-en": ("{new-instruction}", "{new-response}"),
    "argilla/magpie-ultra-v0.1": ("{instruction}", "{response}"),
    "O1-OPEN/OpenO1-SFT": ("{instruction}", "{output}"),
    "CohereForAI/aya_dataset": ("{inputs}", "{targets}"),
}


def _no_dropout(draft: Draft, value: Any) -> None:
    if value and str(draft.config["model"].get("model_name")).rsplit("/", 1)[-1].startswith("gpt2"):
        words.model_config(draft, dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0))
    elif value:
        draft.note("lost", "model.model_kwargs.disable_dropout", "write the fields of its config in `model.config`")


def _dtype(draft: Draft, value: Any) -> None:
    if value not in (None, "auto"):
        draft.put("model.dtype", value)


def _attention(draft: Draft, value: Any) -> None:
    if value in ("eager", "sdpa", "flex_attention"):
        draft.put("model.attn_implementation", value)
    elif value:
        draft.note("unneeded", "model.attn_implementation", "hfpipe takes the fastest attention that is installed")


def _lora(name: str) -> Any:
    def follow(draft: Draft, value: Any) -> None:
        if value is not None and "lora" in draft.stage:
            draft.train(
                f"peft.{name}", f"lora.{name}", words.target_modules(value) if name == "target_modules" else value
            )

    return follow


def _bits(draft: Draft, value: Any) -> None:
    peft = draft.config.get("peft") or {}
    if not value or "lora" not in draft.stage:
        return
    bits = int(peft.get("q_lora_bits", 4))
    if bits == 4 and peft.get("bnb_4bit_quant_type", "fp4") == "fp4":
        draft.note("lost", "peft.bnb_4bit_quant_type", "4 bits are nf4, and oumi's default is fp4")
    storage = peft.get("bnb_4bit_quant_storage")
    words.quantize(
        draft, bits, bnb_4bit_use_double_quant=bool(peft.get("use_bnb_nested_quant")), bnb_4bit_quant_storage=storage
    )


def _template(draft: Draft, value: Any) -> None:
    if value not in (None, "auto"):
        words.own_template(draft, "model.chat_template", str(value))


def _tokenizer(draft: Draft, value: Any) -> None:
    for name, one in (value or {}).items():
        words.special_token(draft, f"model.tokenizer_kwargs.{name}", name, one)


def _kwargs(draft: Draft, value: Any) -> None:
    for key, one in (value or {}).items():
        if key == "max_length" and draft.stage["kind"] == "preference":
            draft.put("stage.training.max_length", one)
        elif key in ("packing", "max_length", "neftune_noise_alpha", "assistant_only_loss", "completion_only_loss"):
            if draft.stage["kind"] == "sft":
                draft.train(f"training.trainer_kwargs.{key}", f"training.{key}", one)
        elif key == "loss_type" and draft.stage["kind"] == "preference":
            preferences.loss(draft, "training.trainer_kwargs.loss_type", one)
        elif key == "dataset_text_field":
            _text_column(draft, one)
        elif key != "max_seq_length":
            draft.train(f"training.trainer_kwargs.{key}", f"training.{key}", one)


def _text_column(draft: Draft, column: Any) -> None:
    for source in draft.stage["data"] if column != "text" else ():
        source.setdefault("columns", {"text": column})


def _clip(draft: Draft, value: Any) -> None:
    draft.put("stage.training.max_grad_norm", 0.0 if value is None else value)


def _sharding(draft: Draft, value: Any) -> None:
    if value:
        draft.note("unneeded", "fsdp", _LAUNCH.why)


def _init(draft: Draft, value: Any) -> None:
    if str(value).lower() not in ("none", "default"):
        _lora("init_lora_weights")(draft, value)


def _skipped(draft: Draft, value: Any) -> None:
    if value:
        why = "bitsandbytes' own list of skipped modules is taken"
        draft.note("changed", "peft.llm_int8_skip_modules", why)


def _merged(draft: Draft, value: Any) -> None:
    words.merge(draft, "MERGED" in str(value).upper())


TABLE: Table = {
    # Model
    "model.model_name": "model.id",
    "model.adapter_model": Lost("a stage starts from the base, or from a stage before it"),
    "model.tokenizer_name": "model.tokenizer.id",
    "model.tokenizer_pad_token": lambda draft, value: words.special_token(
        draft, "model.tokenizer_pad_token", "pad_token", value
    ),
    "model.tokenizer_kwargs": _tokenizer,
    "model.processor_kwargs*": Out("for images, and hfpipe trains on text"),
    "model.model_max_length": "stage.training.max_length",
    "model.load_pretrained_weights": with_another,
    "model.trust_remote_code": "model.trust_remote_code",
    "model.torch_dtype_str": _dtype,
    "model.compile": _SPEED,
    "model.chat_template": _template,
    "model.chat_template_kwargs": Lost("the template is rendered with its own defaults"),
    "model.attn_implementation": _attention,
    "model.device_map": _LAUNCH,
    "model.model_kwargs.rope_scaling": lambda draft, value: words.model_config(draft, {"rope_scaling": value}),
    "model.model_kwargs.quantization_config": Unneeded("a base that comes quantized is read as its files are"),
    "model.model_kwargs.disable_dropout": _no_dropout,
    "model.model_kwargs.*": Lost("the model is made by its own config"),
    "model.enable_liger_kernel": _SPEED,
    "model.shard_for_eval": _SPEED,
    "model.freeze_layers": if_set(lambda draft, value: draft.put("stage.freeze", value)),
    "model.model_revision": "model.revision",
    # Data
    "data.*": with_another,
    # Training
    "training.trainer_type": with_another,
    "training.use_peft": with_another,
    "training.enable_gradient_checkpointing": words.checkpointing,
    "training.gradient_checkpointing_kwargs*": _SPEED,
    "training.output_dir": _FOLDER,
    "training.per_device_train_batch_size": "stage.training.per_device_train_batch_size",
    "training.per_device_eval_batch_size": _SCORED,
    "training.gradient_accumulation_steps": "stage.training.gradient_accumulation_steps",
    "training.max_steps": words.max_steps,
    "training.num_train_epochs": "stage.training.num_train_epochs",
    "training.seed": "seed",
    "training.data_seed": Unneeded("one seed, the recipe's `seed`, orders the rows"),
    "training.learning_rate": Said("stage.training.learning_rate", float),
    "training.lr_scheduler_type": "stage.training.lr_scheduler_type",
    "training.lr_scheduler_kwargs": "stage.training.lr_scheduler_kwargs",
    "training.lr_scheduler_kwargs.*": with_another,
    "training.warmup_ratio": lambda draft, value: words.warmup(draft, "training.warmup_ratio", value),
    "training.warmup_steps": lambda draft, value: words.warmup(draft, "training.warmup_steps", value),
    "training.optimizer": "stage.training.optim",
    "training.weight_decay": "stage.training.weight_decay",
    "training.adam_beta1": "stage.training.adam_beta1",
    "training.adam_beta2": "stage.training.adam_beta2",
    "training.adam_epsilon": "stage.training.adam_epsilon",
    "training.sgd_momentum": Lost("transformers' `sgd` has no momentum", (None, 0, 0.0)),
    "training.max_grad_norm": _clip,
    "training.mixed_precision_dtype": _SPEED,
    "training.compile": words.compiled,
    "training.label_ignore_index": _ROWS,
    "training.trainer_kwargs": _kwargs,
    "training.logging_steps": "stage.training.logging_steps",
    "training.eval_*": _SCORED,
    "training.metrics_function": _SCORED,
    "training.save_*": _SAVED,
    "training.resume_from_checkpoint": _SAVED,
    "training.try_resume_from_last_checkpoint": _SAVED,
    "training.enable_*": _LOGGED,
    "training.include_*": _LOGGED,
    "training.log*": _LOGGED,
    "training.dep_log_level": _LOGGED,
    "training.run_name": _LOGGED,
    "training.profiler*": _LOGGED,
    "training.telemetry*": _LOGGED,
    "training.dataloader_*": _ROWS,
    "training.ddp_*": _LAUNCH,
    "training.nccl_*": _LAUNCH,
    "training.empty_device_cache_steps": _SPEED,
    "training.use_deterministic": _SPEED,
    "training.full_determinism": _SPEED,
    # Adapter
    "peft.lora_r": _lora("r"),
    "peft.lora_alpha": _lora("lora_alpha"),
    "peft.lora_dropout": _lora("lora_dropout"),
    "peft.lora_target_modules": _lora("target_modules"),
    "peft.lora_exclude_modules": _lora("exclude_modules"),
    "peft.lora_target_parameters": _lora("target_parameters"),
    "peft.lora_modules_to_save": _lora("modules_to_save"),
    "peft.lora_bias": _lora("bias"),
    "peft.lora_init_weights": _init,
    "peft.lora_task_type": Unneeded("the kind of stage says it"),
    "peft.q_lora": _bits,
    "peft.q_lora_bits": with_another,
    "peft.bnb_4bit_*": with_another,
    "peft.use_bnb_nested_quant": with_another,
    "peft.llm_int8_skip_modules": _skipped,
    "peft.peft_save_mode": _merged,
    "fsdp": _sharding,
    "fsdp.*": _LAUNCH,
    "deepspeed": _LAUNCH,
    "deepspeed.*": _LAUNCH,
}


def convert(draft: Draft) -> None:
    """Fills a draft from an oumi config.

    Raises:
        OutOfScope: The config is for preferences, rewards, distillation, images, or for no training.
    """
    config = draft.config
    training, data = config.get("training"), (config.get("data") or {}).get("train")
    if not isinstance(training, dict) or not isinstance(data, dict):
        raise OutOfScope("this oumi config trains nothing (it has no `training:` with `data: {train: ...}`).")
    trainer = str(training.get("trainer_type", "HF")).upper()
    if trainer in _GOALS:
        raise OutOfScope(
            f"this oumi config is for {_GOALS[trainer]} (`trainer_type: {trainer}`), for which a recipe has no stage."
        )
    if "vision" in str(data.get("collator_name")):
        raise OutOfScope(
            f"this oumi config is for images (`collator_name: {data['collator_name']}`), and hfpipe trains on text."
        )
    if trainer == "TRL_DPO":
        preferences.begin(draft)
    if training.get("use_peft"):
        draft.stage["lora"] = {}
    sets = data.get("datasets") or []
    if trainer in ("HF", "OUMI") or (sets and all(one.get("dataset_name") in _TEXTS for one in sets)):
        draft.stage.update(kind="pretrain", name="pretrain")
    for one in sets:
        draft.stage["data"] += _rows(draft, one, bool(data.get("stream")))
    _split(draft, data)
    draft.apply(TABLE)
    if config["model"].get("load_pretrained_weights") is False:
        words.fresh(draft)
    _defaults(draft, data)
    preferences.finish(draft)


def _split(draft: Draft, data: dict[str, Any]) -> None:
    """Converts a split's keys beside its data sets, and the sets that are held out."""
    if data.get("pack") and draft.stage["kind"] == "sft":
        draft.train("data.train.pack", "training.packing", True)
    if len(draft.stage["data"]) > 1 and data.get("mixture_strategy"):
        why = "sources take turns by their weights, and none ends the stage"
        draft.note("changed", "data.train.mixture_strategy", why)
    for split in ("validation", "test"):
        for one in (draft.config["data"].get(split) or {}).get("datasets") or []:
            for source in _rows(draft, one, False):
                name = f"{words.HELD_OUT}-{len(draft.suites) + 1}"
                draft.suites[name] = {"data": source, "metrics": ["bits_per_byte"]}


def _defaults(draft: Draft, data: dict[str, Any]) -> None:
    """Writes out oumi's defaults where its config is silent."""
    if "lora" in draft.stage:
        draft.default("stage.lora.r", 8)
        draft.default("stage.lora.lora_alpha", 8)
    if draft.take("stage.training.max_steps") is None:
        draft.default("stage.training.num_train_epochs", 3)
    draft.default("stage.training.learning_rate", 5e-5)
    draft.default("stage.training.per_device_train_batch_size", 8)
    draft.default("stage.training.lr_scheduler_type", "linear")
    draft.default("stage.training.warmup_steps", 0)
    draft.default("stage.training.optim", "adamw_torch")
    masked = data.get("collator_name") == "text_completions_only_with_padding" or data.get("train_target")
    if masked:
        last = "final" in str(data.get("train_target") or "").lower()
        words.train_on(draft, "last" if last else "assistant")
    else:
        words.train_on(draft, "all")
    draft.default("seed", 42)


def _rows(draft: Draft, one: dict[str, Any], streaming: bool) -> list[dict[str, Any]]:
    """Sources of one of oumi's data sets."""
    name, options = str(one.get("dataset_name")), one.get("dataset_kwargs") or {}
    if options.get("processor_name") or "vl_" in name or "vision" in name:
        raise OutOfScope(f"this oumi config is for images (`dataset_name: {name}`), and hfpipe trains on text.")
    path = one.get("dataset_path") or options.get("dataset_path") or options.get("hf_dataset_path") or name
    source = words.source_of(
        str(path), name=one.get("subset"), split=one.get("split") or "train", take=one.get("sample_count")
    )
    if source["path"] != path:
        source.pop("split")
    if streaming:
        source["streaming"] = True
    if one.get("mixture_proportion") is not None:
        source["weight"] = float(one["mixture_proportion"])
    return _formatted(draft, name, options, source)


def _formatted(draft: Draft, name: str, options: dict[str, Any], source: dict[str, Any]) -> list[dict[str, Any]]:
    if draft.stage["kind"] == "preference":
        return [source]  # its rows are recognized by their columns
    if draft.stage["kind"] == "pretrain":
        column = _TEXTS.get(name, "text")
        return [source if column == "text" else {**source, "columns": {"text": column}}]
    if name in _ALPACAS:
        system = options.get("include_system_prompt", True)
        alone = words.turns("{instruction}", "{output}", words.ALPACA_SYSTEM if system else None)
        asked = "{instruction}\n\n### Input:\n{input}"
        return words.with_and_without_input(
            source, alone, words.turns(asked, "{output}", words.ALPACA_SYSTEM_WITH_INPUT if system else None)
        )
    if name in ("HuggingFaceDataset", "text_sft", "text_sft_jsonl"):
        return words.chat_rows(draft, source, options.get("messages_column", "messages"))
    if name in _CHATS:
        return words.chat_rows(draft, source, _CHATS[name])
    if name == "PromptResponseDataset":
        question, answer = options.get("prompt_column", "instruction"), options.get("response_column", "output")
        return [{**source, "template": words.turns(f"{{{question}}}", f"{{{answer}}}")}]
    if name in _PAIRS:
        return [{**source, "template": words.turns(*_PAIRS[name])}]
    if name.startswith("nvidia/ChatQA"):
        draft.note(
            "lost", f"dataset_name: {name}", "its documents and turns are joined by oumi's own code; write `template:`"
        )
    else:
        draft.note("changed", f"dataset_name: {name}", "its rows are read by the columns that they have")
    return [source]
