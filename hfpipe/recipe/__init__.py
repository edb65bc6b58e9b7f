"""The recipe: its keys, loading and overrides, every fault at once. Imports no heavy library."""

from hfpipe.recipe.config import (
    CrossValidation,
    Energy,
    Merge,
    Model,
    Push,
    Recipe,
    Shift,
    Suite,
    Suites,
    Tokenizer,
    TokenizerTraining,
)
from hfpipe.recipe.dump import dump_recipe, hash_of, shared_recipe
from hfpipe.recipe.schema import json_schema
from hfpipe.recipe.source_config import Augment, Fold, Source
from hfpipe.recipe.stage_config import (
    Classification,
    EarlyStopping,
    Keep,
    Pretrain,
    Quantization,
    Replay,
    Samples,
    SelfReplay,
    Sft,
    Stage,
    StageBase,
    Translation,
)
from hfpipe.recipe.validate import load_recipe, load_suites

__all__ = [
    "Augment",
    "Classification",
    "CrossValidation",
    "EarlyStopping",
    "Energy",
    "Fold",
    "Keep",
    "Merge",
    "Model",
    "Pretrain",
    "Push",
    "Quantization",
    "Recipe",
    "Replay",
    "Samples",
    "SelfReplay",
    "Sft",
    "Shift",
    "Source",
    "Stage",
    "StageBase",
    "Suite",
    "Suites",
    "Tokenizer",
    "TokenizerTraining",
    "Translation",
    "dump_recipe",
    "hash_of",
    "json_schema",
    "load_recipe",
    "load_suites",
    "shared_recipe",
]
