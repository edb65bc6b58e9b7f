"""Every field of the installed classes has its effect, or is refused with the reason; a new one asks to be decided."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from peft import LoraConfig
from torch.nn import functional
from transformers import GenerationConfig

from hfpipe.cli import main
from hfpipe.model.create import create_model, train_tokenizer
from hfpipe.recipe.raw import RawStage, RawSuite
from hfpipe.recipe.rules.training import check_training
from hfpipe.recipe.rules.without_effect import check_generation_effect, check_training_effect
from hfpipe.recipe.signatures import generation_fields
from hfpipe.recipe.stage_config import KINDS
from hfpipe.stages.arguments import stage_arguments


def words_of(text: str) -> set[str]:
    return set(text.split())


# Passed to the trainer's arguments, which act on them.
PASSED = words_of(
    """
    activation_checkpointing activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon
    average_tokens_across_devices bf16 ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters
    ddp_static_graph ddp_timeout disable_tqdm fp16 full_determinism gradient_checkpointing
    gradient_checkpointing_kwargs include_num_input_tokens_seen label_smoothing_factor learning_rate
    liger_kernel_config log_level log_level_replica log_on_each_node logging_first_step logging_nan_inf_filter
    logging_steps logging_strategy lr_scheduler_kwargs lr_scheduler_type max_grad_norm neftune_noise_alpha optim
    optim_args optim_target_modules project report_to run_name save_steps save_strategy skip_memory_metrics tf32
    torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps trackio_bucket_id
    trackio_space_id trackio_static_space_id use_cache use_cpu use_liger_kernel warmup_steps weight_decay
    activation_offloading loss_type router_aux_loss_coef accelerator_config deepspeed fsdp fsdp_config
    """
)
# Read by hfpipe, which acts on them itself.
OURS = words_of(
    """
    num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps save_total_limit
    max_length assistant_only_loss completion_only_loss pad_to_multiple_of packing packing_strategy
    train_sampling_strategy
    """
)
LORA = words_of(
    """
    alora_invocation_tokens alpha_pattern bias ensure_weight_tying exclude_modules fan_in_fan_out
    init_lora_weights kasa_config layer_replication layers_pattern layers_to_transform lora_alpha lora_bias
    lora_dropout modules_to_save monteclora_config r rank_pattern runtime_config target_modules
    target_parameters trainable_token_indices use_bdlora use_dora use_qalora use_rslora velora_config
    """
)
# What generation follows, and what it refuses in words of its own.
GENERATION = words_of(
    """
    bad_words_ids begin_suppress_tokens bos_token_id cache_config cache_implementation compile_config
    constraints decoder_start_token_id disable_compile diversity_penalty do_sample dola_layers early_stopping
    encoder_no_repeat_ngram_size encoder_repetition_penalty eos_token_id epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty force_bos_token_to_be_generated force_words_ids forced_bos_token_id
    forced_eos_token_id guidance_scale length_penalty low_memory max_cache_len max_length
    max_matching_ngram_size max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size
    num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams pad_token_id penalty_alpha
    prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits repetition_penalty
    sequence_bias speculation_type stop_strings suppress_tokens temperature token_healing top_h top_k top_p
    typical_p use_cache use_mtp watermarking_config
    """
)
# Those of DPOConfig alone, and what acts in the other kinds and not in a preference stage.
PREFERENCE = words_of(
    """
    beta disable_dropout discopop_tau f_alpha_divergence_coef f_divergence_type label_smoothing ld_alpha loss_weights
    precompute_ref_batch_size precompute_ref_log_probs use_weighting
    """
)
NOT_IN_PREFERENCE = {"label_smoothing_factor", "loss_type"}
SAMPLES = {bool: True, int: 3, float: 0.25, str: "x", type(None): "x", list: ["x"], dict: {"x": 1}}


def arguments_class(kind: str) -> Any:
    module, name = KINDS[kind].ARGUMENTS
    return getattr(importlib.import_module(module), name)


def raw(kind: str, **blocks: Any) -> RawStage:
    return RawStage(("stages", 0), blocks, "s", kind)


def another(default: Any) -> Any:
    """Returns a value of a field that is not its default."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    return SAMPLES[type(default)] if type(default) in SAMPLES and default != "x" else "y"


def default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_of_training_acts_or_is_refused(kind: str) -> None:
    for field in dataclasses.fields(arguments_class(kind)):
        if not field.init:
            continue
        stage = raw(kind, training={field.name: another(default_of(field))})
        faults = [fault for fault in check_training(stage) if fault.steps[-1] == field.name]
        acts = PASSED | OURS | PREFERENCE
        if field.name in (acts - NOT_IN_PREFERENCE if kind == "preference" else acts):
            told = [fault.text for fault in faults if "has no effect" in fault.text or "decides" in fault.text]
            assert not told, f"{field.name} acts, and is refused: {told}"
        else:
            assert faults, f"{field.name} of {kind} is neither refused nor known to act: decide, and list it"
            assert len(faults[0].text) > 20


