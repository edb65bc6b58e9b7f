"""Configs of other tools become recipes that `check --fast` accepts, and nothing that changes the weights is silent."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfpipe.cli import main
from hfpipe.convert.draft import rule_of
from hfpipe.convert.trainer_keys import trainer_table

AXOLOTL = """
base_model: team/base-1b
datasets:
  - {path: team/instructions, type: alpaca, split: "train[:90%]"}
  - path: notes.jsonl
    type: chat_template
    field_messages: turns
    message_property_mappings: {role: from, content: value}
val_set_size: 0.1
adapter: qlora
load_in_4bit: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
sequence_len: 2048
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
warmup_ratio: 0.1
bf16: auto
gradient_checkpointing: true
special_tokens: {pad_token: "<pad>"}
wandb_project: mine
seed: 7
"""
AXOLOTL_PRETRAIN = """
base_model: team/base-1b
pretraining_dataset: [{path: team/web, name: en, text_column: body}]
sequence_len: 1024
sample_packing: true
micro_batch_size: 1
max_steps: 100
learning_rate: 0.0003
"""
LLAMA_FACTORY_V1 = """
model: team/chat-4b
model_class: llm
peft_config: {name: lora, r: 32, target_modules: all}
quant_config: {name: bnb, quantization_bit: 4}
dist_config: {name: fsdp2}
train_dataset: sets.yaml
micro_batch_size: 2
global_batch_size: 16
cutoff_len: 1024
learning_rate: 1e-4
batching_strategy: padding_free
"""
LLAMA_FACTORY = """
model_name_or_path: team/chat-4b
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,ours
template: qwen3
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 4
output_dir: saves
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
"""
TRL = """
model_name_or_path: team/base-1b
dtype: bfloat16
dataset_name: team/chats
dataset_train_split: train_sft
dataset_test_split: test_sft
eval_strategy: steps
use_peft: true
load_in_4bit: true
lora_target_modules: all-linear
max_length: 512
packing: true
learning_rate: 1.0e-4
push_to_hub: true
hub_model_id: team/out
"""
HANDBOOK = """
model_name_or_path: team/base-1b
dataset_mixture:
  datasets:
    - {id: team/chats, config: all, split: train, columns: [messages], weight: 0.5}
    - {id: team/maths, config: default, split: train, columns: [messages], weight: 1.0}
  test_split_size: 100
learning_rate: 2.0e-05
lr_scheduler_type: cosine
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
max_length: 2048
"""
TORCHTUNE = """
# tune download team/Base-1B --output-dir /tmp/Base-1B
output_dir: /tmp/out
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, path: /tmp/t.model, max_seq_len: null}
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2_1b
  lora_attn_modules: [q_proj, v_proj, output_proj]
  apply_lora_to_mlp: true
  lora_rank: 8
  lora_alpha: 16
  lora_dropout: 0.0
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /tmp/Base-1B/
  checkpoint_files: [model.safetensors]
dataset: {_component_: torchtune.datasets.alpaca_cleaned_dataset, packed: false}
seed: null
shuffle: true
batch_size: 4
epochs: 1
max_steps_per_epoch: null
gradient_accumulation_steps: 8
optimizer: {_component_: torch.optim.AdamW, fused: true, weight_decay: 0.01, lr: 3e-4}
lr_scheduler: {_component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup, num_warmup_steps: 100}
loss: {_component_: torchtune.modules.loss.LinearCrossEntropyLoss}
clip_grad_norm: null
device: cuda
dtype: bf16
"""
OUMI = """
model: {model_name: team/base-1b, model_max_length: 2048, torch_dtype_str: bfloat16}
data:
  train:
    collator_name: text_completions_only_with_padding
    datasets: [{dataset_name: yahma/alpaca-cleaned, split: train, sample_count: 500}]
training:
  trainer_type: TRL_SFT
  use_peft: true
  per_device_train_batch_size: 2
  max_steps: 20
  optimizer: adamw_torch_fused
  learning_rate: 3.0e-04
  lr_scheduler_type: cosine
  warmup_ratio: 0.1
  enable_wandb: true
