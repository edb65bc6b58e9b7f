"""LLaMA-Factory's second form of configs: blocks with a `name`, and data sets in a YAML file of their own.

Source: LLaMA-Factory's `src/llamafactory/v1/config` and its `examples/v1`, read in November 2026.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hfpipe.convert import preferences, words
from hfpipe.convert.draft import Draft, Lost, Out, OutOfScope, Said, Table, Unneeded, if_set, with_another
from hfpipe.recipe.document import Loader

_SPEED = Unneeded("speed and memory only")
_LAUNCH = Unneeded("how processes are launched belongs in the file of `accelerate launch --config_file`")
_ELSEWHERE = Unneeded("not of the training")
_SAVED = Unneeded("hfpipe keeps whole checkpoints and continues by the same command")
_LORA = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "modules_to_save")
_SILENT = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}


def _adapter(draft: Draft, value: Any) -> None:
    block = dict(value or {})
    name = block.pop("name", None)
    if name == "freeze":
        why = "freezing all but some layers needs their number; write `train_only: [PATTERN]` with their names"
        draft.note("lost", "peft_config", why)
        return
    draft.put("stage.lora.target_modules", words.target_modules(block.pop("target_modules", "all")))
    for key in _LORA:
        one = block.get(key, _SILENT.get(key))
        if one not in (None, False):
            draft.train(f"peft_config.{key}", f"lora.{key}", one)
    if block.get("adapter_name_or_path"):
        draft.note(
            "lost", "peft_config.adapter_name_or_path", "a stage starts from the base, or from a stage before it"
        )


def _quantization(draft: Draft, value: Any) -> None:
    bits = (value or {}).get("quantization_bit", 4)
    if "lora" not in draft.stage:
        draft.note("lost", "quant_config", "the weights of a full fine-tune are not quantized")
    else:
        words.quantize(draft, int(bits))


def _optimizer(draft: Draft, value: Any) -> None:
    block = dict(value)
    name = block.pop("name", None)
    if name != "muon":
        draft.note("lost", "optim_config", f"transformers has no optimizer '{name}'")
        return
    words.muon(draft, {key: block.pop(key) for key in ("momentum", "nesterov", "ns_steps") if key in block})
    betas = block.pop("adamw_betas", (0.9, 0.95))
    named = {"weight_decay": block.pop("wd", 0.1), "adam_beta1": betas[0], "adam_beta2": betas[1]}
    named["adam_epsilon"] = block.pop("adamw_eps", 1e-8)
    for key, one in named.items():
        draft.train("optim_config", f"training.{key}", one)
    for key in block:
        draft.note("lost", f"optim_config.{key}", "torch's Muon has no such word")


def _schedule(draft: Draft, value: Any) -> None:
    draft.note("lost", "lr_scheduler_config", "the tool ships no schedule of this name")


def _batching(draft: Draft, value: Any) -> None:
    if value in ("padding_free", "dynamic_padding_free"):
        draft.train("batching_strategy", "training.packing", True)
    if str(value).startswith("dynamic"):
        draft.note("changed", "batching_strategy", "a step has as many rows as the recipe says, not as many tokens")


TABLE: Table = {
    "model": "model.id",
    "model_class": Out("not for a language model", (None, "llm")),
    "custom_chat_template": "model.tokenizer.chat_template",
    "trust_remote_code": "model.trust_remote_code",
    "flash_attn": _SPEED,
    "init_config": _LAUNCH,
    "kernel_config": _SPEED,
    "dist_config": _LAUNCH,
    "dist_timeout": _LAUNCH,
    "dp_size": _LAUNCH,
    "cp_size": _LAUNCH,
    "cp_mode": _LAUNCH,
    "mp_*": _LAUNCH,
    "peft_config": if_set(_adapter),
    "quant_config": with_another,
    "train_dataset": with_another,
    "eval_dataset": with_another,
    "output_dir": _SAVED,
    "micro_batch_size": "stage.training.per_device_train_batch_size",
    "global_batch_size": "stage.global_batch_size",
    "cutoff_len": "stage.training.max_length",
    "learning_rate": Said("stage.training.learning_rate", float),
    "num_train_epochs": "stage.training.num_train_epochs",
    "max_steps": words.max_steps,
    "max_grad_norm": "stage.training.max_grad_norm",
    "bf16": _SPEED,
    "batching_strategy": if_set(_batching),
    "batching_workers": _SPEED,
    "enable_activation_checkpointing": words.checkpointing,
    "optim_config": if_set(_optimizer),
    "lr_scheduler_config": if_set(_schedule),
    "seed": "seed",
    "full_determinism": "stage.training.full_determinism",
    "resume_from_checkpoint": _SAVED,
    "save_*": _SAVED,
    "logging_steps": "stage.training.logging_steps",
    "pref_loss": if_set(lambda draft, value: preferences.loss(draft, "pref_loss", value)),
    "pref_beta": "stage.training.beta",
    "pref_ftx": with_another,
    "simpo_gamma": Lost("TRL's DPOTrainer has no SimPO"),
    "dpo_label_smoothing": if_set(
        lambda draft, value: draft.train("dpo_label_smoothing", "training.label_smoothing", value)
    ),
    "ld_alpha": "stage.training.ld_alpha",
    "sample_backend": _ELSEWHERE,
    "max_new_tokens": _ELSEWHERE,
    "temperature": _ELSEWHERE,
    "top_*": _ELSEWHERE,
}


def convert(draft: Draft) -> None:
    """Fills a draft from a config of the second form.

    Raises:
        OutOfScope: The config is for images, or for no training.
    """
    config = draft.config
    if not config.get("train_dataset"):
        raise OutOfScope("this LLaMA-Factory config trains nothing (no `train_dataset`).")
    sets = _data_sets(draft, str(config["train_dataset"]))
    if any(one.get("converter") == "pair" for one in sets.values()):
        preferences.begin(draft)
    for name, one in sets.items():
        draft.stage["data"] += [_source(draft, name, one)]
    draft.apply(TABLE)
    if config.get("quant_config"):
        _quantization(draft, config["quant_config"])
    for name, one in _data_sets(draft, str(config["eval_dataset"])).items() if config.get("eval_dataset") else ():
        draft.suites[f"{words.HELD_OUT}-{name}"] = {"data": _source(draft, name, one), "metrics": ["bits_per_byte"]}
    _defaults(draft)


def _defaults(draft: Draft) -> None:
    """Writes out the tool's defaults where its config is silent."""
    if draft.stage["kind"] == "preference":
        preferences.with_sft(draft, "pref_ftx", draft.config.get("pref_ftx"))
    for key, value in {
        "per_device_train_batch_size": 1,
        "max_length": 2048,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
    }.items():
        draft.default(f"stage.training.{key}", value)
    if draft.take("stage.training.max_steps") is None:
        draft.default("stage.training.num_train_epochs", 3)
    words.train_on(draft, "assistant")
    draft.default("seed", 42)
    preferences.finish(draft)


