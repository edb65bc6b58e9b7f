"""Rows of a stream that are made of whole examples of a fine-tune: several of them, or one.

Examples of a window share rows, best fit first, or each is a row of its own. Those stand by length then: as every lane
shuffles the lengths of its window in one order, the rows that the lanes give at one time are of like length.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from hfpipe.core.errors import DataError
from hfpipe.data.cleaning.text_rules import Tally, merged
from hfpipe.data.row_order import Epoch, PackedRows
from hfpipe.data.stream.packing import Rows
from hfpipe.data.stream.shard_reader import ShardReader
from hfpipe.data.tokenize import IGNORED, RowTokenizer

BARREN = 2_000  # rows without one token to train on, after which no more are looked at


class Examples(NamedTuple):
    """The way from examples to rows.

    Args:
        tokenizers: Of each source, what tokenizes its rows, none longer than a row of the stream.
        packed: Whether several examples share a row.
        together: Rows of a lane in one step, which are of like length where examples do not share rows.
    """

    tokenizers: Sequence[RowTokenizer]
    packed: bool
    together: int = 1


class Example(NamedTuple):
    """Tokens (L,) of an example and its labels (L,)."""

    ids: np.ndarray
    labels: np.ndarray


class ExampleBuilder:
    """Builds the rows of one source in one lane, and knows how many of them were given out.

    Args:
        reader: The lane's share of the source.
        examples: How its examples become rows.
        length: Tokens of a row.
        documents: Examples of a window, which ends with an epoch too.
        characters: Of a window, after which it takes no more examples.
        place: The seed of the run, and the numbers of lane and source.
    """

    def __init__(
        self,
        reader: ShardReader,
        examples: Examples,
        length: int,
        documents: int,
        characters: int,
        place: tuple[int, int, int],
    ) -> None:
        self.reader, self._packed, self._together, self._length = reader, examples.packed, examples.together, length
        self._tokenizer = examples.tokenizers[place[2]]
        self._documents, self._characters, self._place = documents, characters, place
        self.tokens = self._untrained = self._long = 0  # of all that was read; rows without a token, and longer ones
        self._refused = Tally()  # rows that the chat template refuses
        self._window = 0
        self._rest: list[Example] = []  # of the row with most room, for the next window
        self._last_epoch = 0  # in which an example was found
        self.rows = _rows([], [])
        self.given = 0
        self._start = self._now()

    @property
    def left(self) -> int:
        """Rows that are built and not given out."""
        return len(self.rows.tokens) - self.given

    @property
    def ended(self) -> bool:
        """Says whether nothing is left."""
        return not self.left and self.reader.ended and not self._rest

    def turn(self) -> float:
        """Returns the part of a row that the next row counts for, as sources take turns."""
        return int(self.rows.tokens[self.given]) / self._length

    def _now(self) -> dict[str, Any]:
        return {
            "reader": self.reader.state(),
            "tokens": self.tokens,
            "untrained": self._untrained,
            "long": self._long,
            "refused": [dict(self._refused.counts), list(self._refused.ids)],
            "window": self._window,
            "rest": [[one.ids.tolist(), one.labels.tolist()] for one in self._rest],
        }

    def state(self) -> dict[str, Any]:
        """The state before the window and the rows given out of it, small and JSON-able."""
        return {**(self._start if self.left else self._now()), "given": self.given if self.left else 0}

    def load(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken, which builds the window again if it was begun."""
        self.reader.load(state["reader"])
        self.tokens, self._untrained, self._long = state["tokens"], state["untrained"], state["long"]
        self._refused, self._window = Tally(*state["refused"]), state["window"]
        self._last_epoch = self.reader.epoch
        self._rest = [Example(*(np.array(part, dtype=np.int32) for part in one)) for one in state["rest"]]
        if state["given"]:
            self.build()
            self.given = state["given"]

    def build(self) -> None:
        """Draws, tokenizes and packs the next window; at least one row comes of it, unless the source has ended.

        Raises:
            DataError: No share has an example with a token to train on.
        """
        self._start = self._now()
        examples, self._rest = self._rest, []
        size = sum(len(one.ids) for one in examples)
        tokenizer = self._tokenizer.anew()
        drawn = 0
        while not examples or (self._packed and size < 2 * self._length):
            first = not self.reader.epoch
            rows = self.reader.take(self._documents, self._characters)
            if not rows:
                break
            new = self._tokenized(tokenizer, rows, first)
            chance = np.random.default_rng([*self._place, self._window, drawn])
            drawn += len(rows)
            examples += [new[number] for number in chance.permutation(len(new))]
            size += sum(len(one.ids) for one in new)
            if not examples and (drawn > BARREN or self.reader.epoch > self._last_epoch + self.reader.lanes):
                refused = f" ({self._refused})" if len(self._refused) else ""
                raise DataError(
                    f"source {self.reader.source.path!r}: none of {drawn:,} rows has a token to train on{refused}. "
                    "Look at them with `hfpipe preview`; a prompt longer than max_length leaves no room for an answer."
                )
        self.rows, self.given = self._in_rows(examples), 0
        self._window += 1

    def _tokenized(self, tokenizer: RowTokenizer, rows: list[dict[str, Any]], first: bool) -> list[Example]:
        """Tokenizes rows; what is left out is counted in the `first` epoch."""
        made = tokenizer.encode(rows, refuse=False)
        self.tokens += len(made.ids)
        if first:
            self._untrained += made.untrained
            self._long += made.long
            for number, word in made.refused:
                name = str(rows[number].get("id", "without an id"))
                self._refused.add([f"the chat template refuses it ({word})"], name)
        if len(made):
            self._last_epoch = self.reader.epoch
        labels = np.where(made.trained, made.ids, IGNORED).astype(np.int32)
        return [Example(made.ids[begin:end], labels[begin:end]) for begin, end in pairwise(made.starts)]

    def _in_rows(self, examples: list[Example]) -> Rows:
        """Makes rows; where examples share them and others will come, those of the emptiest row wait for them."""
        sizes = np.array([len(one.ids) for one in examples], dtype=np.int64)
        if not self._packed:
            return _rows(examples, [np.array([number]) for number in self._by_length(sizes)])
        seed = np.random.SeedSequence([*self._place, self._window]).generate_state(1)[0]
        packed = PackedRows(sizes, self._length, int(seed)).epoch(0) if examples else Epoch(np.zeros(0, np.int32))
        rows = [packed.row(number) for number in range(packed.rows)]
        if len(rows) > 1 and not self.reader.ended:
            emptiest = min(range(len(rows)), key=lambda number: sizes[rows[number]].sum())
            if sizes[rows[emptiest]].sum() < self._length:
                self._rest = [examples[number] for number in rows.pop(emptiest)]
        return _rows(examples, rows)

    def _by_length(self, sizes: np.ndarray) -> np.ndarray:
        """Returns an order in which neighbours are of like length, the same lengths at a time in every lane."""
        order = np.argsort(sizes, kind="stable")
        whole = len(order) - len(order) % self._together
        seed, _, source = self._place
        groups = order[:whole].reshape(-1, self._together)
        groups = groups[np.random.default_rng([seed, source, self._window]).permutation(len(groups))]
        return np.concatenate([groups.ravel(), order[whole:]])

    def facts(self) -> dict[str, Any]:
        """Returns what was drawn so far."""
        tallies = self.reader.tallies()
        dirty = merged([Tally(tallies["dirty"], tallies["dirty_ids"]), self._refused])
        return {
            "tokens": self.tokens,
            "epochs": self.reader.epoch,
            "documents": self.reader.documents,
            "rows": self.reader.rows,
            **tallies,
            "dirty": dirty.counts,
            "dirty_ids": dirty.ids,
            "untrained": self._untrained,
            "long": self._long,
        }


def _rows(examples: Sequence[Example], rows: Sequence[np.ndarray]) -> Rows:
    """Makes rows of examples, each as long as what it holds.

    Args:
        examples: The examples.
        rows: Of each row, the numbers of its examples.
    """
    fields = [np.empty(len(rows), dtype=object) for _ in range(3)]
    for place, numbers in enumerate(rows):
        parts = [examples[number] for number in numbers]
        fields[0][place] = np.concatenate([one.ids for one in parts])
        fields[1][place] = np.concatenate([np.arange(len(one.ids), dtype=np.int32) for one in parts])
        fields[2][place] = np.concatenate([one.labels for one in parts])
    counts = np.array([len(numbers) for numbers in rows], dtype=np.int64)
    no = np.zeros(len(rows), dtype=bool)
    tokens = np.array([len(ids) for ids in fields[0]], dtype=np.int64)
    ids, positions, labels = fields
    return Rows(ids, positions, labels, counts, no, no, counts, tokens)
