"""The card of every kind of base and model: each sentence of it is true, and none is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from pages import read
from pushing import RECIPE, make_run

from hfpipe.cli import main
from hfpipe.hub import prepare_artifact
from hfpipe.recipe import Push, load_recipe

HUB = "me/base (commit " + "c" * 40 + ")"
NOTHING = {"architecture": {"model_type": "llama", "hidden_size": 8}, "tokenizer": {"train": {"vocab_size": 300}}}
BOTH = "by stage law (pretrain, all weights) and stage chat (sft, LoRA, merged into the weights)"


def card_of(folder: Path, what: str, model: dict[str, Any], stage: dict[str, Any] | None = None) -> ModelCard:
    """The card of what a stage of a run left, as it is pushed."""
    stages = [RECIPE["stages"][0], RECIPE["stages"][1] | (stage or {})]
    if "peft" in stages[1]:
        stages[1].pop("lora")
    run = make_run(folder / "run", RECIPE | {"model": model, "stages": stages})
    environment = json.loads((run / "environment.json").read_text())
    environment["base"] = {"id": model.get("id", "stages/base/model"), "revision": "c" * 40 if "id" in model else None}
    (run / "environment.json").write_text(json.dumps(environment))
    if "architecture" in model or model["id"] != "me/base":
        (run / "hub.json").write_text("{}")
    if what == "quantized":
        (run / "stages/law/model/config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    push = Push(repo_id="me/toy", what=what.replace("quantized", "model"), stage="chat" if what in TWO else "law")
    place = prepare_artifact(run, push, load_recipe(run / "recipe.yaml"))
    return ModelCard.load(place / "README.md")


TWO = ("adapter", "merged")


@pytest.mark.parametrize(
    ("what", "base", "stage", "says", "metadata"),
    [
        ("adapter", "hub", {}, f"A LoRA adapter for {HUB}. It was trained by stage chat (sft, LoRA) of", "adapter"),
        (
            "adapter",
            "hub",
            {"quantization": "nf4"},
            f"A LoRA adapter for {HUB}. It was trained by stage chat (sft, LoRA on nf4) of",
            "adapter",
        ),
        (
            "adapter",
            "hub",
            {"peft": {"type": "ia3"}},
            f"An ia3 adapter for {HUB}. It was trained by stage chat (sft, ia3) of",
            "adapter",
        ),
        ("merged", "hub", {}, f"Made from {HUB}, {BOTH} of", "finetune"),
        ("model", "hub", {}, f"Made from {HUB}, by stage law (pretrain, all weights) of", "finetune"),
        (
            "quantized",
            "hub",
            {},
            "of the hfpipe recipe toy. Its weights are stored quantized, see config.json.",
            "quantized",
        ),
        ("merged", "folder", {}, f"Made from the local model ./mybase, which is not on the Hub, {BOTH} of", None),
        ("model", "folder", {}, "Made from the local model ./mybase, which is not on the Hub, by stage law", None),
        ("merged", "nothing", {}, f"Trained from nothing: a llama with fresh weights, {BOTH} of", None),
        ("model", "nothing", {}, "Trained from nothing: a llama with fresh weights, by stage law (pretrain, all", None),
    ],
)
def test_the_card_of_every_kind_of_base(
    tmp_path: Path, what: str, base: str, stage: dict[str, Any], says: str, metadata: str | None
) -> None:
    (tmp_path / "mybase").mkdir()
    model = {"hub": {"id": "me/base"}, "folder": {"id": str(tmp_path / "mybase")}, "nothing": NOTHING}[base]
    card = card_of(tmp_path, what, model, stage)
    (tmp_path / "card.md").write_text(card.content)
    text = " ".join(read(tmp_path / "card.md").text.split())
    assert says in text, text[:400]
    told = card.data.to_dict()
    assert (told.get("base_model"), told.get("base_model_relation")) == ("me/base" if metadata else None, metadata)
    assert ("from nothing" in text) == (base == "nothing")
    assert ("mybase" in text) == (base == "folder")
    assert str(tmp_path) not in card.content
    assert "law (pretrain, all weights) on team/law: max_steps 10" in text
    assert ("on chat.jsonl" in text) == (what in TWO), "the data of each of its stages is named"
    inherited = {"hub": "terms of use of me/base.", "folder": "terms of use of ./mybase.", "nothing": None}[base]
    assert ("It inherits" in text, inherited is None or inherited in text) == (inherited is not None, True)
    assert "stored quantized" not in text or what == "quantized"
    if base != "hub":
        named = "that of the base and those" if base == "folder" else "those"
        assert f"No licence is stated here; {named} of the data must be looked up." in text
    loads = "PeftModel.from_pretrained(base" if what == "adapter" else 'AutoModelForCausalLM.from_pretrained("me/toy")'
    assert loads in text


def test_what_lies_beside_a_saved_model_is_our_card_before_any_push(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for stage in ("law", "chat"):
        done = {"hash": "x", "parent": "base", "steps": 1, "data": {}}
        (run / "stages" / stage / "done.json").write_text(json.dumps(done))
        (run / "stages" / stage / "model" / "README.md").write_text("# Model Card\n\n[More Information Needed]\n")
    assert main(["report", str(run)]) == 0
    for place in ("law/model", "chat/model", "chat/merged"):
        folder = run / "stages" / place
        card = ModelCard.load(folder / "README.md")
        assert "More Information Needed" not in card.text
        assert f'from_pretrained("{folder}")' in card.text.replace("(base, ", "(")
        assert ModelCard(card.content).data.model_name == f"toy-{place.split('/')[0]}"
    adapter = (run / "stages/chat/model/README.md").read_text()
    assert re.search(r"^A LoRA adapter for \[me/base\]", adapter, re.MULTILINE)
    assert "Scores" in adapter
    (run / "stages/chat/model/adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(run / "stages/law/model")})
    )
    assert main(["report", str(run)]) == 0
    adapter = (run / "stages/chat/model/README.md").read_text()
    assert f"A LoRA adapter for the model that stage `law` left in `{run}/stages/law/model`." in adapter


def test_a_dialled_stage_says_so_where_its_strength_is_folded_in(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    done = {
        "hash": "x",
        "parent": "law",
        "steps": 1,
        "data": {},
        "dialled": {"strength": 0.5, "over_budget": "general"},
    }
    (run / "stages/chat/done.json").write_text(json.dumps(done))
    (run / "stages/chat/model").rename(run / "stages/chat/dial")
    (run / "stages/chat/model").mkdir()
    assert main(["report", str(run)]) == 0
    assert "It has 0.5 of the strength" in (run / "stages/chat/dial/README.md").read_text()
    trained = (run / "stages/chat/model/README.md").read_text()
    assert "of the strength" not in trained
    assert "No score of this model was recorded." in trained, "the scores are those at half its strength"
