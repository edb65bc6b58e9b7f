"""torchtune: YAML whose blocks name components of its own (`_component_`).

Source: the recipes and the data sets of torchtune (`recipes/configs`, `torchtune/datasets`), read in August 2026.
"""

from __future__ import annotations

import re
from typing import Any

from hfpipe.convert import preferences, words
from hfpipe.convert.draft import Draft, Lost, Out, OutOfScope, Said, Table, Unneeded, with_another

_SPEED = Unneeded("speed and memory only")
_FOLDER = Unneeded("a run's files lie in `runs/NAME`; `output_dir:` of the recipe names another folder")
_SAVED = Unneeded("hfpipe keeps whole checkpoints and continues by the same command")
_LOGGED = Unneeded("`training.report_to` takes wandb, tensorboard, trackio and others; see docs/trackers.md")
_LAUNCH = Unneeded("how processes are launched belongs in the file of `accelerate launch --config_file`")
_FILES = Unneeded("the folder of the model says it")
_SIZES = (
    "vocab_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "embed_dim",
    "intermediate_dim",
    "max_seq_len",
    "norm_eps",
    "rope_base",
)
_TIED = ("llama3_2", "gemma", "qwen2_5_0_5b", "qwen2_5_1_5b", "qwen2_5_3b", "qwen3_0_6b", "qwen3_1_7b", "qwen3_4b")
_OPTIMIZERS = {
    "torch.optim.AdamW": "adamw_torch",
    "torch.optim.SGD": "sgd",
    "bitsandbytes.optim.PagedAdamW": "paged_adamw_32bit",
    "bitsandbytes.optim.PagedAdamW8bit": "paged_adamw_8bit",
    "bitsandbytes.optim.AdamW8bit": "adamw_bnb_8bit",
    "torchao.optim.AdamW8bit": "adamw_torch_8bit",
    "torchao.optim.AdamW4bit": "adamw_torch_4bit",
    "torchao.prototype.low_bit_optim.AdamW8bit": "adamw_torch_8bit",
    "torchao.prototype.low_bit_optim.AdamW4bit": "adamw_torch_4bit",
    "torchao.prototype.low_bit_optim.CPUOffloadOptimizer": "adamw_torch",
}
_LOSSES = ("LinearCrossEntropyLoss", "CEWithChunkedOutputLoss", "CrossEntropyLoss")
_OF_PAIRS = {"DPOLoss": "sigmoid", "RSOLoss": "hinge"}  # TRL's names of the same
_MODULES = {"output_proj": "o_proj"}
_MLP = ("gate_proj", "up_proj", "down_proj")
# Builders of data sets: the Hub data set each stands for, and how its rows are built.
_SETS = {"alpaca_dataset": "tatsu-lab/alpaca", "alpaca_cleaned_dataset": "yahma/alpaca-cleaned"}
_PAIRS = {
    "samsum_dataset": ("Samsung/samsum", "Summarize this dialogue:\n{dialogue}\n---\nSummary:\n", "{summary}"),
    "grammar_dataset": ("liweili/c4_200m", "Correct this to standard English: {input}\n---\nCorrected: ", "{output}"),
}
_TEXTS = {
    "wikitext_dataset": ("EleutherAI/wikitext_document_level", "page"),
    "cnn_dailymail_articles_dataset": ("ccdv/cnn_dailymail", "article"),
    "text_completion_dataset": (None, "text"),
}


def _optimizer(draft: Draft, value: Any) -> None:
    if value in _OPTIMIZERS:
        fused = value == "torch.optim.AdamW" and draft.config["optimizer"].get("fused")
        draft.put("stage.training.optim", "adamw_torch_fused" if fused else _OPTIMIZERS[value])
    elif value:
        draft.note("lost", "optimizer._component_", f"{value} is not among the optimizers that are converted")


def _schedule(draft: Draft, value: Any) -> None:
    if str(value).endswith("get_cosine_schedule_with_warmup"):
        draft.put("stage.training.lr_scheduler_type", "cosine")
    elif value:
        draft.note("lost", "lr_scheduler._component_", f"{value} is not among the schedules that are converted")


def _loss(draft: Draft, value: Any) -> None:
    name = str(value).rsplit(".", 1)[-1]
    if name in _OF_PAIRS and draft.stage["kind"] == "preference":
        draft.put("stage.loss", _OF_PAIRS[name])
    elif value and name not in _LOSSES:
        raise OutOfScope(
            f"this torchtune config is for another loss than next tokens or pairs of answers (`loss: {value}`)."
        )


