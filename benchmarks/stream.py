"""The stream against its limit: tokens per second from Parquet to packed rows, beside the bare Rust tokenizer's.

    python benchmarks/stream.py [--tokenizer FOLDER_OR_ID] [--rounds 5]

The documents are the built-in corpus, written four times over to Parquet in a temporary folder, so that what the
stream builds ahead at its end weighs little; "short" are its documents cut to 600 characters. The third figure is
SFTTrainer's own preparation (tokenize and pack) of a quarter of the same documents. All read nothing but memory-cached
files, and are measured in turns in one process, so that a busy machine slows them alike. The last lines are the
seconds to the first batch of a stream resumed after 100, 1,000 and 10,000 batches.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import datasets
from datasets import Dataset, load_dataset
from trl import SFTConfig, SFTTrainer

from hfpipe.data.builtin import builtin
from hfpipe.data.stream import TokenStream
from hfpipe.model.create import create_model, train_tokenizer
from hfpipe.model.load import load_tokenizer

MAX_LENGTH = 1024
COPIES = 4  # of the corpus


def parquet(texts: list[str], folder: Path, files: int = 8) -> str:
    for number in range(files):
        Dataset.from_dict({"text": texts[number::files]}).to_parquet(folder / f"{number}.parquet")
    return str(folder / "*.parquet")


def bare_seconds(texts: list[str], tokenizer) -> float:
    """Seconds of the tokenizer alone, in calls of 500 documents as the stream makes them."""
    begin = time.perf_counter()
    for start in range(0, len(texts), 500):
        tokenizer.backend_tokenizer.encode_batch_fast(texts[start : start + 500], add_special_tokens=False)
    return time.perf_counter() - begin


def opened(files: str, tokenizer) -> TokenStream:
    rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
    return TokenStream([rows.select_columns(["text"])], tokenizer, max_length=MAX_LENGTH)


def stream_seconds(files: str, tokenizer, batches: int) -> float:
    served = opened(files, tokenizer).batches(8)
    begin = time.perf_counter()
    for _ in range(batches):
        next(served)
    return time.perf_counter() - begin


def trainer_seconds(texts: list[str], tokenizer) -> float:
    """Seconds in which SFTTrainer tokenizes and packs the documents; what it takes without any is taken off."""
    architecture = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = create_model({**architecture, "num_attention_heads": 2, "max_position_embeddings": 1024}, tokenizer, 0)

    def seconds(rows: list[str]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            Dataset.from_dict({"text": rows}).to_parquet(Path(folder) / "rows.parquet")
            data = load_dataset("parquet", data_dir=folder, split="train", cache_dir=f"{folder}/cache")
            options = {"packing": True, "packing_strategy": "wrapped", "max_length": MAX_LENGTH, "use_cpu": True}
            arguments = SFTConfig(output_dir=folder, bf16=False, report_to="none", **options)
            begin = time.perf_counter()
            SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
            return time.perf_counter() - begin

    return seconds(texts) - seconds(texts[:1])


def measure(name: str, texts: list[str], tokenizer, rounds: int) -> None:
    every = texts * COPIES
    with tempfile.TemporaryDirectory() as folder:
        files = parquet(every, Path(folder))
        once = sum(map(len, tokenizer(texts, return_attention_mask=False)["input_ids"])) + len(texts)
        tokens = COPIES * once
        batches = tokens // (8 * MAX_LENGTH)
        ratios, gains, speeds = [], [], []
        for _ in range(rounds):
            bare = tokens / bare_seconds(every, tokenizer)
            ours = batches * 8 * MAX_LENGTH / stream_seconds(files, tokenizer, batches)
            trainer = once / trainer_seconds(texts, tokenizer)
            ratios.append(ours / bare)
            gains.append(ours / trainer)
            speeds.append(ours)
        print(
            f"{name:6} {len(every):,} documents, {tokens:,} tokens: {statistics.median(speeds):,.0f} tokens/s, "
            f"{statistics.median(ratios):.2f} of the bare tokenizer (of {rounds} rounds: {min(ratios):.2f} to "
            f"{max(ratios):.2f}), {statistics.median(gains):.1f} times SFTTrainer's preparation"
        )


def measure_resume(texts: list[str], tokenizer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = parquet(texts, Path(folder))
        source = opened(files, tokenizer)
        served = source.batches(1)
        done = 0
        for goal in (100, 1_000, 10_000):
            while done < goal:
                next(served)
                done += 1
            resumed = opened(files, tokenizer)
            begin = time.perf_counter()
            resumed.load_state_dict(source.state_dict())
            next(resumed.batches(1))
            print(f"resume after {goal:6,} batches: first batch in {time.perf_counter() - begin:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", help="a folder or Hub id; one of 16,000 tokens is trained when absent")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    texts = list(builtin()["text"])
    if options.tokenizer:
        tokenizer = load_tokenizer(options.tokenizer)
    else:
        tokenizer = train_tokenizer(texts[:5000], 16_000, MAX_LENGTH)
    tokenizer.model_max_length = 1 << 30
    measure("long", texts, tokenizer, options.rounds)
    measure(
        "short",
        [text[start : start + 600] for text in texts for start in range(0, len(text), 600)],
        tokenizer,
        options.rounds,
    )
    measure_resume(texts, tokenizer)


if __name__ == "__main__":
    main()
