"""Small encoder-decoder models with random weights, whose tokenizers know a few letters."""

import json
from pathlib import Path
from typing import Any

import sentencepiece
import tiny
from transformers import MarianConfig, MarianMTModel, MarianTokenizer


def letters(*special: str) -> list[str]:
    return [*special, *"▁abcdefghijklmnopqrstuvwxyz"]


def sizes(vocab_size: int) -> dict[str, Any]:
    both = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
    named = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in both.items()}
    return {"vocab_size": vocab_size, "d_model": 32, "max_position_embeddings": 32, "dropout": 0.0, **named}


def saved(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_marian(folder: Path, **fields: Any) -> Path:
    """Writes a Marian model, whose tokenizer is sentencepiece's and not fast, to `model`, M2M100's files beside it."""
    (folder / "text.txt").write_text("\n".join(f"{animal} and {sound}" for animal, sound in tiny.SOUNDS.items()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "pieces"), vocab_size=28, minloglevel=2
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "pieces.model"))
    names = [pieces.id_to_piece(place) for place in range(pieces.get_piece_size())]
    names = ["</s>", "<unk>", *(name for name in names if not name.startswith("<")), "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({name: place for place, name in enumerate(names)}))
    spm, vocab = str(folder / "pieces.model"), str(folder / "vocab.json")
    tokenizer = MarianTokenizer(spm, spm, vocab, model_max_length=32)
    pad = tokenizer.pad_token_id
    config = MarianConfig(
        **sizes(len(names)),
        pad_token_id=pad,
        eos_token_id=0,
        decoder_start_token_id=pad,
        forced_eos_token_id=0,
        **fields,
    )
    saved(MarianMTModel(config), tokenizer, folder / "model")
    return folder
