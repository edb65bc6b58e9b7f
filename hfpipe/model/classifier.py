"""The head of a classifier: which classes it tells apart, which modules are new, and what it says about texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfpipe.core.errors import RecipeError
from hfpipe.core.files import load_json

SUFFIX = "ForSequenceClassification"
# Modules between the body and the classes, by the names transformers gives them: never stored in 4 or 8 bits. They are
# regular expressions, for the pooler of BERT lies in its body (`bert.pooler.dense`).
_HEADS = ("score", "classifier", "pre_classifier", "pooler", "head", "classification_head", "lm_head")
HEAD_MODULES = [rf"(.*\.)?{name}" for name in (*_HEADS, "sequence_summary", "logits_proj")]
SAVED_BY_PEFT = ("classifier", "score")  # PeftModelForSequenceClassification
DEFAULT_MAX_LENGTH = 512

Label = str | float | list[str]


def head_config(problem: str | None, names: Sequence[str], pad_token_id: int) -> dict[str, Any]:
    """The fields of a transformers config that make a head: problem type, class names, and the padding token.

    A decoder is read at the last token that is not padding, so its config has to name the padding token.
    """
    named = dict(enumerate(names)) if names else {0: "LABEL_0"}  # regression has one output without a name
    return {
        "problem_type": problem,
        "id2label": named,
        "label2id": {name: index for index, name in named.items()},
        "pad_token_id": pad_token_id,
    }


def read_head(folder: Path) -> dict[str, Any]:
    """Returns the head's fields out of the config.json that lies beside a saved adapter.

    Raises:
        RecipeError: The file does not say them.
    """
    path = folder / "config.json"
    try:
        config = load_json(path)
        names = [str(name) for _, name in sorted(config["id2label"].items(), key=lambda pair: int(pair[0]))]
        problem, padding = config["problem_type"], config["pad_token_id"]
        if not isinstance(problem, str | None) or not isinstance(padding, int):
            raise ValueError(problem)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RecipeError(
            f"{path} is missing or damaged: it has to name the classes (id2label), the problem_type and the "
            "pad_token_id of the classifier that the adapter belongs to. Put a copy of the file back."
        ) from error
    return head_config(problem, names, padding)


def outermost(modules: Sequence[str]) -> list[str]:
    """Modules to save beside an adapter, without those inside of another one: RoBERTa's head has two in `classifier`.

    PEFT saves every `classifier` and `score` of its own accord, and cannot load one that is inside of what it saves.
    """
    whole = {*modules, *SAVED_BY_PEFT}
    parts = {name: name.split(".") for name in modules}
    return sorted(
        name
        for name, path in parts.items()
        if not any(".".join(path[:end]) in whole or path[end - 1] in SAVED_BY_PEFT for end in range(1, len(path)))
    )


def is_classifier(model: Any) -> bool:
    """Returns True if a model, or the one below an adapter, has a classification head."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).__name__.endswith(SUFFIX)
