"""TRL's command line (`trl sft --config FILE`), and the alignment handbook's configs, which are made for it.

Source: `trl/scripts/sft.py`, `SFTConfig` and `ModelConfig` of TRL 1.16, and the recipes of the alignment handbook.
"""

from __future__ import annotations

from typing import Any

from hfpipe.convert import preferences, words
from hfpipe.convert.draft import Draft, Lost, Out, OutOfScope, Table, Unneeded, with_another
from hfpipe.convert.trainer_keys import trainer_table

_ROWS = Unneeded("hfpipe makes the rows itself")
_OF_DPO = ("beta", "max_prompt_length", "precompute_ref_log_probs", "ref_model", "rpo_alpha")  # of no sft config
_OTHER_TRAINERS = {
    "num_generations": "reinforcement learning",
    "reward_funcs": "reinforcement learning",
    "reward_model_path": "reinforcement learning",
    "center_rewards_coefficient": "a reward model",
    "desirable_weight": "answers that are judged one by one (KTO)",
}
_ATTENTION = ("eager", "sdpa", "flex_attention")


def _lora(name: str) -> Any:
    def follow(draft: Draft, value: Any) -> None:
        if value is not None and draft.config.get("use_peft"):
            made = words.target_modules(value) if name == "target_modules" else value
            draft.train(name, f"lora.{name}", made)

    return follow


def _bits(draft: Draft, value: Any) -> None:
    if value and draft.config.get("load_in_8bit"):
        words.quantize(draft, 8)
    elif value:
        if draft.config.get("bnb_4bit_quant_type") == "fp4":
            draft.note("lost", "bnb_4bit_quant_type", "4 bits are nf4")
        words.quantize(draft, 4, bnb_4bit_use_double_quant=bool(draft.config.get("use_bnb_nested_quant")))


def _attention(draft: Draft, value: Any) -> None:
    if value in _ATTENTION:
        draft.put("model.attn_implementation", value)
    elif value:
        why = "hfpipe takes the fastest attention that is installed; `model.attn_implementation` asks for one"
        draft.note("unneeded", "attn_implementation", why)


def _dtype(draft: Draft, value: Any) -> None:
    if value in ("float32", "bfloat16", "float16"):
        draft.put("model.dtype", value)


def _strategy(draft: Draft, value: Any) -> None:
    if value == "wrapped" and draft.config.get("packing"):
        draft.note("changed", "packing_strategy", "examples are packed whole and kept apart, not cut at the rows' ends")


TABLE: Table = {
    "model_name_or_path": "model.id",
    "model_revision": "model.revision",
    "tokenizer_name_or_path": "model.tokenizer.id",
    "trust_remote_code": "model.trust_remote_code",
    "dtype": _dtype,
    "torch_dtype": _dtype,
    "attn_implementation": _attention,
    "use_flash_attention_2": Unneeded("hfpipe takes the fastest attention that is installed"),
    "model_init_kwargs": Lost("write the words of `model:`"),
    "chat_template": "model.tokenizer.chat_template",
    "chat_template_path": "model.tokenizer.chat_template",
    "eos_token": lambda draft, value: words.special_token(draft, "eos_token", "eos_token", value),
    "pad_token": lambda draft, value: words.special_token(draft, "pad_token", "pad_token", value),
    "use_peft": with_another,
    "lora_r": _lora("r"),
    "lora_alpha": _lora("lora_alpha"),
    "lora_dropout": _lora("lora_dropout"),
    "lora_target_modules": _lora("target_modules"),
    "lora_target_parameters": _lora("target_parameters"),
    "lora_modules_to_save": _lora("modules_to_save"),
    "lora_task_type": Unneeded("the kind of stage says it"),
    "use_rslora": _lora("use_rslora"),
    "use_dora": _lora("use_dora"),
    "load_in_4bit": _bits,
    "load_in_8bit": _bits,
    "bnb_4bit_quant_type": with_another,
    "use_bnb_nested_quant": with_another,
    "bnb_4bit_quant_storage": Unneeded("memory only"),
    "dataset_name": with_another,
    "dataset_config": with_another,
    "dataset_train_split": with_another,
    "dataset_test_split": with_another,
    "dataset_streaming": with_another,
    "dataset_mixture": with_another,
    "dataset_mixture.*": with_another,
    "dataset_mixer": with_another,
    "dataset_mixer.*": with_another,
    "dataset_splits": with_another,
    "dataset_configs": with_another,
    "datasets": with_another,
    "streaming": with_another,
    "test_split_size": with_another,
    "dataset_text_field": with_another,
    "ignore_bias_buffers": _ROWS,
    "shuffle_dataset": _ROWS,
    "skip_prepare_dataset": _ROWS,
    "preprocessing_num_workers": _ROWS,
    "truncation_mode": Lost("rows that are too long are cut at their end", (None, "keep_start")),
    "max_length": "stage.training.max_length",
    "max_seq_length": "stage.training.max_length",
    "packing_strategy": _strategy,
    "pad_to_multiple_of": Unneeded("speed and memory only"),
    "activation_offloading": Unneeded("speed and memory only"),
    "assistant_only_loss": with_another,
    "completion_only_loss": with_another,
    "command": with_another,
    "config": with_another,
    "max_steps": words.max_steps,
}


