"""Texts that a stage's parent makes of itself, in place of the data that it was trained on and nobody has.

A model samples from nothing but the token that begins a text; a chat model also from the beginning of its own user's
turn, whose question it then answers (https://arxiv.org/abs/2406.08464). They are made once, before the stage is
trained, kept in its folder, and mixed in as other replayed data.

Source: Context-Free Synthetic Data Mitigates Forgetting (https://arxiv.org/abs/2505.13811).
"""

from __future__ import annotations

import time
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hfpipe.core import display, ranks
from hfpipe.core.errors import DataError
from hfpipe.core.files import read_json, read_jsonl, write_json, write_jsonl
from hfpipe.data.chat import chat_text
from hfpipe.data.mixture import OwnTexts
from hfpipe.evaluation.continuations import beginning
from hfpipe.evaluation.generation import Generated, decode, generate
from hfpipe.model.load import compute_dtype, load_model
from hfpipe.model.positions import window_of
from hfpipe.model.spread import device_of, in_step
from hfpipe.recipe import Recipe, Sft, Stage, Suite, hash_of
from hfpipe.stages.stage_run import StageRun

MOST_TEXTS = 2048  # of `rows: auto`
LONGEST = 1024  # tokens of a text, where the model reads as many
BATCH_TOKENS = 16_384  # that are sampled at once, and at most
BATCH_TEXTS = 64
SHOWN = 4  # texts that the report shows
LONG = 10.0  # seconds of making texts that are told before
_MARK = "\u2060hfpipe\u2060"


def own_texts(run: StageRun, model: Any, length: int | None, tokens: float | None) -> list[OwnTexts]:
    """Returns the parent's own texts as sources, made now or found from before. Every rank has to call this.

    Batch by batch they follow from the seed and the parent, and so are the same on any number of ranks and after a
    kill. What another stage of the run has made of the same parent is taken over.

    Args:
        run: The stage.
        model: Its parent, loaded, without the adapter that the stage trains.
        length: Tokens of a text, at most; None for as many as the model reads, up to `LONGEST`.
        tokens: Tokens of all texts that the stage has a use for; None where nobody knows.

    Raises:
        DataError: The parent says nothing.
    """
    block = run.stage.kept.replay
    if block is None:
        return []
    folder = run.folder / "keep"
    opening = opening_of(run.recipe, run.stage, run.tokenizer)
    series = ["texts", "chats"] if opening else ["texts"]
    limit, wanted = min(length or LONGEST, window_of(model, None) or LONGEST), tokens and tokens / len(series)
    words = [run.parent_hash, run.stage.quantized, run.recipe.seed, block.temperature, block.rows, limit, wanted]
    keys = {name: hash_of([name, opening, *words]) for name in series}
    found = ranks.from_main({name: _found(run, folder, name, keys[name]) if ranks.is_main() else {} for name in series})
    if not all(found[name].get("done") for name in series):
        speaker = model if run.continued is None else load_model(run.continued, spread=True)
        was_training, cached = speaker.training, getattr(speaker.config, "use_cache", None)
        speaker.eval()
        speaker.config.use_cache = True
        for name in (name for name in series if not found[name].get("done")):
            maker = _Maker(run, speaker, name, limit, keys[name])
            found[name] = _made(run, folder, maker, block.rows, wanted, len(series))
        speaker.config.use_cache = cached
        speaker.train(was_training)
    for name in series:
        facts = found[name]
        ranks.say(
            f"  keep: {facts['texts']:,} own {name} of the parent, {facts['tokens']:,} tokens, "
            f"{facts['duplicates']:.1%} duplicates"
        )
    return [_source(folder / f"{name}.jsonl") for name in series if found[name]["texts"]]


def _found(run: StageRun, folder: Path, name: str, key: str) -> dict[str, Any]:
    """Returns what is known of the texts in a folder; where there are none, takes them over from another stage."""
    if told := read_json(folder / f"{name}.json"):
        return told
    for other in sorted(run.folder.parent.glob(f"*/keep/{name}.json")):
        told = read_json(other)
        if told.get("done") and told.get("key") == key:
            write_jsonl(folder / f"{name}.jsonl", read_jsonl(other.with_suffix(".jsonl"))[: told["texts"]])
            write_json(folder / f"{name}.json", told)
            ranks.say(f"  keep: the {name} that {other.parents[1].name} made of the same parent are taken over")
            return told
    return {}


