"""Finds earlier training again after a recipe has changed, and continues it where only its length has.

A stage folder belongs to one version of its stage, by the hash in its stage.json. The folder of another version is
moved aside to `stages/<stage>.<hash>`; it comes back when its recipe does. A run deletes none of them: `hfpipe clean`
shows and removes them.

The hash is of the keys that decide the weights. A key counts unless it is listed here: one that is new in a later
version of the libraries trains a stage again rather than pass for one that does nothing. Keys that change the order of
sums only (how a batch is divided, what is recomputed to save memory) do not count: the weights are the same up to
rounding.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfpipe.core.errors import MachineError
from hfpipe.core.files import link_or_copy, read_json, whole_folder, write_json
from hfpipe.core.run_layout import MODEL, damage_of
from hfpipe.recipe import Pretrain, Stage
from hfpipe.recipe.signatures import training_fields
from hfpipe.stages.checkpoints import by_step, step_of, version_of

STAGE = "stage.json"
LENGTH = ("max_steps", "num_train_epochs")
REPORTS = """
    logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_on_each_node log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id include_num_input_tokens_seen skip_memory_metrics debug
"""
SAVING = """
    save_strategy save_steps save_minutes save_total_limit save_on_each_node save_only_model enable_jit_checkpoint
    restore_callback_states_from_checkpoint
"""
SCORING = """
    eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size prediction_loss_only
    eval_do_concat_batches eval_use_gather_object eval_accumulation_steps eval_packing include_for_metrics
    batch_eval_metrics bf16_full_eval fp16_full_eval load_best_model_at_end metric_for_best_model greater_is_better
    predict_with_generate generation_max_length generation_num_beams generation_config do_train do_eval do_predict
"""
MACHINE = """
    use_cpu local_rank dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order dataset_num_proc ddp_backend
    ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters ddp_static_graph
    activation_checkpointing activation_checkpointing_kwargs activation_offloading gradient_checkpointing
    gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
    use_cache
