"""Generated answers of a causal model, and the right answers beside them: both sides by one rule.

Answers are what `model.generate` of the saved model gives, without sampling unless the suite asks for it. A side ends
at the first stop token; the closing marks of a chat template (`<|im_end|>` and white space) go from the end of both
where they are no stop token, and all other special tokens stay in both. A right answer is what the tokenizer gives
back of its tokens where that differs by white space alone.

The keys of a suite's `generation` are tried on two tokens of a model with one small layer before anything is trained:
`generate` refuses most of what it refuses after the base was loaded, some of it after minutes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from hfpipe.core.errors import MachineError, RecipeError
from hfpipe.evaluation.continuations import beginning, special_ends
from hfpipe.evaluation.likelihood import by_length
from hfpipe.evaluation.row_text import RowText, closing_marks, without_reasoning
from hfpipe.model.positions import window_of
from hfpipe.model.spread import device_of
from hfpipe.recipe import Suite
from hfpipe.recipe.annotations import explain, fits
from hfpipe.recipe.signatures import generation_fields

MOST_GENERATED = 512  # tokens of an answer, unless the suite says otherwise
_IDS = ("suppress_tokens", "begin_suppress_tokens")  # and all words that end in token_id
TOKENS = 2  # of an answer of the toy


@dataclass(frozen=True)
class Generated:
    """The answer to a prompt.

    Args:
        ids: Its tokens, before the first stop token.
        cut: Tokens that the prompt lost at its beginning, since the model could not read them.
        ended: Whether the model ended it by a stop token, and not the most tokens that an answer may have.
    """

    ids: list[int]
    cut: int
    ended: bool = True


def stop_tokens(model: Any, tokenizer: Any, options: dict[str, Any]) -> list[int]:
    """Token ids that end an answer: those of the model's generation config, and the tokenizer's EOS.

    `eos_token_id` of the suite's own `generation` takes their place.
    """
    given = options.get("eos_token_id")
    named = [given] if given is not None else [model.generation_config.eos_token_id, tokenizer.eos_token_id]
    ids = [one for part in named for one in (part if isinstance(part, (list, tuple)) else [part])]
    return list(dict.fromkeys(int(one) for one in ids if one is not None))


def encode_prompts(texts: Sequence[RowText], tokenizer: Any) -> list[list[int]]:
    """Tokens of each prompt: with what the tokenizer puts in front of a text, without what it puts behind one."""
    if not texts:
        return []
    before = [] if texts[0].chat else special_ends(tokenizer)[0]
    encoded = tokenizer([row.prompt for row in texts], add_special_tokens=False, return_attention_mask=False)
    return [[*before, *ids] or beginning(tokenizer) for ids in encoded["input_ids"]]


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[list[int]], tokenizer: Any, suite: Suite, longest_answer: int
) -> list[Generated]:
    """Generates an answer to each prompt.

    `max_new_tokens` of the suite's `generation` wins over `max_length` there, which counts the prompt's tokens too;
    without either, an answer may have a few tokens more than the longest right one. A prompt that does not fit into the
    model's context beside its answer (or into the suite's `max_length`) loses its beginning.

    Args:
        model: A causal language model in evaluation mode.
        prompts: Tokens to continue.
        tokenizer: The model's tokenizer.
        suite: Whose `generation`, `max_length` and `batch_size` hold.
        longest_answer: Tokens of the longest right answer of the whole suite.

    Raises:
        RecipeError: The answer alone is longer than the model's context.
    """
    options = dict(suite.generation)
    window = window_of(model, suite.max_length)
    new, total = options.pop("max_new_tokens", None), options.pop("max_length", None)
    require_window(suite, model)
    if new is None and total is None:
        new = min(longest_answer + 4, MOST_GENERATED)
        new = new if window is None else min(new, max(1, window // 2))
    room = total - 1 if new is None else None if window is None else window - new  # tokens of a prompt
    if new is None and window is not None:
        total = min(total, window)
        room = total - 1
    kept = [ids if room is None else ids[-max(1, room) :] for ids in prompts]
    stops = stop_tokens(model, tokenizer, options)
    settings = {
        "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id,
        **options,
        "eos_token_id": stops or None,
        **({"tokenizer": tokenizer} if "stop_strings" in options else {}),
    }
    answers = [Generated([], 0)] * len(prompts)
    for indices in _batches([len(ids) for ids in kept], suite.batch_size, equal=new is None):
        longest = len(kept[indices[0]])
        ids = torch.full((len(indices), longest), tokenizer.pad_token_id)
        mask = torch.zeros((len(indices), longest), dtype=torch.long)
        for place, index in enumerate(indices):  # on the left, so that every answer begins at the same place
            ids[place, longest - len(kept[index]) :] = torch.as_tensor(kept[index])
            mask[place, longest - len(kept[index]) :] = 1
        inputs = {"input_ids": ids.to(device_of(model)), "attention_mask": mask.to(device_of(model))}
        limit = new if new is not None else max(1, total - longest)
        with _told(model):
            output = model.generate(**inputs, max_new_tokens=limit, **settings)
        for index, said in zip(indices, output[:, longest:].tolist(), strict=True):
            answers[index] = Generated(
                _ended(said, stops, tokenizer.pad_token_id),
                len(prompts[index]) - len(kept[index]),
                not stops or any(one in stops for one in said),
            )
    return answers


def require_window(suite: Suite, model: Any) -> None:
    """Refuses answers that are longer than what the model reads at once.

    Args:
        suite: Whose `generation` and `max_length` hold.
        model: The model; its shapes are enough.

    Raises:
        RecipeError: They are.
    """
    new, window = suite.generation.get("max_new_tokens"), window_of(model, suite.max_length)
    if new is not None and window is not None and new >= window:
        raise RecipeError(
            f"generation.max_new_tokens is {new}, and the model reads {window} tokens at once, prompt and answer "
            f"together. Write less than {window}."
        )


@contextmanager
def _told(model: Any) -> Iterator[None]:
    """Turns what `generate` raises over its settings into words: over a type in the model's file, or a value.

    Raises:
        RecipeError: The model's generation_config.json, or the suite's `generation`, cannot be followed.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        taken = generation_fields() or {}
        for name, value in model.generation_config.to_diff_dict().items():
            if name in taken and not fits(value, taken[name].kinds):
                raise RecipeError(
                    f"the generation_config.json of {model.name_or_path!r} is damaged: {name}: "
                    f"{explain(value, taken[name].kinds)}"
                ) from error
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise RecipeError(
            f"generation of a suite, or of the model's generation_config.json: transformers says: {said}"
        ) from error


