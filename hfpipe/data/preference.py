"""Pairs of answers to tokens, as TRL's DPOTrainer makes them: the prompt with each answer, and where the answers begin.

A prompt and its two answers are texts, or turns of a conversation that the chat template writes. Each answer is
tokenized as a whole with the prompt; both begin where the tokens of the prompt alone and those of either part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hfpipe.core.errors import DataError, UserError
from hfpipe.data.chat import Chats, conversation
from hfpipe.data.text_tokens import IGNORED, Text, TextTokenizer, shared_tokens
from hfpipe.data.token_store import Columns, list_column

Row = dict[str, Any]


@dataclass(frozen=True)
class TokenPairs:
    """Tokens of many pairs.

    Args:
        sides: Of each pair the tokens of the prompt with the chosen and with the rejected answer, (L,) each.
        begins: Of each pair the tokens before the answers.
        untrained: Pairs left out: their prompt fills `max_length`, or both answers are the same.
        long: Pairs with a prompt that lost its beginning, or a side longer than `max_length` that lost its end.
        refused: Of each row that the chat template refuses, its number among the rows given and the template's word.
    """

    sides: Sequence[tuple[np.ndarray, np.ndarray]]
    begins: Sequence[int]
    untrained: int = 0
    long: int = 0
    refused: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        return len(self.begins)

    @property
    def tokens(self) -> int:
        """All tokens that a model reads."""
        return sum(len(side) for pair in self.sides for side in pair)

    def __iter__(self) -> Iterator[Row]:
        """Yields `input_ids`, `labels` (of the chosen side) and `rejected_ids` of each pair."""
        for begin, (chosen, rejected) in zip(self.begins, self.sides, strict=True):
            labels = [IGNORED] * begin + chosen[begin:].tolist()
            yield {"input_ids": chosen.tolist(), "labels": labels, "rejected_ids": rejected.tolist()}

    def columns(self) -> Columns:
        """Returns the columns that a `TokenStore` gives back as `input_ids`, `labels` and `rejected_ids`."""
        made: dict[str, pa.Array] = {}
        for name, number in (("input_ids", 0), ("rejected_ids", 1)):
            parts = [pair[number] for pair in self.sides]
            made[name] = list_column(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))
        runs = [place for begin, pair in zip(self.begins, self.sides, strict=True) for place in (begin, len(pair[0]))]
        return made | {"trained": list_column(np.array(runs), np.arange(0, len(runs) + 1, 2))}


class PairTokenizer:
    """Tokenizes pairs, many at a time; the tokens and the places of the answers are those of DPOTrainer.

    Args:
        tokenizer: A fast tokenizer.
        max_length: Tokens of a prompt with an answer, whose end is cut; None for all.
        max_prompt_length: Tokens of a prompt, whose beginning is cut before that; None for all.

    Raises:
        DataError: The rows are conversations and there is no chat template, or it takes none of them.
    """

    def __init__(self, tokenizer: Any, max_length: int | None, max_prompt_length: int | None = None) -> None:
        self._tokenizer, self._max_length, self._max_prompt = tokenizer, max_length, max_prompt_length
        self._texts, self._chats = TextTokenizer(tokenizer), Chats(tokenizer)

    def encode(self, rows: Sequence[Row]) -> TokenPairs:
        """Tokenizes rows of one form."""
        made: list[Text] = []
        refused: list[tuple[int, str]] = []
        for number, row in enumerate(rows):
            try:
                made += self._of_chat(row) if isinstance(row["prompt"], list) else self._of_text(row)
            except UserError:
                raise
            except Exception as error:  # a template raises whatever it likes, for a row that it does not foresee
                refused.append((number, f"{type(error).__name__}: {error}"))
        if refused and not made:
            raise DataError(
                f"the chat template takes none of {len(refused)} conversations; of the first it says: "
                f"{refused[0][1].rstrip('.')}. "
                "Look at the roles and the order of the turns, or give another template."
            )
        if not made:
            return TokenPairs([], [])
        special = not isinstance(rows[0]["prompt"], list)
        found = self._texts.encode(made, special=special)
        sides = [found.ids[first:last] for first, last in zip(found.starts[:-1], found.starts[1:], strict=True)]
        firsts = [
            int(trained.argmax()) if trained.any() else len(trained)
            for trained in np.split(found.trained, found.starts[1:-1])
        ]
        begins = [min(pair) for pair in zip(firsts[::2], firsts[1::2], strict=True)]
        kept: list[tuple[tuple[np.ndarray, np.ndarray], int]] = []
        long = 0
        for number, begin in enumerate(begins):
            chosen, rejected = sides[2 * number], sides[2 * number + 1]
            if begin < 2:  # the first token of a row is never trained on, so it does not tell where the prompt ends
                prompt = self._texts.ids(made[2 * number].prompt or "", special=special)
                begin = min(shared_tokens(prompt, chosen), shared_tokens(prompt, rejected))
            left = 0 if self._max_prompt is None else max(0, begin - self._max_prompt)
            chosen, rejected, begin = chosen[left:], rejected[left:], begin - left
            too_long = self._max_length is not None and max(len(chosen), len(rejected)) > self._max_length
            long += bool(left) or too_long
            chosen, rejected = chosen[: self._max_length], rejected[: self._max_length]
            if begin < min(len(chosen), len(rejected)) and not np.array_equal(chosen, rejected):
                kept.append(((chosen, rejected), begin))
        left_out = len(begins) - len(kept)
        return TokenPairs([pair for pair, _ in kept], [begin for _, begin in kept], left_out, long, tuple(refused))

    def _of_text(self, row: Row) -> list[Text]:
        eos, prompt = self._tokenizer.eos_token or "", row["prompt"]
        answers = [said if said.endswith(eos) else said + eos for said in (row["chosen"], row["rejected"])]
        return [Text(prompt + said, prompt) for said in answers]

    def _of_chat(self, row: Row) -> list[Text]:
        turns, options = conversation({**row, "messages": row["prompt"]})
        answers = [conversation({"messages": row[side]})[0] for side in ("chosen", "rejected")]
        prompt = self._chats.text(turns, options, prompt=True)
        return [Text(self._chats.text([*turns, *said], options), prompt) for said in answers]


def pair_collator(pad_token_id: int, multiple: int | None) -> Any:
    """Returns what makes a batch of rows as a `TokenStore` gives them; TRL's own collator does the work.

    The chosen sides come first, then the rejected ones: (2B, L). A row's `reference` are the log-probabilities of its
    chosen and its rejected answer under the reference model.
    """
    collator = DataCollatorForPreference(pad_token_id=pad_token_id, pad_to_multiple_of=multiple)

    def collate(rows: Sequence[Row], *_: Any) -> dict[str, torch.Tensor]:
        examples = []
        for row in rows:
            begin = int((np.asarray(row["labels"]) >= 0).argmax())
            chosen, rejected = (np.asarray(row[name]).tolist() for name in ("input_ids", "rejected_ids"))
            example = {"prompt_ids": chosen[:begin], "chosen_ids": chosen[begin:], "rejected_ids": rejected[begin:]}
            if "reference" in row:
                example |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), row["reference"], strict=True))
            examples.append(example)
        return collator(examples)

    return collate