PREFERENCE: Table = {
    "loss_type": lambda draft, value: preferences.loss(draft, "loss_type", value) if value else None,
    "loss_weights": "stage.training.loss_weights",
    "rpo_alpha": with_another,
    "max_prompt_length": "stage.training.max_prompt_length",  # a word of older TRLs
    "max_completion_length": Lost("prompt and answer share `max_length`, and the end of an answer is cut"),
    "ref_model": Lost("the reference is the stage's parent"),
    "ref_adapter_name": Lost("the reference is the stage's parent"),
    "model_adapter_name": Unneeded("a stage has one adapter"),
    "force_use_ref_model": Unneeded("the reference is the stage's parent, without memory of its own"),
    "ref_model_init_kwargs": Unneeded("the reference is the stage's parent"),
    "reference_free": Lost("the reference is the stage's parent"),
    "sync_ref_model": Lost("the reference is the stage's parent, and stays it"),
    "ref_model_mixup_alpha": Unneeded("see sync_ref_model"),
    "ref_model_sync_steps": Unneeded("see sync_ref_model"),
    "generate_during_eval": Unneeded("suites generate where their metrics ask for it"),
    "label_pad_token_id": _ROWS,
    "padding_value": _ROWS,
    "use_logits_to_keep": Unneeded("speed and memory only"),
}


def convert(draft: Draft) -> None:
    """Fills a draft from a config of `trl sft` or `trl dpo`.

    Raises:
        OutOfScope: The config is for another of TRL's trainers.
    """
    config = draft.config
    command = str(config.get("command") or ("dpo" if any(config.get(key) is not None for key in _OF_DPO) else "sft"))
    if "ORPOTrainer" in draft.text:  # its keys are those of a DPO config
        raise OutOfScope(
            "this TRL config is for the loss ORPO (it names the ORPOTrainer), for which there is no stage."
        )
    if command not in ("sft", "dpo"):
        raise OutOfScope(
            f"this is a config of `trl {command}`, for which a recipe has no stage; `trl sft` and `trl dpo` are "
            "converted."
        )
    if command == "dpo":
        preferences.begin(draft)
    for key, goal in _OTHER_TRAINERS.items():
        draft.follow(key, Out(f"for {goal}", (None,)), config.get(key))
    _sources(draft)
    is_sft = draft.stage["kind"] == "sft"
    draft.apply(trainer_table(draft.stage["kind"], TABLE if is_sft else {**TABLE, **PREFERENCE}))
    _defaults(draft)
    preferences.finish(draft)


def _defaults(draft: Draft) -> None:
    """Writes out TRL's defaults where its config is silent."""
    config = draft.config
    if config.get("use_peft"):
        for place, value in (("r", 16), ("lora_alpha", 32), ("lora_dropout", 0.05)):
            draft.default(f"stage.lora.{place}", value)
    if draft.take("stage.training.max_steps") is None:
        draft.default("stage.training.num_train_epochs", 3)
    draft.default("stage.training.learning_rate", 2e-5 if draft.stage["kind"] == "sft" else 1e-6)
    draft.default("stage.training.per_device_train_batch_size", 8)
    draft.default("stage.training.lr_scheduler_type", "linear")
    draft.default("stage.training.warmup_steps", 0)
    draft.default("stage.training.max_length", 1024)
    if draft.stage["kind"] == "preference":
        preferences.with_sft(draft, "rpo_alpha", config.get("rpo_alpha"))
    elif config.get("assistant_only_loss"):
        words.train_on(draft, "assistant")
    elif config.get("completion_only_loss"):
        words.train_on(draft, "completion")
    elif _all_tokens(draft):
        words.train_on(draft, "all")
    draft.default("seed", 42)