def _batches(lengths: Sequence[int], batch_size: int, *, equal: bool) -> Iterator[list[int]]:
    """Batches by length; with `equal`, of rows of one length only, since each has its own number of new tokens."""
    for indices in by_length(lengths, batch_size):
        part: list[int] = []
        for index in indices:
            if equal and part and lengths[part[0]] != lengths[index]:
                yield part
                part = []
            part.append(index)
        yield part


def _ended(ids: list[int], stops: Sequence[int], pad_token_id: int) -> list[int]:
    """Tokens before the first stop token, without the padding of a row that ended before its batch."""
    ids = ids[: next((place for place, one in enumerate(ids) if one in stops), len(ids))]
    while ids and ids[-1] == pad_token_id:
        ids = ids[:-1]
    return ids


@dataclass(frozen=True)
class RightAnswer:
    """A right answer.

    Args:
        text: What predictions are compared with.
        size: Its tokens, the stop token included.
        open: Whether it ends in a closing mark of the chat template that is no stop token, so generation runs on.
    """

    text: str
    size: int
    open: bool


def references(texts: Sequence[RowText], tokenizer: Any, stops: Sequence[int], reasoning: str) -> list[RightAnswer]:
    """Returns the right answer of each row as the model would say it.

    Args:
        texts: Rows.
        tokenizer: The model's tokenizer.
        stops: See `stop_tokens`.
        reasoning: `strip` takes reasoning off.
    """
    if not texts:
        return []
    batch = tokenizer(
        [row.completion for row in texts],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    found = []
    for row, ids, offsets in zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True):
        end = next((place for place, one in enumerate(ids) if one in stops), None)
        written = row.completion if end is None else row.completion[: offsets[end][0]]
        text = as_decoded(written, ids[:end], tokenizer)
        runs_on = row.chat and end is None and bool(closing_marks(text, tokenizer))
        size = len(ids) if end is None else end + 1
        found.append(RightAnswer(compared(row, text, tokenizer, reasoning), size, runs_on))
    return found


