"""The head of a classifier: which classes it tells apart, which modules are new, and what it says about texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hfpipe.model.scoring import by_length, within_positions

SUFFIX = "ForSequenceClassification"
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")  # transformers' words
# Modules between the body and the classes, by the names transformers gives them: never stored in 4 or 8 bits. They are
# regular expressions, for the pooler of BERT lies in its body (`bert.pooler.dense`).
_HEADS = ("score", "classifier", "pre_classifier", "pooler", "head", "classification_head", "lm_head")
HEAD_MODULES = [rf"(.*\.)?{name}" for name in (*_HEADS, "sequence_summary", "logits_proj")]
SAVED_BY_PEFT = ("classifier", "score")  # PeftModelForSequenceClassification
DEFAULT_MAX_LENGTH = 512

Label = str | float | list[str]


def head_config(problem: str, names: Sequence[str], pad_token_id: int) -> dict[str, Any]:
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
    """The head's fields out of the config.json that lies beside a saved adapter."""
    config = json.loads((folder / "config.json").read_text())
    names = [name for _, name in sorted(config["id2label"].items(), key=lambda pair: int(pair[0]))]
    return head_config(config["problem_type"], names, config["pad_token_id"])


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
    """Whether a model, or the one below an adapter, has a classification head."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).__name__.endswith(SUFFIX)


@torch.no_grad()
def classify(
    model: Any, texts: Sequence[str], tokenizer: Any, max_length: int, batch_size: int
) -> list[tuple[Label, float]]:
    """What a classifier says about each text.

    Args:
        model: A classifier in evaluation mode.
        texts: Texts to judge.
        tokenizer: The model's tokenizer.
        max_length: Tokens to keep of each text, at most those that the model has positions for.
        batch_size: Texts of a forward pass.

    Returns:
        The name of the likeliest class and its probability; of several classes at once the names of those with a
        probability above one half, and the probability that all of them are right; of a regression the number, and 1.
    """
    config = model.config
    limit = within_positions(model, max_length)
    encoded = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
    answers: list[tuple[Label, float]] = [("", 0.0)] * len(texts)
    for indices in by_length([len(ids) for ids in encoded], batch_size):
        longest = max(1, *(len(encoded[index]) for index in indices))
        ids = torch.full((len(indices), longest), tokenizer.pad_token_id)
        mask = torch.zeros((len(indices), longest), dtype=torch.long)
        for place, index in enumerate(indices):
            ids[place, : len(encoded[index])] = torch.as_tensor(encoded[index])
            mask[place, : len(encoded[index])] = 1
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits.float().cpu()
        for place, index in enumerate(indices):
            answers[index] = _answer(logits[place], config)
    return answers


def _answer(logits: torch.Tensor, config: Any) -> tuple[Label, float]:
    """One row of logits (C,) in words, and how sure it is."""
    if config.problem_type == "regression":
        return float(logits[0]), 1.0
    if config.problem_type == "multi_label_classification":
        named = [config.id2label[index] for index in range(len(logits)) if logits[index] > 0]
        return named, float(logits.abs().sigmoid().prod())
    likeliest = int(logits.argmax())
    return str(config.id2label[likeliest]), float(logits.softmax(-1)[likeliest])