def _all_tokens(draft: Draft) -> bool:
    """True if TRL trains on every token: of conversations and texts always, of prompts only when told to."""
    return draft.config.get("completion_only_loss") is False or all("columns" not in one for one in draft.stage["data"])


def _sources(draft: Draft) -> None:
    config = draft.config
    mixture = config.get("dataset_mixture")
    if isinstance(mixture, dict):
        _mixture(draft, mixture.get("datasets") or [], mixture.get("test_split_size"))
    elif isinstance(config.get("datasets"), list):
        listed = [{"id": one.get("path"), "config": one.get("name"), **one} for one in config["datasets"]]
        _mixture(draft, listed, config.get("test_split_size"))
    elif isinstance(config.get("dataset_mixer"), dict):
        _mixer(draft)
    elif config.get("dataset_name"):
        name, split = str(config["dataset_name"]), config.get("dataset_train_split") or "train"
        source = words.source_of(name, name=config.get("dataset_config"), split=split)
        if config.get("dataset_streaming"):
            source["streaming"] = True
        _with_column(draft, source)
        draft.stage["data"].append(source)
        test = config.get("dataset_test_split") or "test"
        if config.get("eval_strategy") not in (None, "no", False):
            held = {**source, "split": test}
            draft.suites[words.HELD_OUT] = {"data": held, "metrics": ["bits_per_byte"]}


def _with_column(draft: Draft, source: dict[str, Any]) -> None:
    column = draft.config.get("dataset_text_field")
    if column not in (None, "text"):
        source["columns"] = {"text": column}


def _mixture(draft: Draft, listed: list[dict[str, Any]], test: Any) -> None:
    """Sources of a mixture, where `weight` or `fraction` is the share of a source's rows that is taken."""
    for one in listed:
        split = str(one.get("split") or "train")
        if test is None and split.startswith("test"):
            source = words.source_of(str(one["id"]), name=one.get("config"), split=split)
            draft.suites[f"{words.HELD_OUT}-{len(draft.suites) + 1}"] = {"data": source, "metrics": ["bits_per_byte"]}
            continue
        source = words.source_of(str(one["id"]), name=one.get("config"), split=split, data_files=one.get("data_files"))
        columns = one.get("columns") or ["messages"]
        if set(columns) & {"chosen", "rejected"}:
            preferences.begin(draft)
        share = one.get("weight", one.get("fraction"))
        words.part_of(draft, "dataset_mixture.weight", source, float(share if share is not None else 1))
        draft.stage["data"].append(source)
    if test:
        folded = [one for one in draft.stage["data"] if "fold" in one]
        if folded:
            draft.note("changed", "test_split_size", "rows are held out of the sources that are taken whole")
        _hold_out(draft, test)


def _hold_out(draft: Draft, test: Any) -> None:
    whole = [one for one in draft.stage["data"] if "fold" not in one]
    every, draft.stage["data"] = draft.stage["data"], whole
    words.hold_out(draft, "test_split_size", float(test) / len(whole) if whole and float(test) >= 1 else test)
    draft.stage["data"] = every


def _mixer(draft: Draft) -> None:
    """The handbook's older form: data sets with their shares, and splits for all of them."""
    splits = draft.config.get("dataset_splits") or ["train"]
    for path, share in draft.config["dataset_mixer"].items():
        for split in splits:
            source = words.source_of(path, split=split)
            if "prefs" in split:
                preferences.begin(draft)
            if split.startswith("test"):
                name = f"{words.HELD_OUT}-{len(draft.suites) + 1}"
                draft.suites[name] = {"data": source, "metrics": ["bits_per_byte"]}
                continue
            words.part_of(draft, "dataset_mixer", source, float(share))
            draft.stage["data"].append(source)
