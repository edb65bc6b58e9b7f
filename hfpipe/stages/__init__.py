"""The kinds of a stage. Each is one function, read top to bottom: a stage of the recipe to a trained model on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Trainer

from hfpipe.data.token_store import Tokenizes
from hfpipe.recipe import Stage
from hfpipe.stages.classification import labelled_length, run_classification
from hfpipe.stages.labels import labelled_tokens
from hfpipe.stages.preference import (
    pair_length,
    pair_rows,
    pair_tokenizer,
    preference_trainer,
    require_ranks,
    run_preference,
)
from hfpipe.stages.pretrain import run_pretrain
from hfpipe.stages.sft import run_sft, sft_trainer
from hfpipe.stages.sft_rows import sft_length, sft_rows
from hfpipe.stages.trainer import StageRun
from hfpipe.stages.translation import pair_lengths, paired_tokens, run_translation

STAGES = {
    "pretrain": run_pretrain,
    "sft": run_sft,
    "classification": run_classification,
    "translation": run_translation,
    "preference": run_preference,
}

# Of a kind whose rows are tokenized before it is trained: makes them, for `hfpipe prepare`.
ROWS: dict[str, Callable[[StageRun, Any], object]] = {
    "sft": lambda run, model: sft_rows(run, sft_length(run, model)),
    "classification": lambda run, model: labelled_tokens(run, labelled_length(run, model)),
    "translation": lambda run, model: paired_tokens(run, pair_lengths(run, model)),
    "preference": lambda run, model: pair_rows(run, pair_length(run, model)),
}

# Makes tokens of the rows of a kind that are no texts, of the stage, the run's tokenizer and the longest length.
TOKENIZERS: dict[str, Callable[[Stage, Any, int | None], Tokenizes]] = {"preference": pair_tokenizer}

# Makes the trainer of a kind that has one of its own, of the stage, its model, the arguments and the tokenizer.
TRAINERS: dict[str, Callable[[Stage, Any, Any, Any], Trainer]] = {
    "sft": sft_trainer,
    "preference": preference_trainer,
}

# Refuses ways to start the ranks that a kind cannot be trained by.
REQUIREMENTS: dict[str, Callable[[Stage], None]] = {"preference": require_ranks}

__all__ = ["REQUIREMENTS", "ROWS", "STAGES", "TOKENIZERS", "TRAINERS", "StageRun"]