def decode(ids: list[int], tokenizer: Any) -> str:
    """The text of tokens, special ones included, spaced as it was written."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def as_decoded(text: str, ids: list[int], tokenizer: Any) -> str:
    """A text as its tokenizer gives it back, where that differs in white space alone, and else as it was written."""
    decoded = decode(ids, tokenizer)
    return decoded if re.sub(r"\s", "", decoded) == re.sub(r"\s", "", text) else text


def compared(row: RowText, text: str, tokenizer: Any, reasoning: str) -> str:
    """The part of an answer that is compared, a prediction or a right answer alike."""
    if row.chat:
        text = text.removesuffix(closing_marks(text, tokenizer))
    return without_reasoning(text, row.prompt) if reasoning == "strip" else text


SMALL: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}


def require_generation(suite: Suite, name: str, vocabulary: int, tokenizer: Any, *, reads_pairs: bool = False) -> None:
    """Refuses what `generate` would refuse of a suite's `generation`, and ids that no token has.

    Args:
        suite: The suite.
        name: Its name.
        vocabulary: Rows of the model's embeddings.
        tokenizer: The model's tokenizer.
        reads_pairs: Whether an encoder-decoder model answers.

    Raises:
        RecipeError: A word is refused.
        MachineError: It needs a package that is not installed.
    """
    given = suite.generation
    if not given:
        return
    for key, value in given.items():
        ids = value if isinstance(value, list) else [value]
        is_id = key.endswith("token_id") or key in _IDS
        wrong = [one for one in ids if is_id and isinstance(one, int) and not 0 <= one < vocabulary]
        if wrong:
            raise RecipeError(
                f"evaluate.{name}.generation.{key}: found {wrong[0]}; allowed are ids of tokens, 0 to "
                f"{vocabulary - 1:,} for this model."
            )
    if (longest := given.get("max_length")) is not None and longest < 2:
        raise RecipeError(
            f"evaluate.{name}.generation.max_length: found {longest}; it counts the prompt's tokens too, so allowed is "
            "a whole number from 2. `max_new_tokens` counts those of the answer alone."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        toy = _toy(vocabulary, reads_pairs)
        rows = min(suite.batch_size, 2)
        error = _refusal(toy, tokenizer, given, rows)
        if error is None:
            return
        others = {key: {word: value for word, value in given.items() if word != key} for key in given}
        guilty = next(
            (key for key, rest in reversed(others.items()) if _refusal(toy, tokenizer, rest, rows) is None), None
        )
    word = f"evaluate.{name}.generation" + (f".{guilty}" if guilty else "")
    told = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    refusal = MachineError if isinstance(error, ImportError) else RecipeError
    raise refusal(
        f"{word}: found {given[guilty] if guilty else given}, and transformers refuses it: {told}."
    ) from error


def _toy(vocabulary: int, reads_pairs: bool) -> Any:
    """A model with one small layer and random weights."""
    if reads_pairs:
        config = T5Config(vocab_size=vocabulary, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
        return T5ForConditionalGeneration(config).eval()
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, hidden_size=8, intermediate_size=8, tie_word_embeddings=True, **SMALL)
    ).eval()


@torch.no_grad()
def _refusal(toy: Any, tokenizer: Any, given: dict[str, Any], rows: int) -> Exception | None:
    """Returns the error that `generate` raises over these words; None where it answers."""
    words = {key: value for key, value in given.items() if key not in ("max_length", "min_new_tokens")}
    words["max_new_tokens"] = min(given.get("max_new_tokens", TOKENS), TOKENS)
    if "stop_strings" in words:
        words["tokenizer"] = tokenizer
    ids = torch.tensor([[1, 2, 3]] * rows) % toy.config.vocab_size
    toy.generation_config = GenerationConfig(decoder_start_token_id=0)
    settings = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": None, **words}
    try:
        toy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    except Exception as error:
        return error
    return None
