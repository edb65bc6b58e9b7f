"""The kinds of a stage. Each is one function, read top to bottom: a stage of the recipe to a trained model on disk."""

from __future__ import annotations

from hfpipe.stages.classification import run_classification
from hfpipe.stages.preference import run_preference
from hfpipe.stages.pretrain import run_pretrain
from hfpipe.stages.sft import run_sft
from hfpipe.stages.trainer import StageRun
from hfpipe.stages.translation import run_translation

STAGES = {
    "pretrain": run_pretrain,
    "sft": run_sft,
    "classification": run_classification,
    "translation": run_translation,
    "preference": run_preference,
}

__all__ = ["STAGES", "StageRun"]
