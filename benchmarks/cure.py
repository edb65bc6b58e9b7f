"""Cures for forgetting on a small real model: what is learned, what is kept, and what each cure costs.

    python benchmarks/cure.py --model DIR --learn FILE [--beside FILE] [--seeds 5] [--cures none self ...] [--out FILE]

The model is trained on the text of FILE by `hfpipe run`, once for each cure and seed; seconds are of the processor.
Measured by plain transformers, in nats per token on rows of LENGTH tokens, before and after:

- kept: texts that the model made of itself before, by other means than the cure (another seed, sampled here);
- learned: the end of FILE, which is not trained on;
- beside: another text, that nobody trains on.

A cure is told to be beyond the noise where its difference from `none`, seed by seed, has a 95 % interval over the seeds
that leaves 0 out.

The model in docs/cure.md is stories260K (https://huggingface.co/karpathy/tinyllamas), 260,032 parameters, in the format
of transformers. Files are plain text, or Parquet with a column `text`. Results go to --out, a line of JSON a run; what
stands there already is not trained again.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import AutoPeftModelForCausalLM
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfpipe.cli import main

LENGTH, ROWS, RATE = 128, 16, 2e-3
PIECE = 3000  # characters of a document that a plain text is cut into
HELD = 0.1  # of the text
SAMPLED = 400  # texts of the model itself that are kept apart
CURES: dict[str, dict[str, Any]] = {
    "none": {},
    "self": {"keep": "self"},
    "self 25 %": {"keep": {"replay": {"share": 0.25}}},
    "self 50 %": {"keep": {"replay": {"share": 0.5}}},
    "kl": {"keep": {"replay": {"share": 0.125}, "kl": {"weight": 1.0}}},
    "kl 25 %": {"keep": {"replay": {"share": 0.25}, "kl": {"weight": 1.0}}},
    "kl 25 %, weight 3": {"keep": {"replay": {"share": 0.25}, "kl": {"weight": 3.0}}},
    "l2": {"keep": {"l2": {"weight": 0.01}}},
    "a quarter of the rate": {"rate": RATE / 4},
    "LoRA, rank 8": {"lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}},
    "LoRA, rank 2": {"lora": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}},
}
HALFWAY = {"none": "halfway back from none", "self": "halfway back from self"}  # the mean of its weights and the base's
T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # two-sided 95 % of Student's t, by the number of seeds


def texts_of(path: Path) -> list[str]:
    """The documents of a file; a plain text is cut into pieces at line ends."""
    if path.suffix == ".parquet":
        from datasets import load_dataset

        return list(load_dataset("parquet", data_files=str(path), split="train")["text"])
    pieces, piece = [], ""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        piece += line
        if len(piece) >= PIECE:
            pieces.append(piece)
            piece = ""
    return [*pieces, piece] if piece.strip() else pieces


@torch.no_grad()
def sampled(model: Any, tokenizer: Any, seed: int) -> list[str]:
    """Texts that the model makes of itself, token by token, without any code of hfpipe's."""
    torch.manual_seed(seed)
    ids = torch.full((SAMPLED, 1), tokenizer.bos_token_id)
    past, last = None, ids
    for _ in range(2 * LENGTH):
        output = model(last, past_key_values=past, use_cache=True)
        past = output.past_key_values
        last = torch.multinomial((output.logits[:, -1] / 0.9).softmax(-1), 1)
        ids = torch.cat([ids, last], 1)
    ends = [(row == tokenizer.eos_token_id).nonzero()[:, 0].tolist() for row in ids[:, 1:]]
    return [tokenizer.decode(row[1 : end[0] + 1 if end else None]) for row, end in zip(ids, ends, strict=True)]