def _checkpoint(draft: Draft, value: Any) -> None:
    """The folder of the model; the Hub id, if the file says how it was downloaded."""
    folder = str(value).rstrip("/")
    named = re.findall(r"tune download ([\w.-]+/[\w.-]+)", draft.text)
    same = [one for one in named if one.rsplit("/", 1)[-1].lower() == folder.rsplit("/", 1)[-1].lower()]
    draft.put("model.id", same[0] if same else folder)
    if not same:
        draft.note("changed", "checkpointer.checkpoint_dir", "the model is a folder; its Hub id has it downloaded")


def _steps(draft: Draft, value: Any) -> None:
    if value:
        draft.put("stage.training.max_steps", int(value) * int(draft.config.get("epochs", 1)))


def _bits(draft: Draft, value: Any) -> None:
    if value:
        words.quantize(draft, 4)


def _lora_rank(draft: Draft, value: Any) -> None:
    model = draft.config["model"]
    names = [_MODULES.get(one, one) for one in model.get("lora_attn_modules") or ["q_proj", "v_proj"]]
    names += list(_MLP) if model.get("apply_lora_to_mlp") else []
    names += ["lm_head"] if model.get("apply_lora_to_output") else []
    if "phi3" in str(model.get("_component_")) or "phi4" in str(model.get("_component_")):
        names = ["qkv_proj", "o_proj", *(["gate_up_proj", "down_proj"] if model.get("apply_lora_to_mlp") else [])]
        draft.note(
            "changed", "model.lora_attn_modules", "transformers' Phi joins q, k and v in one layer, as gate and up"
        )
    draft.put("stage.lora.target_modules", names)
    draft.put("stage.lora.r", value)


def _component(draft: Draft, value: Any) -> None:
    name = str(value).rsplit(".", 1)[-1]
    if "vision" in str(value) or "multimodal" in str(value):
        raise OutOfScope(f"this torchtune config is for images (`model: {value}`), and hfpipe trains on text.")
    if name.startswith(("lora_", "qlora_")):
        draft.stage.setdefault("lora", {})
    if name.startswith("qlora_"):
        words.quantize(draft, 4)


def _betas(draft: Draft, value: Any) -> None:
    if value:
        draft.put("stage.training.adam_beta1", value[0])
        draft.put("stage.training.adam_beta2", value[1])


TABLE: Table = {
    # Out
    "teacher_model.*": Out("for distillation from another model"),
    "kd_ratio": Out("for distillation from another model"),
    "reward_functions": Out("for reinforcement learning"),
    "policy_model.*": Out("for reinforcement learning"),
    "ppo_epochs": Out("for reinforcement learning"),
    "orchestration.*": Out("for reinforcement learning"),
    "max_new_tokens": Out("for generation"),
    "tasks": Out("for an evaluation"),
    # Model
    "model._component_": _component,
    "model.lora_rank": _lora_rank,
    "model.lora_alpha": "stage.lora.lora_alpha",
    "model.lora_dropout": "stage.lora.lora_dropout",
    "model.use_dora": "stage.lora.use_dora",
    "model.quantize_base": _bits,
    "model.lora_attn_modules": with_another,
    "model.apply_lora_to_mlp": with_another,
    "model.apply_lora_to_output": with_another,
    "tokenizer.max_seq_len": Said("stage.training.max_length", lambda value: value),
    "tokenizer.prompt_template": Lost("the chat template alone writes the prompt"),
    "tokenizer.*": _FILES,
    "checkpointer.checkpoint_dir": _checkpoint,
    "checkpointer.adapter_checkpoint": Lost("a stage starts from the base, or from a stage before it"),
    "checkpointer.*": _FILES,
    "resume_from_checkpoint": _SAVED,
    "save_*": _SAVED,
    # Data
    "dataset": with_another,
    "dataset.*": with_another,
    "dataset_val": with_another,
    "dataset_val.*": with_another,
    "seed": "seed",
    "shuffle": Lost("rows are shuffled", (None, True)),
    "batch_size": "stage.training.per_device_train_batch_size",
    "batch_size_val": Unneeded("`batch_size:` of a suite"),
    "collate_fn": _SPEED,
    "run_val_every_n_steps": Unneeded("suites are scored before and after each stage"),
    # Training
    "optimizer._component_": _optimizer,
    "optimizer.lr": Said("stage.training.learning_rate", float),
    "optimizer.weight_decay": "stage.training.weight_decay",
    "optimizer.eps": Said("stage.training.adam_epsilon", float),
    "optimizer.betas": _betas,
    "optimizer.fused": with_another,
    "optimizer_in_bwd": _SPEED,
    "lr_scheduler._component_": _schedule,
    "lr_scheduler.num_warmup_steps": "stage.training.warmup_steps",
    "lr_scheduler.num_cycles": Lost("the cosine is half a wave", (None, 0.5)),
    "loss._component_": _loss,
    "loss.beta": "stage.training.beta",
    "loss.gamma": "stage.training.beta",  # of RSOLoss
    "loss.label_smoothing": Lost("TRL's sigmoid and hinge know no smoothing; `loss: robust` does", (None, 0, 0.0)),
    "ref_checkpointer.*": Unneeded("the reference is the stage's parent"),
    "ref_model.*": Unneeded("the reference is the stage's parent"),
    "loss.*": _SPEED,
    "epochs": "stage.training.num_train_epochs",
    "max_steps_per_epoch": _steps,
    "gradient_accumulation_steps": "stage.training.gradient_accumulation_steps",
    "clip_grad_norm": "stage.training.max_grad_norm",
    "compile": words.compiled,
    "enable_activation_checkpointing": words.checkpointing,
    "enable_activation_offloading": _SPEED,
    "ac_*": _SPEED,
    "custom_sharded_layers": _LAUNCH,
    "tensor_parallel_*": _LAUNCH,
    "context_parallel_*": _LAUNCH,
    "data_parallel_*": _LAUNCH,
    "fsdp_*": _LAUNCH,
    "fsdp.*": _LAUNCH,
    "use_distributed_state_dict": _LAUNCH,
    "use_flex": _SPEED,
    "memory_efficient_fsdp_wrap": _LAUNCH,
    "low_cpu_ram": _SPEED,
    "device": _LAUNCH,
    "dtype": Said("model.dtype", {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}.get),
    "quantizer": with_another,
    "quantizer.*": with_another,
    "fake_quant_after_n_steps": with_another,
    "output_dir": _FOLDER,
    "name": _FOLDER,
    "metric_logger.*": _LOGGED,
    "log_*": _LOGGED,
    "profiler.*": _LOGGED,
    "model.decoder_trainable": Out("for images, and hfpipe trains on text", (None,)),
    "model.attn_dropout": Lost("the model's own files say its dropout", (None, 0, 0.0)),
    **{f"model.{size}": Unneeded("the model's own files say its sizes") for size in _SIZES},
    "inference.*": Out("for reinforcement learning"),
}


