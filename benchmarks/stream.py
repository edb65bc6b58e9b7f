"""The stream against its limit, and against what else prepares and resumes the same data.

    python benchmarks/stream.py [--tokenizer FOLDER_OR_ID] [--rounds 5] [--copies 4] [--only NAME]

The documents are the built-in corpus, written to Parquet in a temporary folder; "short" are its documents cut to 600
characters, "lines" six megabytes of them in one file of JSON lines. Printed are, with the ratio that is wanted:

- speed: tokens per second from Parquet to packed tensors, beside those of the bare Rust tokenizer on the same documents
  (in calls of 500, as the stream makes them) and beside SFTTrainer's own preparation (tokenize and pack). All read each
  document once, in turns in one process, so that a busy machine slows them alike; medians of the rounds, by the clock
  and by processor time. With it the share of the tokens that come out.
- memory: the peak of the process over a quarter of the corpus and over ten times as much.
- resume: seconds to the first batch at 100, 1,000 and 10,000 batches of one row, beside Trainer's own way, which reads
  the stream again up to there (`accelerate.skip_first_batches`).
- first: seconds from the file to the first batch, of one file of 100 JSON lines.
- wait: the share of the time that a model which takes twice as long as the stream waits for data.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import skip_first_batches
from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader
from trl import SFTConfig, SFTTrainer

from hfpipe.data.builtin.corpus import builtin
from hfpipe.data.dataloader import BatchLoader
from hfpipe.data.sources.load import load_rows
from hfpipe.data.stream.dataset import WINDOW_DOCUMENTS, TokenStream
from hfpipe.data.tokenize import IGNORED
from hfpipe.model.create import create_model, train_tokenizer
from hfpipe.model.tokenizer import load_tokenizer
from hfpipe.recipe import Source

MAX_LENGTH = 1024
ROWS = 8  # of a batch
POSITIONS = (100, 1_000, 10_000)
WAITED = 500  # batches: several windows of each lane


def parquet(texts: Iterable[str], folder: Path, files: int = 8, copies: int = 1) -> str:
    """Writes the documents, each copy of them to files of its own, and gives their pattern."""
    texts = list(texts)
    for copy in range(copies):
        for number in range(files):
            Dataset.from_dict({"text": texts[number::files]}).to_parquet(folder / f"{copy}.{number}.parquet")
    return str(folder / "*.parquet")


def json_lines(texts: Iterable[str], folder: Path, copies: int = 1) -> str:
    """Writes the documents, so many times, to one file of JSON lines."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) * copies)
    return str(path)


def opened(files: str, tokenizer: Any, **options: Any) -> TokenStream:
    rows = load_rows(Source.model_validate({"path": files, "streaming": True}))
    return TokenStream([rows], tokenizer, max_length=MAX_LENGTH, **options)


def clock() -> np.ndarray:
    """Seconds of the clock, and of the processor over all threads."""
    return np.array([time.perf_counter(), time.process_time()])


def bare(texts: list[str], tokenizer: Any) -> np.ndarray:
    """Times the tokenizer alone."""
    begin = clock()
    for start in range(0, len(texts), WINDOW_DOCUMENTS):
        batch = texts[start : start + WINDOW_DOCUMENTS]
        tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    return clock() - begin


def streamed(files: str, tokenizer: Any) -> tuple[np.ndarray, int]:
    """Times the stream that reads every document once, into tensors; returns the number of tokens too."""
    stream = opened(files, tokenizer, exhausted="stop")
    begin = clock()
    for _ in BatchLoader(stream, ROWS, tokenizer.eos_token_id):
        pass
    return clock() - begin, stream.facts()["tokens"]


