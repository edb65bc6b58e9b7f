"""Packs documents into rows of one length, each kept apart from its neighbours by its positions."""

from __future__ import annotations

from inspect import signature
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from hfpipe.data.dataloader import collate
from hfpipe.data.tokenize import IGNORED


class Rows(NamedTuple):
    """Packed rows.

    Args:
        input_ids: (N, L) tokens.
        position_ids: (N, L) positions, 0 where a document (or its continuation in the next row) begins.
        labels: (N, L) the tokens, -100 at position 0: no token stands before it in its document.
        documents: (N,) documents that begin in each row.
        cut: (N,) True where the last of them goes on in the next row, and so loses its context there.
        continued: (N,) True where a row begins in the middle of a document.
        ended: (N,) documents that end in each row.
        tokens: (N,) tokens of each row that are not padding.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    documents: np.ndarray
    cut: np.ndarray
    continued: np.ndarray
    ended: np.ndarray
    tokens: np.ndarray

    def part(self, begin: int, end: int) -> Rows:
        """The rows [begin, end)."""
        return Rows(*(field[begin:end] for field in self))


class Packed(NamedTuple):
    """Rows, and what did not fill one.

    Args:
        rows: The rows.
        rest: (R,) tokens that are left, R < L.
        rest_starts: (R,) True where a document begins among them.
    """

    rows: Rows
    rest: np.ndarray
    rest_starts: np.ndarray


def pack(tokens: np.ndarray, starts: np.ndarray, length: int) -> Packed:
    """Cuts a run of tokens into rows; none is lost and nothing is padded.

    Args:
        tokens: (T,) documents one after the other, each with its EOS.
        starts: (T,) True where a document begins.
        length: L, tokens of a row.
    """
    full = len(tokens) - len(tokens) % length
    ids = tokens[:full].reshape(-1, length)
    begins = starts[:full].reshape(-1, length).copy()
    documents, continued = begins.sum(axis=1), ~begins[:, 0]
    followed = np.append(starts, True)[length : full + 1 : length]  # whether a new document begins after each row
    begins[:, :1] = True
    places = np.arange(length, dtype=np.int32)
    positions = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    labels = np.where(begins, IGNORED, ids)
    cut = (documents > 0) & ~followed
    ended = documents + continued - ~followed
    rows = Rows(ids, positions, labels, documents, cut, continued, ended, np.full(len(ids), length))
    return Packed(rows, tokens[full:], starts[full:])


@torch.no_grad()
def isolation_leak(model: Any, length: int = 32) -> float:
    """Returns the largest log-probability difference between packed rows and their documents run alone on this model.

    Position ids keep packed documents apart only without an attention mask and without a cache, and not in every
    architecture; where they do not, nothing fails and the model is just worse. So it is measured, on a batch as the
    trainer gives it to the model: two rows of two documents each, through `collate`.

    Args:
        model: A causal language model, set up as it will be trained.
        length: L, tokens of a row.

    Returns:
        Nats; infinite where the model takes no `position_ids` at all.
    """
    if not _takes_position_ids(model):
        return float("inf")
    was_training = model.training
    model.eval()
    batch = {key: value.to(model.device) for key, value in packed_sample(model, length).items()}
    begins = [*(batch["position_ids"].flatten() == 0).nonzero().flatten().tolist(), 2 * length]
    together = model(**batch).logits.flatten(0, 1).float().log_softmax(-1)  # (2 L, V)
    leak = 0.0
    for begin, end in pairwise(begins):
        alone = model(input_ids=batch["input_ids"].flatten()[None, begin:end]).logits[0].float().log_softmax(-1)
        leak = max(leak, float((together[begin:end] - alone).abs().max()))
    model.train(was_training)
    return leak


def packed_sample(model: Any, length: int = 32) -> dict[str, torch.Tensor]:
    """Returns a batch of two packed rows of two documents each, of random tokens, as a trainer gives it to a model.

    Args:
        model: A causal language model.
        length: L, tokens of a row.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(0, vocabulary, (2 * length,), generator=torch.Generator().manual_seed(0)).numpy()
    starts = np.zeros(2 * length, dtype=bool)
    starts[[0, length * 5 // 8, length, length * 5 // 4]] = True
    packed = pack(tokens, starts, length).rows
    rows = [
        {"input_ids": ids, "position_ids": positions, "labels": labels}
        for ids, positions, labels in zip(packed.input_ids, packed.position_ids, packed.labels, strict=True)
    ]
    return {key: value for key, value in collate(rows, 0).items() if key != "labels"}


def _takes_position_ids(model: Any) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of an adapter
    words = signature(inner.forward).parameters
    return "position_ids" in words or any(word.kind is word.VAR_KEYWORD for word in words.values())
