"""The fields that are read from the libraries' source are those of the real classes."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, GenerationConfig, TrainingArguments

from hfpipe.core.errors import RecipeError
from hfpipe.recipe import load_recipe, signatures, source_reader
from hfpipe.recipe.annotations import fits


def real_fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def classes() -> list[tuple[signatures.Fields | None, type]]:
    from peft import LoraConfig
    from trl import SFTConfig

    return [
        (signatures.training_fields("pretrain"), TrainingArguments),
        (signatures.training_fields("sft"), SFTConfig),
        (signatures.lora_fields(), LoraConfig),
    ]


def test_fields_are_exactly_those_of_the_class_and_take_its_defaults() -> None:
    for read, cls in classes():
        real = real_fields(cls)
        assert read is not None
        assert read.keys() == real.keys()
        for name, field in real.items():
            if field.default is dataclasses.MISSING:
                continue
            default = getattr(field.default, "value", field.default)  # an enum stands for its value
            assert fits(default, read[name].kinds), name
            if read[name].default is not signatures.UNKNOWN:
                assert read[name].default == default, name


def test_most_annotations_are_understood() -> None:
    for read, cls in classes():
        assert read is not None
        open_fields = [name for name, field in read.items() if not field.kinds]
        assert len(open_fields) < len(read) / 4, (cls, open_fields)
        assert "learning_rate" not in open_fields
        assert "r" not in open_fields


def test_generation_names_cover_those_of_the_class() -> None:
    read = signatures.generation_fields()
    assert read is not None
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} <= read.keys()
    assert "max_new_token" not in read


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "gpt_neox", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "bert", "t5", "mamba"]
)
def test_config_fields_cover_those_of_the_class(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type]
    read = signatures.config_fields(model_type)
    assert read is not None
    named = {name for name in real_fields(config) if not name.startswith("_")} | set(config.attribute_map)
    assert named <= read.keys()
    for name, field in real_fields(config).items():
        if name in read and field.default is not dataclasses.MISSING and not isinstance(field.default, tuple):
            assert fits(field.default, read[name].kinds, exact=True), name
    assert {"num_labels", "model_type"} <= read.keys()
    assert "hiden_size" not in read


def test_model_types_are_those_of_transformers() -> None:
    assert set(CONFIG_MAPPING.keys()) <= set(signatures.model_types())


def test_load_dataset_takes_its_parameters_and_the_options_of_the_builder() -> None:
    import datasets
    from datasets.packaged_modules.csv.csv import CsvConfig

    parameters = {
        name
        for name, parameter in inspect.signature(datasets.load_dataset).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    plain, csv, anything = (signatures.load_dataset_fields(path) for path in (None, "csv", "me/on-the-hub"))
    assert plain is not None
    assert csv is not None
    assert anything is not None
    assert plain.keys() == parameters
    assert csv.keys() == parameters | {field.name for field in dataclasses.fields(CsvConfig)} - _BUILDER_CONFIG
    assert csv.keys() <= anything.keys()


_BUILDER_CONFIG = {"version", "description"}  # of every BuilderConfig, and no option of any


def test_a_library_that_cannot_be_read_is_left_unchecked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: x\nmodel: {id: x}\nstages: [{name: a, kind: sft, data: [{path: json, sepp: 1}], training: {x: 1}}]\n"
    )
    readers = [
        read for part in (signatures, source_reader) for read in vars(part).values() if hasattr(read, "cache_clear")
    ]
    with pytest.raises(RecipeError, match=r"(?s)sepp.*training\.x"):
        load_recipe(path)
    try:
        for missing in (lambda name: None, lambda name: (_ for _ in ()).throw(ImportError(name))):
            for reader in readers:
                reader.cache_clear()
            monkeypatch.setattr(source_reader, "find_spec", missing)
            assert load_recipe(path).stages[0].training == {"x": 1}
    finally:
        monkeypatch.undo()
        for reader in readers:
            reader.cache_clear()