def unended(texts: list[OwnTexts]) -> frozenset[str]:
    """Returns the texts that were cut when they were long enough: nothing says that they end there."""
    rows = [row for source in texts for row in read_jsonl(Path(source.passed_through["data_files"]))]
    return frozenset(row["text"] for row in rows if "text" in row and not row["ended"])


def _source(path: Path) -> OwnTexts:
    return OwnTexts.model_validate({"path": "json", "data_files": str(path), "split": "train"})


def opening_of(recipe: Recipe, stage: Stage, tokenizer: Any) -> str | None:
    """Returns the beginning of a user's turn as a chat model meets it; None where the parent is no chat model.

    A template that the recipe gives to a base tells nothing of the base.
    """
    block, parent = recipe.model.tokenizer, recipe.parent_of(stage.name)
    taught = any(other.name in recipe.lineage(parent) and isinstance(other, Sft) for other in recipe.stages)
    given = block is not None and block.chat_template is not None
    if tokenizer.chat_template is None or (given and not taught):
        return None
    try:
        text = chat_text(tokenizer, [{"role": "user", "content": _MARK}])
    except Exception:  # a template raises whatever it likes
        return None
    return text.partition(_MARK)[0] if _MARK in text else None


class _Maker:
    """Makes batches of texts, each from its own seed.

    Args:
        run: The stage.
        model: Its parent.
        name: "texts" or "chats".
        length: Tokens of a text, at most.
        key: Identifies what the texts follow from.
    """

    def __init__(self, run: StageRun, model: Any, name: str, length: int, key: str) -> None:
        self.run, self.model, self.name, self.length, self.key = run, model, name, length, key
        self.rows = max(1, min(BATCH_TEXTS, BATCH_TOKENS // length))

    def batch(self, number: int) -> list[dict[str, Any]]:
        """Returns the texts of a batch; those that say nothing are left out."""
        recipe = self.run.recipe
        name = f"{recipe.parent_of(self.run.stage.name)} {self.name}"
        seed = np.random.SeedSequence([recipe.seed, zlib.crc32(name.encode()), number]).generate_state(1)[0]
        device, dtype = device_of(self.model), compute_dtype()
        half = device.type == "cuda" and dtype == torch.bfloat16
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.autocast(device.type, dtype) if half else nullcontext():
            torch.manual_seed(int(seed))
            return self._chats() if self.name == "chats" else self._texts()

    def _texts(self) -> list[dict[str, Any]]:
        begin = beginning(self.run.tokenizer)
        rows = []
        for said, ended in self._said([begin] * self.rows, self.length - len(begin)):
            if (text := decode(said, self.run.tokenizer)).strip():
                rows.append({"text": text, "ended": ended, "tokens": len(said) + len(begin)})
        return rows

    def _chats(self) -> list[dict[str, Any]]:
        tokenizer = self.run.tokenizer
        opening = tokenizer(opening_of(self.run.recipe, self.run.stage, tokenizer), add_special_tokens=False)
        asked = []
        for said, ended in self._said([opening["input_ids"]] * self.rows, max(8, self.length // 4)):
            if ended and (question := decode(said, tokenizer).strip()):
                asked.append({"role": "user", "content": question})
        texts = [chat_text(tokenizer, [turn], add_generation_prompt=True) for turn in asked]
        prompts = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        longest = max(map(len, prompts), default=0)
        answers = self._said(prompts, max(8, self.length - longest)) if prompts else []
        return [
            {
                "messages": [turn, {"role": "assistant", "content": decode(said, tokenizer).strip()}],
                "ended": ended,
                "tokens": len(prompt) + len(said),
            }
            for turn, prompt, (said, ended) in zip(asked, prompts, answers, strict=True)
            if ended and decode(said, tokenizer).strip()
        ]

    def _said(self, prompts: list[list[int]], new: int) -> list[tuple[list[int], bool]]:
        """Returns what the model says after each prompt, and whether it came to an end."""
        block = self.run.stage.kept.replay
        assert block is not None
        options = {"do_sample": True, "temperature": block.temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        more = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "max_new_tokens": new}
        words = {"data": {"path": "json"}, "metrics": ["exact_match"], "batch_size": self.rows}
        suite = Suite.model_validate({**words, "generation": options | more})
        answers: list[Generated] = generate(self.model, prompts, self.run.tokenizer, suite, new)
        return [(one.ids, len(one.ids) < new) for one in answers]


def _made(
    run: StageRun, folder: Path, maker: _Maker, rows: int | None, tokens: float | None, series: int
) -> dict[str, Any]:
    """Makes texts until there are enough, goes on with those of a killed run, and returns what was counted."""
    path, told = folder / f"{maker.name}.jsonl", folder / f"{maker.name}.json"
    most = max(1, (rows or MOST_TEXTS) // series)
    enough = float("inf") if rows is not None or tokens is None else tokens
    done, texts = 0, []
    if ranks.is_main() and (before := read_json(told)):
        done, texts = before["batches"], read_jsonl(path)[: before["texts"]]
    done, texts = ranks.from_main((done, texts))
    if not done:
        ranks.say(f"  keep: the parent makes {maker.name} of itself")

    def share() -> float:
        """Returns the part of the wanted texts that is there."""
        return max(len(texts) / most, sum(row["tokens"] for row in texts) / enough) if most else 1.0

    first, begun, is_told = share(), time.monotonic(), False
    while share() < 1:
        with in_step(maker.model):
            mine = maker.batch(done + ranks.rank())
        for batch in ranks.gather(mine):
            if share() >= 1:
                break  # so that as many texts are made by any number of ranks
            done, texts = done + 1, texts + batch
        if (new := share() - first) > 0 and not is_told:
            is_told, left = True, (time.monotonic() - begun) / new * (1 - share())
            if left >= LONG:
                ranks.say(f"  keep: {len(texts):,} {maker.name} so far, about {display.clock(left)} for the rest")
        if done >= 8 and not texts and maker.name == "texts":
            raise DataError(
                f"stages.{run.stage.name}.keep: the parent says nothing where a text begins: {done * maker.rows} times "
                "it ended at once. Replay an earlier stage (`replay:`), or mix in general text as a source."
            )
        if done >= 4 and len(texts) < done * maker.rows / 16 and maker.name == "chats":
            ranks.say("  keep: the parent writes no question and answer by itself, so no chats are made")
            texts, most = [], 0
        _write(path, told, texts[:most], {"key": maker.key, "batches": done, "done": share() >= 1})
    _write(path, told, texts[:most], {"key": maker.key, "batches": done, "done": True})
    return ranks.from_main(read_json(told) if ranks.is_main() else None)


def _write(path: Path, told: Path, texts: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Writes the texts made so far, and then what is counted of them."""
    if not ranks.is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, texts)
    said = [row["text"] if "text" in row else "\n".join(turn["content"] for turn in row["messages"]) for row in texts]
    write_json(
        told,
        {
            **facts,
            "texts": len(texts),
            "tokens": sum(row["tokens"] for row in texts),
            "ended": round(sum(row["ended"] for row in texts) / max(len(texts), 1), 4),
            "duplicates": round(1 - len(set(said)) / max(len(said), 1), 4),
            "repeats": round(repeats(said), 4),
            "shown": said[:SHOWN],
        },
    )


def repeats(texts: list[str]) -> float:
    """Returns the share of 4-word sequences that stand in the same text before.

    Source: Welleck et al. 2019, https://arxiv.org/abs/1908.04319 (seq-rep-4).
    """
    found = again = 0
    for text in texts:
        words = text.split()
        grams = [tuple(words[place : place + 4]) for place in range(len(words) - 3)]
        found += len(grams)
        again += len(grams) - len(set(grams))
    return again / found if found else 0.0