def _data_sets(draft: Draft, named: str) -> dict[str, dict[str, Any]]:
    """The data sets of a YAML file, which is looked for from the config's folder upwards; or the one that is named."""
    if not named.endswith((".yaml", ".yml")):
        return {"default": {"path": named}}
    above = [Path(draft.folder), *Path(draft.folder).resolve().parents][:6]
    for file in (Path(named), *(one / named for one in above)):
        if file.is_file():
            found = yaml.load(file.read_text(encoding="utf-8"), Loader=Loader)
            return {str(name): dict(one) for name, one in found.items()} if isinstance(found, dict) else {}
    draft.note("lost", "train_dataset", f"{named} was not found; put the file beside the config, or write `path:`")
    return {"default": {"path": named}}


def _source(draft: Draft, name: str, one: dict[str, Any]) -> words.Block:
    """A source of one data set."""
    if "multimodal" in name or any(key in one for key in ("images", "videos", "audios")):
        raise OutOfScope(f"this LLaMA-Factory config is for images or sound (`{name}`), and hfpipe trains on text.")
    source = words.source_of(str(one["path"]), split=one.get("split"), take=one.get("size"), weight=one.get("weight"))
    if one.get("streaming"):
        source["streaming"] = True
    formats = {"alpaca": "alpaca_chat", "sharegpt": "sharegpt"}
    if one.get("converter") in formats:
        source["format"] = formats[one["converter"]]
    elif one.get("converter") not in (None, "pair"):
        draft.note("lost", f"{name}.converter", f"'{one['converter']}' is code of the tool's own; write `template:`")
    return source
