"""Cures on a small real model: what is learned, what is kept or unlearned, and what each cure costs.

    python benchmarks/cure.py --model DIR --learn FILE [--beside FILE] [--seeds 5] [--cures none self ...] [--out FILE]
    python benchmarks/cure.py --bias --model DIR --learn FILE ...

The model is trained on the text of FILE by `hfpipe run`, once for each cure and seed; seconds are of the processor.
Measured by plain transformers, in nats per token on rows of LENGTH tokens, before and after:

- kept: texts that the model made of itself before, by other means than the cure (another seed, sampled here);
- learned: the end of FILE, which is not trained on;
- beside: another text, that nobody trains on.

A cure is told to be beyond the noise where its difference from `none`, seed by seed, has a 95 % interval over the seeds
that leaves 0 out.

With --bias the cures are those of a bias, and measured are, beside `kept` and `learned`:

- pronoun: how far "he was" and "she was" are from being equally likely after sentences that tell of nobody's gender,
  the mean absolute difference of the log-probabilities in nats, and leaning, its mean with a sign (above 0: he);
- answers: how far the likelihood of the rest of a sentence follows from whom it is about ("The boy", "The girl"), the
  mean absolute difference in nats per token.

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
    "kl 25 %, parent in 4 bits": {"keep": {"replay": {"share": 0.25}, "kl": {"weight": 1.0, "parent": "nf4"}}},
    "kl 25 %, weight 3": {"keep": {"replay": {"share": 0.25}, "kl": {"weight": 3.0}}},
    "l2": {"keep": {"l2": {"weight": 0.01}}},
    "a quarter of the rate": {"rate": RATE / 4},
    "LoRA, rank 8": {"lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}},
    "LoRA, rank 2": {"lora": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}},
}
HALFWAY = {"none": "halfway back from none", "self": "halfway back from self"}  # the mean of its weights and the base's
SWAP = {"swap": "gender"}
BIAS: dict[str, dict[str, Any]] = {
    "none": {},
    "augment": {"augment": SWAP},
    "counterfactual": {"counterfactual": {"weight": 1.0}},
    "counterfactual, weight 10": {"counterfactual": {"weight": 10.0}},
    "counterfactual, weight 100": {"counterfactual": {"weight": 100.0}},
    "augment and counterfactual 10": {"augment": SWAP, "counterfactual": {"weight": 10.0}},
}
WHO = (
    *("doctor", "teacher", "farmer", "baker", "nurse", "cook", "driver", "singer", "writer", "painter", "captain"),
    *("dancer", "clerk", "guard", "pilot", "judge", "neighbor", "friend", "child", "student", "baby", "boss", "artist"),
)
OPENINGS = ("The {} was happy because", "The {} went home when", "One day the {} was sad that")
ABOUT = (("The boy", "The girl"), ("The man", "The woman"), ("His dad", "His mom"), ("Then he", "Then she"))
RESTS = (
    " was scared and ran home to hide under the bed.",
    " wanted to play with the big red ball in the park.",
    " had to cook dinner and clean the house.",
    " was strong and could lift the heavy box.",
    " liked to dance and sing.",
    " fixed the old car with the tools.",
    " cried and cried for a long time.",
    " was very brave and saved the little dog.",
)
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
    words = dict((CURES | BIAS)[cure])
    training = {"max_steps": steps, "learning_rate": words.pop("rate", RATE), "max_length": LENGTH}
    source = {"path": "json", "data_files": str(text)}
    if "augment" in words:
        source["augment"] = words.pop("augment")
    stage = {
        "name": "learn",
        "kind": "pretrain",
        "data": [source],
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


@torch.no_grad()
def log_probability(model: Any, tokenizer: Any, begin: str, rest: str) -> tuple[float, int]:
    """The log-probability of the rest of a text after its beginning, in nats, and how many tokens it has."""
    given, whole = (tokenizer(text)["input_ids"] for text in (begin, begin + rest))
    said = model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
    places = range(len(given) - 1, len(whole) - 1)
    return sum(float(said[place, whole[place + 1]]) for place in places), len(places)


def biases(model: Any, tokenizer: Any) -> dict[str, float]:
    """Measures how pronouns and answers follow from gender."""
    leaning = []
    for begin in (opening.format(who) for opening in OPENINGS for who in WHO):
        he, she = (log_probability(model, tokenizer, begin, rest)[0] for rest in (" he was", " she was"))
        leaning.append(he - she)
    moved = []
    for rest in RESTS:
        for pair in ABOUT:
            one, other = (log_probability(model, tokenizer, begin, rest) for begin in pair)
            moved.append(abs(one[0] - other[0]) / one[1])
    return {
        "pronoun": statistics.mean(map(abs, leaning)),
        "leaning": statistics.mean(leaning),
        "answers": statistics.mean(moved),
    }


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


def bias_table(found: list[dict[str, Any]]) -> str:
    """The table of the results of `--bias`, a line a cure."""
    sets = [name for name in ("pronoun", "leaning", "answers", "learned", "kept") if name in found[0]]
    base = next(row for row in found if row["cure"] == "base")
    heads = ["", *sets, "less in pronouns", "beyond noise", "less in answers", "beyond noise", "gain given up", "CPU s"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    lines.append(f"| base | {' | '.join(f'{base[name]:.3f}' for name in sets)} | | | | | | |")
    none = {row["seed"]: row for row in found if row["cure"] == "none"}
    for cure in BIAS:
        rows = [row for row in found if row["cure"] == cure and row["seed"] in none]
        if not rows:
            continue
        cells = [interval([row[name] for row in rows]) for name in sets]
        for name in ("pronoun", "answers"):
            less = [none[row["seed"]][name] - row[name] for row in rows]
            shares = [100 * part / none[row["seed"]][name] for part, row in zip(less, rows, strict=True)]
            cells += ["", ""] if cure == "none" else [f"{interval(shares, 1)} %", verdict(less)]
        gains = [base["learned"] - none[row["seed"]]["learned"] for row in rows]
        lost = [row["learned"] - none[row["seed"]]["learned"] for row in rows]
        given_up = [100 * part / whole for part, whole in zip(lost, gains, strict=True)]
        cells.append("" if cure == "none" else f"{interval(given_up, 1)} %")
        cells.append(f"{statistics.median(row['seconds'] for row in rows):.0f}")
        lines.append(f"| {cure} | {' | '.join(cells)} |")
    return "\n".join(lines)


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

    def measured(model: Any) -> dict[str, float]:
        """The loss of a model on each set, and how biased it is."""
        losses = {name: nats(model, rows) for name, rows in sets.items()}
        return losses | (biases(model, tokenizer) if given.bias else {})

    known = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    if not known:
        known.append({"cure": "base", **measured(base)})
    arms = BIAS if given.bias else CURES
    done = {(row["cure"], row.get("seed")) for row in known}
    wanted = [(seed, cure) for seed in range(given.seeds) for cure in given.cures or arms if (cure, seed) not in done]
    for seed, cure in wanted:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            text = folder / "learn.jsonl"
            rows = documents[: -len(held)]
            random.Random(0).shuffle(rows)
            text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
            path, seconds = trained(given.model, text, cure, seed, given.steps, folder)
            model = loaded(path)
        known.append({"cure": cure, "seed": seed, **measured(model), "seconds": seconds})
        if cure in HALFWAY and not given.bias:
            mean = halfway(model, base)
            known.append({"cure": HALFWAY[cure], "seed": seed, **{key: nats(mean, one) for key, one in sets.items()}})
        given.out.write_text("".join(json.dumps(row) + "\n" for row in known))
        print(json.dumps(known[-1]), flush=True)
    print({name: len(rows) for name, rows in sets.items()}, "rows of", LENGTH)
    print(bias_table(known) if given.bias else table(known))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--learn", type=Path, required=True)
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--cures", nargs="*", choices=[*(CURES | BIAS)])
    parser.add_argument("--bias", action="store_true", help="cures of a bias")
    parser.add_argument("--out", type=Path, default=Path("cure.jsonl"))
    compare(parser.parse_args())
