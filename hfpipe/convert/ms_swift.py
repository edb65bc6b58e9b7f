"""ms-swift: arguments of `swift sft` and `swift pt`, as YAML, JSON or in a shell script.

Source: the argument classes of ms-swift (`swift/arguments`, `swift/trainers`) and its examples, read in August 2026.
"""

from __future__ import annotations

import re
from typing import Any

from hfpipe.convert import preferences, words
from hfpipe.convert.draft import Draft, Lost, Out, OutOfScope, Said, Table, Unneeded, if_set, with_another
from hfpipe.convert.trainer_keys import trainer_table

_SPEED = Unneeded("speed and memory only")
_ROWS = Unneeded("hfpipe makes the rows itself")
_ELSEWHERE = Unneeded("not of the training")
_IMAGES = Unneeded("for images, sound and video only")
_GOALS = {
    "infer": "answering, not for training",
    "rollout": "reinforcement learning",
    "export": "exporting, not for training",
    "deploy": "serving, not for training",
    "eval": "scoring, not for training",
    "app": "a page, not for training",
    "merge-lora": "merging, not for training",
    "sample": "sampling, not for training",
}
# Data sets of ModelScope that the Hub has by another name.
_ON_HUB = {
    "AI-ModelScope/alpaca-gpt4-data-en": "vicgalle/alpaca-gpt4",
    "AI-ModelScope/alpaca-gpt4-data-zh": "llm-wizard/alpaca-gpt4-data-zh",
}
_TUNERS = {"lora": "lora", "qlora": "lora", "vera": "vera", "ia3": "ia3", "boft": "boft", "fourierft": "fourierft"}


def _lora(name: str) -> Any:
    def follow(draft: Draft, value: Any) -> None:
        if value not in (None, []) and "lora" in draft.stage:
            made = words.target_modules(value) if name == "target_modules" else value
            made = [made] if name == "modules_to_save" and isinstance(made, str) else made
            draft.train(name, f"lora.{name}", made)

    return follow


def _init(draft: Draft, value: Any) -> None:
    if value not in (None, True, "true", "True") and "lora" in draft.stage:
        draft.train("init_weights", "lora.init_lora_weights", value)


def _bits(draft: Draft, value: Any) -> None:
    method = draft.config.get("quant_method") or "bnb"
    if value in (4, 8) and method == "bnb":
        words.quantize(draft, value, bnb_4bit_use_double_quant=draft.config.get("bnb_4bit_use_double_quant"))
    elif value:
        draft.note("lost", "quant_bits", f"a base is quantized to 4 or 8 bits by bitsandbytes, not {value} by {method}")


def _attention(draft: Draft, value: Any) -> None:
    if value in ("eager", "sdpa", "flex_attention"):
        draft.put("model.attn_implementation", value)


def _dtype(draft: Draft, value: Any) -> None:
    if value in ("float32", "bfloat16", "float16"):
        draft.put("model.dtype", value)


def _tokens(draft: Draft, value: Any) -> None:
    if value:
        draft.put("model.tokenizer.add_special_tokens", value if isinstance(value, list) else [value])


def _accumulation(draft: Draft, value: Any) -> None:
    """A script often divides a number by that of its processes, `$(expr 16 / $nproc_per_node)`."""
    words_of = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    divided = re.fullmatch(r"\$\(expr (\d+) / \$\w+\)", words_of)
    if divided:
        draft.put(
            "stage.global_batch_size", int(divided[1]) * int(draft.config.get("per_device_train_batch_size") or 1)
        )
    elif value is not None:
        draft.train("gradient_accumulation_steps", "training.gradient_accumulation_steps", value)


def _task(draft: Draft, value: Any) -> None:
    if value not in (None, "causal_lm"):
        raise OutOfScope(
            f"this ms-swift config is for another task than text (`task_type: {value}`); write a stage of "
            "`kind: classification` for a classifier."
        )


def _rope(draft: Draft, value: Any) -> None:
    words.model_config(draft, {"rope_scaling": {"rope_type": value}} if value else None)


def _packing(draft: Draft, value: Any) -> None:
    if value and draft.stage["kind"] == "sft":  # pretraining always packs
        draft.train("packing", "training.packing", True)


