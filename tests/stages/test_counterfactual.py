"""`counterfactual:` holds the predictions on a row and on its swapped form together, in every kind that has it."""

from __future__ import annotations

import json
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from tokenizer_families import make
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, Trainer, TrainingArguments

from hfpipe.cli import main
from hfpipe.core.errors import RecipeError
from hfpipe.data.counterfactual import SWAPPED, Swapper, with_swapped, with_swapped_sentences
from hfpipe.data.dataloader import collate
from hfpipe.data.labels import collate_labelled
from hfpipe.model import head
from hfpipe.recipe import load_recipe
from hfpipe.stages.counterfactual import OfClasses, OfTokens

SWAP = [["cow", "fox"]]
TEXTS = ["The cow said moo.", "the fox said yelp, and the cow said moo", "def moo(x): return"]
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def trainer_of(model: Any) -> Trainer:
    arguments = TrainingArguments(output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=True)
    return Trainer(model=model, args=arguments)


def kl(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    return (one.exp() * (one - two)).sum(-1)


@pytest.mark.parametrize("logits", [2**24, 2000])
def test_the_divergence_of_tokens_is_that_of_whole_logits(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LOGITS", logits)
    torch.manual_seed(0)
    tokenizer = make("tiktoken's")
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **SIZE)).train()
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(TEXTS, add_special_tokens=False)["input_ids"]]
    batch = with_swapped(collate, Swapper(tokenizer, SWAP))(rows, 0, 1)
    loss = OfTokens(trainer_of(model), 0.7)(model, batch, num_items_in_batch=torch.tensor(40))
    plain = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    other = model(batch[SWAPPED]["input_ids"], attention_mask=batch[SWAPPED]["attention_mask"]).logits.log_softmax(-1)
    total = sum(
        (kl(plain[a, b], other[c, d]) + kl(other[c, d], plain[a, b])) / 2
        for a, b, c, d in batch[SWAPPED]["places"].tolist()
    )
    labels = batch["labels"][:, 1:]
    tokens = functional.nll_loss(plain[:, :-1][labels != -100], labels[labels != -100], reduction="sum")
    expected = tokens / 40 + 0.7 * total / 40
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    found, wanted = (torch.autograd.grad(one, list(model.parameters())) for one in (loss, expected))
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_the_divergence_of_classes_is_that_of_each_answer(problem: str) -> None:
    torch.manual_seed(0)
    tokenizer = make("tiktoken's")
    count = 1 if problem == "regression" else 3
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=count, problem_type=problem, pad_token_id=0, **SIZE)
    model = LlamaForSequenceClassification(config).train()
    labels: Any = {"regression": [0.5], "single_label_classification": [1]}.get(problem, [1.0, 0.0, 1.0])
    rows = [{"input_ids": ids, "labels": labels} for ids in tokenizer(TEXTS)["input_ids"]]
    batch = with_swapped_sentences(collate_labelled, Swapper(tokenizer, SWAP))(rows, 0, 1)
    forms = {key: batch[SWAPPED][key] for key in ("input_ids", "attention_mask")}
    plain = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    trainer = trainer_of(model)
    loss = OfClasses(trainer, 2.0, problem)(model, batch, num_items_in_batch=torch.tensor(5))
    without = trainer.compute_loss(model, dict(plain), num_items_in_batch=torch.tensor(5))
    one, two = model(plain["input_ids"], attention_mask=plain["attention_mask"]).logits[:2], model(**forms).logits
    if problem == "regression":
        total = ((one - two) ** 2).sum() / 2
    elif problem == "single_label_classification":
        sides = one.log_softmax(-1), two.log_softmax(-1)
        total = (kl(*sides) + kl(*sides[::-1])).sum() / 2
    else:
        p, q = one.sigmoid(), two.sigmoid()
        total = ((p - q) * (one - two)).sum() / 2  # of Bernoulli distributions with these logits
    torch.testing.assert_close(loss - without, 2.0 * total / 5, atol=1e-5, rtol=1e-4)


SWAPS = [["cat", "dog"], ["cow", "hen"], ["fox", "owl"]]
STAGES = ("prose", "sounds", "named")


def recipe(folder: Path, weight: float | None = 1.0) -> dict[str, Any]:
    """Pretraining, an adapter and a classifier, each of which is held together."""
    if not (folder / "prose.jsonl").exists():
        tiny.write_data(folder)
    content = tiny.recipe(folder, merge=False, evaluate={})
    prose, sounds = content["stages"]
    named: dict[str, Any] = {"name": "named", "kind": "classification", "parent": "prose", "global_batch_size": 8}
    named |= {
        "data": [{"path": str(folder / "sounds.jsonl"), "template": {"sentence": "the {animal}", "label": "{sound}"}}]
    }
    named["training"] = {"max_steps": 8, "learning_rate": "2e-3", "save_steps": 3}
    prose["global_batch_size"] = 8
    content["stages"] = [prose, sounds, named]
    for stage in content["stages"] if weight else ():
        stage["counterfactual"] = {"weight": weight, "swap": SWAPS}
    return content


def weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "run/stages" / stage / "model").glob("*.safetensors")))


def rms(difference: torch.Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("counterfactual")
    assert main(["run", str(tiny.write(folder, recipe(folder)))]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.long
def test_killed_in_every_stage_it_is_the_same(finished: Path, tmp_path: Path) -> None:
    path = tiny.write(tmp_path, recipe(tmp_path))
    for place in ("prose/checkpoint-2", "sounds/checkpoint-3", "named/checkpoint-3"):
        process = tiny.start("run", str(path))
        tiny.wait_for(tmp_path / "run/stages" / place / "manifest.json", process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert main(["run", str(path)]) == 0
    for stage in STAGES:
        one, other = weights(finished, stage), weights(tmp_path, stage)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks_and_another_division_of_the_batch_are_one_rank(finished: Path, tmp_path: Path) -> None:
    content = recipe(tmp_path)
    for stage in content["stages"]:
        stage["training"]["per_device_train_batch_size"] = 2
    config = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu.yaml"
    launch = ("accelerate.commands.launch", "--config_file", str(config))
    process = tiny.start("run", str(tiny.write(tmp_path, content)), launch=launch)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    for stage in STAGES:
        one, other = weights(finished, stage), weights(tmp_path, stage)
        assert all(rms(one[name] - other[name]) < 2e-4 for name in one), stage


@pytest.mark.slow
@pytest.mark.long
def test_the_report_names_it_and_the_answers_come_together(finished: Path, tmp_path: Path) -> None:
    assert "KL between both forms of swapped rows by 1" in (finished / "run/report.md").read_text()
    flips = {}
    for name, weight in (("free", None), ("held", 30.0)):
        folder = tmp_path / name
        folder.mkdir()
        content = recipe(folder, weight)
        content["stages"] = [content["stages"][0], content["stages"][2]]
        content["stages"][1]["training"] |= {"max_steps": 40, "learning_rate": "5e-3"}
        assert main(["run", str(tiny.write(folder, content))]) == 0
        log = (folder / "run/stages/named/log.jsonl").read_text().splitlines()
        flips[name] = json.loads(log[-1])["loss"]
    assert flips["held"] > flips["free"]  # animals that say different things cannot be told apart any more


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    content = recipe(tmp_path)
    content["stages"] = content["stages"][:1]
    content["stages"][0] |= {"objective": "masked", "counterfactual": {"weight": 1.0, "swap": [["cow"]]}}
    content["model"]["architecture"] = tiny.ENCODER
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError) as told:
        load_recipe(path)
    assert "this stage trains on masked ones" in str(told.value)
    assert "each list needs two words or more" in str(told.value)