def rows_of(texts: list[str], tokenizer: Any) -> torch.Tensor:
    """(N, L) tokens of documents one after the other, each with BOS and EOS."""
    ids = [one for text in texts for one in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    count = len(ids) // LENGTH
    return torch.tensor(ids[: count * LENGTH]).reshape(count, LENGTH)


@torch.no_grad()
def nats(model: Any, rows: torch.Tensor) -> float:
    """The mean loss of a token."""
    total = 0.0
    for part in rows.split(64):
        logits = model(part).logits[:, :-1]
        total += float(functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return total / rows[:, 1:].numel()


def trained(model: Path, text: Path, cure: str, seed: int, steps: int, folder: Path) -> tuple[Path, float]:
    """Runs a recipe with a cure; returns the model and the seconds of processor time that it took."""
    words = dict(CURES[cure])
    training = {"max_steps": steps, "learning_rate": words.pop("rate", RATE), "max_length": LENGTH}
    stage = {
        "name": "learn",
        "kind": "pretrain",
        "data": [{"path": "json", "data_files": str(text)}],
        "global_batch_size": ROWS,
        "training": {**training, "per_device_train_batch_size": ROWS, "save_strategy": "no"},
        **words,
    }
    recipe = {"name": "cure", "seed": seed, "output_dir": str(folder / "run"), "model": {"id": str(model)}}
    path = folder / "cure.yaml"
    path.write_text(yaml.safe_dump({**recipe, "shift": False, "energy": False, "stages": [stage]}))
    begin, told = time.process_time(), io.StringIO()
    with redirect_stdout(told):
        code = main(["run", str(path)])
    if code:
        sys.exit(f"{told.getvalue()}\n{cure}, seed {seed}: hfpipe ended with {code}")
    return folder / "run/stages/learn/model", time.process_time() - begin


def loaded(path: Path) -> Any:
    """A trained model; an adapter merged into its base."""
    if (path / "adapter_config.json").exists():
        return AutoPeftModelForCausalLM.from_pretrained(path, dtype=torch.float32).merge_and_unload().eval()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def halfway(model: Any, base: Any) -> Any:
    """A model whose weights are the means of two models' weights."""
    for weight, other in zip(model.parameters(), base.parameters(), strict=True):
        weight.add_(other).div_(2)
    return model


def half_interval(values: list[float]) -> float:
    """Half the 95 % interval of a mean over seeds."""
    return T.get(len(values), 2.0) * statistics.stdev(values) / math.sqrt(len(values))


def interval(values: list[float], digits: int = 3) -> str:
    """Mean and half the 95 % interval over seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {half_interval(values):.{digits}f}"


def verdict(differences: list[float]) -> str:
    """Tells a difference from the noise of the seeds."""
    if len(differences) < 2:
        return "one seed"
    return "yes" if abs(statistics.mean(differences)) > half_interval(differences) else "no"


def table(found: list[dict[str, Any]]) -> str:
    """The table of the results, a line a cure."""
    sets = [name for name in ("kept", "learned", "beside") if name in found[0]]
    base = next(row for row in found if row["cure"] == "base")
    heads = ["", *sets, "forgetting taken away", "beyond noise", "gain given up", "beyond noise", "CPU s"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    lines.append(f"| base | {' | '.join(f'{base[name]:.3f}' for name in sets)} | | | | | |")
    none = {row["seed"]: row for row in found if row["cure"] == "none"}
    for cure in [*CURES, *HALFWAY.values()]:
        rows = [row for row in found if row["cure"] == cure and row["seed"] in none]
        if not rows:
            continue
        cells = [interval([row[name] for row in rows]) for name in sets]
        for name in ("kept", "learned"):
            moved = [none[row["seed"]][name] - base[name] for row in rows]
            back = [none[row["seed"]][name] - row[name] for row in rows]
            shares = [100 * part / whole for part, whole in zip(back, moved, strict=True)]
            cells += ["", ""] if cure == "none" else [f"{interval(shares, 1)} %", verdict(back)]
        seconds = [row["seconds"] for row in rows if "seconds" in row]
        cells.append(f"{statistics.median(seconds):.0f}" if seconds else "")
        lines.append(f"| {cure} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compare(given: argparse.Namespace) -> None:
    """Trains and measures what is not known yet, and prints the table."""
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    documents = texts_of(given.learn)
    held = documents[-max(1, round(HELD * len(documents))) :]
    sets = {"kept": rows_of(sampled(base, tokenizer, seed=12_345), tokenizer), "learned": rows_of(held, tokenizer)}
    if given.beside is not None:
        sets["beside"] = rows_of(texts_of(given.beside), tokenizer)
    known = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    if not known:
        known.append({"cure": "base", **{name: nats(base, rows) for name, rows in sets.items()}})
    done = {(row["cure"], row.get("seed")) for row in known}
    wanted = [(seed, cure) for seed in range(given.seeds) for cure in given.cures if (cure, seed) not in done]
    for seed, cure in wanted:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            text = folder / "learn.jsonl"
            rows = documents[: -len(held)]
            random.Random(0).shuffle(rows)
            text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
            path, seconds = trained(given.model, text, cure, seed, given.steps, folder)
            model = loaded(path)
        scores = {name: nats(model, rows) for name, rows in sets.items()}
        known.append({"cure": cure, "seed": seed, **scores, "seconds": seconds})
        if cure in HALFWAY:
            mean = halfway(model, base)
            known.append({"cure": HALFWAY[cure], "seed": seed, **{key: nats(mean, one) for key, one in sets.items()}})
        given.out.write_text("".join(json.dumps(row) + "\n" for row in known))
        print(json.dumps(known[-1]), flush=True)
    print({name: len(rows) for name, rows in sets.items()}, "rows of", LENGTH)
    print(table(known))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--learn", type=Path, required=True)
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--cures", nargs="*", default=list(CURES), choices=list(CURES))
    parser.add_argument("--out", type=Path, default=Path("cure.jsonl"))
    compare(parser.parse_args())