"""
WITHOUT_EFFECT = frozenset(" ".join((REPORTS, SAVING, SCORING, MACHINE)).split())
# hfpipe's own defaults, where the arguments' class has another; None of those that depend on the machine or the length.
OWN_DEFAULTS = {
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "average_tokens_across_devices": True,
    "per_device_train_batch_size": 8,
    "bf16": None,
    "fp16": None,
    "tf32": None,
    "warmup_steps": None,
    "max_length": None,
}
# Schedules whose learning rate at a step does not depend on how many steps there are.
OPEN_ENDED = ("constant", "constant_with_warmup", "inverse_sqrt")


def versions_aside(folder: Path) -> list[Path]:
    """The folders of other versions of a stage that were moved aside, in the order of their names."""
    others = folder.parent.glob(f"{folder.name}.*") if folder.parent.is_dir() else ()
    return sorted(path for path in others if read_json(path / STAGE).get("hash"))


def move_aside(folder: Path) -> Path:
    """Moves a stage folder aside and returns where it is now."""
    name = f"{folder.name}.{str(read_json(folder / STAGE).get('hash', 'unknown'))[:8]}"
    places = [folder.with_name(name), *(folder.with_name(f"{name}-{number}") for number in range(2, 1000))]
    aside = next(place for place in places if not place.exists())
    os.replace(folder, aside)
    return aside


@dataclass(frozen=True)
class Version:
    """One version of a stage.

    Args:
        hash: Identifies what it leaves.
        any_length: The same for all versions that differ in the number of their steps only.
        bound: Why a longer version is another training from its first step on; None where it is not.
    """

    hash: str
    any_length: str
    bound: str | None

    @property
    def trajectory(self) -> str:
        """The same for all versions whose checkpoints it can go on from."""
        return self.hash if self.bound else self.any_length


def take_up(folder: Path, version: Version) -> list[str]:
    """Makes the folder of a stage that of the version that is asked for.

    Args:
        folder: `stages/<stage>`.
        version: The version.

    Returns:
        Lines that say what was done, for the log.
    """
    lines = []
    found = read_json(folder / STAGE)
    if found.get("hash") == version.hash and (folder / "done.json").exists():
        damage = damage_of(folder / MODEL)
        if damage is None:
            return []
        lines += _set_aside_damaged(folder, version, damage)
        found = {}
    elif found.get("hash") == version.hash:
        return []
    if found:
        lines.append(f"the recipe has changed; the earlier work is now in {move_aside(folder)}")
        if found.get("any_length") == version.any_length and version.bound:
            lines.append(f"only its length has changed, but {version.bound}: it is trained from its beginning")
    aside = versions_aside(folder)
    for earlier in aside:
        if read_json(earlier / STAGE)["hash"] == version.hash:
            os.replace(earlier, folder)
            return [*lines, f"what this recipe trained before is back from {earlier}"]
    for earlier in () if version.bound else sorted(aside, key=_steps_of):  # the log of the longest is kept
        if read_json(earlier / STAGE).get("any_length") == version.any_length and _lend(earlier, folder, version):
            lines.append(f"it differs from {earlier} in its length only, and may go on from its checkpoints")
    write_json(folder / STAGE, {"hash": version.hash, "any_length": version.any_length})
    return lines


def _steps_of(folder: Path) -> int:
    """Steps of the newest checkpoint of a stage folder; 0 without one."""
    return max(map(step_of, by_step(folder)), default=0)


def _set_aside_damaged(folder: Path, version: Version, damage: str) -> list[str]:
    """Moves a finished stage aside whose weights are not those that were trained, so that it is trained again.

    Raises:
        MachineError: Only another file has changed, which may have been meant.
    """
    if ".safetensors" not in damage.split()[0]:
        raise MachineError(
            f"{folder / MODEL} is not what the stage wrote: {damage}. Put the file back, or, to train the stage again, "
            f"move the folder away: mv {folder} {folder}.old"
        )
    aside = move_aside(folder)
    write_json(aside / STAGE, {"hash": f"damaged-{version.hash}", "damaged": version.hash})
    _lend(aside, folder, version)
    return [f"the finished stage is damaged ({damage}), so it is trained again; what is left of it is now in {aside}"]


def _lend(earlier: Path, folder: Path, version: Version) -> bool:
    """Gives a stage folder the checkpoints of another version that it can go on from, with their log and cost."""
    checkpoints = [one for one in by_step(earlier) if version_of(one) in (version.hash, version.trajectory)]
    for checkpoint in checkpoints:
        if not (folder / checkpoint.name).exists():
            with whole_folder(folder / checkpoint.name) as beside:
                for file in filter(Path.is_file, checkpoint.rglob("*")):
                    link_or_copy(file, beside / file.relative_to(checkpoint))
    if checkpoints and (earlier / "log.jsonl").exists():
        shutil.copyfile(earlier / "log.jsonl", folder / "log.jsonl")
    if checkpoints and (cost := read_json(earlier / "cost.json")):
        write_json(folder / "cost.json", cost | {"stage": version.hash})
    return bool(checkpoints)


def forget_checkpoints(folder: Path, version: Version) -> None:
    """Removes the checkpoints of a finished stage, but the newest that a longer version could go on from."""
    kept = next((one for one in by_step(folder) if not version.bound and version_of(one) == version.trajectory), None)
    for checkpoint in by_step(folder):
        if checkpoint != kept:
            shutil.rmtree(checkpoint, ignore_errors=True)


def identity(stage: Stage, *, with_length: bool = True) -> Any:
    """Returns what decides the weights of a stage, beside its parent and the seed, as something to be hashed.

    Args:
        stage: The stage.
        with_length: Whether the number of its steps or epochs belongs to it.
    """
    training = dict(stage.training)
    # With early stopping the best of the checkpoints that are scored becomes the model.
    words = WITHOUT_EFFECT - ({"eval_steps", "eval_delay"} if stage.early_stopping is not None else set())
    per_device = training.pop("per_device_train_batch_size", OWN_DEFAULTS["per_device_train_batch_size"])
    rows = stage.global_batch_size or per_device * training.pop("gradient_accumulation_steps", 1)
    if training.get("max_steps", -1) > 0:
        training.pop("num_train_epochs", None)
    else:
        training.pop("max_steps", None)
    counted = {
        key: _plain_number(value)
        for key, value in training.items()
        if key not in words and (with_length or key not in LENGTH) and value != _default(stage.kind, key)
    }
    unsaid = {
        "global_batch_size": None,
        "max_dirty_share": 0.01,
        **({"samples": None} if hasattr(stage, "samples") else {}),
    }
    plain = stage.model_copy(update={"training": counted, **unsaid})
    return [plain, rows, stage.global_batch_size is None]


def _default(kind: str, key: str) -> Any:
    """The value that a word has where the recipe does not say it."""
    if key in OWN_DEFAULTS:
        return OWN_DEFAULTS[key]
    field = (training_fields(kind) or {}).get(key)
    return field.default if field else None


def _plain_number(value: Any) -> Any:
    """1.0 as 1: a recipe may write either."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def bound_to_length(stage: Stage) -> str | None:
    """Returns why a longer training of a stage differs from its first step on; None where it only goes on longer."""
    schedule = str(stage.training.get("lr_scheduler_type", OWN_DEFAULTS["lr_scheduler_type"]))
    warmup = stage.training.get("warmup_steps")
    if stage.early_stopping is not None:
        return "early_stopping scores it at steps that follow from its length"
    if schedule not in OPEN_ENDED:
        return (
            f"the schedule `{schedule}` plans the learning rate up to the last step (lr_scheduler_type: constant, "
            "constant_with_warmup and inverse_sqrt do not, and go on from a checkpoint)"
        )
    if schedule != "constant" and not (isinstance(warmup, int) and warmup >= 1):
        return "its warmup is a share of the steps (with `warmup_steps: NUMBER` it would go on from a checkpoint)"
    if isinstance(stage, Pretrain) and (stage.exhausted == "stop" or not stage.training.get("max_steps")):
        return "the end of the data is packed otherwise (with max_steps and `exhausted: repeat` it would go on)"
    makes_texts = stage.kept.replay is not None and stage.kept.replay.rows is None
    if makes_texts and stage.training.get("max_steps", -1) > 0:
        return "its parent makes as many texts as its length has room for (with `rows: NUMBER` it would go on)"
    if any(source.cleaned and source.passed_through.get("streaming") for source in stage.data):
        return "its streams are cleaned as far as they are read"
    return None
