"""The Hub's demands on the metadata of a model card: its `validate-yaml`, as far as the cards of models go."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

BLOCK = re.compile(r"^(?:\s*)---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", re.S)
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?")
LANGUAGES = re.compile(r"[a-z]{2,3}|code|multilingual")
RELATIONS = ("adapter", "finetune", "merge", "quantized", "draft", "speculator")
TASKS = ("text-generation", "text-classification", "fill-mask", "translation", "summarization", "token-classification")
# The names that the Hub offers: https://huggingface.co/docs/hub/repositories-licenses
NAMES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 afl-3.0 artistic-2.0
bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0
cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c
ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 ofl-1.1 postgresql unlicense zlib pddl ncsa deepfloyd-if-license llama2
llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other
"""
LICENSES = frozenset(NAMES.split())


def faults_of(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of a README.md."""
    block = BLOCK.match(content)
    if block is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], []
    return (list(_errors(data)), []) if isinstance(data, dict) else (["the metadata is not a mapping"], [])


def _errors(data: dict[str, Any]) -> Iterator[str]:
    for key, pattern in (("base_model", REPO_ID), ("datasets", REPO_ID), ("language", LANGUAGES)):
        for value in _list(data.get(key)):
            if not (isinstance(value, str) and pattern.fullmatch(value)):
                yield f'"{key}" with value "{value}" is not valid.'
    for key, allowed in (("license", LICENSES), ("base_model_relation", RELATIONS), ("pipeline_tag", TASKS)):
        for value in _list(data.get(key)):
            if value not in allowed:
                yield f'"{key}" must be one of {sorted(allowed)}'
    if not all(isinstance(tag, str) for tag in _list(data.get("tags"))):
        yield '"tags" must be strings'
    emissions = data.get("co2_eq_emissions")
    if isinstance(emissions, dict) and not isinstance(emissions.get("emissions"), (int, float)):
        yield '"co2_eq_emissions.emissions" must be a number'
    for number, model in enumerate(_list(data.get("model-index"))):
        yield from _model_errors(f"model-index[{number}]", model)


def _model_errors(path: str, model: dict[str, Any]) -> Iterator[str]:
    if not isinstance(model.get("name"), str):
        yield f'"{path}.name" is required'
    for number, result in enumerate(_list(model.get("results"))):
        here = f"{path}.results[{number}]"
        needed = {"task": ("type",), "dataset": ("type", "name")}
        for block, keys in needed.items():
            for key in keys:
                if not isinstance((result.get(block) or {}).get(key), str):
                    yield f'"{here}.{block}.{key}" is required'
        for key in ("config", "split", "revision"):
            if not isinstance(result["dataset"].get(key, ""), str):
                yield f'"{here}.dataset.{key}" must be a string'
        for metric in _list(result.get("metrics")) or [{}]:
            if not isinstance(metric.get("type"), str) or metric.get("value") is None:
                yield f'"{here}.metrics" needs type and value'


def _list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
