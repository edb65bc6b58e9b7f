"""LLaMA-Factory: one flat YAML file, and the names of data sets in a `dataset_info.json`.

Source: the argument classes of LLaMA-Factory (`src/llamafactory/hparams`) and its examples, read in August 2026.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfpipe.convert import llama_factory_v1, preferences, words
from hfpipe.convert.draft import Draft, Lost, OutOfScope, Said, Table, Unneeded, if_set, same, with_another
from hfpipe.convert.trainer_keys import MEGATRON, trainer_table

_SPEED = Unneeded("speed and memory only")
_ROWS = Unneeded("hfpipe makes the rows itself")
_ELSEWHERE = Unneeded("not of the training")
_IMAGES = Unneeded("for images, sound and video only")
_STAGES = {"kto": "answers that are judged one by one (KTO)", "rm": "a reward model", "ppo": "reinforcement learning"}
# Data sets that `dataset_info.json` of LLaMA-Factory names and whose rows are no alpaca; the rest of its Hub sets are.
_CHATS = {
    "slimorca": "Open-Orca/SlimOrca",
    "infinity_instruct": "BAAI/Infinity-Instruct",
    "magpie_pro_300k": "Magpie-Align/Magpie-Pro-300K-Filtered",
    "lima": "llamafactory/lima",
    "glaive_toolcall_en": "llamafactory/glaive_toolcall_en",
}
_ALPACAS = {
    "alpaca_en": "llamafactory/alpaca_en",
    "alpaca_zh": "llamafactory/alpaca_zh",
    "alpaca_gpt4_en": "llamafactory/alpaca_gpt4_en",
    "alpaca_gpt4_zh": "llamafactory/alpaca_gpt4_zh",
    "open_platypus": "garage-bAInd/Open-Platypus",
    "codealpaca": "sahil2801/CodeAlpaca-20k",
}
_RANKINGS = {
    "dpo_mix_en": ("llamafactory/DPO-En-Zh-20k", "en", "sharegpt"),
    "dpo_mix_zh": ("llamafactory/DPO-En-Zh-20k", "zh", "sharegpt"),
    "orca_pairs": ("Intel/orca_dpo_pairs", None, "alpaca"),
}
_DEMOS = ("identity", "alpaca_en_demo", "alpaca_zh_demo")  # files beside dataset_info.json
_TEXTS = {"wiki_demo": "wiki_demo.txt", "c4_demo": "c4_demo.jsonl"}
_OPTIMIZERS = {"use_adam_mini": "Adam-mini", "use_badam": "BAdam"}


def _method(draft: Draft, value: Any) -> None:
    if value == "oft":
        draft.put("stage.peft.type", "oft")
    elif value == "freeze":
        _freeze(draft)
    elif value == "lora" or value is None:
        draft.stage.setdefault("lora", {})


def _freeze(draft: Draft) -> None:
    """The last layers alone are trained, or the first ones where the number is below zero."""
    count = int(draft.config.get("freeze_trainable_layers", 2))
    modules = draft.config.get("freeze_trainable_modules") or "all"
    draft.note(
        "lost",
        "finetuning_type",
        f"freezing all but {abs(count)} layers ({modules}) needs their number; write "
        "`train_only: [PATTERN]` with their names",
    )


def _lora(name: str) -> Any:
    def follow(draft: Draft, value: Any) -> None:
        if value is not None and "lora" in draft.stage:
            draft.train(name, f"lora.{name}", value)

    return follow


def _target(draft: Draft, value: Any) -> None:
    if "lora" in draft.stage:
        draft.put("stage.lora.target_modules", words.target_modules(value))


def _oft(name: str) -> Any:
    def follow(draft: Draft, value: Any) -> None:
        if "peft" in draft.stage and value is not None:
            draft.put(f"stage.peft.{name}", words.target_modules(value) if name == "target_modules" else value)

    return follow


def _additional(draft: Draft, value: Any) -> None:
    if value and "lora" in draft.stage:
        draft.put("stage.lora.modules_to_save", [one.strip() for one in str(value).split(",")])


def _pissa(draft: Draft, value: Any) -> None:
    if value and "lora" in draft.stage:
        rounds = int(draft.config.get("pissa_iter", 16))
        draft.put("stage.lora.init_lora_weights", "pissa" if rounds == -1 else f"pissa_niter_{rounds}")


def _bits(draft: Draft, value: Any) -> None:
    method = str(draft.config.get("quantization_method") or "bnb")
    if value in (4, 8) and method in ("bnb", "bitsandbytes"):
        if draft.config.get("quantization_type") == "fp4":
            draft.note("lost", "quantization_type", "4 bits are nf4")
        words.quantize(draft, value, bnb_4bit_use_double_quant=draft.config.get("double_quantization"))
    elif value:
        draft.note(
            "lost", "quantization_bit", f"a base is quantized to 4 or 8 bits by bitsandbytes, not {value} by {method}"
        )


def _template(draft: Draft, value: Any) -> None:
    if value and draft.stage["kind"] == "sft":
        words.own_template(draft, "template", str(value))


def _packing(draft: Draft, value: Any) -> None:
    if value and draft.stage["kind"] == "sft":
        draft.train("packing", "training.packing", True)
        if not draft.config.get("neat_packing"):
            draft.note("changed", "packing", "examples of one row do not attend to each other, as with `neat_packing`")


def _neat(draft: Draft, value: Any) -> None:
    if value:
        draft.train("neat_packing", "training.packing", True)


def _galore(draft: Draft, value: Any) -> None:
    """GaLore and APOLLO, whose options transformers takes as `optim_args`."""
    for name in ("galore", "apollo"):
        config = {key.removeprefix(f"{name}_"): one for key, one in draft.config.items() if key.startswith(f"{name}_")}
        if not draft.config.get(f"use_{name}"):
            continue
        layerwise = "_layerwise" if config.get("layerwise") else ""
        draft.put("stage.training.optim", f"{name}_adamw{layerwise}")
        draft.put("stage.training.optim_target_modules", words.target_modules(config.get("target", "all")))
        names = {"rank": "rank", "update_interval": "update_proj_gap", "scale": "scale", "proj_type": "proj_type"}
        names |= {"proj": "proj", "scale_type": "scale_type"} if name == "apollo" else {}
        options = [f"{names[key]}={one}" for key, one in config.items() if key in names]
        if options:
            draft.put("stage.training.optim_args", ", ".join(options))


def _optimizer(key: str) -> Lost:
    return Lost(f"transformers has no optimizer {_OPTIMIZERS[key]}")


def _dft(draft: Draft, value: Any) -> None:
    if value:
        draft.train("use_dft_loss", "training.loss_type", "dft")


def _attention(draft: Draft, value: Any) -> None:
    if value in ("disabled", "sdpa"):
        draft.put("model.attn_implementation", "eager" if value == "disabled" else "sdpa")


def _tokens(place: str) -> Any:
    def follow(draft: Draft, value: Any) -> None:
        if value:
            draft.put(place, value if isinstance(value, list) else [one.strip() for one in str(value).split(",")])

    return follow


def _early(draft: Draft, value: Any) -> None:
    if value and draft.suites:
        draft.put("stage.early_stopping", {"suite": next(iter(draft.suites)), "patience": int(value)})


def _routing(draft: Draft, value: Any) -> None:
    values = {"router_aux_loss_coef": value, "output_router_logits": True}
    words.model_config(draft, values if value else None)


def _rope(draft: Draft, value: Any) -> None:
    words.model_config(draft, {"rope_scaling": {"rope_type": value}} if value else None)


def _loss(draft: Draft, value: Any) -> None:
    if draft.stage["kind"] == "preference" and value not in (None, "sigmoid"):
        preferences.loss(draft, "pref_loss", value)


TABLE: Table = {
    "model_name_or_path": "model.id",
    "model_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "adapter_name_or_path": Lost("a stage starts from the base, or from a stage before it"),
    "cache_dir": Unneeded("set HF_HOME"),
    "use_fast_tokenizer": Unneeded("the tokenizer's fast form is taken where there is one"),
    "resize_vocab": Unneeded("embeddings grow where added tokens need it"),
    "add_tokens": _tokens("model.tokenizer.add_tokens"),
    "add_special_tokens": _tokens("model.tokenizer.add_special_tokens"),
    "new_special_tokens_config": Lost("write the tokens in `model: {tokenizer: {add_special_tokens: [...]}}`"),
    "init_special_tokens": Lost("new embeddings begin around the mean of the others", (None, False, "noise_init")),
    "rope_scaling": _rope,
    "flash_attn": _attention,
    "shift_attn": Lost("attention is the model's own"),
    "mixture_of_depths": Lost("hfpipe has no mixture of depths"),
    "moe_aux_loss_coef": _routing,
    "train_from_scratch": with_another,
    "disable_gradient_checkpointing": lambda draft, value: words.checkpointing(draft, not value),
    "hf_hub_token": Unneeded("log in with `hf auth login`"),
    "ms_hub_token": Unneeded("data comes from the Hugging Face Hub"),
    "om_hub_token": Unneeded("data comes from the Hugging Face Hub"),
    "pure_bf16": if_set(lambda draft, value: draft.put("model.dtype", "bfloat16")),
    # Method
    "stage": with_another,
    "finetuning_type": with_another,
    "lora_rank": _lora("r"),
    "lora_alpha": _lora("lora_alpha"),
    "lora_dropout": _lora("lora_dropout"),
    "lora_target": _target,
    "additional_target": _additional,
    "use_rslora": _lora("use_rslora"),
    "use_dora": _lora("use_dora"),
    "pissa_init": _pissa,
    "pissa_iter": with_another,
    "pissa_convert": Unneeded("adapters that start from PiSSA are saved for the base as it came"),
    "create_new_adapter": Unneeded("a stage without `parent_adapter: continue` has an adapter of its own"),
    "loraplus_lr_ratio": if_set(lambda draft, value: words.lora_plus(draft, "loraplus_lr_ratio", value)),
    "loraplus_lr_embedding": Unneeded("see loraplus_lr_ratio"),
    "oft_block_size": _oft("oft_block_size"),
    "oft_rank": _oft("r"),
    "oft_target": _oft("target_modules"),
    "module_dropout": _oft("module_dropout"),
    "freeze_trainable_*": with_another,
    "freeze_extra_modules": with_another,
    "quantization_bit": _bits,
    "quantization_method": with_another,
    "quantization_type": with_another,
    "double_quantization": with_another,
    "use_llama_pro": Lost("hfpipe adds no layers"),
    "use_galore": _galore,
    "galore_*": with_another,
    "use_apollo": _galore,
    "apollo_*": with_another,
    **{key: _optimizer(key) for key in _OPTIMIZERS},
    "use_muon": if_set(lambda draft, value: words.muon(draft, {})),
    "badam_*": Unneeded("see use_badam"),
    "use_dft_loss": _dft,
    "use_asft_loss": Lost("the loss is cross-entropy"),
    "asft_alpha": Unneeded("see use_asft_loss"),
    "use_eaft_loss": Lost("the loss is cross-entropy"),
    "eaft_alpha": Unneeded("see use_eaft_loss"),
    "fp8": if_set(lambda draft, value: draft.note("changed", "fp8", words.EIGHT_BIT_FLOATS)),
    "fp8_*": Unneeded("see fp8"),
    "pref_beta": "stage.training.beta",
    "pref_loss": _loss,
    "pref_ftx": with_another,
    "pref_bco_weight": Lost("write `loss: [sigmoid, bco_pair]` with `training: {loss_weights: [...]}`", (None, 0, 0.0)),
    "dpo_label_smoothing": if_set(
        lambda draft, value: draft.train("dpo_label_smoothing", "training.label_smoothing", value)
    ),
    "ld_alpha": "stage.training.ld_alpha",
    "simpo_gamma": with_another,
    "ref_model": Lost("the reference is the stage's parent"),
    "ref_model_*": Lost("the reference is the stage's parent"),
    **MEGATRON,
    "use_packed_sequences": _packing,
    "disable_shuffling": Lost("rows are shuffled"),
    "early_stopping_steps": _early,
    # Data
    "dataset": with_another,
    "dataset_dir": with_another,
    "eval_dataset": with_another,
    "val_size": with_another,
    "template": _template,
    "default_system": Lost("rows keep the system message that they have, or none"),
    "cutoff_len": "stage.training.max_length",
    "train_on_prompt": with_another,
    "mask_history": with_another,
    "streaming": with_another,
    "mix_strategy": with_another,
    "interleave_probs": with_another,
    "max_samples": with_another,
    "tool_format": Unneeded("the chat template writes tools"),
    "enable_thinking": Unneeded("the chat template writes what the rows hold"),
    "preserve_thinking": Unneeded("the chat template writes what the rows hold"),
    "packing": _packing,
    "neat_packing": _neat,
    "command": with_another,
    "learning_rate": Said("stage.training.learning_rate", float),
    "num_train_epochs": "stage.training.num_train_epochs",
    "max_steps": words.max_steps,
    # Without a part in a recipe, by the reason
    **same(
        _SPEED,
        "upcast_* low_cpu_mem_usage use_unsloth* enable_liger_kernel use_v1_kernels use_kt kt_* kt_config.* "
        "use_reentrant_gc offload_folder compute_dtype device_map quantization_device_map",
    ),
    **same(
        _ELSEWHERE,
        "infer_* use_kv_cache print_param_status compute_accuracy plot_loss use_swanlab swanlab_* ray_* "
        "placement_strategy resources_per_worker eval_* max_new_tokens top_p temperature",
    ),
    **same(
        _IMAGES,
        "freeze_vision_tower freeze_multi_modal_projector freeze_language_model image_* video_* audio_* media_dir "
        "crop_to_patches use_audio_in_video",
    ),
    **same(
        _ROWS,
        "buffer_size overwrite_cache preprocessing_* tokenized_path data_shared_file_system ignore_pad_token_for_loss",
    ),
}


def convert(draft: Draft) -> None:
    """Fills a draft from a LLaMA-Factory config.

    Raises:
        OutOfScope: The config is for preferences, rewards, images, or for no training.
    """
    config = draft.config
    if "train_dataset" in config or "model" in config:
        llama_factory_v1.convert(draft)
        return
    stage = str(config.get("stage", "sft"))
    if stage in _STAGES:
        raise OutOfScope(
            f"this LLaMA-Factory config is for {_STAGES[stage]} (`stage: {stage}`), for which a recipe has no stage."
        )
    if config.get("do_train") is False or not config.get("dataset"):
        raise OutOfScope("this LLaMA-Factory config trains nothing (no `dataset`, or no `do_train`).")
    if stage == "dpo":
        preferences.begin(draft)
    if stage == "pt":
        draft.stage.update(kind="pretrain", name="pretrain")
    _method(draft, config.get("finetuning_type"))
    _sources(draft)
    words.hold_out(draft, "val_size", config.get("val_size"))
    _held_out_sets(draft)
    draft.apply(trainer_table(draft.stage["kind"], TABLE))
    if config.get("train_from_scratch"):
        words.fresh(draft)
    _defaults(draft)
    preferences.finish(draft)


def _defaults(draft: Draft) -> None:
    """Writes out LLaMA-Factory's defaults where its config is silent."""
    config = draft.config
    if "lora" in draft.stage:
        draft.default("stage.lora.r", 8)
        draft.default("stage.lora.lora_alpha", 2 * draft.stage["lora"]["r"])
        draft.default("stage.lora.target_modules", "all-linear")
    if "peft" in draft.stage:
        draft.default("stage.peft.target_modules", "all-linear")
    draft.default("stage.training.max_length", 2048)
    draft.default("stage.training.learning_rate", 5e-5)
    if draft.take("stage.training.max_steps") is None:
        draft.default("stage.training.num_train_epochs", 3.0)
    draft.default("stage.training.per_device_train_batch_size", 8)
    draft.default("stage.training.lr_scheduler_type", "linear")
    draft.default("stage.training.warmup_steps", 0)
    who: words.Trained = (
        "all" if config.get("train_on_prompt") else "last" if config.get("mask_history") else "assistant"
    )
    if draft.stage["kind"] == "preference":
        preferences.with_sft(draft, "pref_ftx", config.get("pref_ftx"))
    words.train_on(draft, who)
    draft.default("seed", 42)


