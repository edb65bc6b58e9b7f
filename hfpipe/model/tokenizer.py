"""Loads tokenizers; and the tokens that a recipe adds to one, to the embeddings, and to what an adapter trains."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hfpipe.core.errors import RecipeError, UserError
from hfpipe.core.upstream import part_shared_embeddings
from hfpipe.model.load_errors import clear_errors
from hfpipe.recipe import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")  # one of them, at least
# What chat templates mark turns and calls with: <|im_start|>, <start_of_turn>, </tool_call>, [INST].
_MARKER = re.compile(r"<\|[^<>|\s]+\|>|</?[A-Za-z_][\w-]*>|\[/?[A-Z_]{2,}\]")


def load_tokenizer(
    path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    task: str = "causal",
    words: Mapping[str, Any] | None = None,
) -> Any:
    """Loads a tokenizer and makes sure that it has an EOS and a padding token.

    Args:
        path: A Hub id or a folder.
        revision: Commit or branch of a Hub id.
        trust_remote_code: Whether code of its repository may run.
        task: What its model is for. That of an encoder-decoder model need not be fast: Marian's is not.
        words: Words of transformers' own that the recipe gives it, such as `eos_token`.

    Raises:
        RecipeError: It does not exist, is not a fast tokenizer, or has no EOS token.
    """
    folder = Path(path)
    try:
        with clear_errors("tokenizer", path):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                path, revision=revision or "main", trust_remote_code=trust_remote_code
            )
    except UserError as error:
        if folder.is_dir() and not any(list(folder.glob(name)) for name in TOKENIZER_FILES):
            raise RecipeError(
                f"the folder {path!r} has no tokenizer (tokenizer.json, or a vocabulary). Save it beside the model, or "
                "name another folder or Hub id: `model: {tokenizer: {id: ...}}`."
            ) from error
        raise
    if not isinstance(tokenizer.model_max_length, int | float):
        raise RecipeError(
            f"tokenizer {path!r}: its tokenizer_config.json has model_max_length {tokenizer.model_max_length!r}, "
            "which is not a number of tokens. Correct it in that file."
        )
    give_words(tokenizer, words or {})
    closing = tokenizer.eos_token or tokenizer.sep_token  # an encoder's tokenizer ends a text with [SEP]
    if not tokenizer.is_fast and task != "seq2seq":
        raise RecipeError(f"tokenizer {path!r} has no fast (Rust) form, which hfpipe needs for offsets and speed.")
    if closing is None:
        raise RecipeError(f"tokenizer {path!r} has no EOS token. Name one: model.tokenizer: {{eos_token: ...}}.")
    if tokenizer.pad_token_id is None:  # none is named, or one that the vocabulary does not have
        tokenizer.pad_token = closing
    return tokenizer


def prepare_tokenizer(tokenizer: Any, block: Tokenizer | None) -> Any:
    """Gives a tokenizer the words, tokens and chat template of the recipe; tokens that it has stay as they are."""
    if block is not None:
        give_words(tokenizer, block.passed_through)
        tokenizer.add_tokens(list(block.add_tokens))
        tokenizer.add_tokens(list(block.add_special_tokens), special_tokens=True)
        if block.chat_template is not None:
            tokenizer.chat_template = block.chat_template
    return tokenizer


def give_words(tokenizer: Any, words: Mapping[str, Any]) -> None:
    """Gives a tokenizer words of transformers' own: special tokens, which are added where it has none, and settings.

    Raises:
        RecipeError: transformers refuses one.
    """
    special = {key: value for key, value in words.items() if key in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    if "extra_special_tokens" in words:
        special["extra_special_tokens"] = words["extra_special_tokens"]
    try:
        tokenizer.add_special_tokens(special)
        for key, value in words.items():
            if key not in special:
                setattr(tokenizer, key, value)
                tokenizer.init_kwargs[key] = value  # by which it is saved
    except (ValueError, TypeError, AttributeError) as error:
        raise RecipeError(f"model.tokenizer: transformers refuses {', '.join(words)}: {error}") from error


def template_warning(tokenizer: Any, block: Tokenizer | None) -> str | None:
    """Warns of a recipe's chat template whose marks are no tokens: the model reads them in pieces, as text."""
    if block is None or block.chat_template is None:
        return None
    known = tokenizer.get_vocab()
    marks = [mark for mark in dict.fromkeys(_MARKER.findall(block.chat_template)) if mark not in known]
    if not marks:
        return None
    quoted = ", ".join(f'"{mark}"' for mark in marks)
    return (
        f"model.tokenizer.chat_template writes {quoted}, which the tokenizer does not know as one token and cuts into "
        f"pieces. To make them tokens, add below model.tokenizer: add_special_tokens: [{quoted}]"
    )


