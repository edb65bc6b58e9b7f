"""Cleaning as a chain of datatrove's pipelines: their deduplication, and rules of hfpipe's in steps of our own.

Each pipeline has tasks that share no memory: a task reads one piece of a source, and the pipelines hand files on. So
the text may be more than one machine holds. A copy is removed where `Cleaner` removes it: the first of its like stays,
in the order of the sources and of the rows in them.

- Exact duplicates: datatrove's steps; the task of a document is its priority, so that its first copy stays.
- Near duplicates: datatrove's steps over the 5-grams of `minhash.py`. Two documents meet that agree in all hashes of a
  bucket. datatrove compares no further, and keeps one of each cluster; here each goes that meets one before it, as in
  `Cleaner`.
- Overlap with suites: datatrove's n-gram step removes whatever holds one run of 12 words. hfpipe's rule counts how many
  rows hold a run, so tasks sketch (`SuiteIndex`), one judges, and datatrove's filter takes the rows out.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import multiprocess
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.writers import ParquetWriter
from datatrove.utils.word_tokenizers import WhitespaceTokenizer
from xxhash import xxh3_64_intdigest

from hfpipe.core.errors import MachineError
from hfpipe.core.files import read_json, write_json
from hfpipe.data.cleaning.cleaned import DONE, text_folder
from hfpipe.data.cleaning.contamination import SuiteIndex, grams_of, packed, unpacked, words_of
from hfpipe.data.cleaning.minhash import NGRAM, PERMUTATIONS
from hfpipe.data.cleaning.text_rules import MAX_CHARACTERS, Read, Tally, merged, refuse_dirt, tidy_rows
from hfpipe.data.sources.formats import Rows
from hfpipe.data.sources.load import load_rows
from hfpipe.data.stream.shard_reader import in_shards, share_of
from hfpipe.recipe import Source

MOST_TASKS = 65_534  # what ranks the copies of a text, its task, has 16 bits
FINDERS = 16  # tasks that look for copies, each among the hashes of its range
LOOK_EVERY = 1_000  # rows
COLUMNS = pa.schema([("id", pa.string()), ("text", pa.string())])
Documents = Iterator[Document]


@dataclass(frozen=True)
class Piece:
    """The part of a source that one task reads.

    Args:
        source: The source.
        place: Its number among those that are cleaned.
        number: Which of its pieces.
        pieces: How many it has.
    """

    source: Source
    place: int
    number: int
    pieces: int

    def rows(self) -> Rows:
        """The rows of the piece; the pieces one after the other are the rows of the source in their order."""
        rows = load_rows(self.source, kinds=("text",))
        if isinstance(rows, Dataset):
            return rows.select(range(*(len(rows) * part // self.pieces for part in (self.number, self.number + 1))))
        return share_of(in_shards(rows, self.pieces, self.source), self.number, self.pieces)


def pieces_of(source: Source, tasks: int) -> int:
    """Returns how many of so many tasks a source has work for: one has a row, or a shard of a stream."""
    rows = load_rows(source, kinds=("text",))
    return max(1, min(tasks, len(rows) if isinstance(rows, Dataset) else in_shards(rows, tasks, source).num_shards))


class ReadPieces(PipelineStep):  # type: ignore[misc]
    """Reads the documents of a task's piece that are not dirty.

    Args:
        pieces: The pieces of all tasks.
        word: Read only sources that ask for this.
        told: Where a task tells what it read; None for nowhere.
    """

    name, type = "source of a recipe", "READER"

    def __init__(self, pieces: Sequence[Piece], word: str | None = None, told: Path | None = None) -> None:
        super().__init__()
        self.pieces, self.word, self.told = pieces, word, told

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> Documents:
        piece, read = self.pieces[rank], Read()
        if self.word is not None and not getattr(piece.source, self.word):
            return
        parent = multiprocess.parent_process()
        for row in tidy_rows(piece.rows(), piece.source, read, MAX_CHARACTERS):
            if read.rows % LOOK_EVERY == 0 and parent is not None and not parent.is_alive():
                raise MachineError("The command that started this task was killed.")  # and may be running again
            self.stat_update("documents")
            yield Document(row["text"], str(row.get("id") or ""), metadata={"task": rank, "place": str(piece.place)})
        if self.told is not None:
            write_json(self.told / f"{rank:05d}.json", read.facts())


class Sketch(PipelineStep):  # type: ignore[misc]
    """Writes down what the documents of a task share with the suites.

    Args:
        suites: A file with the suites' rows.
        output: Where to.
    """

    name, type = "overlap with suites: sketches", "DECONT"

    def __init__(self, suites: Path, output: Path) -> None:
        super().__init__()
        self.suites, self.output = suites, output

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> None:
        index, found = _index_of(self.suites), []
        for place, document in enumerate(data):
            if (one := index.look_at({"text": document.text}, place, near=False)) is not None:
                found.append(one)
        self.output.mkdir(parents=True, exist_ok=True)
        np.savez(self.output / f"{rank:05d}.npz", **packed(found))  # type: ignore[arg-type]


class JudgeOverlap(PipelineStep):  # type: ignore[misc]
    """Judges each source by the sketches of its pieces, and writes what goes for `MinhashDedupFilter`.

    Args:
        pieces: The pieces of all tasks.
        suites: A file with the suites' rows.
        sketches: What `Sketch` wrote.
        output: Where to.
    """

    name, type = "overlap with suites: judgement", "DECONT"

    def __init__(self, pieces: Sequence[Piece], suites: Path, sketches: Path, output: Path) -> None:
        super().__init__()
        self.pieces, self.suites, self.sketches, self.output = pieces, suites, sketches, output

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        index = _index_of(self.suites)
        for place in sorted({piece.place for piece in self.pieces}):
            tasks = [task for task, piece in enumerate(self.pieces) if piece.place == place]
            if not self.pieces[tasks[0]].source.decontaminate:
                continue
            # Rows are numbered by task and place in it: a task has less than 2^32.
            found = [one for task in tasks for one in unpacked(np.load(self.sketches / f"{task:05d}.npz"), task << 32)]
            _, guilty = index.judge(found)
            _write_removed(np.array(sorted(guilty), np.uint64), self.output)


class SignText(MinhashDedupSignature):  # type: ignore[misc]
    """datatrove's MinHash signatures of the 5-grams that `minhash.py` takes."""

    def get_shingles(self, text: str) -> np.ndarray:
        """(N, 1) hashes of the word 5-grams of a text; a text without words is like itself alone."""
        grams = np.unique(grams_of(words_of(text), NGRAM))
        return (grams if len(grams) else np.array([xxh3_64_intdigest(text.encode())], np.uint64)).reshape(-1, 1)