@pytest.mark.parametrize("kind", KINDS)
def test_words_that_are_passed_reach_the_trainer(kind: str, tmp_path: Path) -> None:
    cls, source = arguments_class(kind), {"path": "json"}
    free = {"report_to", "deepspeed", "optim", "lr_scheduler_type", "debug", "tf32", "optim_target_modules", "bf16"}
    free |= {"precompute_ref_log_probs"}  # a preference stage gives it to its trainer later
    for field in dataclasses.fields(cls):
        default = default_of(field)
        if (
            field.name not in (PASSED | PREFERENCE) - free
            or type(default) not in (bool, int, float)
            or "torch_comp" in field.name
        ):
            continue
        if field.name in ("fp16", "activation_offloading", "use_liger_kernel", "activation_checkpointing"):
            continue  # which a machine without a GPU refuses
        value = 0.25 if isinstance(default, float) else another(default)
        stage: Any = KINDS[kind].model_validate(
            {"name": "s", "kind": kind, "data": [source], "training": {field.name: value}}
        )
        built = stage_arguments(stage, tmp_path, 0, 10)
        assert getattr(built, field.name) == value, field.name


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_recomputed_only_where_that_is_asked(kind: str, tmp_path: Path) -> None:
    """TRL's own default recomputes them, which makes a step a third slower."""
    for training in ({}, {"gradient_checkpointing": False}, {"gradient_checkpointing": True}):
        stage: Any = KINDS[kind].model_validate(
            {"name": "s", "kind": kind, "data": [{"path": "json"}], "training": training}
        )
        built = stage_arguments(stage, tmp_path, 0, 10)
        asked = training.get("gradient_checkpointing", False)
        assert built.activation_checkpointing is built.gradient_checkpointing is asked


def test_every_word_of_lora_acts_or_is_refused() -> None:
    for field in dataclasses.fields(LoraConfig):
        if not field.init:
            continue
        stage = raw("sft", lora={field.name: another(default_of(field))})
        faults = [fault for fault in check_training_effect(stage) if fault.steps[-1] == field.name]
        assert bool(faults) != (field.name in LORA), f"{field.name}: {faults or 'is it refused, or does it act?'}"


def test_every_word_of_generation_acts_or_is_refused() -> None:
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")} | set(generation_fields() or ())
    for name in sorted(known & set(generation_fields() or ())):
        suite = RawSuite(("evaluate", "a"), {"generation": {name: "other"}}, "a")
        faults = list(check_generation_effect(suite))
        assert bool(faults) != (name in GENERATION), f"{name}: {faults or 'is it refused, or does it act?'}"


def test_a_word_at_its_default_may_stand() -> None:
    stage = raw("sft", training={"dataloader_num_workers": 0, "predict_with_generate": False, "do_train": False})
    assert not list(check_training(stage))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smooth")
    tiny.write_data(folder)
    texts = [json.loads(line)["text"] for line in (folder / "prose.jsonl").read_text().splitlines()]
    for name, architecture in (("llama", tiny.recipe(folder)["model"]["architecture"]), ("bert", tiny.ENCODER)):
        tokenizer = train_tokenizer(texts, 320, 128, "masked" if name == "bert" else "causal")
        create_model(architecture, tokenizer, 0).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "causal": ("llama", {"kind": "pretrain"}),
    "masked": ("bert", {"kind": "pretrain", "objective": "masked"}),
    "sft": ("llama", {"kind": "sft"}),
    "classification": ("bert", {"kind": "classification"}),
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", STAGES)
def test_label_smoothing_acts_in_every_kind(name: str, folder: Path) -> None:
    """At smoothing e the loss is (1 - e) of the plain one and e of a part that is near log(K) at a fresh model."""
    base, words = STAGES[name]
    roles = {"sentence": "note", "label": "sound"} if name == "classification" else None
    table = "sounds" if roles else "prose"
    source = {"path": "json", "data_files": str(folder / f"{table}.jsonl")} | ({"columns": roles} if roles else {})
    losses = {}
    for smoothing in (0.0, 0.5):
        training = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 8, "max_length": 64}
        stage = {"name": "s", **words, "data": [source], "training": training | {"label_smoothing_factor": smoothing}}
        content = {"name": "x", "output_dir": str(folder / f"{name}-{smoothing}"), "model": {"id": str(folder / base)}}
        path = folder / "r.yaml"
        path.write_text(yaml.safe_dump(content | {"stages": [stage], "energy": False}))
        assert main(["run", str(path)]) == 0
        log = (folder / f"{name}-{smoothing}/stages/s/log.jsonl").read_text().splitlines()
        losses[smoothing] = json.loads(log[0])["loss"]
    classes = 6 if roles else 320
    assert losses[0.5] != losses[0.0]
    assert abs(losses[0.5] - (0.5 * losses[0.0] + 0.5 * math.log(classes))) < 0.15


def test_smoothing_is_that_of_torch() -> None:
    """A reminder of what the word means: the share goes to all classes alike."""
    logits, labels = torch.randn(5, 7), torch.arange(5)
    plain, even = functional.cross_entropy(logits, labels), -logits.log_softmax(-1).mean(-1).mean()
    smoothed = functional.cross_entropy(logits, labels, label_smoothing=0.3)
    assert torch.allclose(smoothed, 0.7 * plain + 0.3 * even)
