"""The words of a suite's `generation`, tried on a toy model before anything is trained.

`generate` refuses most of what it refuses after the base was loaded, some of it after minutes, and a few values end in
an error of arithmetic. Two tokens of a model with one small layer and the same vocabulary say it at once.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from hfpipe.core.errors import MachineError, RecipeError
from hfpipe.recipe import Suite

_IDS = ("suppress_tokens", "begin_suppress_tokens")  # and all words that end in token_id
TOKENS = 2  # of an answer of the toy
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