peft: {lora_r: 16, lora_alpha: 32, lora_target_modules: [q_proj, v_proj], q_lora: true, bnb_4bit_quant_type: nf4}
"""
SWIFT = """
NPROC_PER_NODE=2 \\
swift sft \\
    --model team/chat-4b \\
    --use_hf true \\
    --tuner_type lora \\
    --dataset 'team/chats:all#500' my.jsonl \\
    --torch_dtype bfloat16 \\
    --num_train_epochs 1 \\
    --learning_rate 1e-4 \\
    --lora_rank 8 \\
    --target_modules all-linear \\
    --gradient_accumulation_steps $(expr 16 / $nproc_per_node) \\
    --max_length 2048 \\
    --warmup_ratio 0.05 \\
    --split_dataset_ratio 0.01
"""
AXOLOTL_DPO = """
base_model: team/chat-1b
rl: dpo
rl_beta: 0.2
adapter: lora
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
sequence_len: 1024
datasets:
  - {path: Intel/orca_dpo_pairs, split: train, type: chatml.intel}
  - {path: team/pairs, type: chat_template.default, field_messages: turns, field_chosen: good, field_rejected: bad}
  - {path: team/asked, type: llama3.icr}
val_set_size: 0.1
micro_batch_size: 2
num_epochs: 1
learning_rate: 5e-6
warmup_ratio: 0.1
"""
LLAMA_FACTORY_DPO = """
model_name_or_path: team/chat-1b
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.3
pref_loss: ipo
pref_ftx: 0.5
dataset: dpo_en_demo, ranked
template: qwen
cutoff_len: 2048
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
"""
TRL_DPO = """
model_name_or_path: team/chat-1b
dataset_name: trl-lib/ultrafeedback_binarized
learning_rate: 5e-7
loss_type: [sigmoid, sft]
loss_weights: [1.0, 0.2]
beta: 0.05
num_train_epochs: 1
per_device_train_batch_size: 4
max_length: 512
eval_strategy: steps
eval_steps: 50
"""
HANDBOOK_DPO = """
model_name_or_path: team/chat-1b
dataset_mixer: {HuggingFaceH4/ultrafeedback_binarized: 1.0}
dataset_splits: [train_prefs, test_prefs]
beta: 0.01
loss_type: sigmoid
learning_rate: 5.0e-7
lr_scheduler_type: cosine
max_length: 1024
num_train_epochs: 1
optim: adamw_torch
per_device_train_batch_size: 8
"""
OUMI_DPO = """
model: {model_name: team/chat-1b, model_max_length: 1024}
data: {train: {datasets: [{dataset_name: mlabonne/orpo-dpo-mix-40k, split: train}]}}
training:
  trainer_type: TRL_DPO
  use_peft: true
  per_device_train_batch_size: 2
  max_steps: 20
  learning_rate: 5.0e-05
  trainer_kwargs: {beta: 0.2, loss_type: ipo, max_length: 512}
peft: {lora_r: 8, lora_alpha: 16}
"""
SWIFT_DPO = """
swift rlhf \\
    --rlhf_type dpo \\
    --model team/chat-4b \\
    --use_hf true \\
    --train_type lora \\
    --dataset team/pairs \\
    --beta 0.1 \\
    --rpo_alpha 0.1 \\
    --learning_rate 1e-5 \\
    --max_length 2048
