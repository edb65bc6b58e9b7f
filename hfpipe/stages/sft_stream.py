"""The rows of an sft stage with a streamed source: tokenized while it trains, so that it starts at once.

They come through the lanes of the stream as those of pretraining do, with whole examples in the place of documents.
"""

from __future__ import annotations

import math

import numpy as np
from datasets import IterableDataset

from hfpipe.core import ranks
from hfpipe.data.mixture import mixture
from hfpipe.data.sources.load import load_rows
from hfpipe.data.stream.dataset import TokenStream, default_lanes
from hfpipe.data.stream.examples import Examples
from hfpipe.data.tokenize import sft_tokenizer
from hfpipe.recipe import Sft
from hfpipe.recipe.row_formats import TEXT_KINDS
from hfpipe.stages.sft_rows import DEFAULT_MAX_LENGTH
from hfpipe.stages.trainer import StageRun, divide_batch


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
    tables = [run.cleaner.tables(load_rows(part.source, kinds=TEXT_KINDS), part.source) for part in parts]
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