def _names(value: Any) -> list[str]:
    return [one.strip() for one in value.split(",")] if isinstance(value, str) else list(value or [])


def _sources(draft: Draft) -> None:
    config = draft.config
    names = _names(config["dataset"])
    shares = [float(one) for one in str(config.get("interleave_probs") or "").split(",") if one.strip()]
    for number, name in enumerate(names):
        rows = _rows(draft, name)
        for row in rows:
            if config.get("max_samples"):
                row["take"] = int(config["max_samples"])
            if config.get("streaming"):
                row["streaming"] = True
            if shares:
                row["weight"] = shares[number] / len(rows)
        draft.stage["data"] += rows
    strategy = config.get("mix_strategy") or "concat"
    if strategy != "concat":
        draft.note(
            "changed", "mix_strategy", f"sources take turns by their weights, and none ends the stage ('{strategy}')"
        )


def _held_out_sets(draft: Draft) -> None:
    for number, name in enumerate(_names(draft.config.get("eval_dataset"))):
        if name in _names(draft.config["dataset"]):
            draft.note(
                "unneeded", "eval_dataset", "a suite never holds rows that are trained on; `val_size` holds some out"
            )
            continue
        for part, source in enumerate(_rows(draft, name)):
            draft.suites[f"{words.HELD_OUT}-{name}-{number + part}"] = {"data": source, "metrics": ["bits_per_byte"]}