"""
TORCHTUNE_DPO = """
# tune download team/Base-8B --output-dir /tmp/Base-8B
model:
  _component_: torchtune.models.llama3_1.lora_llama3_1_8b
  lora_attn_modules: [q_proj, v_proj, output_proj]
  apply_lora_to_mlp: true
  lora_rank: 16
  lora_alpha: 32
  lora_dropout: 0.0
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, path: /tmp/t.model, max_seq_len: 1024}
checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: /tmp/Base-8B}
dataset: {_component_: torchtune.datasets.stack_exchange_paired_dataset}
loss: {_component_: torchtune.rlhf.loss.DPOLoss, beta: 0.2, label_smoothing: 0}
optimizer: {_component_: torch.optim.AdamW, fused: true, weight_decay: 0.05, lr: 5e-4}
lr_scheduler: {_component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup, num_warmup_steps: 100}
batch_size: 4
epochs: 1
max_steps_per_epoch: 1000
gradient_accumulation_steps: 8
seed: null
shuffle: true
"""
PREFERENCES = {
    "torchtune-dpo.yaml": (TORCHTUNE_DPO, "sigmoid", {"beta": 0.2, "max_length": 1024, "learning_rate": 5e-4}),
    "axolotl-dpo.yaml": (AXOLOTL_DPO, "sigmoid", {"beta": 0.2, "learning_rate": 5e-6}),
    "llama-factory-dpo.yaml": (LLAMA_FACTORY_DPO, ["ipo", "sft"], {"beta": 0.3, "loss_weights": [1.0, 0.5]}),
    "trl-dpo.yaml": (TRL_DPO, ["sigmoid", "sft"], {"beta": 0.05, "loss_weights": [1.0, 0.2], "max_length": 512}),
    "handbook-dpo.yaml": (HANDBOOK_DPO, "sigmoid", {"beta": 0.01, "lr_scheduler_type": "cosine"}),
    "oumi-dpo.yaml": (OUMI_DPO, "ipo", {"beta": 0.2, "max_length": 512, "max_steps": 20}),
    "swift-dpo.sh": (SWIFT_DPO, ["sigmoid", "sft"], {"beta": 0.1, "loss_weights": [1.0, 0.1]}),
}
CONFIGS = {
    "axolotl.yaml": AXOLOTL,
    "axolotl-pretrain.yml": AXOLOTL_PRETRAIN,
    "llama-factory.yaml": LLAMA_FACTORY,
    "trl.yaml": TRL,
    "handbook.yaml": HANDBOOK,
    "torchtune.yaml": TORCHTUNE,
    "oumi.yaml": OUMI,
    "swift.sh": SWIFT,
}
OUT = {
    "judged one by one": "base_model: a/b\nrl: kto\ndatasets: [{path: a/c, type: chatml.argilla}]",
    "images": "base_model: a/b\nprocessor_type: AutoProcessor\ndatasets: [{path: a/c, type: chat_template}]",
    "a reward model": "model_name_or_path: a/b\nstage: rm\nfinetuning_type: lora\ndataset: pairs",
    "reinforcement learning": "model: {model_name: a/b}\ntraining: {trainer_type: TRL_GRPO}\ndata: {train: {}}",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset_info.json").write_text(
        '{"identity": {"file_name": "identity.json"}, "ours": {"hf_hub_url": "team/chats", "formatting": "sharegpt"},'
        '"ranked": {"hf_hub_url": "team/ranked", "ranking": true, "columns": {"prompt": "asked", "chosen": "good"}}}'
    )
    return tmp_path


def converted(
    text: str, capsys: pytest.CaptureFixture[str], name: str = "config.yaml"
) -> tuple[dict[str, Any], str, str]:
    """The recipe, its text, and what is said on standard error."""
    Path(name).write_text(text)
    assert main(["convert", name]) == 0
    said = capsys.readouterr()
    return yaml.safe_load(said.out), said.out, said.err


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_becomes_a_recipe_without_a_fault(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / name).write_text(CONFIGS[name])
    assert main(["convert", name, "-o", "recipe.yaml"]) == 0
    assert "LOST" not in capsys.readouterr().err
    assert main(["check", "--fast", "recipe.yaml"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_config_of_preferences_becomes_a_preference_stage(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, loss, numbers = PREFERENCES[name]
    recipe, written, said = converted(config, capsys, name)
    [stage] = recipe["stages"]
    assert (stage["kind"], stage.get("loss", "sigmoid")) == ("preference", loss)
    assert {word: stage["training"][word] for word in numbers} == numbers
    assert "LOST" not in said
    assert "lora_dropout" not in stage.get("lora", {})
    for suite in recipe.get("evaluate", {}).values():
        assert suite["metrics"][0] == "preference_accuracy"
    Path("recipe.yaml").write_text(written)
    assert main(["check", "--fast", "recipe.yaml"]) == 0, capsys.readouterr().err


def test_the_rows_of_pairs_are_read_as_their_tool_reads_them(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = converted(AXOLOTL_DPO, capsys)[0]["stages"][0]["data"]
    assert "template" not in first
    assert second["format"] == "ranking_chat"
    assert second["columns"] == {"conversations": "turns", "chosen": "good", "rejected": "bad"}
    assert third["template"]["prompt"] == [{"role": "user", "content": "{input}"}]
    [paired] = converted(TORCHTUNE_DPO, capsys)[0]["stages"][0]["data"]
    assert paired["template"]["chosen"] == [{"role": "assistant", "content": "{response_j}"}]
    demo, ranked = converted(LLAMA_FACTORY_DPO, capsys)[0]["stages"][0]["data"]
    assert (demo["format"], ranked["format"]) == ("ranking_chat", "ranking")
    assert ranked["columns"] == {"instruction": "asked", "chosen": "good"}


def test_the_numbers_of_a_config_are_in_the_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, _, _ = converted(AXOLOTL, capsys)
    stage = recipe["stages"][0]
    assert recipe["model"]["id"] == "team/base-1b"
    assert recipe["seed"] == 7
    assert stage["quantization"] == "nf4"
    assert stage["lora"] == {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
    training = stage["training"]
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"]) == (2, 4)
    assert (training["learning_rate"], training["warmup_steps"], training["optim"]) == (2e-4, 0.1, "adamw_bnb_8bit")
    first, second = stage["data"]
    assert (first["path"], first["split"], first["fold"]) == (
        "team/instructions",
        "train[:90%]",
        {"of": 10, "leave": 1},
    )
    assert (second["path"], second["data_files"], second["format"]) == ("json", "notes.jsonl", "sharegpt")
    assert [suite["data"]["fold"] for suite in recipe["evaluate"].values()] == [{"of": 10, "keep": 1}] * 2


def test_what_a_tool_does_in_silence_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torchtune clips no gradient, has a constant rate without a schedule, and cuts no row."""
    text = TORCHTUNE.replace("lr_scheduler:", "# lr_scheduler:").replace("# tune download", "#")
    recipe, written, _ = converted(text, capsys)
    training = recipe["stages"][0]["training"]
    assert (training["max_grad_norm"], training["lr_scheduler_type"], training["max_length"]) == (0.0, "constant", None)
    assert recipe["model"]["id"] == "/tmp/Base-1B"
    assert "checkpointer.checkpoint_dir" in written