def convert(draft: Draft) -> None:
    """Fills a draft from a torchtune config.

    Raises:
        OutOfScope: The config is for another recipe than one of fine-tuning on text.
    """
    config = draft.config
    if "dataset" not in config:
        raise OutOfScope("this torchtune config trains nothing (it has no `dataset`).")
    sets = config["dataset"] if isinstance(config["dataset"], list) else [config["dataset"]]
    trained = {one for block in sets for one in _source(draft, block)}
    draft.apply(TABLE, {**config, "loss": config.get("loss") or {}})
    if len(trained) > 1:
        draft.note("lost", "train_on_input", "sources of one stage are all trained on alike")
    _held_out(draft)
    _qat(draft)
    _defaults(draft)
    if draft.stage["kind"] == "preference":
        preferences.finish(draft)
        return
    words.train_on(draft, "all" if True in trained else "assistant")


def _qat(draft: Draft) -> None:
    """torchtune rounds the layers below its adapters, or all linear layers: a head that is the embeddings is none."""
    block = draft.config.get("quantizer") or {}
    name = str(block.get("_component_", "")).rsplit(".", 1)[-1].removesuffix("ModuleSwap")
    if not name:
        return
    if name not in ("Int8DynActInt4WeightQATQuantizer", "Int4WeightOnlyQATQuantizer"):
        draft.note("lost", "quantizer", f"{name} is not among the quantizers that are converted")
        return
    model = str((draft.config.get("model") or {}).get("_component_", "")).rsplit(".", 1)[-1]
    every = "all-linear" if any(tied in model for tied in _TIED) else "all"
    made = {"weights": "int4", **({"activations": "int8"} if name.startswith("Int8") else {})}
    made["group_size"] = block.get("groupsize", 256)
    made["target_modules"] = draft.take("stage.lora.target_modules") or every
    if draft.config.get("fake_quant_after_n_steps"):
        made["after_steps"] = draft.config["fake_quant_after_n_steps"]
    draft.put("stage.qat", made)


def _defaults(draft: Draft) -> None:
    """Writes out torchtune's defaults where its config is silent."""
    config = draft.config
    draft.default("stage.training.weight_decay", 0.01)  # torch.optim.AdamW's own
    draft.default("stage.training.lr_scheduler_type", "constant")
    draft.default("stage.training.warmup_steps", 0)
    if config.get("clip_grad_norm") is None:
        draft.put("stage.training.max_grad_norm", 0.0)
    if (config.get("tokenizer") or {}).get("max_seq_len") is None and draft.stage["kind"] != "pretrain":
        draft.put("stage.training.max_length", None)  # no row is cut
    if isinstance(config.get("dataset"), dict) and config["dataset"].get("packed") and draft.stage["kind"] == "sft":
        draft.put("stage.training.packing", True)
    draft.default("seed", 42)