class RemoveLater(PipelineStep):  # type: ignore[misc]
    """Removes each document that meets one before it in a bucket, in place of datatrove's clusters.

    Args:
        pairs: What `MinhashDedupBuckets` wrote: task and place of a document, then of one behind it, as uint32.
        output: Where the removed are written, as `MinhashDedupFilter` reads them.
    """

    name, type = "near duplicates: the first stays", "DEDUP"

    def __init__(self, pairs: Path, output: Path) -> None:
        super().__init__()
        self.pairs, self.output = pairs, output

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        later = [np.zeros(0, np.uint64)]
        for file in sorted(self.pairs.glob("*.dups")):
            pairs = np.fromfile(file, "<u4").reshape(-1, 4).astype(np.uint64)
            later.append(np.unique(pairs[:, 2] << np.uint64(32) | pairs[:, 3]))
        _write_removed(np.unique(np.concatenate(later)), self.output)


class Finish(PipelineStep):  # type: ignore[misc]
    """Tells what was read and removed of each source, declares the text whole, and deletes the files in between.

    Args:
        pieces: The pieces of all tasks.
        folder: Of the cleaned text.
        work: Of the files in between.
        reason: Why rows were removed that do not overlap a suite.
        max_dirty_share: See `refuse_dirt`.
    """

    name, type = "end", "DEDUP"

    def __init__(self, pieces: Sequence[Piece], folder: Path, work: Path, reason: str, max_dirty_share: float) -> None:
        super().__init__()
        self.pieces, self.folder, self.work, self.reason = pieces, folder, work, reason
        self.max_dirty_share = max_dirty_share

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        found = []
        for place in sorted({piece.place for piece in self.pieces}):
            tasks = [task for task, piece in enumerate(self.pieces) if piece.place == place]
            told = [read_json(self.work / "told" / f"{task:05d}.json") for task in tasks]
            rows = sum(one["rows"] for one in told)
            dirty, mended = (
                merged([Tally(one[word], one[f"{word}_ids"]) for one in told]) for word in ("dirty", "mended")
            )
            refuse_dirt(self.pieces[tasks[0]].source, dirty, rows, self.max_dirty_share)
            files = text_folder(self.folder, place).glob("*.parquet")
            kept = sum(pq.read_metadata(file).num_rows for file in files)
            removed = [self.work / "overlap" / f"{task:06d}.remove" for task in tasks]
            overlapping = sum(file.stat().st_size // 4 for file in removed if file.exists())
            gone = {"overlaps a suite": overlapping, self.reason: rows - len(dirty) - overlapping - kept}
            found.append(
                {
                    "removed": {name: count for name, count in gone.items() if count},
                    "removed_ids": [],
                    "dirty": dirty.counts,
                    "dirty_ids": dirty.ids,
                    "mended": mended.counts,
                    "mended_ids": mended.ids,
                    "cleaned_rows": rows,
                }
            )
        write_json(self.folder / DONE, {"sources": found})
        shutil.rmtree(self.work, ignore_errors=True)


class QuietExecutor(LocalPipelineExecutor):  # type: ignore[misc]
    """Leaves the terminal to hfpipe; the log of each task has everything."""

    def _run_for_rank(self, *place: int) -> Any:
        with contextlib.redirect_stderr(io.StringIO()):
            return super()._run_for_rank(*place)


@cache
def _index_of(suites: Path) -> SuiteIndex:
    return SuiteIndex(pickle.loads(suites.read_bytes()))


def _write_removed(places: np.ndarray, output: Path) -> None:
    """Writes the places of documents that are removed, task in the upper half, as a file for each task."""
    output.mkdir(parents=True, exist_ok=True)
    tasks, begins = np.unique(places >> np.uint64(32), return_index=True)
    for task, part in zip(tasks.tolist(), np.split(places, begins)[1:], strict=True):
        part.astype("<u4").tofile(output / f"{task:06d}.remove")


@dataclass(frozen=True)
class Pipeline:
    """One of the pipelines, which run one after the other.

    Args:
        name: Of its folder of logs, and for a person.
        steps: datatrove's pipeline.
        tasks: How many.
    """

    name: str
    steps: list[Any]
    tasks: int


def pipelines(pieces: Sequence[Piece], folder: Path, max_dirty_share: float) -> list[Pipeline]:
    """The pipelines that clean the sources of a stage.

    Args:
        pieces: The pieces of all tasks; their sources have one `deduplicate`, or none.
        folder: Of the cleaned text; `work/suites` in it holds the suites' rows where a source is compared with them.
        max_dirty_share: Of the stage.
    """
    tasks, work = len(pieces), folder / "work"
    overlap, suites = work / "overlap", work / "suites"
    chain, filters = [], []
    if any(piece.source.decontaminate for piece in pieces):
        sketches = work / "sketches"
        look = [ReadPieces(pieces, "decontaminate"), Sketch(suites, sketches)]
        chain.append(Pipeline("1-overlap", look, tasks))
        chain.append(Pipeline("2-judge", [JudgeOverlap(pieces, suites, sketches, overlap)], 1))
        filters.append(MinhashDedupFilter(str(overlap)))
    asked = next((piece.source for piece in pieces if piece.source.deduplicate is not None), None)
    if asked is not None:
        find, last = _near(work, asked.near) if asked.near is not None else _exact(work, tasks)
        find[0].steps[:0] = [ReadPieces(pieces, "deduplicate"), *filters]
        chain += [Pipeline(one.name, one.steps, one.tasks or tasks) for one in find]
        filters = [*filters, last]
    writer = ParquetWriter(str(folder / "text"), "${place}/${rank}.parquet", adapter=_row, schema=COLUMNS)
    chain.append(Pipeline("6-write", [ReadPieces(pieces, told=work / "told"), *filters, writer], tasks))
    reason = "near duplicate" if asked is not None and asked.near is not None else "duplicate"
    chain.append(Pipeline("7-end", [Finish(pieces, folder, work, reason, max_dirty_share)], 1))
    return chain


def _exact(work: Path, tasks: int) -> tuple[list[Pipeline], PipelineStep]:
    """The pipelines that find copies, the first without what it reads, and the filter that takes them out."""
    config, finders = ExactDedupConfig(_content, _priority), min(FINDERS, tasks)
    signatures, copies = str(work / "signatures"), str(work / "copies")
    sign = ExactDedupSignature(signatures, config, finder_workers=finders)
    find = [
        Pipeline("3-sign", [sign], 0),
        Pipeline("4-find", [ExactFindDedups(signatures, copies, config)], finders),
    ]
    return find, ExactDedupFilter(copies, config)


def _near(work: Path, threshold: float) -> tuple[list[Pipeline], PipelineStep]:
    """Returns the same steps as `_exact`, for documents from a similarity on."""
    buckets, hashes = buckets_of(threshold)
    config = MinhashConfig(n_grams=NGRAM, num_buckets=buckets, hashes_per_bucket=hashes)
    signatures, pairs, removed = work / "signatures", work / "pairs", work / "near"
    find = [
        Pipeline("3-sign", [SignText(str(signatures), config, WhitespaceTokenizer())], 0),
        Pipeline("4-find", [MinhashDedupBuckets(str(signatures), str(pairs), config=config)], buckets),
        Pipeline("5-first", [RemoveLater(pairs, removed)], 1),
    ]
    return find, MinhashDedupFilter(str(removed))


def removed_share(similarity: Any, buckets: int, hashes: int) -> Any:
    """Chance that a document meets another in a bucket; numbers or arrays of them.

    Args:
        similarity: Jaccard similarity of the two.
        buckets: Number of buckets.
        hashes: Of each.
    """
    return 1 - (1 - similarity**hashes) ** buckets


@cache
def buckets_of(threshold: float) -> tuple[int, int]:
    """Returns the buckets, and the hashes of each, that tell best what is at least so similar from what is less.

    Best by the area between the chance to be removed and a step at the threshold, of as many hashes as `minhash.py`
    takes (Lee et al. 2022, arXiv:2107.06499, appendix A).
    """
    similarity = np.linspace(0, 1, 1001)

    def error(hashes: int) -> float:
        return float(
            np.abs(removed_share(similarity, PERMUTATIONS // hashes, hashes) - (similarity >= threshold)).sum()
        )

    hashes = min(range(1, PERMUTATIONS + 1), key=error)
    return PERMUTATIONS // hashes, hashes


def _content(document: Document) -> bytes:
    return document.text.encode()  # type: ignore[no-any-return]  # xxhash 4 takes no text


def _priority(document: Document) -> int:
    """The first of the copies in different tasks stays; within a task, datatrove keeps the first itself."""
    return MOST_TASKS + 1 - int(document.metadata["task"])


def _row(_: ParquetWriter, document: Document) -> dict[str, Any]:
    return {"id": document.id or None, "text": document.text}
