"""Tokens of fine-tuning rows, made once: speed against the Rust tokenizer alone, memory, disk, and padding.

    python benchmarks/prepare.py [--tokenizer FOLDER_OR_ID] [--rows 4000] [--memory 10000,100000]

The rows are made of the built-in corpus: prompt and completion, and chats of two exchanges, about 500 tokens each.
Printed are, with what is wanted:

- speed: processor time of the Rust tokenizer alone (`encode_batch_fast` and the ids, in calls of 1,000 texts that are
  rendered already) divided by that of all of it: Parquet read, rows tidied, rendered, tokenized, labelled and written.
  At least 0.85 for prompt and completion, 0.5 for a chat template; medians of three rounds in turns in one process.
- disk: bytes a token; at most 6. again: seconds until tokens that are there are found.
- memory: the peak of a process that makes and reads so many chats, for each count. The last at most 1.2 times the
  first.
- padding: the share of padding of 8 rows a step in a random order, grouped by length, and packed.
- wait: what making a batch takes (rows read, joined, stacked) of the time that the batch lasts at 50,000 tokens a
  second, for micro-batches of one row and of eight; at most 1 %.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import load_dataset

from hfpipe.data.builtin.corpus import builtin
from hfpipe.data.chat import chat_text
from hfpipe.data.cleaning.text_rules import Read, tidy_rows
from hfpipe.data.dataloader import BatchLoader, ResumableSampler
from hfpipe.data.row_order import GroupedRows, PackedRows
from hfpipe.data.sources.load import load_rows
from hfpipe.data.token_pool import encoded
from hfpipe.data.token_store import Columns, TokenStore, columns_of, key_of, release_mapped, write_columns
from hfpipe.data.tokenize import RowTokenizer
from hfpipe.model.create import train_tokenizer
from hfpipe.model.tokenizer import load_tokenizer
from hfpipe.recipe import Source

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BLOCK = 1_000


def rows_of(kind: str, count: int) -> Iterator[dict[str, Any]]:
    """Yields pairs or chats of pieces of the corpus, of many lengths."""
    texts = [row["text"] for row in builtin("text", "train")]
    text = " ".join(texts)
    chance, place = np.random.default_rng(0), 0
    for _ in range(count):
        sizes = chance.integers(100, 900, 4)
        pieces = []
        for size in sizes:
            place = (place + int(size)) % (len(text) - 2_000)
            pieces.append(text[place : place + int(size)])
        if kind == "pairs":
            yield {"prompt": "".join(pieces[:2]), "completion": " " + "".join(pieces[2:])}
        else:
            roles = ("user", "assistant") * 2
            yield {"messages": [{"role": role, "content": said} for role, said in zip(roles, pieces, strict=True)]}


def write(kind: str, count: int, folder: Path) -> Source:
    """Writes rows as Parquet, and gives them as a source."""
    file = folder / f"{kind}{count}.parquet"
    writer = None
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = rows_of(kind, count)
    while block := [*islice(rows, BLOCK)]:
        table = pa.Table.from_pylist(block)
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    return Source.model_validate({"path": "parquet", "data_files": str(file)})


def make(source: Source, tokenizer: Any, path: Path) -> None:
    """Makes the tokens of a source, as a stage does."""
    rows_to_tokens = RowTokenizer(tokenizer, 4096)
    clean = tidy_rows(load_rows(source), source, Read())

    def blocks() -> Iterator[Columns]:
        chunks = iter(lambda: [*islice(clean, BLOCK)], [])
        for number, (_, made) in enumerate(encoded(rows_to_tokens, chunks, processes=1)):
            yield columns_of(made)
            if number % 10 == 9:
                release_mapped()

    write_columns(path, blocks())


def seconds(work: Callable[[], Any]) -> float:
    """Returns the processor time of this process, all threads."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def speed(tokenizer: Any, rows: int, folder: Path) -> None:
    backend = tokenizer.backend_tokenizer
    for kind, wanted in (("pairs", 0.85), ("chats", 0.5)):
        source = write(kind, rows, folder)
        load_rows(source)  # read into the cache of `datasets`, as for any run
        given = load_dataset("parquet", data_files=source.passed_through["data_files"], split="train")
        if kind == "pairs":
            texts = [row["prompt"] + row["completion"] for row in given]
        else:
            texts = [chat_text(tokenizer, row["messages"]) for row in given]

        def alone(texts: list[str] = texts, special: bool = kind == "pairs") -> None:
            for begin in range(0, len(texts), BLOCK):
                for encoding in backend.encode_batch_fast(texts[begin : begin + BLOCK], add_special_tokens=special):
                    encoding.ids  # noqa: B018

        path = folder / f"{kind}.arrow"
        rounds = [(seconds(alone), seconds(lambda source=source, path=path: make(source, tokenizer, path)))  # type: ignore[misc]
                  for _ in range(3)]  # fmt: skip
        bare, whole = (statistics.median(one) for one in zip(*rounds, strict=True))
        store = TokenStore(path)
        tokens = int(store.lengths.sum())
        begin = time.perf_counter()
        key_of(load_rows(source), tokenizer)
        again = time.perf_counter() - begin
        print(f"speed    {kind}: {bare / whole:.2f} of the tokenizer (wanted {wanted}), {tokens / whole:,.0f}/s")
        print(f"disk     {kind}: {path.stat().st_size / tokens:.2f} bytes a token; again after {again:.1f} s")
        random = np.random.default_rng(0).permutation(store.lengths)
        for name, lengths in (
            ("random", random),
            ("grouped", store.lengths[GroupedRows(store.lengths, 8, 0).epoch(0).examples]),
        ):
            steps = lengths[: len(lengths) // 8 * 8].reshape(-1, 8)
            print(f"padding  {kind}: {1 - steps.sum() / (8 * steps.max(axis=1)).sum():.1%} {name}, 8 rows a step")
        room = max(2048, int(store.lengths.max()))
        packed = PackedRows(store.lengths, room, 0).epoch(0)
        print(f"padding  {kind}: {1 - tokens / (room * packed.rows):.1%} packed into {room}")
        wait(store, kind)


def wait(store: TokenStore, kind: str) -> None:
    for packed in (False, True):
        order = PackedRows(store.lengths, 2048, 0) if packed else None
        total = (order.epoch(0).rows if order else len(store.lengths)) // 8 * 8
        for rows in (1, 8):
            sampler = ResumableSampler(
                store, store.lengths, total=total, per_device=rows, accumulation=1, seed=0, order=order, packed=packed
            )
            sizes: list[int] = []
            took = seconds(lambda sizes=sizes, sampler=sampler, rows=rows: sizes.extend(  # type: ignore[misc]
                batch["input_ids"].numel() for batch in BatchLoader(sampler, rows, 0)
            ))  # fmt: skip
            name = "packed" if packed else "grouped"
            print(
                f"wait     {kind}: {50_000 * took / sum(sizes):.2%} of 50,000 tokens/s, {rows} rows {name} (wanted 1%)"
            )


def peak(tokenizer: Any, rows: int, folder: Path) -> None:
    """Prints the peak memory of this process, in MiB: makes the tokens of chats and reads each once, in an order."""
    source, path = write("chats", rows, folder), folder / "chats.arrow"
    key_of(load_rows(source), tokenizer)
    make(source, tokenizer, path)
    store = TokenStore(path)
    for example in GroupedRows(store.lengths, 8, 0).epoch(0).examples:
        store[int(example)]["labels"].sum()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 1024)  # `ru_maxrss` would count what the process was before it ran this


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer")
    parser.add_argument("--rows", type=int, default=4_000)
    parser.add_argument("--memory", default="10000,100000", help="counts of rows; empty for none")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    if options.tokenizer:
        tokenizer = load_tokenizer(options.tokenizer)
    else:
        tokenizer = train_tokenizer((row["text"] for row in builtin("text", "train")), 8_000, 1024)
    tokenizer.chat_template = CHATML
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        if options.peak:
            peak(tokenizer, options.peak, Path(folder))
            return
        speed(tokenizer, options.rows, Path(folder))
    given = ["--tokenizer", options.tokenizer] if options.tokenizer else []
    peaks = []
    for count in filter(None, options.memory.split(",")):
        command = [sys.executable, __file__, *given, "--peak", count]
        said = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout
        peaks.append(float(said.split()[-1]))
        print(f"memory   {int(count):,} chats: {peaks[-1]:,.0f} MiB at most, {peaks[-1] / peaks[0]:.2f} of the first")


if __name__ == "__main__":
    main()
