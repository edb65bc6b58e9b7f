"""The recipe: its words, loading and overrides, every fault at once. Imports no heavy library."""

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
from hfpipe.recipe.stage_config import (
    Classification,
    EarlyStopping,
    Fold,
    Pretrain,
    Quantization,
    Replay,
    Sft,
    Source,
    Stage,
    StageBase,
    Translation,
)
from hfpipe.recipe.validate import load_recipe, load_suites

__all__ = [
    "Classification",
    "CrossValidation",
    "EarlyStopping",
    "Energy",
    "Fold",
    "Merge",
    "Model",
    "Pretrain",
    "Push",
    "Quantization",
    "Recipe",
    "Replay",
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
