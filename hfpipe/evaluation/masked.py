"""Suites for an encoder: predicting masked tokens of held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hfpipe.data.dataloader import collate
from hfpipe.data.masking import Masking
from hfpipe.data.tokenize import IGNORED, Encoded
from hfpipe.evaluation.likelihood import by_length, require_finite
from hfpipe.model.positions import within_positions

OPTIONS = {"mlm_probability": 0.15, "mask_replace_prob": 1.0, "random_replace_prob": 0.0}


@torch.no_grad()
def fill_masks(
    model: Any, texts: Sequence[str], numbers: Sequence[int], tokenizer: Any, max_length: int, batch_size: int
) -> list[dict[str, Any] | None]:
    """Masks 15 % of the tokens of each text, the same at every call, and asks the model for them.

    Args:
        model: A masked language model in evaluation mode.
        texts: Texts.
        numbers: Places of the texts in the suite, which say what is masked.
        tokenizer: The model's tokenizer.
        max_length: Tokens to keep of each text.
        batch_size: Texts of a forward pass.

    Returns:
        `bits` spent on the masked tokens, `hits` among them, and their number `tokens`; None where none was masked.
    """
    masking = Masking(tokenizer, OPTIONS, seed=0)
    limit = within_positions(model, max_length)
    encoded = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
    rows = [masking.row(ids, number) for ids, number in zip(encoded, numbers, strict=True)]
    answers: list[dict[str, Any] | None] = [None] * len(rows)
    for indices in by_length([len(row["labels"]) for row in rows], batch_size):
        padded = collate([rows[index] for index in indices], tokenizer.pad_token_id)
        batch = {key: value.to(model.device) for key, value in padded.items()}
        labels = batch.pop("labels")
        where = labels != IGNORED
        logits = model(**batch).logits[where].float()
        losses = torch.nn.functional.cross_entropy(logits, labels[where], reduction="none").double()
        require_finite(losses)
        hits = logits.argmax(-1) == labels[where]
        place = where.nonzero()[:, 0]
        for row, index in enumerate(indices):
            own = place == row
            if own.any():
                bits = float(losses[own].sum()) / math.log(2)
                answers[index] = {"bits": bits, "hits": int(hits[own].sum()), "tokens": int(own.sum())}
    return answers


@torch.no_grad()
def pseudo_bits(model: Any, rows: Sequence[Encoded], tokenizer: Any, batch_size: int) -> list[float]:
    """Bits of the pseudo-likelihood of the targets of each row: each is masked in turn (Salazar et al. 2020).

    Args:
        model: A masked language model in evaluation mode.
        rows: Encoded rows.
        tokenizer: The model's tokenizer.
        batch_size: Texts of a forward pass; a row gives one for each of its targets.
    """
    places = [(number, int(place)) for number, row in enumerate(rows) for place in np.flatnonzero(row.scored)]
    bits = [0.0] * len(rows)
    for indices in by_length([len(rows[number].input_ids) for number, _ in places], batch_size):
        batch = []
        for number, place in (places[index] for index in indices):
            ids, labels = list(rows[number].input_ids), [IGNORED] * len(rows[number].input_ids)
            ids[place], labels[place] = tokenizer.mask_token_id, ids[place]
            batch.append({"input_ids": ids, "labels": labels})
        padded = {key: value.to(model.device) for key, value in collate(batch, tokenizer.pad_token_id).items()}
        labels_of = padded.pop("labels")
        where = labels_of != IGNORED
        logits = model(**padded).logits[where].float()
        losses = torch.nn.functional.cross_entropy(logits, labels_of[where], reduction="none").double()
        require_finite(losses)
        for index, loss in zip(indices, losses.tolist(), strict=True):
            bits[places[index][0]] += loss / math.log(2)
    return bits
