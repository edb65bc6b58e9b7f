"""Cleaning against the tokenizer: documents per CPU second of the pass, beside the bare Rust tokenizer on the same.

    python benchmarks/cleaning.py [--tokenizer gpt2] [--documents 2000] [PARQUET ...]

Without files the documents are mixed from the built-in texts. They are written as eight Parquet files and streamed from
there, by one process on one thread; CPU seconds, so that a busy machine does not count.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

from datasets import Dataset, disable_progress_bars, load_dataset

from hfpipe.data.dedup import Cleaner
from hfpipe.data.sources.load import load_rows
from hfpipe.model.create import train_tokenizer
from hfpipe.model.tokenizer import load_tokenizer
from hfpipe.recipe import Source

FILES, LANES, SUITE_ROWS = 8, 8, 500


def documents(files: list[str], count: int) -> list[str]:
    """Documents that differ, each mixed from the sentences of two."""
    rows = load_dataset("parquet", data_files=files, split="train") if files else load_rows(Source(path="builtin"))
    texts, chance, mixed = rows["text"][:5000], random.Random(0), []
    for _ in range(count):
        sentences = [part for text in chance.choices(texts, k=2 if files else 20) for part in text.split(". ")]
        chance.shuffle(sentences)
        mixed.append(". ".join(sentences[: len(sentences) // 2]))
    return mixed


def cpu_seconds(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--tokenizer", help="a folder or a Hub id; one is trained on the documents when absent")
    parser.add_argument("--documents", type=int, default=2000)
    options = parser.parse_args()
    disable_progress_bars()
    texts = documents(options.files, options.documents)
    words = [text.split() for text in texts]
    print(f"{len(texts):,} documents of {sum(map(len, words)) / len(texts):.0f} words")
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else train_tokenizer(iter(texts), 8192, 1024)
    backend = tokenizer.backend_tokenizer

    def tokenize() -> None:
        for start in range(0, len(texts), 500):
            backend.encode_batch_fast(texts[start : start + 500], add_special_tokens=False)

    bare = len(texts) / cpu_seconds(tokenize)
    print(f"{'bare tokenizer':32}{bare:10,.0f} documents per CPU second")
    suite = [{"text": " ".join(row[-60:])} for row in words[:SUITE_ROWS]]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(FILES):
            rows = [{"text": text} for text in texts[number::FILES]]
            Dataset.from_list(rows).to_parquet(Path(folder) / f"{number}.parquet")
        for clean in ({"deduplicate": "exact"}, {"deduplicate": "near"}, {"decontaminate": True}):
            source = Source.model_validate(
                {"path": "parquet", "data_files": f"{folder}/*.parquet", "streaming": True, **clean}
            )
            stream, cleaner = load_rows(source), Cleaner(Path(folder) / "cleaning", str(clean), {"suite": suite})
            speed = len(texts) / cpu_seconds(lambda: cleaner.shares(stream, LANES, source))  # noqa: B023
            print(f"{clean!s:32}{speed:10,.0f} documents per CPU second, {speed / bare:.1f} of the bare tokenizer")


if __name__ == "__main__":
    main()