def _trainable(draft: Draft, value: Any) -> None:
    if value:
        draft.put("stage.train_only", _patterns(value))


def _trainable_by_pattern(draft: Draft, value: Any) -> None:
    if value:
        draft.put("stage.train_only", [value])


def _loss(draft: Draft, value: Any) -> None:
    if value and draft.stage["kind"] == "preference":
        preferences.loss(draft, "loss_type", value)


TABLE: Table = {
    "command": with_another,
    "model": "model.id",
    "model_type": Unneeded("the class follows from the model's config"),
    "model_revision": "model.revision",
    "task_type": _task,
    "num_labels": Out("for a classifier, which a stage of `kind: classification` trains"),
    "rlhf_type": with_another,
    "beta": "stage.training.beta",
    "loss_type": _loss,
    "rpo_alpha": with_another,
    "label_smoothing": "stage.training.label_smoothing",
    "ref_model": Lost("the reference is the stage's parent"),
    "ref_adapters": Lost("the reference is the stage's parent"),
    "torch_dtype": _dtype,
    "attn_impl": _attention,
    "experts_impl": _SPEED,
    "new_special_tokens": _tokens,
    "rope_scaling": _rope,
    "max_model_len": _ELSEWHERE,
    "device_map": _SPEED,
    "max_memory": _SPEED,
    "use_hf": Unneeded("data and models come from the Hugging Face Hub"),
    "hub_token": Unneeded("log in with `hf auth login`"),
    # Method
    "tuner_type": with_another,
    "train_type": with_another,
    "tuner_backend": _SPEED,
    "adapters": Lost("a stage starts from the base, or from a stage before it"),
    "lora_rank": _lora("r"),
    "lora_alpha": _lora("lora_alpha"),
    "lora_dropout": _lora("lora_dropout"),
    "lora_bias": _lora("bias"),
    "lora_dtype": _SPEED,
    "target_modules": _lora("target_modules"),
    "target_regex": _lora("target_modules"),
    "target_parameters": _lora("target_parameters"),
    "modules_to_save": _lora("modules_to_save"),
    "use_rslora": _lora("use_rslora"),
    "use_dora": _lora("use_dora"),
    "lorap_lr_ratio": if_set(lambda draft, value: words.lora_plus(draft, "lorap_lr_ratio", value)),
    "init_weights": _init,
    "quant_bits": _bits,
    "quant_method": with_another,
    "bnb_4bit_*": with_another,
    "freeze_parameters": if_set(lambda draft, value: draft.put("stage.freeze", _patterns(value))),
    "freeze_parameters_regex": if_set(lambda draft, value: draft.put("stage.freeze", [value])),
    "freeze_parameters_ratio": Lost("write `freeze: [PATTERN]` with the names of the parameters", (None, 0, 0.0)),
    "trainable_parameters": _trainable,
    "trainable_parameters_regex": _trainable_by_pattern,
    "freeze_llm": _IMAGES,
    "freeze_vit": _IMAGES,
    "freeze_aligner": _IMAGES,
    "vit_*": _IMAGES,
    "aligner_lr": _IMAGES,
    "max_pixels": _IMAGES,
    "use_galore": Lost("write `training: {optim: galore_adamw, optim_target_modules: [...]}`"),
    "galore_*": Unneeded("see use_galore"),
    "optimizer": Lost("write `training: {optim: ...}`"),
    "llamapro_*": _ELSEWHERE,
    "neftune_noise_alpha": "stage.training.neftune_noise_alpha",
    "lisa_activated_layers": Lost("LISA trains other layers in turn", (None, 0)),
    "merge_lora": words.merge,
    "gradient_accumulation_steps": _accumulation,
    # Data
    "dataset": with_another,
    "val_dataset": with_another,
    "cached_dataset": Lost("rows that ms-swift prepared are not read; name the data set"),
    "cached_val_dataset": Unneeded("suites hold the held-out rows"),
    "split_dataset_ratio": with_another,
    "dataset_shuffle": Lost("rows are shuffled", (None, True)),
    "val_dataset_shuffle": _ROWS,
    "streaming": with_another,
    "interleave_prob": with_another,
    "stopping_strategy": with_another,
    "shuffle_buffer_size": _ROWS,
    "load_from_cache_file": _ROWS,
    "download_mode": _ROWS,
    "columns": Lost("write `columns:` at the source"),
    "strict": _ROWS,
    "lazy_tokenize": _ROWS,
    "model_name": _ELSEWHERE,
    "model_author": _ELSEWHERE,
    "custom_*": Lost("data sets that code of your own registers are not read"),
    "external_plugins": Lost("code of your own is not run"),
    "template": if_set(lambda draft, value: words.own_template(draft, "template", str(value))),
    "template_backend": _ROWS,
    "system": Lost("rows keep the system message that they have, or none"),
    "agent_template": Unneeded("the chat template writes tools"),
    "enable_thinking": Unneeded("the chat template writes what the rows hold"),
    "add_non_thinking_prefix": Unneeded("the chat template writes what the rows hold"),
    "use_chat_template": with_another,
    "padding_side": _ROWS,
    "loss_scale": with_another,
    "max_length": "stage.training.max_length",
    "truncation_strategy": with_another,
    "packing": _packing,
    "packing_*": _ROWS,
    "padding_free": _SPEED,
    "sequence_parallel_size": _SPEED,
    "ddp_backend": _SPEED,
    "model_kwargs": Lost("the model is made by its own config"),
    "to_cached_dataset": _ROWS,
    "max_epochs": "stage.training.num_train_epochs",
    "learning_rate": Said("stage.training.learning_rate", float),
    "max_steps": words.max_steps,
    "warmup_steps": lambda draft, value: words.warmup(draft, "warmup_steps", value),
    "early_stop_interval": Lost("add `early_stopping: {suite: NAME}` to the stage"),
    "max_new_tokens": _ELSEWHERE,
    "temperature": _ELSEWHERE,
    "top_p": _ELSEWHERE,
    "top_k": _ELSEWHERE,
    "stream": _ELSEWHERE,
    "infer_*": _ELSEWHERE,
    "load_args": _ELSEWHERE,
    "load_data_args": _ELSEWHERE,
    "add_version": _ELSEWHERE,
    "create_checkpoint_symlink": _ELSEWHERE,
    "ENV": Unneeded("set variables of the environment yourself"),
    "ENV.*": Unneeded("set variables of the environment yourself"),
    "swanlab_*": _ELSEWHERE,
    "ray_*": _SPEED,
    "use_ray": _SPEED,
}


