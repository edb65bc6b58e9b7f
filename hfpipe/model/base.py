"""The base of a run: found on the Hub and pinned to its commit, or made from nothing; prepared once, then read.

A base that cannot be loaded as the stages ask is refused by its config and the names of its files, before any weight.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file, extract_commit_hash, has_file

from hfpipe.core import ranks
from hfpipe.core.errors import DataError, MachineError, RecipeError
from hfpipe.core.files import read_json, whole_folder, write_json
from hfpipe.data.cleaning.text_rules import Read, tidy_rows
from hfpipe.data.sources.load import load_rows
from hfpipe.model.create import architecture_of, create_model, train_tokenizer
from hfpipe.model.load import (
    AUTO_CLASSES,
    ModelRef,
    config_of,
    task_of,
    task_of_type,
)
from hfpipe.model.load_errors import clear_errors, pickles_only, require_token_ids
from hfpipe.model.tokenizer import added_ids, load_tokenizer, prepare_tokenizer, template_warning
from hfpipe.recipe import Recipe, TokenizerTraining, hash_of
from hfpipe.recipe.config import Model
from hfpipe.recipe.row_formats import formats_of_stage, texts_of


@dataclass(frozen=True)
class PreparedBase:
    """The base model, ready to be loaded.

    Args:
        ref: Where it is.
        tokenizer: The run's tokenizer.
        added: Ids of the tokens that the base knows nothing of.
        hash: Identifies the base; part of the hash of every stage.
        pinned: Changes to the recipe's model block that make it name this very commit.
    """

    ref: ModelRef
    tokenizer: Any
    added: tuple[int, ...]
    hash: str
    pinned: dict[str, Any]


def prepare_base(recipe: Recipe, folder: Path) -> PreparedBase:
    """Makes or finds the base model and its tokenizer.

    Args:
        recipe: The recipe.
        folder: `stages/base` in the run folder; a fresh model is written there.

    Raises:
        UserError: The model or tokenizer cannot be had.
    """
    options = recipe.model
    done = folder / "done.json"
    unpinned = options.model_copy(update={"revision": "main"})
    key = hash_of([unpinned, recipe.seed, recipe.stages[0].data] if options.architecture else unpinned)
    known = read_json(done)
    if known.get("hash") != key or options.revision not in (known["revision"], known["commit"]):
        if options.architecture is not None:
            if ranks.is_main():
                _create(recipe, folder / "model")
            commit = None
        else:
            commit = ranks.on_main(partial(_commit_of, options.id or "", options.revision, options))
        known = {"hash": key, "revision": options.revision, "commit": commit}
        ranks.wait()
        if ranks.is_main():
            write_json(done, known)
    commit = known["commit"]  # of the first start: a branch that moves on does not change a run under way
    ref = (
        ModelRef(str(folder / "model"), options)
        if options.architecture is not None
        else ModelRef(options.id or "", options, revision=commit)
    )
    # The Hub counts the requests of all ranks together; what needs code of the Hub cannot be sent.
    make = partial(_tokenizer, recipe, ref)
    tokenizer = make() if options.trust_remote_code else ranks.on_main(make)
    if warning := template_warning(tokenizer, options.tokenizer):
        ranks.say(f"warning: {warning}", "warning")
    added = added_ids(tokenizer, options.tokenizer, rows_of_embeddings(ref))
    pinned = {"revision": commit} if commit else {}
    return PreparedBase(replace(ref, vocabulary=len(tokenizer)), tokenizer, added, hash_of([key, commit]), pinned)


def rows_of_embeddings(ref: ModelRef) -> int:
    """Returns the rows of the embeddings of a model, by its config."""
    return config_of(ref).get_text_config().vocab_size


def _create(recipe: Recipe, folder: Path) -> None:
    """Trains the tokenizer where the recipe asks for it, and writes a model with fresh weights."""
    block, architecture = recipe.model.tokenizer, architecture_of(recipe.model)
    assert block is not None  # the recipe's check requires it with an architecture
    task = task_of_type(str(architecture.get("model_type")))
    if block.train is not None:
        context = architecture.get("max_position_embeddings", 1024)
        texts = texts_for_tokenizer(recipe, block.train)
        tokenizer: Any = train_tokenizer(texts, block.train.vocab_size, context, task)
    else:
        words = block.passed_through
        tokenizer = load_tokenizer(block.id or "", revision=block.revision, task=task, words=words)
    prepare_tokenizer(tokenizer, block)
    model = create_model(architecture, tokenizer, recipe.seed)
    with whole_folder(folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    ranks.say(f"base: {model.num_parameters():,} fresh parameters, {len(tokenizer):,} tokens")


def texts_for_tokenizer(recipe: Recipe, training: TokenizerTraining) -> Iterator[str]:
    """The first documents of each source of the first stage."""
    stage = recipe.stages[0]
    for source in stage.data:
        rows = load_rows(source, kinds=formats_of_stage(stage.kind))
        for row in islice(tidy_rows(rows, source, Read()), training.take):
            yield from texts_of(row)


def _tokenizer(recipe: Recipe, ref: ModelRef) -> Any:
    block, task = recipe.model.tokenizer, task_of(ref)
    trust, words = recipe.model.trust_remote_code, block.passed_through if block is not None else {}
    path, revision = (ref.path, ref.revision) if block is None or block.id is None else (block.id, block.revision)
    tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust, task=task, words=words)
    prepare_tokenizer(tokenizer, block)
    if len(tokenizer) == 0:
        raise DataError(f"the tokenizer of {ref.path} has no tokens.")
    return tokenizer


def require_task(recipe: Recipe, task: str) -> None:
    """Refuses a stage that trains the base for something that it is not made for; a classifier's head fits any.

    Args:
        recipe: The recipe.
        task: What the base is for, a key of `AUTO_CLASSES`.

    Raises:
        RecipeError: A stage of next tokens starts from an encoder, a masked one from a decoder, and the like.
    """
    remedies = {
        "masked": "It is an encoder: train it by `objective: masked` (kind: pretrain), or by kind: classification.",
        "causal": "It says the next token: train it by `objective: causal` (kind: pretrain), or by kind: sft.",
        "seq2seq": "It is an encoder-decoder model, which reads a source and says a target: take kind: translation.",
    }
    for number, stage in enumerate(recipe.stages):
        from_base = stage.parent == "base" or (stage.parent is None and number == 0)
        if from_base and stage.task not in ("classification", task):
            raise RecipeError(
                f"stages.{stage.name} (kind: {stage.kind}) trains a {stage.task} language model, and the base "
                f"{recipe.model.id or 'from nothing'} is made for another task, {task}. "
                + remedies.get(task, "Take the model that it was made from.")
            )


def _commit_of(path: str, revision: str, options: Model) -> str | None:
    """The commit a branch of a Hub model stands at; None for a folder."""
    with clear_errors("model", path):
        config_of(ModelRef(path, options, revision))
        return extract_commit_hash(cached_file(path, "config.json", revision=revision), None)


LEAST_LINEAR = 0.5  # share of the weights beside the embeddings that quantization must reach


def require_loadable(recipe: Recipe) -> None:
    """Refuses a base that a stage could not load, or not as the recipe asks.

    Raises:
        RecipeError: The base is quantized already, and a stage trains all weights or quantizes them again; its weights
            are pickles; or quantization would leave most of them as they are.
        MachineError: A stage quantizes, and bitsandbytes is not installed.
    """
    quantized = [stage.name for stage in recipe.stages if stage.quantized]
    needing = [f"{name}.quantization" for name in quantized]
    needing += [f"{stage.name}.keep.kl.parent" for stage in recipe.stages if stage.kept.kl and stage.kept.kl.parent]
    if needing and importlib.util.find_spec("bitsandbytes") is None:
        raise MachineError(
            f"stages.{needing[0]} needs bitsandbytes, which is not installed: pip install 'hfpipe[quantization]'. Or "
            f"remove `{needing[0].rpartition('.')[2]}`."
        )
    options = recipe.model
    if options.id is None:
        return
    config = config_of(ModelRef(options.id, options, revision=options.revision))
    _require_unquantized(recipe, config)
    with clear_errors("model", options.id):
        pickled, safe = (
            any(has_file(options.id, name, revision=options.revision) for name in names)
            for names in ((WEIGHTS_NAME, WEIGHTS_INDEX_NAME), (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
        )
    if pickled and not safe:
        raise RecipeError(pickles_only(options.id))
    if not safe:
        raise RecipeError(
            f"model {options.id!r} has no weights ({SAFE_WEIGHTS_NAME}). Name a model that has, or start from nothing "
            "by `model: {architecture: ...}`."
        )
    if quantized:
        _require_linear(recipe, quantized[0], config)


def _require_unquantized(recipe: Recipe, config: Any) -> None:
    block = getattr(config, "quantization_config", None)
    for stage in recipe.stages if block is not None else ():
        if stage.adapter is not None and stage.quantized is None:
            continue
        method = block.get("quant_method", "") if isinstance(block, dict) else getattr(block, "quant_method", "")
        found = "quantizes it again" if stage.quantized else "trains all of its weights, which cannot be trained"
        remedy = "Remove `quantization`" if stage.quantized else "Add `lora: {r: 16}`"
        raise RecipeError(
            f"stages.{stage.name}: the base {recipe.model.id!r} is quantized already ({method}), and this stage "
            f"{found}. {remedy}, or start from the model in full precision."
        )


def _require_linear(recipe: Recipe, stage: str, config: Any) -> None:
    """bitsandbytes quantizes linear layers alone; the experts of a mixture, for one, are none to transformers."""
    model = shapes_of(ModelRef(recipe.model.id or "", recipe.model, revision=recipe.model.revision))
    ends = {id(end.weight): end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end}
    layers = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    linear = sum(weight.numel() for weight in layers if id(weight) not in ends)
    whole = model.num_parameters() - sum(weight.numel() for weight in ends.values())
    if linear < LEAST_LINEAR * whole:
        raise RecipeError(
            f"stages.{stage}.quantization: bitsandbytes quantizes linear layers alone, and {linear / whole:.0%} of "
            f"the weights of {recipe.model.id!r} ({config.model_type}) are in one, the embeddings aside. The rest "
            "would take the memory that it takes now. Remove `quantization`, or take another model."
        )


def shapes_of(ref: ModelRef) -> Any:
    """The model of a `ModelRef` without its weights: on torch's meta device, where nothing takes memory."""
    config = config_of(ref)
    with clear_errors("model", ref.path), torch.device("meta"):
        model = AUTO_CLASSES[task_of(ref)].from_config(config, trust_remote_code=ref.options.trust_remote_code)
    if model.can_generate():
        with clear_errors("model", ref.path), suppress(OSError):  # many models have no such file
            model.generation_config = GenerationConfig.from_pretrained(ref.path, revision=ref.revision or "main")
        require_token_ids(model, ref.path)
    return model
