"""Saving what a stage trained: tried before the first step, written in one piece, loaded again, and compared."""

from __future__ import annotations

import gc
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from hfpipe.core import ranks
from hfpipe.core.errors import DataError, RecipeError
from hfpipe.core.files import load_json, whole_folder, write_json
from hfpipe.core.run_layout import ADAPTER_CONFIG
from hfpipe.core.upstream import override
from hfpipe.model.adapter import (
    TOLERANCE,
    adapter_state,
    give_back,
    probe,
    require_equal,
    save_adapter,
    verify_tensors,
)
from hfpipe.model.classifier import is_classifier
from hfpipe.model.load import grows, load_model
from hfpipe.model.parts import verify_parts, write_parts
from hfpipe.model.spread import state_of_whole_ends
from hfpipe.stages.stage_run import StageRun

SAMPLING = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty")


def make_saveable(model: Any) -> None:
    """Takes words out of a model's generation config that have no effect and keep it from being saved.

    transformers loads a config that names a temperature without `do_sample`, which generation ignores, and refuses to
    save it once anything in it has changed, as the token ids do when training begins.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "generation_config", None)
    if config is None:
        return
    unused = [*(SAMPLING if not config.do_sample else ()), *(BEAMS if (config.num_beams or 1) == 1 else ())]
    try:
        config.validate(strict=True)
        return
    except ValueError:
        dropped = [word for word in unused if getattr(config, word, None) is not None]
    for word in dropped:
        setattr(config, word, None)
    if dropped:
        ranks.say(
            f"  the generation config of the base sets {', '.join(dropped)} without do_sample or beams, which has no "
            "effect and cannot be saved: the trained model leaves it out"
        )


def rehearse(run: StageRun, model: Any, *, sharded: bool) -> None:
    """Writes everything that is written at the end, without weights, to a folder that is removed again.

    Args:
        run: The stage.
        model: What is trained, without the wrappers of the trainer.
        sharded: Whether its weights are spread over ranks, which save them together.

    Raises:
        RecipeError: Something cannot be saved.
    """
    ranks.on_main(lambda: _rehearse(run, model, sharded))


def _rehearse(run: StageRun, model: Any, sharded: bool) -> None:
    place = run.folder / ".rehearsal.writing"  # as of a folder that was cut short: it may stay after a kill
    base = model.get_base_model() if run.stage.adapter is not None else model
    try:
        if run.stage.adapter is not None:
            model.peft_config["default"].save_pretrained(str(place))
            _record_base(place, run)
        elif sharded:
            base.config.save_pretrained(place)
        else:
            base.save_pretrained(place, state_dict={})
        if getattr(base, "generation_config", None) is not None:
            base.generation_config.save_pretrained(place)
        run.tokenizer.save_pretrained(place)
        write_json(place / "done.json", {"hash": run.hash})
    except (ValueError, TypeError, AttributeError, NotImplementedError, KeyError) as error:
        raise RecipeError(
            f"stages.{run.stage.name}: what it trains could not be saved: {' '.join(str(error).split()).rstrip('.')}. "
            "Nothing was trained. Correct the config or the tokenizer of the base, or take another base."
        ) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def save(run: StageRun, trainer: Trainer, original: dict[str, torch.Tensor], *, in_parts: bool) -> None:
    """Writes the trained model or adapter in one piece, loads it again from disk, and compares it with the trained one.

    Optimizer, gradients and weights of the trainer are let go before the model is loaded again: the end of a training
    takes no more memory than the training. The trainer cannot be used after it.

    Args:
        run: The stage.
        trainer: Has the trained model.
        original: The first weights of an adapter whose making changed the base, see `original_state`.
        in_parts: Whether the model was read in parts; one that accelerate has divided is spread by now, too.

    Raises:
        DataError: What was trained gives no numbers.
        RuntimeError: What is on disk is not what was trained.
    """
    if in_parts:
        _save_spread(run, trainer, original)
        return
    target = run.folder / "model"
    sharded = is_sharded(trainer)
    with torch.no_grad():
        # Without autocast, which the trainer wraps around a forward pass (bf16, fp16): what is loaded has none.
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
        trained = None if sharded else probe(model, run.tokenizer, run.probe_texts)
    if trained is not None and trained.isnan().any():
        raise DataError(
            f"stages.{run.stage.name}: after its last step the model's answers are no longer numbers: its weights have "
            "grown too large. Nothing was saved. Lower learning_rate (that is another training, from its first step)."
        )
    if not ranks.is_main() and not sharded:
        let_go(trainer, model)
        ranks.wait()
        return
    with whole_folder(target if ranks.is_main() else run.folder / f"rank{ranks.rank()}") as beside:
        if run.stage.adapter is not None and not sharded:
            save_adapter(model, beside, original, grown=grows(run.parent))
        else:
            if sharded and run.stage.adapter is None:
                _leave_out_tied(trainer, model)
            trainer.save_model(str(beside))
        (beside / "training_args.bin").unlink(missing_ok=True)  # a pickle, which no one should have to load
        run.tokenizer.save_pretrained(beside)
        if run.stage.adapter is not None and ranks.is_main():
            if sharded:
                give_back(model, beside, original)
            _record_base(beside, run)
            expected = None if sharded else adapter_state(model, original, grown=grows(run.parent))
            verify_tensors(beside, expected)
            if is_classifier(model):
                model.config.save_pretrained(beside)  # the classes, which an adapter's own config does not name
        if trained is not None:
            dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
            coarsest = max(dtypes, key=lambda dtype: TOLERANCE.get(dtype, 0))
            let_go(trainer, model)
            saved = replace(run.parent, path=str(beside), revision=None)
            again = load_model(saved, frozen=run.stage.adapter is not None)
            require_equal(trained, probe(again, run.tokenizer, run.probe_texts), coarsest, f"stage {run.stage.name}")
    ranks.wait()


def _leave_out_tied(trainer: Trainer, model: Any) -> None:
    """Keeps a weight of several names, gathered once for each, from being saved more than once."""
    gather, tied = trainer.accelerator.get_state_dict, set(model.all_tied_weights_keys)

    def once(*arguments: Any, **words: Any) -> dict[str, torch.Tensor] | None:
        gathered = gather(*arguments, **words)  # None on all but the main process under ZeRO-3
        return gathered and {name: tensor for name, tensor in gathered.items() if name not in tied}

    override(trainer.accelerator, get_state_dict=once)


def _save_spread(run: StageRun, trainer: Trainer, original: dict[str, torch.Tensor]) -> None:
    """Writes a model whose weights are spread over the ranks, and compares the files with it, tensor by tensor."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    grown = run.stage.adapter is not None and grows(run.parent)
    state = state_of_whole_ends(model) if grown else None
    with whole_folder(run.folder / "model") if ranks.is_main() else nullcontext(run.folder) as beside:
        if run.stage.adapter is None:
            write_parts(model, beside)
            verify_parts(model, beside)
        elif ranks.is_main():
            save_adapter(model, beside, original, grown=grown, state=state)
            verify_tensors(beside, adapter_state(model, original, grown=grown, state=state))
            _record_base(beside, run)
            if is_classifier(model):
                model.config.save_pretrained(beside)
        if ranks.is_main():
            run.tokenizer.save_pretrained(beside)
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.optimizer = None  # type: ignore[assignment]
    ranks.wait()


def is_sharded(trainer: Trainer) -> bool:
    """Returns True if the weights are spread over the ranks."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def let_go(trainer: Trainer, model: Any) -> None:
    """Frees the memory of optimizer, gradients and weights, whoever still has a reference to them."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if optimizer is not None:
        optimizer.state.clear()
    trainer.accelerator.free_memory()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.grad = None
        tensor.data = torch.empty(0, dtype=tensor.dtype)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _record_base(folder: Path, run: StageRun) -> None:
    """Names the base in adapter_config.json as others can load it: by Hub id and commit, or a folder's full path."""
    path = folder / ADAPTER_CONFIG
    config = load_json(path)
    local = Path(run.parent.path)
    config["base_model_name_or_path"] = str(local.absolute()) if local.is_dir() else run.parent.path
    config["revision"] = run.parent.revision
    for modules in ("target_modules", "exclude_modules"):  # sets to PEFT, whose order is another in each process
        if isinstance(config.get(modules), list):
            config[modules].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
