"""JSON Schema of a recipe, with the libraries' own fields in it, so that an editor completes and checks them."""

from __future__ import annotations

from typing import Any

from hfpipe.recipe.annotations import json_schema_of
from hfpipe.recipe.config import Recipe
from hfpipe.recipe.passthrough import stage_fields
from hfpipe.recipe.signatures import (
    UNKNOWN,
    Field,
    Fields,
    generation_fields,
    load_dataset_fields,
    lora_fields,
    masking_fields,
    muon_fields,
    peft_types,
    tokenizer_fields,
)
from hfpipe.recipe.stage_config import KINDS


def json_schema() -> dict[str, Any]:
    """The schema (draft 2020-12). It takes all that `load_recipe` takes; rules over several keys are not in it."""
    schema = Recipe.model_json_schema()
    blocks = schema["$defs"]
    for kind, words in KINDS.items():
        properties = blocks[words.__name__]["properties"]
        _close(properties["training"], stage_fields(kind))
        _close(properties["lora"]["anyOf"][0], lora_fields())
        _close(properties["muon"]["anyOf"][0], muon_fields())
        peft = properties["peft"]["anyOf"][0]  # the fields depend on the type; `check` looks at them
        peft["properties"], peft["required"] = {"type": {"enum": list(peft_types())}}, ["type"]
    _close(blocks["Pretrain"]["properties"]["masking"]["anyOf"][0], masking_fields())
    _close(blocks["Suite"]["properties"]["generation"], generation_fields())
    if (taken := tokenizer_fields()) is not None:
        tokenizer = blocks["Tokenizer"]
        tokenizer["properties"] |= {name: _schema_of(field) for name, field in taken.items()}
        tokenizer["additionalProperties"] = False
    passed = load_dataset_fields("any path")
    if passed is not None:
        source = blocks["Source"]
        source["properties"] |= {
            name: _schema_of(field) for name, field in passed.items() if name not in source["properties"]
        }
        source["additionalProperties"] = False
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "hfpipe recipe", **schema}


def _close(block: dict[str, Any], fields: Fields | None) -> None:
    """Gives a block of free keys the fields of its class, and no others."""
    if fields is not None:
        block["properties"] = {name: _schema_of(field) for name, field in fields.items()}
        block["additionalProperties"] = False


def _schema_of(field: Field) -> dict[str, Any]:
    schema = dict(json_schema_of(field.kinds))
    if field.help:
        schema["description"] = field.help
    if field.default is not UNKNOWN and field.default is not None:
        schema["default"] = field.default
    return schema
