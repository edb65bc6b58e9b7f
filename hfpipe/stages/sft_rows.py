"""The rows of an sft stage as tokens: tables are tokenized once before, streams while the stage trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from hfpipe.core import ranks
from hfpipe.core.errors import DataError
from hfpipe.data.cleaning.text_rules import Read, refuse_dirt, tidy_rows
from hfpipe.data.mixture import mixture
from hfpipe.data.sources.formats import Kind
from hfpipe.data.sources.load import load_rows, open_source
from hfpipe.data.stream.dataset import TokenStream, default_lanes
from hfpipe.data.stream.examples import Examples
from hfpipe.data.text_tokens import TokenRows
from hfpipe.data.token_pool import encoded
from hfpipe.data.token_store import (
    Columns,
    Concatenated,
    Tokenizes,
    TokenStore,
    columns_of,
    made_once,
    told,
    write_columns,
)
from hfpipe.data.tokenize import RowTokenizer, sft_tokenizer
from hfpipe.model.positions import learned_positions
from hfpipe.recipe import Sft, Source, Stage
from hfpipe.recipe.row_formats import TEXT_KINDS
from hfpipe.stages.own_texts import own_texts, unended
from hfpipe.stages.trainer import StageRun, divide_batch, read_share, row_length, shares_of_rows

DEFAULT_MAX_LENGTH = 1024  # TRL's
BLOCK = 1_000  # rows tokenized at a time


def sft_length(run: StageRun, model: Any) -> int | None:
    """Returns the most tokens of a row; None where the recipe says `max_length: null`, as in TRL."""
    if run.stage.training.get("max_length", DEFAULT_MAX_LENGTH) is None and learned_positions(model) is None:
        return None
    return row_length(run, model, DEFAULT_MAX_LENGTH)


def sft_rows(run: StageRun, length: int | None, model: Any = None) -> tuple[Concatenated, dict[str, dict[str, Any]]]:
    """Returns the rows of the stage and of those it replays, in a fixed order, and what was read of each source.

    Args:
        run: The stage.
        length: Tokens of a row.
        model: The stage's parent, which makes its own texts where the stage replays them; None for without them.
    """
    stage = run.stage
    assert isinstance(stage, Sft)
    read = [_tokens_of(run, source, length) for source in stage.data]
    stores, facts = [part for part, _ in read], [found for _, found in read]
    if any(source.weight is not None for source in stage.data):
        counts = shares_of_rows([len(part) for part in stores], [source.weight or 1.0 for source in stage.data])
        stores = [part.first(count) for part, count in zip(stores, counts, strict=True)]
    parts: list[TokenStore | Concatenated] = [*stores]
    sources = list(stage.data)
    replayed = [part for part in mixture(run.recipe, stage) if part.replayed]
    if replayed:
        own = 1 - sum(part.share for part in replayed) - (stage.kept.replay.share if stage.kept.replay else 0)
        whole = sum(map(len, parts)) / own  # rows of the stage
        for earlier in replayed:
            wanted = math.ceil(whole * earlier.share)
            part, found = _tokens_of(run, earlier.source, length, at_most=wanted)
            if len(part) < wanted:
                ranks.say(f"  {earlier.source.title}: {len(part):,} rows to replay, {wanted:,} would make up its share")
            parts.append(part)
            facts.append({**found, "replayed": True})
            sources.append(earlier.source)
    if stage.kept.replay is not None and model is not None:
        share = stage.kept.replay.share
        room = share / (1 - share) * sum(part.trained for part in parts)  # tokens
        count: float = sum(map(len, parts))
        if stage.training.get("packing") and length is not None:
            count = sum(int(part.lengths.sum()) for part in parts) / length
        for own_part, found, source in own_rows(run, model, length, room, read_share(stage, count)):
            parts.append(own_part)
            facts.append(found)
            sources.append(source)
    tokens = [int(part.lengths.sum()) for part in parts]
    for found, given in zip(facts, tokens, strict=True):
        found["token_share"] = round(given / sum(tokens), 4)
    names = [f"{number}: {source.title}" for number, source in enumerate(sources)]
    return Concatenated(parts), dict(zip(names, facts, strict=True))


def own_rows(
    run: StageRun, model: Any, length: int | None, room: float, read: float
) -> list[tuple[Concatenated, dict[str, Any], Source]]:
    """Returns the texts that a stage's parent makes of itself, each series with its facts and its source.

    Args:
        run: The stage, of kind sft.
        model: Its parent.
        length: Tokens of a row.
        room: Trained tokens that they are to make; the texts are repeated for it.
        read: The part of them that the stage comes to, for which texts are made.
    """
    texts = own_texts(run, model, length, room * read)
    goes_on = unended(texts)
    made: list[tuple[Concatenated, dict[str, Any], Source]] = []
    for source in texts:
        part, found = _tokens_of(run, source, length, unended=goes_on)
        made.append((_repeated(part, room / len(texts)), {**found, "replayed": True, "parents_own": True}, source))
    return made


class Marked:
    """Rows with `own` (L,), True in those that the stage's parent made of itself, which come last.

    Args:
        rows: The rows.
        own: How many are the parent's own.
    """

    def __init__(self, rows: Concatenated, own: int) -> None:
        self._rows, self._first = rows, len(rows) - own

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        row = self._rows[number]
        return {**row, "own": np.full(len(row["input_ids"]), number >= self._first)}


def _repeated(part: TokenStore, tokens: float) -> Concatenated:
    """Returns the rows of a store as often, and of the last time as many, as make so many trained tokens."""
    ends = np.cumsum(part.lengths) * (part.trained / part.lengths.sum())
    times, rest = divmod(tokens, float(ends[-1]))
    times = int(times)
    return Concatenated([part] * times + [part.first(int(np.searchsorted(ends, rest)) + 1)])


def _tokens_of(
    run: StageRun,
    source: Source,
    length: int | None,
    at_most: int | None = None,
    unended: Collection[str] = (),
) -> tuple[TokenStore, dict[str, Any]]:
    """Tokenizes a source of an sft stage; see `tokens_of_source`."""
    stage = run.stage
    assert isinstance(stage, Sft)
    own = any(source is one for one in stage.data)
    words: list[Any] = [stage.train_on, stage.too_long, length, at_most, own, stage.max_dirty_share]
    words += [stage.training.get("completion_only_loss"), stage.training.get("assistant_only_loss")]
    if unended:
        words.append(sorted(unended))
    tokenizer = partial(sft_tokenizer, stage, run.tokenizer, length, source, unended)
    store, found = tokens_of_source(run, source, TEXT_KINDS, tokenizer, words, at_most)
    left = found["rows"] - sum(found["dirty"].values())
    if found["untrained"]:
        told = f"{found['untrained']} of {left} rows have no token to train on and are left out"
        ranks.say(f"  {source.title}: {told}")
    if found["long"]:
        done = {"cut": "are cut", "split": "are split", "drop": "are left out"}[stage.too_long]
        ranks.say(f"  {source.title}: {found['long']:,} rows are longer than {length} tokens and {done} (too_long)")
    return store, found


def tokens_of_source(
    run: StageRun,
    source: Source,
    kinds: tuple[Kind, ...],
    tokenizer: Callable[[], RowTokenizer | Tokenizes],
    words: list[Any],
    at_most: int | None = None,
) -> tuple[TokenStore, dict[str, Any]]:
    """Tokenizes a source, or finds its tokens from before.

    Args:
        run: The stage.
        source: One of its sources, or of a stage that it replays.
        kinds: The formats of rows that will do.
        tokenizer: Makes what turns rows into tokens.
        words: All of the recipe that decides which tokens come out, beside the source.
        at_most: Rows to take; None for all.

    Returns:
        The tokens, and what was read, left out and cut.

    Raises:
        DataError: Too many rows are dirty, or none has a token to train on.
    """
    stage = run.stage
    opened = open_source(source, kinds=kinds)
    rows, removed = run.cleaner.rows(opened.rows, source)

    def make(path: Path) -> dict[str, Any]:
        read, counts = Read(), {"untrained": 0, "long": 0, "tokens": 0, "kept": 0}
        clean = islice(tidy_rows(rows, source, read), at_most)
        columns = _columns(clean, tokenizer(), read, counts)
        write_columns(path, told(columns, source.title, len(rows) if isinstance(rows, Dataset) else None))
        refuse_dirt(source, read.dirty, read.rows, stage.max_dirty_share)
        left = read.rows - len(read.dirty)
        if not counts["kept"]:
            raise nothing_to_train(stage, source, left)
        return {**read.facts(), **counts}

    if not isinstance(rows, Dataset):
        words = [*words, run.hash, source.model_dump()]
    store, found, before = made_once(rows, run.tokenizer, words, make, run.folder / "tokens")
    how = "tokenized before" if before else "tokenized"
    ranks.say(f"  {source.title}: {found['kept']:,} rows, {found['tokens']:,} tokens, {how}")
    found = {key: value for key, value in found.items() if key not in ("tokens", "kept")}
    return store, {**found, **removed, "format": opened.taken.format.name}


def _columns(
    rows: Iterator[dict[str, Any]], tokenizer: RowTokenizer | Tokenizes, read: Read, counts: dict[str, int]
) -> Iterator[Columns]:
    """Yields the tokens of rows by block; counts into `read` and `counts` what was left out, cut and kept."""
    chunks = iter(lambda: [*islice(rows, BLOCK)], [])
    tokenized: Any = ((chunk, tokenizer.encode(chunk)) for chunk in chunks)
    if isinstance(tokenizer, RowTokenizer):
        tokenized = encoded(tokenizer, chunks)
    for chunk, made in tokenized:
        for number, word in made.refused:
            name = str(chunk[number].get("id", "without an id"))
            read.dirty.add([f"the chat template refuses it ({word})"], name)
        counts["untrained"] += made.untrained
        counts["long"] += made.long
        counts["tokens"] += made.tokens
        counts["kept"] += len(made)
        if len(made):
            yield columns_of(made) if isinstance(made, TokenRows) else made.columns()


def nothing_to_train(stage: Stage, source: Source, rows: int) -> DataError:
    """Returns the error of a source of which no row has a token to train on."""
    return DataError(
        f"stages.{stage.name}: {source.title} gave {rows} rows and none of them has a token to train on. Look at them "
        "with `hfpipe preview`; a prompt longer than max_length leaves no room for its completion."
    )


def is_streamed(stage: Sft) -> bool:
    """Says whether the rows of a stage are tokenized while it trains.

    Where the recipe gives no `max_steps` the end of the data ends the training: a stream is read to it then, once. So
    it is where the parent's own texts are mixed in by the tokens that are trained on.
    """
    streamed = any(source.passed_through.get("streaming") for source in stage.data)
    return streamed and stage.training.get("max_steps", -1) > 0 and stage.kept.replay is None


def sft_stream(run: StageRun, length: int | None, *, packed: bool) -> TokenStream:
    """Returns the stream of this rank's rows. Every rank has to call this.

    Args:
        run: The stage.
        length: Tokens of a row; None where nothing is cut.
        packed: Whether examples share rows.
    """
    stage, seed = run.stage, run.recipe.seed
    assert isinstance(stage, Sft)
    parts = mixture(run.recipe, stage)
    tables = [
        run.cleaner.documents(one.source, partial(load_rows, one.source, kinds=TEXT_KINDS, together=True))
        for one in parts
    ]
    per_device, accumulation = divide_batch(stage)
    step = per_device * accumulation * ranks.ranks()
    room = length or DEFAULT_MAX_LENGTH
    sources = [rows for rows, _ in tables]
    lanes = stage.lanes or default_lanes(sources, ranks.ranks())

    def cleaned(number: int, rows: IterableDataset, lanes: int) -> list[np.ndarray] | None:
        """Returns why rows of a stream are removed; looks no further than the stage will come."""
        needed = math.ceil(stage.training["max_steps"] * step * room / lanes * parts[number].share)
        return run.cleaner.shares(rows, lanes, parts[number].source, needed)

    tokenizers = [sft_tokenizer(stage, run.tokenizer, length, part.source) for part in parts]
    return TokenStream(
        sources,
        run.tokenizer,
        max_length=room,
        weights=[part.share for part in parts],
        origins=[part.source for part in parts],
        replayed=[part.replayed for part in parts],
        lanes=lanes,
        max_dirty_share=stage.max_dirty_share,
        seed=seed,
        rank=ranks.rank(),
        ranks=ranks.ranks(),
        cleaned=cleaned,
        examples=Examples(tokenizers, packed, max(1, step // lanes)),
    )
