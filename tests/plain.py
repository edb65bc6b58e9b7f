"""A tiny model with random weights, and the script that a person would write to score it."""

import json
from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hfpipe.cli import main
from hfpipe.evaluation.suites import score_suite, suite_rows
from hfpipe.model.create import train_tokenizer
from hfpipe.model.load import ModelRef, load_model
from hfpipe.model.tokenizer import load_tokenizer
from hfpipe.recipe import load_recipe
from hfpipe.scores.scorecard import Score

CONTEXT = 48


def make_model(folder: Path, *, llama: bool, context: int = CONTEXT) -> Path:
    """A Llama whose tokenizer puts a BOS token in front, or a GPT-2 whose tokenizer does not."""
    texts = [f"The {animal} said {sound} by the river. Question: Answer:" for animal, sound in tiny.SOUNDS.items()]
    tokenizer = train_tokenizer(texts * 20, 320, context)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_attention_heads": 2}
    if llama:
        start = tokenizer.eos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{start} $A", pair=f"{start} $A $B", special_tokens=[(start, tokenizer.eos_token_id)]
        )
        config: Any = LlamaConfig(**sizes, num_hidden_layers=2, intermediate_size=64, max_position_embeddings=context)
        network: Any = LlamaForCausalLM(config)
    else:
        network = GPT2LMHeadModel(GPT2Config(**sizes, n_layer=2, n_positions=context, bos_token_id=0, eos_token_id=0))
    for parameter in network.parameters():
        parameter.data.mul_(6)  # so that the likelihoods lie far apart
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_encoder(folder: Path) -> Path:
    """A BERT whose tokenizer puts [CLS] and [SEP] round a text."""
    tokenizer = train_tokenizer([f"The {animal} said {sound}." for animal, sound in tiny.SOUNDS.items()], 320, CONTEXT)
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"})
    ends = [("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
    network = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, **sizes))
    for parameter in network.parameters():
        parameter.data.mul_(6)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Plain:
    """The plain way to score: log-softmax in float32, one text at a time."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def __call__(self, context: str, continuation: str) -> tuple[float, bool, int]:
        """Log-likelihood of the continuation, whether it is the greedy one, and its tokens."""
        if context:
            given = self.tokenizer(context.rstrip())["input_ids"]
            ids = self.tokenizer(context + continuation)["input_ids"]
        else:
            given = [self.tokenizer.eos_token_id]
            ids = given + self.tokenizer(continuation, add_special_tokens=False)["input_ids"]
        size = len(ids) - len(given)
        kept = ids[-(CONTEXT + 1) :]
        table = torch.log_softmax(self.model(torch.tensor([kept[:-1]])).logits[0].float(), -1)[-size:]
        target = torch.tensor(kept[-size:])
        return float(table.gather(1, target[:, None]).sum()), bool((table.argmax(-1) == target).all()), size


def records(folder: Path, model: Path, rows: list[dict[str, Any]], suite: dict[str, Any]) -> list[dict[str, Any]]:
    """Each row's record: its place, its values, and what the model gave by kind (`likelihood`, `generation`)."""
    return scores_and_records(folder, model, rows, suite)[1]


def scores_and_records(
    folder: Path, model: Path, rows: list[dict[str, Any]], suite: dict[str, Any]
) -> tuple[list[Score], list[dict[str, Any]]]:
    """The scores and the records of a suite on `rows`."""
    recipe = load_recipe(recipe_of(folder, rows, suite))
    ref = ModelRef(str(model), options=recipe.model)
    block = recipe.evaluate["it"]
    tokenizer = load_tokenizer(str(model))
    scored = score_suite("it", block, suite_rows(block), load_model(ref), tokenizer, "base")
    return scored.scores, scored.records


def recipe_of(folder: Path, rows: list[dict[str, Any]], suite: dict[str, Any]) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = tiny.recipe(folder)
    source = {"path": "json", "data_files": str(folder / "rows.jsonl"), **suite.get("data", {})}
    content["evaluate"] = {"it": {"batch_size": 2, **suite, "data": source}}
    tiny.write_data(folder)
    return tiny.write(folder, content)


def scored(folder: Path, model: Path, rows: list[dict[str, Any]], suite: dict[str, Any]) -> dict[str, float]:
    """The scores of a suite on `rows`, through the command line."""
    path = str(recipe_of(folder, rows, suite))
    assert main(["check", "--fast", path]) == 0
    assert main(["evaluate", str(model), path, "--output", str(folder / "scores.json")]) == 0
    found = json.loads((folder / "scores.json").read_text())
    assert all(score["low"] <= score["value"] <= score["high"] for score in found)
    return {score["metric"]: score["value"] for score in found}