def _information(draft: Draft, name: str) -> tuple[dict[str, Any] | None, Path]:
    """The entry of `dataset_info.json`, looked for where LLaMA-Factory looks, and up from the config."""
    folder = Path(str(draft.config.get("dataset_dir") or "data"))
    above = [Path(draft.folder), *Path(draft.folder).resolve().parents][:5]
    for place in [folder, *(one / folder for one in above), Path(draft.folder)]:
        file = place / "dataset_info.json"
        if file.is_file():
            try:
                return json.loads(file.read_text(encoding="utf-8")).get(name), place
            except (ValueError, AttributeError):
                continue
    return None, folder


def _rows(draft: Draft, name: str) -> list[dict[str, Any]]:
    """Sources of one of the data sets that the config names."""
    entry, folder = _information(draft, name)
    if entry is None:
        known = {**_ALPACAS, **_CHATS}.get(name)
        if name in _DEMOS:
            entry = {"file_name": f"{name}.json"}
        elif name in ("dpo_en_demo", "dpo_zh_demo"):
            entry = {"file_name": f"{name}.json", "formatting": "sharegpt", "ranking": True}
        elif name in _RANKINGS:
            path, subset, formatting = _RANKINGS[name]
            entry = {"hf_hub_url": path, "subset": subset, "formatting": formatting, "ranking": True}
        elif name in _TEXTS:
            entry = {"file_name": _TEXTS[name], "columns": {"prompt": "text"}}
        elif known is not None:
            entry = {"hf_hub_url": known, **({"formatting": "sharegpt"} if name in _CHATS else {})}
        elif name.startswith(("mllm", "llava", "pokemon")):
            raise OutOfScope(
                f"this LLaMA-Factory config is for images or sound (`dataset: {name}`), and hfpipe trains on text."
            )
        else:
            why = "no dataset_info.json with this name was found; put the file beside the config, or write `path:`"
            draft.note("lost", f"dataset: {name}", why)
            return [{"path": name}]
    columns = entry.get("columns") or {}
    if columns.get("kto_tag") or (entry.get("ranking") and draft.stage["kind"] != "preference"):
        raise OutOfScope(
            f"the rows of this LLaMA-Factory config are pairs or judged answers (`dataset: {name}`), and its stage is "
            "not `dpo`."
        )
    if any(key in columns for key in ("images", "videos", "audios")):
        raise OutOfScope(
            f"this LLaMA-Factory config is for images or sound (`dataset: {name}`), and hfpipe trains on text."
        )
    place = entry.get("hf_hub_url") or (str(folder / entry["file_name"]) if entry.get("file_name") else None)
    if place is None:
        draft.note("lost", f"dataset: {name}", "only data sets of the Hugging Face Hub and files are read")
        return [{"path": name}]
    source = words.source_of(place, name=entry.get("subset"), split=entry.get("split"), data_dir=entry.get("folder"))
    if entry.get("num_samples"):
        source["take"] = entry["num_samples"]
    return _formatted(draft, name, entry, source)