def added_ids(tokenizer: Any, block: Tokenizer | None, rows: int) -> tuple[int, ...]:
    """Ids of the tokens that the base knows nothing of.

    Args:
        tokenizer: The run's tokenizer, see `prepare_tokenizer`.
        block: The recipe's `model.tokenizer`; what it names counts even where the base has a row for it, since bases
            hold rows for tokens that they have never seen.
        rows: Rows of the base's embeddings.
    """
    named = [*block.add_tokens, *block.add_special_tokens] if block is not None else []
    return tuple(sorted({*tokenizer.convert_tokens_to_ids(named), *range(rows, len(tokenizer))}))


def require_room(tokenizer: Any, rows: int, path: str) -> None:
    """Refuses a tokenizer that gives ids beyond the embeddings of its model: a forward pass would fail on them.

    Embeddings grow to the number of tokens, see `make_room`; a tokenizer with gaps between its ids has higher ones.

    Args:
        tokenizer: The tokenizer, prepared.
        rows: Rows of the model's embeddings.
        path: The model, for the message.

    Raises:
        RecipeError: There is such an id.
    """
    room = max(rows, len(tokenizer))
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= room)
    if beyond:
        raise RecipeError(
            f"the tokenizer of {path!r} gives {len(beyond):,} tokens ids beyond the embeddings of the model, which has "
            f"{rows:,} rows: {beyond[0][1]!r} is {beyond[0][0]:,}, and the last is {beyond[-1][0]:,}. The two do not "
            "belong together: name the model's own tokenizer (model.tokenizer.id), or another model."
        )


def make_room(model: Any, size: int | None) -> None:
    """Lets the embeddings of a model grow to `size` rows, where they have fewer.

    New rows are drawn around the mean of the others, as transformers does
    (https://nlp.stanford.edu/~johnhew/vocab-expansion.html), and are the same at every load.
    """
    if size is None or size <= model.get_input_embeddings().num_embeddings:
        return
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # On the meta device there is no mean to draw around.
        is_real = model.get_input_embeddings().weight.device.type != "meta"
        model.resize_token_embeddings(size, mean_resizing=is_real)
    part_shared_embeddings(model)


def train_rows(model: Any, block: dict[str, Any], ids: tuple[int, ...]) -> dict[str, Any]:
    """The block of an adapter that trains the rows of added tokens beside its own weights.

    The rows go into the adapter by PEFT's `trainable_token_indices`, not the whole embeddings. A head that is tied to
    the embeddings follows them; one that is not has its rows trained too.

    Args:
        model: The base.
        block: PEFT's `type` and fields of its config. One that trains the embeddings already stays as it is.
        ids: The tokens, see `added_ids`.

    Raises:
        RecipeError: The head has a bias, which PEFT leaves out (https://github.com/huggingface/peft/issues/3649).
    """
    names = {module: name for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = names[embeddings].rpartition(".")[2]
    readers = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and module.weight is embeddings.weight
    }
    named = [name for key in ("modules_to_save", "target_modules") for name in _listed(block.get(key))]
    if not ids or block.get("trainable_token_indices") or readers & set(named):
        return block
    if head is not None and head.bias is not None:
        raise RecipeError(
            "model.tokenizer: an adapter cannot train added tokens on this model, whose head has a bias: PEFT leaves "
            "the bias out (https://github.com/huggingface/peft/issues/3649). Train all weights, or write "
            f"`modules_to_save: [{own}, {names[head].rpartition('.')[2]}]`."
        )
    rows = {names[embeddings]: list(ids)}
    if head is not None and head.weight is not embeddings.weight:
        rows[names[head]] = list(ids)
    return block | {"trainable_token_indices": rows}


def _listed(names: Any) -> list[str]:
    return names if isinstance(names, list) else []
