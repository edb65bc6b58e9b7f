"""Blocks that go to a library as they stand, checked against that library's own signature."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hfpipe.recipe.annotations import explain, fits
from hfpipe.recipe.config import Model, Suite, Tokenizer
from hfpipe.recipe.faults import Fault, did_you_mean, found_and_allowed
from hfpipe.recipe.foreign_words import our_word
from hfpipe.recipe.raw import Block, RawStage, stages, suites
from hfpipe.recipe.signatures import (
    Field,
    Fields,
    config_fields,
    generation_fields,
    load_dataset_fields,
    lora_fields,
    masking_fields,
    model_types,
    muon_fields,
    peft_fields,
    peft_types,
    tokenizer_fields,
    training_fields,
)
from hfpipe.recipe.source_config import Source
from hfpipe.recipe.stage_config import KINDS


def check_passed_through(data: dict[str, Any]) -> Iterator[Fault]:
    """Yields the faults of every block that is passed through."""
    for stage in stages(data):
        yield from _check_training(stage)
        training = {"below `training:`": _training_of(stage)}
        yield from check_block(stage.at("lora"), lora_fields(), "LoraConfig", training)
        yield from check_block(stage.at("muon"), muon_fields(), "torch.optim.Muon", training)
        yield from check_block(stage.at("masking"), masking_fields(), "DataCollatorForLanguageModeling", training)
        peft = stage.at("peft")
        kind = str(peft.data.get("type"))
        fields = Block(peft.steps, {key: value for key, value in peft.data.items() if key != "type"})
        yield from check_block(fields, peft_fields(kind), peft_types().get(kind, ""), training)
        for source in stage.sources:
            yield from _check_source(source)
    for suite in suites(data):
        yield from _check_source(suite.source)
        if suite.data.get("generation"):
            yield from check_block(suite.at("generation"), generation_fields(), "GenerationConfig")
    model = Block((), data).at("model")
    yield from _check_architecture(model.at("architecture"))
    yield from check_config(model, _type_in(model.data.get("id")))
    tokenizer = model.at("tokenizer")
    words = {key: value for key, value in tokenizer.data.items() if key not in Tokenizer.model_fields}
    if words and (taken := tokenizer_fields()) is not None:
        taken = {name: Field(name) for name in Tokenizer.model_fields} | taken
        yield from check_block(Block(tokenizer.steps, words), taken, "`tokenizer`")


def check_block(
    block: Block,
    fields: Fields | None,
    owner: str,
    elsewhere: Mapping[str, Callable[[], Fields | None]] | None = None,
    *,
    exact: bool = False,
) -> Iterator[Fault]:
    """Yields the unknown keys and the values of a wrong type of a block.

    Args:
        block: The block.
        fields: What its class takes; None where that is not known, and nothing is checked.
        owner: The class, for the message.
        elsewhere: Blocks beside this one that a stray key may belong to, and their fields.
        exact: Whether the class takes no whole number for a float.
    """
    if fields is None:
        return
    for key, value in block.data.items():
        steps = (*block.steps, key)
        if key not in fields:
            home = next((name for name, of in (elsewhere or {}).items() if key in (of() or {})), None)
            if home:
                hint = f" It belongs {home}."
            else:
                hint = f" Here it is {ours}." if (ours := our_word(key)) else did_you_mean(key, fields)
            yield Fault(steps, f"unknown key of {owner}.{hint}")
        elif not fits(value, fields[key].kinds, exact=exact):
            yield Fault(steps, explain(value, fields[key].kinds))


SAVING = {
    "save_minutes": Field(
        "save_minutes", ast.Constant("float"), help="minutes since the last checkpoint after which another is saved"
    )
}


def stage_fields(kind: str) -> Fields | None:
    """Returns the fields of `training` of a stage: its arguments class's, and keys of hfpipe's own that it lacks."""
    fields = training_fields(kind)
    return None if fields is None else length_fields(kind) | SAVING | fields


def length_fields(kind: str) -> dict[str, Field]:
    """Returns the lengths that `training` of a stage takes, in tokens, also where its arguments class has none."""
    whole = ast.Constant("int")
    if kind == "translation":
        return {
            "max_length": Field("max_length", whole, help="tokens of a source at most"),
            "max_target_length": Field("max_target_length", whole, help="tokens of a target at most"),
        }
    others = KINDS[kind].LENGTHS.items() if kind in KINDS else ()
    fields = {name: Field(name, ast.Constant("int | None"), help=told) for name, told in others}
    return {"max_length": Field("max_length", whole, help="tokens of a row at most")} | fields


def _training_of(stage: RawStage) -> Callable[[], Fields | None]:
    return lambda: training_fields(stage.kind) if stage.kind else None


def _check_training(stage: RawStage) -> Iterator[Fault]:
    if stage.kind is None:
        return
    fields = stage_fields(stage.kind)
    words = KINDS[stage.kind].model_fields
    elsewhere: dict[str, Callable[[], Fields | None]] = {
        "below `lora:`": lora_fields,
        "to the stage, beside `training:`": lambda: {name: Field(name) for name in words},
    }
    if stage.kind != "sft":
        elsewhere["to kind: sft"] = lambda: training_fields("sft")
    yield from check_block(stage.at("training"), fields, KINDS[stage.kind].ARGUMENTS[1], elsewhere)


def _check_source(source: Block) -> Iterator[Fault]:
    passed = {key: value for key, value in source.data.items() if key not in Source.model_fields}
    path = source.data.get("path")
    if isinstance(source.data.get("columns"), list) and path != "builtin":
        passed["columns"] = source.data["columns"]  # Parquet's own `columns`
    fields = load_dataset_fields()
    if path == "builtin":
        fields = {name: field for name, field in (fields or {}).items() if name in ("name", "split")}
    elif fields is not None and not passed.keys() <= fields.keys():
        fields = load_dataset_fields(str(path))
    if "split" in passed and not isinstance(passed["split"], str | None):
        allowed = "text, such as train, or train[:1000]; several splits are joined by '+': train+validation"
        yield Fault((*source.steps, "split"), found_and_allowed(passed.pop("split"), allowed))
    owner = "`path: builtin`" if path == "builtin" else "a source or of load_dataset"
    if fields is not None:
        own = {name: Field(name) for name in Source.model_fields if name != "columns"}
        yield from check_block(Block(source.steps, passed), own | fields, owner, _beside(source))


def _beside(source: Block) -> dict[str, Callable[[], Fields | None]]:
    """The right place of a key that a source has and does not take."""
    if source.steps[0] == "evaluate":
        return {"to the suite, beside `data:`": lambda: {name: Field(name) for name in Suite.model_fields}}
    words = [name for kind in KINDS.values() for name in kind.model_fields]
    return {
        "to the stage, beside `data:`": lambda: {name: Field(name) for name in words},
        "to the stage, below `training:`": lambda: stage_fields("sft"),
        "below `model:`": lambda: {name: Field(name) for name in Model.model_fields if name != "id"},
    }


def check_config(model: Block, model_type: str | None) -> Iterator[Fault]:
    """Yields the unknown fields of `model.config`, and values of a wrong type.

    Args:
        model: The block `model`.
        model_type: Of the model that is loaded; None where that is not known yet.
    """
    changes = model.at("config")
    if "model_type" in changes.data:
        yield Fault((*changes.steps, "model_type"), "is what the model is, and cannot be changed. Remove it.")
    elif changes.data and model_type is not None:
        fields = config_fields(model_type)
        rope = (
            {"rope_scaling": Field("rope_scaling", ast.Constant("dict"))} if "rope_parameters" in (fields or {}) else {}
        )
        yield from check_block(changes, fields and fields | rope, f"the {model_type} config", exact=True)


def _type_in(folder: Any) -> str | None:
    """The type of the model in a folder; of one on the Hub it is known once its config is loaded."""
    try:
        config = json.loads((Path(folder) / "config.json").read_bytes()) if isinstance(folder, str) else None
    except (OSError, ValueError, RecursionError):
        return None
    found = config.get("model_type") if isinstance(config, dict) else None
    return found if isinstance(found, str) else None


def _check_architecture(architecture: Block) -> Iterator[Fault]:
    model_type, named = (architecture.data.get(key) for key in ("model_type", "from"))
    if named is not None and (not isinstance(named, str) or not named):
        yield Fault((*architecture.steps, "from"), found_and_allowed(named, "text, such as Qwen/Qwen3-0.6B"))
    if model_type is None:
        return
    if not isinstance(model_type, str):
        yield Fault((*architecture.steps, "model_type"), found_and_allowed(model_type, "text, such as llama"))
        return
    fields = config_fields(model_type)
    if fields is None and model_types() and model_type not in model_types():
        near = did_you_mean(model_type, model_types())
        yield Fault(
            (*architecture.steps, "model_type"), f"found '{model_type}', which transformers does not know.{near}"
        )
    own = Block(architecture.steps, {key: value for key, value in architecture.data.items() if key != "from"})
    yield from check_block(own, fields, f"the {model_type} config", exact=True)
