"""Small tokenizers of every family that models have, trained on a few sentences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The fox said yelp, and the cow said moo.  Grüße! 牛呢 2024 12,345",
    "Question: what does the fox say?\nAnswer: yelp\n\n  the end of it",
    "def moo(x):\n    return x + 1\n\t# done 😀",
]
# What tiktoken's encodings of newer models divide by (cl100k).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bpe(pre_tokenizer: Any, **more: Any) -> Tokenizer:
    made = Tokenizer(models.BPE(**more.pop("model", {})))
    made.pre_tokenizer = pre_tokenizer
    for name, value in more.items():
        setattr(made, name, value)
    alphabet = pre_tokenizers.ByteLevel.alphabet() if more.get("decoder") is not None else []
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    made.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    return made


def _byte_level(**options: Any) -> Tokenizer:
    return _bpe(
        pre_tokenizers.ByteLevel(add_prefix_space=options.pop("add_prefix_space", False)),
        decoder=decoders.ByteLevel(),
        **options,
    )


def _framed(tokenizer: Tokenizer, single: str) -> Any:
    ids = {name: tokenizer.token_to_id(name) for name in ("<s>", "</s>")}
    return processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=[*ids.items()])


def _trimmed() -> Tokenizer:
    return _byte_level(post_processor=processors.ByteLevel())


def _untrimmed() -> Tokenizer:
    return _byte_level(post_processor=processors.ByteLevel(trim_offsets=False))


def _prefixed() -> Tokenizer:
    return _byte_level(add_prefix_space=True, post_processor=processors.ByteLevel())


def _trimmed_with_bos() -> Tokenizer:
    made = _byte_level()
    made.post_processor = processors.Sequence([processors.ByteLevel(), _framed(made, "<s> $A")])
    return made


def _roberta() -> Tokenizer:
    made = _byte_level()
    ids = {name: (name, made.token_to_id(name)) for name in ("<s>", "</s>")}
    made.post_processor = processors.RobertaProcessing(ids["</s>"], ids["<s>"])
    return made


def _tiktoken() -> Tokenizer:
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    levels = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made = _bpe(levels, decoder=decoders.ByteLevel(), model={"ignore_merges": True}, normalizer=normalizers.NFC())
    made.post_processor = processors.Sequence([processors.ByteLevel(), _framed(made, "<s> $A")])
    return made


def _no_division() -> Tokenizer:
    """Llama 2's: nothing is divided before tokens are merged."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made = _bpe(pre_tokenizers.Metaspace(), model={"unk_token": "<unk>", "byte_fallback": False})
    made.normalizer = spaces
    made.pre_tokenizer = None
    made.post_processor = _framed(made, "<s> $A")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return made


def _unigram(behind: str = "") -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(TEXTS * 3, trainer)
    made.post_processor = _framed(made, f"$A{behind}")
    return made


def _word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    made.train_from_iterator(TEXTS * 3, trainer)
    made.post_processor = _framed(made, "<s> $A </s>")
    return made


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte-level, trimmed offsets": _trimmed,
    "byte-level, whole offsets": _untrimmed,
    "byte-level with a space in front": _prefixed,
    "byte-level with BOS, trimmed offsets": _trimmed_with_bos,
    "RoBERTa's": _roberta,
    "tiktoken's": _tiktoken,
    "Llama 2's": _no_division,
    "Metaspace": _unigram,
    "T5's": lambda: _unigram(" </s>"),
    "WordPiece": _word_piece,
}


def make(family: str, template: str | None = None) -> Any:
    """Returns a tokenizer of a family as transformers has it."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=FAMILIES[family](), bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer
