"""The trained model in use: `hfpipe generate RUN FILE` and `hfpipe chat RUN`.

A model is asked as it was trained (see `Asking`) and stops where `generate` of the saved model stops: at the stop
tokens of its generation config and the tokenizer's EOS. Nothing is sampled unless it is asked for, so that the same
prompt gets the same answer, as in the scores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer, set_seed

from hfpipe.core import display, ranks
from hfpipe.core.errors import DataError, RecipeError
from hfpipe.core.files import write_jsonl
from hfpipe.core.run_layout import MODEL
from hfpipe.data.prompts import Row, read_prompts
from hfpipe.evaluation.generation import MOST_GENERATED, encode_prompts, generate, stop_tokens
from hfpipe.evaluation.row_text import RowText, text_of_prompt
from hfpipe.model.interpolate import open_dial
from hfpipe.model.load import load_model
from hfpipe.model.positions import window_of
from hfpipe.pipeline.context import quiet_libraries
from hfpipe.pipeline.trained import Trained, open_trained, whole_model
from hfpipe.recipe import Suite
from hfpipe.recipe.choose import generation_words, require_strength
from hfpipe.scores.scorecard import BASE

PROBE = "The quick brown fox"  # a text on which a dialled adapter is compared with its base


@dataclass(frozen=True)
class Speaker:
    """A loaded model, with what has to be put off while it speaks.

    Args:
        name: As it is called on the screen.
        model: The model.
        speaking: Enters the state in which it speaks: of a base below an adapter the adapter is off.
    """

    name: str
    model: Any
    speaking: Callable[[], AbstractContextManager[Any]] = nullcontext


def _speakers(trained: Trained, strength: float | None, base: bool) -> Iterator[Speaker]:
    """Loads the trained model, and its base after it where it is asked for and lies not below the adapter."""
    with display.doing("loading the model"):
        model = _model_of(trained, strength)
    yield Speaker(trained.stage.name, model)
    if base and trained.is_on_base:
        yield Speaker("base", model, model.disable_adapter)
    elif base:
        with display.doing("loading the base"):
            parent = load_model(trained.base)
        yield Speaker("base", parent)


def _model_of(trained: Trained, strength: float | None) -> Any:
    """The trained model, or what lies between its parent (0) and itself (1)."""
    if strength is None:
        return load_model(trained.ref)
    full = replace(trained.ref, path=str(trained.folder / "stages" / trained.stage.name / MODEL))
    parent = full.base if full.is_adapter else _parent_of(trained)
    return open_dial(full, parent, trained.tokenizer, [PROBE]).at(strength)


def _parent_of(trained: Trained) -> Any:
    name = trained.recipe.parent_of(trained.stage.name)
    known = trained.recipe.model
    if name == BASE and known.id is not None:
        return trained.base
    return replace(whole_model(trained.folder, trained.recipe, name), vocabulary=len(trained.tokenizer))


def generate_file(
    folder: Path,
    file: str,
    output: str | None = None,
    *,
    stage: str | None = None,
    strength: float | None = None,
    base: bool = False,
    limit: int | None = None,
    batch_size: int = 16,
    words: Sequence[str] = (),
) -> Path:
    """Answers the prompts of a file in batches, and writes a JSON line for each.

    Args:
        folder: The run folder.
        file: JSON lines, CSV or text with prompts; see `data.prompts`.
        output: Where the answers go; FILE's name with `-answers.jsonl` at its end when None.
        stage: Which stage answers; the last finished one when None.
        strength: From 0 (its parent) to 1 (as it was trained, when None).
        base: Whether the base answers too.
        limit: Prompts to answer, from the beginning; all when None.
        batch_size: Prompts answered at once on each rank.
        words: Fields of GenerationConfig, as `max_new_tokens=200`.

    Returns:
        The file of answers. A line has `row`, `given` (the row of the file), `prompt` (the text that the model was
        given), `answer`, `ended` (False where the answer was cut off), and with `base` the same of the base.
    """
    quiet_libraries()
    options = generation_words(words)
    require_strength(strength)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise RecipeError("--batch-size and --limit take a number of 1 or more.")
    target = Path(output or f"{Path(file).with_suffix('')}-answers.jsonl")
    trained = open_trained(folder, stage, "generate")
    if base:
        _ = trained.base  # refused before anything is loaded
    asked = ranks.on_main(lambda: read_prompts(file, trained.asking, limit))
    texts = [text_of_prompt(one.row, trained.tokenizer) for one in asked]
    suite = Suite.model_validate({"generation": options, "batch_size": batch_size})
    set_seed(trained.recipe.seed)
    lines = [
        {"row": number, "given": one.given, "prompt": text.prompt}
        for number, (one, text) in enumerate(zip(asked, texts, strict=True))
    ]
    for speaker in _speakers(trained, strength, base):
        before = "" if speaker.name == trained.stage.name else "base_"
        for line, found in zip(lines, _answers(speaker, texts, trained.tokenizer, suite), strict=True):
            line |= {f"{before}{name}": value for name, value in found.items()}
        cut = sum(not line[f"{before}ended"] for line in lines)
        ranks.say(
            f"{speaker.name}: {len(lines):,} answers"
            + (f", {cut:,} of them cut off at their most tokens (--set max_new_tokens=N)" if cut else "")
        )
    if ranks.is_main():
        write_jsonl(target, lines)
        ranks.say(f"written to {target}", "result")
    ranks.wait()
    return target


def _answers(speaker: Speaker, texts: Sequence[RowText], tokenizer: Any, suite: Suite) -> list[dict[str, Any]]:
    """One answer a prompt, on every rank; each was generated on one of them."""
    mine = texts[ranks.rank() :: ranks.ranks()]
    with speaker.speaking():
        said = generate(speaker.model, encode_prompts(mine, tokenizer), tokenizer, suite, MOST_GENERATED)
    shares = ranks.gather(
        [
            {
                "answer": tokenizer.decode(one.ids, skip_special_tokens=True),
                "ended": one.ended,
                **({"cut": one.cut} if one.cut else {}),
            }
            for one in said
        ]
    )
    found: list[dict[str, Any]] = [{}] * len(texts)
    for rank, share in enumerate(shares):
        found[rank :: ranks.ranks()] = share
    return found


def chat(
    folder: Path,
    *,
    stage: str | None = None,
    strength: float | None = None,
    base: bool = False,
    words: Sequence[str] = (),
) -> None:
    """Talks to a trained model: on a terminal turn by turn, else the answer to the prompt on standard input.

    Args:
        folder: The run folder.
        stage: Which stage answers; the last finished one when None.
        strength: From 0 (its parent) to 1 (as it was trained, when None).
        base: Whether the base answers beside it.
        words: Fields of GenerationConfig, as `max_new_tokens=200`.
    """
    quiet_libraries()
    options = generation_words(words)
    require_strength(strength)
    trained = open_trained(folder, stage, "chat")
    if base:
        _ = trained.base
    typed = sys.stdin.isatty()
    text = "" if typed else sys.stdin.read().strip()
    if not typed and not text:
        raise DataError("standard input holds no prompt. Type one: echo 'Hello!' | hfpipe chat RUN")
    if not typed:
        _row_of(trained, text, [])
    speakers = [*_speakers(trained, strength, base)]
    display.clear()  # the answers are written word by word
    talks = [Talk(one, trained, options, named=len(speakers) > 1) for one in speakers]
    if not typed:
        for talk in talks:
            talk.answer(text)
        return
    print(_welcome(trained, base, strength), flush=True)
    while (text := _next_line()) is not None:
        if text in ("/new", "/clear"):
            talks = [Talk(one, trained, options, named=len(speakers) > 1) for one in speakers]
            print("(a new conversation)")
        elif text:
            for talk in talks:
                talk.answer(text)


def _welcome(trained: Trained, base: bool, strength: float | None) -> str:
    at = "" if strength is None else f" at strength {strength:g}"
    beside = f", beside its base ({trained.base.path})" if base else ""
    keeps = (
        "It remembers the conversation; /new begins another one."
        if trained.asking.is_chat
        else ("It was trained on single prompts, so it remembers nothing.")
    )
    return f"stage {trained.stage.name} of {trained.folder}{at}{beside}. {keeps} /exit or Ctrl-D ends it."


def _next_line() -> str | None:
    """The next line that is typed; None at the end."""
    try:
        text = input("> ").strip()
    except EOFError:
        print()
        return None
    return None if text in ("/exit", "/quit") else text


def _row_of(trained: Trained, text: str, turns: Sequence[dict[str, Any]]) -> Row:
    """The row that is put to the model: the conversation with the new turn, or the prompt alone."""
    asking = trained.asking
    if len(asking.fields) > 1:  # of several columns: a whole prompt is typed
        row: Row = {"messages": [{"role": "user", "content": text}]} if asking.is_chat else {"prompt": text}
    else:
        row = asking.of_text(text)
    return {**row, "messages": [*turns, *row["messages"][-1 if turns else 0 :]]} if "messages" in row else row


class Talk:
    """A conversation with one model, which remembers its own answers.

    Args:
        speaker: The model.
        trained: What was trained, and how it is asked.
        options: Fields of GenerationConfig.
        named: Whether its name stands before each answer.
    """

    def __init__(self, speaker: Speaker, trained: Trained, options: dict[str, Any], *, named: bool) -> None:
        self.speaker, self.trained, self.options, self.named = speaker, trained, options, named
        self.turns: list[dict[str, Any]] = []

    @torch.no_grad()
    def answer(self, text: str) -> None:
        """Answers a turn, word by word as the model finds them."""
        model, tokenizer = self.speaker.model, self.trained.tokenizer
        stops = stop_tokens(model, tokenizer, self.options)
        settings = {"max_new_tokens": MOST_GENERATED, "do_sample": False, **self.options}
        settings |= {"eos_token_id": stops or None, "pad_token_id": tokenizer.pad_token_id}
        if "stop_strings" in settings:
            settings["tokenizer"] = tokenizer
        row, ids = self._fitting(text, settings["max_new_tokens"])
        if self.named:
            print(f"[{self.speaker.name}] ", end="", flush=True)
        inputs = torch.tensor([ids], device=model.device)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        with self.speaker.speaking():
            output = model.generate(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), streamer=streamer, **settings
            )
        said = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        if "messages" in row:
            self.turns = [*row["messages"], {"role": "assistant", "content": said}]

    def _fitting(self, text: str, new: int) -> tuple[Row, list[int]]:
        """The row and its tokens; earlier turns are forgotten where all do not fit beside an answer.

        Raises:
            DataError: The text alone does not fit.
        """
        window = window_of(self.speaker.model)
        while True:
            row = _row_of(self.trained, text, self.turns)
            ids = encode_prompts([text_of_prompt(row, self.trained.tokenizer)], self.trained.tokenizer)[0]
            new = min(new, max(1, window // 2)) if window is not None else new
            if window is None or len(ids) + new <= window:
                return row, ids
            if not self.turns:
                raise DataError(
                    f"the prompt has {len(ids):,} tokens, and the model reads {window:,} at once, with an answer of up "
                    f"to {new:,}. Shorten it, or allow a shorter answer: --set max_new_tokens=N."
                )
            print("(the beginning of the conversation no longer fits and is forgotten)")
            begin = 1 if self.turns[0]["role"] == "system" else 0
            self.turns = [*self.turns[:begin], *self.turns[begin + 2 :]]