def _source(draft: Draft, block: dict[str, Any]) -> list[bool]:
    """Adds the source of one block, and says whether the prompt is trained on."""
    name = str(block.get("_component_", "")).rsplit(".", 1)[-1]
    if "multimodal" in str(block.get("_component_")) or block.get("image_tag"):
        raise OutOfScope(
            f"this torchtune config is for images (`dataset: {block.get('_component_')}`), and hfpipe trains on text."
        )
    if ".grpo." in str(block.get("_component_")):
        raise OutOfScope(f"this torchtune config is for reinforcement learning (`dataset: {name}`).")
    taken: tuple[str, ...] = (
        "_component_",
        "source",
        "packed",
        "train_on_input",
        "column_map",
        "column",
        "columns",
        "add_eos",
        "weight",
    )
    taken += ("conversation_column", "conversation_style", "new_system_prompt", "split_across_pack", "filter_fn")
    more = {key: value for key, value in block.items() if key not in taken}
    if block.get("filter_fn"):
        draft.note("lost", "dataset.filter_fn", "write a condition, `where:`, at the source")
    draft.stage["data"] += _rows(draft, block, name, more)
    return [bool(block.get("train_on_input", name in (*_SETS, *_PAIRS)))]


def _rows(draft: Draft, block: dict[str, Any], name: str, more: dict[str, Any]) -> list[dict[str, Any]]:
    columns = block.get("column_map") or {}
    if name in ("preference_dataset", "hh_rlhf_helpful_dataset"):  # whole conversations, which begin alike
        preferences.begin(draft)
        source = words.source_of(block.get("source") or "RLHFlow/HH-RLHF-Helpful-standard", **more)
        return [
            preferences.renamed(source, "preference", **{side: columns.get(side) for side in ("chosen", "rejected")})
        ]
    if name == "stack_exchange_paired_dataset":
        preferences.begin(draft)
        named = {"prompt": "question", "chosen": "response_j", "rejected": "response_k", **columns}
        asked, *sides = (f"{{{named[one]}}}" for one in ("prompt", "chosen", "rejected"))
        source = words.source_of(block.get("source") or "lvwerra/stack-exchange-paired", data_dir="data/rl", **more)
        return [{**source, "template": preferences.in_turns(f"Question: {asked}\n\nAnswer: ", *sides)}]
    if name in _SETS:
        source = words.source_of(block.get("source") or _SETS[name], **more)
        pair = [words.turns(text, "{output}") for text in (words.ALPACA_PROMPT, words.ALPACA_PROMPT_WITH_INPUT)]
        return words.with_and_without_input(source, *pair)
    if name in _TEXTS:
        path, column = _TEXTS[name]
        column = block.get("column") or column
        draft.stage.update(kind="pretrain", name="pretrain")
        source = words.source_of(block.get("source") or path or "", **more)
        return [source if column == "text" else {**source, "columns": {"text": column}}]
    if name in _PAIRS:
        path, question, answer = _PAIRS[name]
        source = words.source_of(block.get("source") or path, **more)
        return [{**source, "template": words.turns(question, answer, block.get("new_system_prompt"))}]
    if name == "instruct_dataset":
        question, answer = (f"{{{columns.get(one, one)}}}" for one in ("input", "output"))
        source = words.source_of(str(block["source"]), **more)
        return [{**source, "template": words.turns(question, answer, block.get("new_system_prompt"))}]
    if name in ("chat_dataset", "slimorca_dataset"):
        source = words.source_of(block.get("source") or "Open-Orca/SlimOrca-Dedup", **more)
        style = block.get("conversation_style", "sharegpt")
        keys = ("from", "value") if style == "sharegpt" else ("role", "content")
        if block.get("new_system_prompt"):
            draft.note("lost", "dataset.new_system_prompt", "rows keep the system message that they have, or none")
        return words.chat_rows(draft, source, block.get("conversation_column", "conversations"), *keys)
    draft.note(
        "lost", "dataset._component_", f"{name} is not among the data sets that are converted; write `template:`"
    )
    return [words.source_of(str(block.get("source") or name), **more)]


def _held_out(draft: Draft) -> None:
    block = draft.config.get("dataset_val")
    if not isinstance(block, dict) or not block.get("_component_"):
        return
    rows = _rows(draft, block, str(block["_component_"]).rsplit(".", 1)[-1], {"split": block.get("split", "train")})
    for number, row in enumerate(rows):
        name = f"{words.HELD_OUT}-{number + 1}" if len(rows) > 1 else words.HELD_OUT
        draft.suites[name] = {"data": row, "metrics": ["bits_per_byte"]}
