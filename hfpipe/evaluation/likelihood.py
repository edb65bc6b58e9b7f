"""The likelihood of text: of given tokens, of long texts in windows, and of masked tokens under an encoder.

The rules are those of lm-eval's `loglikelihood_rolling` and `loglikelihood` (0.4.13): a text follows the BOS token, or
EOS where a tokenizer has no BOS; every token is scored once; a text longer than the window is read in windows that do
not share a scored token, the last of them full. One difference: where the tokenizer itself puts BOS in front of a text,
lm-eval puts another one before it and scores the first; here there is one, and it is not scored.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hfpipe.core import display
from hfpipe.core.errors import RecipeError
from hfpipe.data.dataloader import collate
from hfpipe.data.masking import Masking
from hfpipe.data.tokenize import IGNORED, Encoded
from hfpipe.evaluation.continuations import beginning, special_ends
from hfpipe.evaluation.row_text import RowText
from hfpipe.model.positions import within_positions
from hfpipe.model.spread import device_of

BATCH_TOKENS = 1024  # tokens of a batch for each of its rows: longer rows go in smaller batches
LOGIT_ROWS = 1024  # rows of logits that are float32 at once
OPTIONS = {"mlm_probability": 0.15, "mask_replace_prob": 1.0, "random_replace_prob": 0.0}


def by_length(lengths: Sequence[int], batch_size: int, most_tokens: int | None = None) -> Iterator[list[int]]:
    """Batches of indices, the longest first, so that rows of like length share a batch; tells how far they are.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch.
        most_tokens: Tokens of a batch with its padding, where that is bounded; one row may have more.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        size = batch_size
        if most_tokens is not None:
            size = max(1, min(batch_size, most_tokens // max(1, lengths[order[start]])))
        display.count(start, len(order))
        yield order[start : start + size]
        start += size


@dataclass(frozen=True)
class Likelihood:
    """The likelihood that a model gives the targets of a row.

    Args:
        bits: Bits that it spends on them, the negative logarithm of their probability.
        greedy: Whether each of them is the likeliest token at its place.
    """

    bits: float
    greedy: bool


def require_finite(losses: torch.Tensor) -> None:
    """Refuses to score a model that gives no numbers.

    Raises:
        RecipeError: A loss is infinite or NaN.
    """
    if not torch.isfinite(losses).all():
        raise RecipeError(
            "the model's likelihoods are not finite numbers, so nothing can be scored: its training has diverged, or "
            "its weights overflow in their dtype. Lower learning_rate, or set `model.dtype` to float32 or bfloat16."
        )


def bits_of(model: Any, rows: Sequence[Encoded], pad_token_id: int, batch_size: int) -> list[float]:
    """Bits that the model spends on the targets of each row; arguments as those of `likelihoods`."""
    return [found.bits for found in likelihoods(model, rows, pad_token_id, batch_size)]


@torch.no_grad()
def likelihoods(model: Any, rows: Sequence[Encoded], pad_token_id: int, batch_size: int) -> list[Likelihood]:
    """The likelihood of the targets of each row.

    Args:
        model: A causal language model in evaluation mode.
        rows: Encoded rows.
        pad_token_id: Fills the right side of shorter rows.
        batch_size: Rows of a forward pass.

    Raises:
        RecipeError: The model gives no finite numbers.
    """
    found = [Likelihood(0.0, True)] * len(rows)
    takes = inspect.signature((model.get_base_model() if hasattr(model, "get_base_model") else model).forward)
    for indices in by_length([len(row.input_ids) for row in rows], batch_size, batch_size * BATCH_TOKENS):
        longest = max(len(rows[index].input_ids) for index in indices)
        if longest < 2:
            continue
        ids = torch.full((len(indices), longest), pad_token_id)
        mask = torch.zeros((len(indices), longest), dtype=torch.long)
        scored = torch.zeros((len(indices), longest), dtype=torch.bool)
        for place, index in enumerate(indices):
            size = len(rows[index].input_ids)
            ids[place, :size] = torch.as_tensor(rows[index].input_ids)
            mask[place, :size] = 1
            scored[place, :size] = torch.from_numpy(rows[index].scored)
        if not scored[:, 1:].any():
            continue
        kept = longest - int(scored.any(0).nonzero()[0].clamp(min=1))  # positions from the first that has a target on
        ids, mask, scored = (tensor.to(device_of(model)) for tensor in (ids, mask, scored))
        fewer = {"logits_to_keep": kept} if "logits_to_keep" in takes.parameters else {}
        # The last token is a target only: a row may be one longer than the model's context.
        logits = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=False, **fewer).logits
        logits = logits[:, -kept:]  # (B, kept, V); the tokens that a prompt adapter puts in front have some too
        places, targets = scored[:, -kept:].nonzero(), ids[:, -kept:]
        totals = torch.zeros(len(indices), dtype=torch.float64, device=logits.device)
        missed = torch.zeros(len(indices), dtype=torch.long, device=logits.device)
        # Part by part: all rows of the logits in float32 would be the largest tensor by far.
        for part in places.split(LOGIT_ROWS):
            row_of, right = part[:, 0], targets[part[:, 0], part[:, 1]]
            chosen = logits[row_of, part[:, 1]].float()
            losses = torch.nn.functional.cross_entropy(chosen, right, reduction="none")
            totals.index_add_(0, row_of, losses.double())
            missed.index_add_(0, row_of, (chosen.argmax(-1) != right).long())
        require_finite(totals)
        for index, total, misses in zip(indices, totals.tolist(), missed.tolist(), strict=True):
            found[index] = Likelihood(total / math.log(2), not misses)
    return found


def encode_texts(texts: Sequence[RowText], tokenizer: Any) -> list[Encoded]:
    """Tokenizes rows whole; the targets are the tokens of the scored characters.

    Prompt and completion are tokenized together. Special tokens of a completion are marks: neither their bits nor their
    bytes count. Those of a plain text count as they stand in it.

    Args:
        texts: Rows, all of one format.
        tokenizer: A fast tokenizer.
    """
    if not texts:
        return []
    before = [] if texts[0].chat else special_ends(tokenizer)[0]
    batch = tokenizer(
        [row.prompt + row.completion for row in texts],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    return [
        _encoded(row, ids, np.asarray(offsets, dtype=np.int64).reshape(-1, 2), before, tokenizer)
        for row, ids, offsets in zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True)
    ]


def _encoded(row: RowText, ids: list[int], offsets: np.ndarray, before: list[int], tokenizer: Any) -> Encoded:
    text, given = row.prompt + row.completion, len(row.prompt)
    # White space has an empty offset at its end where a tokenizer trims offsets.
    starts, ends = np.minimum(offsets[:, 0], offsets[:, 1] - 1), offsets[:, 1]
    scored, size = np.zeros(len(ids), bool), 0
    for start, end in ((given + first, given + last) for first, last in row.spans):
        inside = (ends > start) & (starts < end)
        scored |= inside
        where = np.flatnonzero(inside)
        if len(where) and not row.chat and where[0]:  # a token that joins the prompt's end and the completion
            start = min(start, max(int(offsets[where[0], 0]), int(ends[where[0] - 1])))
        size += _size(text[start:end])
    if given:
        marks = scored & np.isin(ids, tokenizer.all_special_ids)
        size -= sum(_size(text[first:last]) for first, last in offsets[marks])
        scored &= ~marks
    prefix = before or ([] if given else beginning(tokenizer))
    if ids[:1] == prefix[-1:]:  # the text brings its own BOS
        prefix = prefix[:-1]
    if not prefix and scored[:1].any():  # nothing stands before the first token
        size -= _size(text[offsets[0, 0] : offsets[0, 1]])
        scored[:1] = False
    scored = np.concatenate([np.zeros(len(prefix), bool), scored])
    return Encoded([*prefix, *ids], scored, size if scored.any() else 0)


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def windows(row: Encoded, size: int) -> list[Encoded]:
    """Cuts a row into windows that score each of its targets once.

    A completion that fits into a window has one, in which the prompt loses its beginning if need be. Else the first
    window is the row's beginning (or, where the prompt fills more than half of it, ends half a window behind the
    prompt), and each further one scores up to `size` targets with what stands before them in the window.

    Args:
        row: A row.
        size: Tokens that the model reads; a window has one more, its last, which is a target only.
    """
    targets = np.flatnonzero(row.scored)
    if not len(targets):
        return []
    first, last = int(targets[0]), int(targets[-1]) + 1
    end = last
    if last - first > size:
        end = size + 1 if 2 * first <= size else first + size // 2
    parts = []
    while True:
        start = max(0, end - size - 1)
        scored = row.scored[start:end].copy()
        scored[: max(0, first - start)] = False
        if scored.any():
            parts.append(Encoded(row.input_ids[start:end], scored, 0))
        if end == last:
            return parts
        first, end = end, min(last, end + size)


def words_of(row: RowText) -> int:
    """Words as white space divides them; of plain texts as lm-eval counts them, white space at an end one more."""
    if row.prompt:
        return len(row.scored.split())
    return len(re.split(r"\s+", row.completion))


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
        batch = {key: value.to(device_of(model)) for key, value in padded.items()}
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
        padded = {key: value.to(device_of(model)) for key, value in collate(batch, tokenizer.pad_token_id).items()}
        labels_of = padded.pop("labels")
        where = labels_of != IGNORED
        logits = model(**padded).logits[where].float()
        losses = torch.nn.functional.cross_entropy(logits, labels_of[where], reduction="none").double()
        require_finite(losses)
        for index, loss in zip(indices, losses.tolist(), strict=True):
            bits[places[index][0]] += loss / math.log(2)
    return bits
