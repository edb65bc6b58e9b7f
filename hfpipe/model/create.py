"""Models with fresh weights: a base from nothing with its tokenizer, and a small copy of a model.

A small copy shows what follows from an architecture and not from its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

from hfpipe.core.errors import RecipeError
from hfpipe.core.machine import machine_error
from hfpipe.core.upstream import attention_of
from hfpipe.model.load import AUTO_CLASSES, task_of_type
from hfpipe.model.load_errors import clear_errors
from hfpipe.recipe import Model
from hfpipe.recipe.passthrough import check_config
from hfpipe.recipe.raw import Block

END_OF_TEXT = "<|endoftext|>"
BEGIN, END, PAD, MASK = "[CLS]", "[SEP]", "[PAD]", "[MASK]"
T5_PAD, T5_END = "<pad>", "</s>"
LAYERS, WIDTH, TOKENS = 1, 64, 64  # of a copy, at most
FEW_WEIGHTS = 30_000_000  # of a copy, where the number of heads can be halved until it has no more
MOST_WEIGHTS = 300_000_000  # of a copy: 1.2 GB in float32, made in about three seconds
LARGER = 4  # times the fresh weights, which attend to nothing much
_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff")  # and names that end so
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_length: int, task: str = "causal"
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer (GPT-2's scheme), which knows no unknown character.

    A decoder's has one special token, that ends and pads; an encoder's has ModernBERT's: a text stands between [CLS]
    and [SEP], and there are [PAD] and [MASK]; an encoder-decoder's has T5's: </s> behind each text, and <pad>.

    Args:
        texts: Documents to learn the merges from.
        vocab_size: Tokens in all, the 256 bytes and the special tokens included.
        max_length: The model's context in tokens, recorded in the tokenizer.
        task: What its model is for: `causal`, `masked` or `seq2seq`.
    """
    special: list[Any] = [END_OF_TEXT]
    named = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    if task == "masked":
        special = [PAD, BEGIN, END, AddedToken(MASK, lstrip=True, special=True)]
        named = {"cls_token": BEGIN, "sep_token": END, "pad_token": PAD, "mask_token": MASK}
    elif task == "seq2seq":
        special = [T5_PAD, T5_END]
        named = {"eos_token": T5_END, "pad_token": T5_PAD}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if task == "masked":
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A {END}",
            pair=f"{BEGIN} $A {END} $B:1 {END}:1",
            special_tokens=[(token, bpe.token_to_id(token)) for token in (BEGIN, END)],
        )
    elif task == "seq2seq":
        bpe.post_processor = processors.TemplateProcessing(
            single=f"$A {T5_END}",
            pair=f"$A {T5_END} $B {T5_END}",
            special_tokens=[(T5_END, bpe.token_to_id(T5_END))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **named,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def architecture_of(options: Model) -> dict[str, Any]:
    """Returns the fields of the config of a model that is made from nothing.

    Args:
        options: The recipe's model block; `from` in its `architecture` names a model of the Hub, or a folder, whose
            config is taken, with the other fields in place of its own.

    Raises:
        UserError: The config cannot be had.
    """
    fields = dict(options.architecture or {})
    named = fields.pop("from", None)
    if named is None:
        return fields
    with clear_errors("model", named):
        config = AutoConfig.from_pretrained(named, trust_remote_code=options.trust_remote_code)
    check = Block(("model",), {"config": fields})
    for fault in check_config(check, config.model_type):
        raise RecipeError(f"model.architecture.{fault.steps[-1]}: {fault.text}")
    of_its_files = ("architectures", "dtype", "quantization_config", "transformers_version")
    return {key: value for key, value in config.to_dict().items() if key not in of_its_files} | fields


def create_model(architecture: dict[str, Any], tokenizer: Any, seed: int) -> Any:
    """Builds a language model with fresh float32 weights, for the task that transformers has models of that type for.

    Args:
        architecture: Fields of the transformers config named by `model_type`; the vocabulary and the special tokens are
            the tokenizer's.
        tokenizer: The tokenizer the model is for.
        seed: Seed of the weights.

    Raises:
        RecipeError: The fields contradict each other, or the architecture is no language model.
    """
    fields = dict(architecture)
    model_type = fields.pop("model_type")
    needed = 1 + max(tokenizer.get_vocab().values(), default=0)  # some have gaps between their ids
    fields.setdefault("vocab_size", needed)
    if fields["vocab_size"] < needed:
        raise RecipeError(
            f"model.architecture.vocab_size is {fields['vocab_size']}, but the tokenizer has ids up to {needed - 1}. "
            "Leave it out to take the tokenizer's."
        )
    fields |= {
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    task = task_of_type(model_type)
    if task == "masked":
        fields |= {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
    if task == "seq2seq":  # T5's and Marian's way: the decoder begins with the padding token
        fields.setdefault("decoder_start_token_id", tokenizer.pad_token_id)
    set_seed(seed)
    try:
        config = AutoConfig.for_model(model_type, **fields)
        if getattr(config, "forced_eos_token_id", None) is not None:  # BART's default is that of BART's vocabulary
            config.forced_eos_token_id = tokenizer.eos_token_id
        return AUTO_CLASSES[task].from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever a class of transformers raises over its fields
        if machine_error(error) is not None:
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        message = kind + str(error).strip().split("\n")[0]
        raise RecipeError(f"model.architecture cannot be built as a {model_type} language model: {message}") from error


@torch.no_grad()
def small_copy(model: Any) -> Any:
    """Returns a model of the same architecture, whose heads are as wide and whose layers are few.

    Args:
        model: A causal model of transformers; its shapes are enough.

    Returns:
        The copy, on the CPU in float32, with larger weights than fresh ones; None where the architecture cannot be cut
        so, the copy would be large, or its attention runs on a GPU alone.
    """
    config = copy.deepcopy(model.config)
    words: dict[str, Any] = {"attn_implementation": attention_of(model), "dtype": torch.float32}
    try:
        if attention_of(model) not in ("eager", "sdpa"):
            return None
        _cut(config.get_text_config())
        while (size := _size(config, words)) > FEW_WEIGHTS and _halve(config.get_text_config()):
            pass
        if size > MOST_WEIGHTS:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            toy = AutoModelForCausalLM.from_config(config, **words).eval()
            for weight in toy.parameters():
                weight.mul_(LARGER if weight.dim() > 1 else 1)
            toy(input_ids=torch.zeros(1, 2, dtype=torch.long))
            return toy
    except Exception as error:  # whatever a class of transformers raises over its fields
        if machine_error(error) is not None:
            raise
        return None


def _size(config: Any, words: dict[str, Any]) -> int:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **words).num_parameters()


def _halve(config: Any) -> bool:
    """Gives a config half as many heads, each as wide as before; False where their number cannot be halved."""
    heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if heads % 2 or config.hidden_size % 2:
        return False
    if shared not in (None, 1):
        if shared % 2:
            return False
        config.num_key_value_heads = shared // 2
    config.hidden_size, config.num_attention_heads = config.hidden_size // 2, heads // 2
    return True


def _cut(config: Any) -> None:
    """Cuts a config to its first layers, one of each type among them, and to narrow layers between attention."""
    whole = config.num_hidden_layers
    types = getattr(config, "layer_types", None) or []
    layers = min(whole, max([LAYERS, *(types.index(kind) + 1 for kind in set(types))]))
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(config, name, value[:layers])
        elif isinstance(value, int) and name.endswith(_WIDTHS):
            setattr(config, name, min(value, WIDTH))
    config.num_hidden_layers, config.vocab_size = layers, TOKENS
    for name in _TOKENS:
        if hasattr(config, name):
            setattr(config, name, None if name == "pad_token_id" else 0)
