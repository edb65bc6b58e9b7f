"""Keys that axolotl, LLaMA-Factory, TRL's scripts and ms-swift have for what a recipe says otherwise.

Asked where a key is unknown, so that a person who knows another tool is told our key. `hfpipe convert` reads whole
configs of these tools; a test holds that both say the same.
"""

from __future__ import annotations

LENGTH = "`max_length` below the stage's `training:`"
RANK = "`r` below the stage's `lora:`"
DATA = "the stage's `data:`, a list of sources such as {path: data.jsonl}"
BASE = "`model: {id: ...}`"
TEMPLATE = "`chat_template` below `model: {tokenizer: ...}`; a model that has a template of its own needs none"
HELD_OUT = "a suite below `evaluate:`; a part of the training data is held out by `fold`"
PACKING = "`packing: true` below the stage's `training:`"
EPOCHS = "`num_train_epochs` below the stage's `training:`"
FOUR_BITS = "the stage's `quantization: nf4` (4 bits) or `int8`"
TARGETS = "`target_modules` below the stage's `lora:`, such as all-linear"

BETA = "`beta` below the `training:` of a stage of `kind: preference`"
SMOOTHED = "`label_smoothing` below the `training:` of a stage of `kind: preference`"

FOREIGN_WORDS: dict[str, str] = {
    "rl_beta": BETA,
    "pref_beta": BETA,
    "dpo_beta": BETA,
    "dpo_label_smoothing": SMOOTHED,
    "dpo_use_weighting": "`use_weighting` below the `training:` of a stage of `kind: preference`",
    "dpo_loss_weights": "`loss_weights` below the `training:` of a stage of `kind: preference`",
    "base_model": BASE,
    "model_name_or_path": BASE,
    "model_name": BASE,
    "model_id": BASE,
    "tokenizer_config": "`model: {tokenizer: {id: ...}}`",
    "tokenizer_name_or_path": "`model: {tokenizer: {id: ...}}`",
    "torch_dtype": "`model: {dtype: ...}`",
    "attn_impl": "`model: {attn_implementation: ...}`",
    "flash_attn": "`model: {attn_implementation: ...}`",
    "flash_attention": "`model: {attn_implementation: ...}`",
    "special_tokens": "the tokens' names, such as `pad_token`, below `model: {tokenizer: ...}`",
    "chat_template": TEMPLATE,
    "chat_template_path": TEMPLATE,
    "datasets": DATA,
    "dataset": DATA,
    "dataset_name": DATA,
    "dataset_path": DATA,
    "train_dataset": DATA,
    "train_file": DATA,
    "pretraining_dataset": "`data:` of a stage of `kind: pretrain`",
    "dataset_config": "`name` of the source",
    "dataset_train_split": "`split` of the source",
    "dataset_text_field": "`columns: {text: ...}` of the source",
    "type": "`format` of a source, such as alpaca or sharegpt",
    "ds_type": "`path` of the source, such as json, with `data_files`",
    "max_samples": "`take` of the source",
    "interleave_probs": "`weight` of each source",
    "interleave_prob": "`weight` of each source",
    "val_set_size": HELD_OUT,
    "val_size": HELD_OUT,
    "split_dataset_ratio": HELD_OUT,
    "test_split_size": HELD_OUT,
    "test_datasets": HELD_OUT,
    "eval_dataset": HELD_OUT,
    "val_dataset": HELD_OUT,
    "sequence_len": LENGTH,
    "cutoff_len": LENGTH,
    "max_seq_length": LENGTH,
    "max_seq_len": LENGTH,
    "model_max_length": LENGTH,
    "block_size": LENGTH,
    "micro_batch_size": "`per_device_train_batch_size` below the stage's `training:`",
    "batch_size": "the stage's `global_batch_size` (rows an optimizer step, over all ranks)",
    "num_epochs": EPOCHS,
    "epochs": EPOCHS,
    "max_epochs": EPOCHS,
    "lr": "`learning_rate` below the stage's `training:`",
    "optimizer": "`optim` below the stage's `training:`",
    "lr_scheduler": "`lr_scheduler_type` below the stage's `training:`",
    "warmup_ratio": "`warmup_steps` below the stage's `training:`, where a number below 1 is a share of the steps",
    "noisy_embedding_alpha": "`neftune_noise_alpha` below the stage's `training:`",
    "sample_packing": PACKING,
    "neat_packing": PACKING,
    "wandb_project": "`report_to: wandb` and `project` below the stage's `training:`",
    "early_stopping_patience": "the stage's `early_stopping: {suite: ..., patience: ...}`",
    "train_on_inputs": "the stage's `train_on: all`",
    "train_on_prompt": "the stage's `train_on: all`",
    "mask_history": "the stage's `train_on: last`",
    "roles_to_train": "the stage's `train_on`",
    "adapter": "the stage's `lora:` block; 4 bits beside it are `quantization: nf4`",
    "use_peft": "the stage's `lora:` block",
    "finetuning_type": "the stage's `lora:` block; without one all weights are trained",
    "tuner_type": "the stage's `lora:` block; without one all weights are trained",
    "load_in_4bit": FOUR_BITS,
    "load_in_8bit": FOUR_BITS,
    "quantization_bit": FOUR_BITS,
    "quant_bits": FOUR_BITS,
    "lora_r": RANK,
    "lora_rank": RANK,
    "rank": RANK,
    "alpha": "`lora_alpha` below the stage's `lora:`",
    "dropout": "`lora_dropout` below the stage's `lora:`",
    "lora_target": TARGETS,
    "lora_target_modules": TARGETS,
    "lora_target_linear": TARGETS,
    "lora_modules_to_save": "`modules_to_save` below the stage's `lora:`",
    "additional_target": "`modules_to_save` below the stage's `lora:`",
    "pissa_init": "`init_lora_weights: pissa` below the stage's `lora:`",
    "peft_use_dora": "`use_dora` below the stage's `lora:`",
    "peft_use_rslora": "`use_rslora` below the stage's `lora:`",
    "merge_lora": "`merge: true` of the recipe",
    "hub_model_id": "`push: {repo_id: ...}`",
    "push_to_hub": "a block `push: {repo_id: ...}`",
}


def our_word(key: object) -> str | None:
    """Returns what a recipe says in place of another tool's key; None where the key is not known."""
    return FOREIGN_WORDS.get(str(key))