def convert(draft: Draft) -> None:
    """Fills a draft from arguments of ms-swift.

    Raises:
        OutOfScope: They are for another command than `swift sft` or `swift pt`, for images or for a classifier.
    """
    config = draft.config
    command = str(config.get("command", "sft"))
    if "tensor_model_parallel_size" in config or "micro_batch_size" in config:
        raise OutOfScope(
            "these are arguments of Megatron-SWIFT, whose words are another library's; `swift sft` is converted."
        )
    if command == "rlhf" and config.get("rlhf_type") in (None, "dpo"):
        preferences.begin(draft)
    elif command == "rlhf":
        raise OutOfScope(
            f"this ms-swift config is for `rlhf_type: {config['rlhf_type']}`, for which a recipe has no stage; dpo is "
            "converted."
        )
    elif command in _GOALS or command not in ("sft", "pt"):
        goal = _GOALS.get(command, "another command")
        raise OutOfScope(
            f"these are arguments of `swift {command}`, which is for {goal}; `swift sft`, `swift pt` and `swift "
            "rlhf --rlhf_type dpo` are converted."
        )
    for key in ("task_type", "num_labels"):
        draft.follow(key, TABLE[key], config.get(key))
    if re.search(r"-VL\b|-VL-|-Omni|-Audio|llava|InternVL|MiniCPM-V", str(config.get("model")), re.IGNORECASE):
        raise OutOfScope(
            f"this ms-swift config is for images or sound (`model: {config['model']}`), and hfpipe trains on text."
        )
    if command == "pt" or config.get("use_chat_template") is False:
        draft.stage.update(kind="pretrain", name="pretrain")
    _method(draft)
    _sources(draft)
    words.hold_out(draft, "split_dataset_ratio", config.get("split_dataset_ratio"))
    draft.apply(trainer_table(draft.stage["kind"], TABLE))
    _defaults(draft)
    if draft.stage["kind"] == "preference":
        preferences.with_sft(draft, "rpo_alpha", config.get("rpo_alpha"))
        preferences.finish(draft)