def _formatted(draft: Draft, name: str, entry: dict[str, Any], source: dict[str, Any]) -> list[dict[str, Any]]:
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if draft.stage["kind"] == "preference":
        sides = {side: columns.get(side) for side in ("chosen", "rejected")}
        if entry.get("formatting") in ("sharegpt", "openai"):
            return [preferences.renamed(source, "ranking_chat", conversations=columns.get("messages"), **sides)]
        more = {ours: columns.get(theirs) for ours, theirs in _ALPACA_COLUMNS.items() if ours != "output"}
        return [preferences.renamed(source, "ranking", **more, **sides)]
    if draft.stage["kind"] == "pretrain":
        column = columns.get("prompt") or "text"
        return [source if column == "text" else {**source, "columns": {"text": column}}]
    if entry.get("formatting") in ("sharegpt", "openai"):
        plain = ("role", "content") if entry["formatting"] == "openai" else ("from", "value")
        column = columns.get("messages") or ("messages" if entry["formatting"] == "openai" else "conversations")
        return words.chat_rows(draft, source, column, tags.get("role_tag", plain[0]), tags.get("content_tag", plain[1]))
    if not columns:
        return [{**source, "format": "alpaca_chat"}]
    named = {ours: columns[theirs] for ours, theirs in _ALPACA_COLUMNS.items() if columns.get(theirs)}
    named = {ours: column for ours, column in named.items() if ours != column}
    if columns.get("query") or columns.get("history"):
        return [{**source, "format": "alpaca_chat", **({"columns": named} if named else {})}]
    system = f"{{{columns['system']}}}" if columns.get("system") else None
    question, answer = columns.get("prompt", "instruction"), columns.get("response", "output")
    return [{**source, "template": words.turns(f"{{{question}}}", f"{{{answer}}}", system)}]


_ALPACA_COLUMNS = {
    "instruction": "prompt",
    "input": "query",
    "output": "response",
    "system": "system",
    "history": "history",
}