def prepared(texts: list[str], tokenizer: Any) -> np.ndarray:
    """Times SFTTrainer's tokenization and packing of the documents, less its time for no documents."""
    architecture = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = create_model({**architecture, "num_attention_heads": 2, "max_position_embeddings": 1024}, tokenizer, 0)

    def seconds(rows: list[str]) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            Dataset.from_dict({"text": rows}).to_parquet(Path(folder) / "rows.parquet")
            data = load_dataset("parquet", data_dir=folder, split="train", cache_dir=f"{folder}/cache")
            options = {"packing": True, "packing_strategy": "wrapped", "max_length": MAX_LENGTH, "use_cpu": True}
            arguments = SFTConfig(output_dir=folder, bf16=False, report_to="none", **options)
            begin = clock()
            SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
            return clock() - begin

    return seconds(texts) - seconds(texts[:1])


def measure_speed(
    name: str,
    texts: list[str],
    tokenizer: Any,
    rounds: int,
    copies: int,
    wanted: float | None,
    write: Callable[..., str] = parquet,
) -> None:
    once = sum(map(len, tokenizer(texts, return_attention_mask=False)["input_ids"])) + len(texts)
    every, tokens = texts * copies, copies * once
    with tempfile.TemporaryDirectory() as folder:
        files = write(texts, Path(folder), copies=copies)
        streamed(files, tokenizer)  # warm
        ratios, gains, speeds = [], [], []
        for _ in range(rounds):
            alone = bare(every, tokenizer)
            ours, kept = streamed(files, tokenizer)
            ratios.append(alone / ours)
            gains.append(prepared(texts, tokenizer) * copies / ours if wanted else ours / ours)
            speeds.append(tokens / ours[0])
    ratio, gain = (np.median(found, axis=0) for found in (ratios, gains))
    low, high = np.min(ratios, axis=0), np.max(ratios, axis=0)
    print(f"{name}: {len(every):,} documents, {tokens:,} tokens, {statistics.median(speeds):,.0f} tokens/s")
    print(
        f"  of the bare tokenizer (0.85):       {ratio[0]:.2f} by the clock ({low[0]:.2f} to {high[0]:.2f}), "
        f"{ratio[1]:.2f} by processor time ({low[1]:.2f} to {high[1]:.2f})"
    )
    if wanted:
        print(
            f"  times SFTTrainer's preparation ({wanted}): {gain[0]:.1f} by the clock, {gain[1]:.1f} by processor time"
        )
    print(f"  tokens kept (0.999):                {kept / tokens:.4f}", flush=True)