def test_a_warm_up_of_a_constant_schedule_is_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, written, _ = converted(LLAMA_FACTORY.replace("cosine", "constant"), capsys)
    assert recipe["stages"][0]["training"].keys() & {"lr_scheduler_type", "warmup_steps"} == {"lr_scheduler_type"}
    assert "constant schedule has none" in written


def test_a_model_that_a_comment_names_is_taken_from_the_hub(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, _, _ = converted(TORCHTUNE, capsys)
    assert recipe["model"]["id"] == "team/Base-1B"
    assert recipe["stages"][0]["lora"]["target_modules"][:3] == ["q_proj", "v_proj", "o_proj"]


def test_shell_arguments_are_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, _, _ = converted(SWIFT, capsys, "train.sh")
    stage = recipe["stages"][0]
    assert stage["global_batch_size"] == 16
    assert stage["data"][0] | {"fold": 0} == {"path": "team/chats", "name": "all", "take": 500, "fold": 0}
    assert stage["training"]["weight_decay"] == 0.1  # ms-swift's own default


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("relora", "relora: true"),
        ("no_such_key", "no_such_key: 5"),
        ("optimizer", "optimizer: sinkgd"),
        ("lr_scheduler", "lr_scheduler: rex"),
        ("lora_model_dir", "lora_model_dir: ./before"),
    ],
)
def test_what_changes_the_weights_and_cannot_be_said_is_told(
    key: str, line: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = "\n".join(old for old in AXOLOTL.splitlines() if not old.startswith(f"{key}:"))
    _, written, said = converted(f"{config}\n{line}\n", capsys)
    for text in (said, written.split("\nname:")[0]):
        assert "LOST" in text
        assert key in text


def test_the_second_form_of_llama_factory(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = {"ours": {"path": "data/ours.json", "source": "local", "converter": "alpaca", "size": 50}}
    sets["theirs"] = {"path": "team/chats", "converter": "sharegpt", "weight": 2.0}
    (here / "sets.yaml").write_text(yaml.safe_dump(sets))
    recipe, written, said = converted(LLAMA_FACTORY_V1, capsys)
    stage = recipe["stages"][0]
    assert stage["data"] == [
        {"path": "json", "data_files": "data/ours.json", "take": 50, "format": "alpaca_chat"},
        {"path": "team/chats", "weight": 2.0, "format": "sharegpt"},
    ]
    assert stage["lora"] == {"target_modules": "all-linear", "r": 32, "lora_alpha": 16, "lora_dropout": 0.05}
    assert (stage["quantization"], stage["global_batch_size"], stage["train_on"]) == ("nf4", 16, "assistant")
    assert (stage["training"]["packing"], stage["training"]["lr_scheduler_type"]) == (True, "constant")
    assert "dist_config" in written
    assert "LOST" not in said
    recipe, _, said = converted(LLAMA_FACTORY_V1 + "optim_config: {name: muon, wd: 0.2, ns_steps: 6}\n", capsys)
    assert recipe["stages"][0]["muon"] == {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 6}
    assert recipe["stages"][0]["training"]["weight_decay"] == 0.2
    assert "LOST" not in said
    _, _, said = converted(LLAMA_FACTORY_V1 + "optim_config: {name: own}\n", capsys)
    assert "no optimizer 'own'" in said


def test_parts_of_the_weights_and_their_rates_are_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = AXOLOTL.replace('{pad_token: "<pad>"}', '{eos_token: "<end>"}') + "loraplus_lr_ratio: 16\n"
    recipe, _, said = converted(config, capsys)
    assert recipe["model"]["tokenizer"]["eos_token"] == "<end>"
    assert recipe["stages"][0]["learning_rates"] == {"lora_B": pytest.approx(16 * 2e-4)}
    assert "LOST" not in said
    full = AXOLOTL_PRETRAIN + "unfrozen_parameters: ['^lm_head.weight$', 'layers.1[0-9]']\nembedding_lr: 1e-5\n"
    recipe, _, said = converted(full, capsys)
    stage = recipe["stages"][0]
    assert stage["train_only"] == ["^lm_head.weight$", "layers.1[0-9]"]
    assert list(stage["learning_rates"].values()) == [1e-5]
    assert "LOST" not in said
    _, _, said = converted(full.replace("weight$'", "weight$[32000:]'"), capsys)
    assert "some of its rows" in said


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (
            TORCHTUNE,
            "quantizer: {_component_: torchtune.training.quantization.Int8DynActInt4WeightQATQuantizer}",
            {"qat": {"weights": "int4", "activations": "int8", "group_size": 256}},
        ),
        (
            AXOLOTL_PRETRAIN,
            "qat: {activation_dtype: nvfp4, weight_dtype: nvfp4, group_size: 16}",
            {"qat": {"weights": "nvfp4", "activations": "nvfp4", "target_modules": "all"}},
        ),
        (AXOLOTL_PRETRAIN, "optimizer: muon", {"muon": {}}),
        (LLAMA_FACTORY, "use_muon: true", {"muon": {"adjust_lr_fn": "match_rms_adamw"}}),
    ],
)
def test_words_of_a_stage(
    config: str, change: str, words: dict[str, Any], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, written, said = converted(f"{config}\n{change}\n", capsys)
    [stage] = recipe["stages"]
    for word, value in words.items():
        assert stage[word].items() >= value.items()
    assert stage.get("qat", {}).get("target_modules") in (None, "all", stage.get("lora", {}).get("target_modules"))
    assert "LOST" not in said
    Path("recipe.yaml").write_text(written)
    assert main(["check", "--fast", "recipe.yaml"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "config",
    [
        AXOLOTL_PRETRAIN + "reinit_weights: true\n",
        OUMI.replace("{model_name", "{load_pretrained_weights: false, model_name"),
    ],
)
def test_fresh_weights_begin_from_the_config_of_a_model(
    config: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, written, said = converted(config, capsys)
    assert recipe["model"]["architecture"] == {"from": "team/base-1b"}
    assert recipe["model"]["tokenizer"] == {"id": "team/base-1b"}
    assert "id" not in recipe["model"]
    assert "LOST" not in said
    Path("recipe.yaml").write_text(written)
    assert main(["check", "--fast", "recipe.yaml"]) == 0, capsys.readouterr().err


def test_a_warm_up_beyond_the_end_keeps_the_rate_of_each_step(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = AXOLOTL_PRETRAIN.replace("max_steps: 100", "max_steps: 10\nwarmup_steps: 30")
    training = converted(config, capsys)[0]["stages"][0]["training"]
    assert (training["warmup_steps"], training["learning_rate"]) == (10, pytest.approx(0.0003 / 3))


def test_a_limit_of_prompts_is_said_and_another_trainer_is_not_taken_for_dpo(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = HANDBOOK_DPO + "max_prompt_length: 512\n"
    recipe, _, said = converted(text, capsys)
    assert recipe["stages"][0]["training"]["max_prompt_length"] == 512
    assert "LOST" not in said
    Path("config.yaml").write_text(f"# ORPOTrainer arguments\n{text}")
    assert main(["convert", "config.yaml"]) == 2
    assert "ORPO" in capsys.readouterr().err


def test_every_key_of_a_config_is_in_the_recipe_or_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key without an effect on the weights is told above the recipe, which has a line for each reason."""
    _, written, said = converted(AXOLOTL, capsys)
    for key in ("wandb_project", "bf16", "special_tokens.pad_token"):
        assert key in written.split("\nname:")[0] or key == "special_tokens.pad_token"
    assert "wandb_project" not in said


@pytest.mark.parametrize("goal", OUT)
def test_other_goals_are_refused_in_a_paragraph(goal: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text(OUT[goal])
    assert main(["convert", "config.yaml"]) == 2
    said = capsys.readouterr()
    assert goal in said.err
    assert not said.out


def test_the_tool_can_be_said_and_must_be_where_it_is_not_recognized(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("config.yaml").write_text("learning_rate: 1\nepochs: 3\n")
    assert main(["convert", "config.yaml"]) == 2
    assert "--from" in capsys.readouterr().err
    Path("config.yaml").write_text(TRL)
    assert main(["convert", "--from", "trl", "config.yaml"]) == 0


def test_a_file_that_is_there_is_not_written_over(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text(TRL)
    Path("recipe.yaml").write_text("mine")
    assert main(["convert", "config.yaml", "-o", "recipe.yaml"]) == 2
    assert Path("recipe.yaml").read_text() == "mine"
    assert "exists already" in capsys.readouterr().err


def test_a_missing_dataset_info_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "data/dataset_info.json").unlink()
    _, _, said = converted(LLAMA_FACTORY, capsys)
    assert "dataset: ours" in said
    assert "dataset_info.json" in said


def test_every_word_of_the_table_in_the_docs_is_converted() -> None:
    page = (Path(__file__).parents[2] / "docs/convert.md").read_text()
    table = page[page.index("| recipe | axolotl |") :].split("\n\n")[0]
    header, _, *rows = table.splitlines()
    tools = [cell.strip() for cell in header.strip("|").split("|")][1:]
    modules = [tool.lower().replace("-", "_") for tool in tools]
    for row in rows:
        for module, cell in zip(modules, row.strip("|").split("|")[1:], strict=True):
            key = cell.strip().strip("`")
            rules = import_module(f"hfpipe.convert.{module}").TABLE
            rules = rules if module in ("torchtune", "oumi") else trainer_table("sft", rules)
            assert not key or rule_of(rules, key) is not None, f"{module}: {key}"