def _method(draft: Draft) -> None:
    tuner = str(draft.config.get("tuner_type") or draft.config.get("train_type") or "lora")
    if tuner in ("lora", "qlora"):
        draft.stage["lora"] = {}
    elif tuner in _TUNERS:
        draft.put("stage.peft.type", _TUNERS[tuner])
        draft.note("changed", "tuner_type", f"PEFT's defaults of {tuner} are taken; see `peft:`")
    elif tuner != "full":
        draft.note("lost", "tuner_type", f"'{tuner}' is not among the methods that are converted")


def _defaults(draft: Draft) -> None:
    """Writes out ms-swift's defaults where its arguments are silent."""
    config = draft.config
    if "lora" in draft.stage:
        for name, value in (("r", 8), ("lora_alpha", 32), ("lora_dropout", 0.05), ("target_modules", "all-linear")):
            draft.default(f"stage.lora.{name}", value)
    adapter = "lora" in draft.stage or "peft" in draft.stage
    draft.default("stage.training.learning_rate", 1e-4 if adapter else 1e-5)
    draft.default("stage.training.per_device_train_batch_size", 1)
    if draft.take("stage.training.gradient_accumulation_steps") is None and "global_batch_size" not in draft.stage:
        draft.put("stage.global_batch_size", 16)
    if draft.take("stage.training.max_steps") is None:
        draft.default("stage.training.num_train_epochs", 3)
    for name, value in (
        ("weight_decay", 0.1),
        ("adam_beta2", 0.95),
        ("lr_scheduler_type", "cosine"),
        ("warmup_steps", 0),
    ):
        draft.default(f"stage.training.{name}", value)
    if draft.take("stage.training.max_length") is None:
        draft.note("changed", "max_length", "rows are cut at hfpipe's default length; ms-swift takes the model's own")
    if draft.stage["kind"] == "sft":
        words.too_long(draft, "cut" if config.get("truncation_strategy") == "right" else "drop")
        scale = str(config.get("loss_scale") or "default")
        who: words.Trained = "all" if scale == "all" else "last" if scale.startswith("last_round") else "assistant"
        if scale not in ("default", "all", "last_round"):
            draft.note("lost", "loss_scale", f"every trained token counts alike ('{scale}')")
        words.train_on(draft, who)
    draft.default("seed", 42)


def _patterns(value: Any) -> list[str]:
    return [f"^{one}" for one in (value if isinstance(value, list) else [value])]


def _sources(draft: Draft) -> None:
    """Sources of `ID`, `ID:SUBSET`, `ID#ROWS`, `ms::ID`, `hf::ID` or a file."""
    config = draft.config
    named = config.get("dataset") or []
    for one in named if isinstance(named, list) else [named]:
        draft.stage["data"].append(_source(draft, str(one)))
    shares = config.get("interleave_prob")
    for source, share in zip(draft.stage["data"], shares or [], strict=False):
        source["weight"] = float(share)
    held = config.get("val_dataset") or []
    for number, one in enumerate(held if isinstance(held, list) else [held]):
        draft.suites[f"{words.HELD_OUT}-{number + 1}"] = {
            "data": _source(draft, str(one)),
            "metrics": ["bits_per_byte"],
        }


def _source(draft: Draft, text: str) -> dict[str, Any]:
    text, _, rows = text.partition("#")
    place, _, rest = text.partition("::") if text.startswith(("ms::", "hf::")) else ("", "", text)
    path, _, subset = (rest, "", "") if rest.startswith(("/", ".")) else rest.partition(":")
    if "self-cognition" in path:
        draft.note("lost", f"dataset: {path}", "ms-swift writes the model's name and author into its rows")
    elif place != "hf" and not draft.config.get("use_hf") and not words.is_file(path):
        path = _ON_HUB.get(path, path)
        draft.note(
            "changed",
            f"dataset: {text}",
            f"it names a data set of ModelScope; taken from the Hugging Face Hub as {path}",
        )
    source = words.source_of(path, name=subset or None, take=int(rows) if rows.strip().isdigit() else None)
    if draft.config.get("streaming"):
        source["streaming"] = True
    return source
