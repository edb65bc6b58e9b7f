"""Lanes and ranks simulated: is each document read once, what share has each rank, and what does it hold?

    python benchmarks/lanes.py [--documents 20000] [--plans 8:1 8:8 64:8 64:64 256:64]

Numbered documents of very different length (log-normal, 300 characters in the middle) are written to 8 Parquet files.
Of each plan, LANES:RANKS, the ranks of a launch are run one after the other in this process, each to the end of its
lanes, and it prints as a Markdown table:

- once: documents that were served exactly once, of all;
- share: the tokens of the rank with the fewest and with the most, as a share of an even division;
- padding: rows that stand in for lanes that ended before others, and padded ends, as a share of all tokens;
- held: the peak of what Python and NumPy held for the first rank, in a pass of its own that keeps no row;
- seconds: the time of one rank, on average.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, load_dataset

from hfpipe.data.stream.dataset import TokenStream
from hfpipe.data.tokenize import IGNORED
from hfpipe.model.create import train_tokenizer

FILES = 8
LENGTH = 512
WORDS = [f"{first}{second}" for first in ("ba", "do", "ki", "lu", "me", "no") for second in ("l", "n", "r", "st", "x")]


def texts(count: int) -> list[str]:
    """Returns documents that begin with their number."""
    chance = random.Random(0)
    sizes = [max(3, int(chance.lognormvariate(4, 1))) for _ in range(count)]
    return [f"#{number}# " + " ".join(chance.choices(WORDS, k=size)) for number, size in enumerate(sizes)]


def numbers(rows: Sequence[Any], lanes: int, tokenizer: Any) -> Counter[str]:
    """Counts the documents in the rows of a rank, which hold its lanes in turn."""
    found: Counter[str] = Counter()
    for lane in range(lanes):
        ids = [token for row in rows[lane::lanes] for token in row]
        found.update(text.split("#")[1] for text in tokenizer.decode(ids).split(tokenizer.eos_token) if "#" in text)
    return found


def opened(source: Any, tokenizer: Any, lanes: int, ranks: int, rank: int) -> TokenStream:
    """Returns the stream of a rank, which ends with its documents."""
    plan: dict[str, Any] = {"lanes": lanes, "rank": rank, "ranks": ranks}
    return TokenStream([source], tokenizer, max_length=LENGTH, exhausted="stop", prefetch=False, **plan)


def one_rank(stream: TokenStream) -> tuple[list[Any], int]:
    """Returns the rows of a rank, those that stand in for an ended lane empty, and its trained tokens."""
    rows, trained = [], 0
    for batch in stream.batches(1):
        for row in batch:
            real = row["source"] is not None
            trained += int((row["labels"] != IGNORED).sum()) if real else 0
            rows.append(row["input_ids"].tolist() if real else [])
    return rows, trained


def held_by(stream: TokenStream) -> int:
    """Returns the peak of bytes that Python and NumPy hold while a rank reads all of its documents."""
    tracemalloc.start()
    for _ in stream.batches(1):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def simulated(source: Any, tokenizer: Any, documents: int, lanes: int, ranks: int) -> str:
    """Runs the ranks of a plan, and returns its line of the table."""
    seen: Counter[str] = Counter()
    sizes, places = [], 0
    begin = time.perf_counter()
    for rank in range(ranks):
        rows, trained = one_rank(opened(source, tokenizer, lanes, ranks, rank))
        seen.update(numbers(rows, lanes // ranks, tokenizer))
        sizes.append(trained)
        places += LENGTH * len(rows)
    seconds = (time.perf_counter() - begin) / ranks
    held = held_by(opened(source, tokenizer, lanes, ranks, 0))
    once = sum(count == 1 for count in seen.values())
    even = sum(sizes) / ranks
    share = f"{min(sizes) / even:.1%} to {max(sizes) / even:.1%}"
    return (
        f"| {lanes} | {ranks} | {once:,} of {documents:,} | {share} | {1 - sum(sizes) / places:.1%} "
        f"| {held / 2**20:.1f} MB | {seconds:.1f} |"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--plans", nargs="+", default=["8:1", "8:8", "64:8", "64:64", "256:64"])
    asked = parser.parse_args()
    datasets.disable_progress_bars()
    written = texts(asked.documents)
    tokenizer = train_tokenizer(written[:2000], 600, LENGTH)
    heads = ["lanes", "ranks", "once", "share of a rank", "padding", "held", "seconds"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(FILES):
            place = Path(folder, f"{number}.parquet")
            Dataset.from_dict({"text": written[number::FILES]}).to_parquet(place, batch_size=50)
        for plan in asked.plans:
            lanes, ranks = map(int, plan.split(":"))
            source = load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train", streaming=True)
            print(simulated(source, tokenizer, asked.documents, lanes, ranks), flush=True)


if __name__ == "__main__":
    main()