def peak() -> float:
    """Most megabytes that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory(texts: list[str], tokenizer: Any) -> None:
    some = texts[: len(texts) // 4]
    found = []
    for copies in (1, 10):
        with tempfile.TemporaryDirectory() as folder:
            files = parquet(some, Path(folder), copies=copies)
            before = peak()
            for _ in opened(files, tokenizer, exhausted="stop", window_documents=100).batches(ROWS):
                pass
            found.append((before, peak()))
    (start, one), (_, ten) = found
    print(f"memory: {start:.0f} MB before, {one:.0f} over {len(some):,} documents, {ten:.0f} over ten times as many")
    print(f"  over ten times the data (1.1):      {ten / one:.2f}", flush=True)


def replayed(files: str, tokenizer: Any) -> Callable[[int], Iterator[Any]]:
    """Trainer's way: the packed stream of `datasets`, skipped up to a batch."""

    def packed(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = tokenizer([text + tokenizer.eos_token for text in batch["text"]], return_attention_mask=False)
        flat = [token for document in ids["input_ids"] for token in document]
        return {"input_ids": [flat[at : at + MAX_LENGTH] for at in range(0, len(flat) - MAX_LENGTH + 1, MAX_LENGTH)]}

    rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
    rows = rows.map(packed, batched=True, remove_columns=["text"]).with_format("torch")
    return lambda done: iter(skip_first_batches(DataLoader(rows, batch_size=1), done))


def measure_resume(texts: list[str], tokenizer: Any, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = parquet(texts, Path(folder), copies=4)
        stream, theirs = opened(files, tokenizer), replayed(files, tokenizer)
        served, done, seconds = stream.batches(1), 0, {}
        for position in POSITIONS:
            times = []
            for place in range(position, position + 7 * rounds, 7):  # some places stand early in a window, some late
                while done < place:
                    next(served)
                    done += 1
                state = stream.state_dict()
                resumed = opened(files, tokenizer)
                begin = time.perf_counter()
                resumed.load_state_dict(state)
                batches = resumed.batches(1)
                next(batches)
                times.append(time.perf_counter() - begin)
                batches.close()
            seconds[position] = statistics.median(times)
            begin = time.perf_counter()
            next(theirs(position))
            print(
                f"resume at batch {position:6,}: {seconds[position]:.2f} s to the first batch; Trainer's replay "
                f"{time.perf_counter() - begin:.2f} s",
                flush=True,
            )
        served.close()
        print(f"  at 10,000 against 100 (1.1):        {seconds[10_000] / seconds[100]:.2f}", flush=True)


def measure_first(texts: list[str], tokenizer: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = json_lines([text[:200] for text in texts[:100]], Path(folder))
        begin = clock()
        batches = opened(files, tokenizer).batches(ROWS)
        next(batches)
        taken = clock() - begin
        batches.close()
        print(f"first batch of 100 rows (1 s):        {taken[0]:.2f} s by the clock, {taken[1]:.2f} by processor time")


def measure_wait(texts: list[str], tokenizer: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = parquet(texts, Path(folder))
        begin = time.perf_counter()
        taken = sum(1 for _ in opened(files, tokenizer, exhausted="stop").batches(ROWS))
        each = (time.perf_counter() - begin) / taken
        loader = BatchLoader(opened(files, tokenizer), ROWS, tokenizer.eos_token_id)
        batches = iter(loader)
        next(batches)  # the first is waited for
        loader.waited_seconds, begin = 0.0, time.perf_counter()
        for _ in range(WAITED):
            batch = next(batches)
            assert batch["labels"].dtype == torch.long
            assert (batch["labels"] != IGNORED).any()
            time.sleep(2 * each)
        waited = loader.waited_seconds / (time.perf_counter() - begin)
        batches.close()
    print(
        f"wait: {waited:.2%} of the time of a model that takes {2000 * each:.1f} ms a batch, the stream "
        f"{1000 * each:.1f} ms: {1000 * loader.waited_seconds / WAITED:.2f} ms a batch, with the stacking of its rows"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", help="a folder or Hub id; one of 16,000 tokens is trained when absent")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=4, help="of the corpus, for speed")
    parser.add_argument("--only", choices=("speed", "memory", "resume", "first", "wait"))
    options = parser.parse_args()
    datasets.disable_progress_bars()
    texts = list(builtin()["text"])
    if options.tokenizer:
        tokenizer = load_tokenizer(options.tokenizer)
    else:
        tokenizer = train_tokenizer(texts[:5000], 16_000, MAX_LENGTH)
    tokenizer.model_max_length = 1 << 30
    short = [text[start : start + 600] for text in texts for start in range(0, len(text), 600)]
    size = np.cumsum([len(text) for text in texts])
    some = texts[: int(np.searchsorted(size, 6_000_000))]
    measures = {
        "memory": [lambda: measure_memory(texts, tokenizer)],  # first: a peak does not go down again
        "speed": [
            lambda: measure_speed("long", texts, tokenizer, options.rounds, options.copies, 1.4),
            lambda: measure_speed("short", short, tokenizer, options.rounds, options.copies, 2.3),
            lambda: measure_speed("lines", some, tokenizer, options.rounds, 1, None, json_lines),
        ],
        "resume": [lambda: measure_resume(texts, tokenizer, options.rounds)],
        "first": [lambda: measure_first(texts, tokenizer)],
        "wait": [lambda: measure_wait(texts, tokenizer)],
    }
    for name, runs in measures.items():
        if options.only in (None, name):
            for run in runs:
                run()


if __name__ == "__main__":
    main()
