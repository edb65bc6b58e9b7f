"""A stage keeps its parent by texts of the parent's own, by the divergence there, and by distance of weights."""

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hfpipe.cli import main
from hfpipe.model import head
from hfpipe.stages import own_texts
from hfpipe.stages.nearness import OWN, NearParent

STAGES = ("prose", "more", "sounds")


# Plain steps downhill: AdamW makes steps of full size of gradients that are nothing but rounding, as those of a
# divergence from the parent are where the model still is the parent.
DOWNHILL = {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def recipe(folder: Path, data: Path | None = None, **changes: Any) -> Path:
    """Prose, more of it in full by all three words, and a LoRA of sounds; some texts of their own for both."""
    if data is None:
        tiny.write_data(folder)
    content = tiny.recipe(data or folder, merge=False, output_dir=str(folder / "run"))
    prose, sounds = content["stages"]
    more = {**prose, "name": "more", "global_batch_size": 8, "training": {**prose["training"], **DOWNHILL}}
    more["keep"] = {"replay": {"share": "25%", "rows": 150}, "kl": {"weight": 2.0}, "l2": {"weight": 0.1}}
    sounds["keep"] = {"replay": {"from": "self", "share": 0.3, "temperature": 0.9, "rows": "auto"}, "kl": {}}
    sounds["training"] |= DOWNHILL
    content["stages"] = [prose, more, sounds]
    for stage in content["stages"]:
        stage |= changes.get(stage["name"], {})
    return tiny.write(folder, content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keep")
    assert main(["run", str(recipe(folder))]) == 0
    return folder


def weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "run/stages" / stage / "model").glob("*.safetensors")))


def texts(folder: Path, stage: str) -> list[dict[str, Any]]:
    lines = (folder / "run/stages" / stage / "keep/texts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def rms(difference: torch.Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


def assert_same(one: Path, other: Path, tolerance: float) -> None:
    for stage in STAGES:
        first, second = weights(one, stage), weights(other, stage)
        assert first.keys() == second.keys()
        for name in first:
            assert rms(first[name] - second[name]) <= tolerance, f"{stage}: {name}"
    assert all(texts(one, stage) == texts(other, stage) for stage in STAGES[1:])


@pytest.mark.slow
@pytest.mark.long
def test_own_texts_take_their_share_and_are_told(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage, share in (("more", 0.25), ("sounds", 0.3)):
        done = json.loads((finished / "run/stages" / stage / "done.json").read_text())
        *_, own = done["data"]["sources"].values()
        assert own["replayed"]
        if stage == "more":
            assert own["token_share"] == pytest.approx(share, abs=0.05)
        made = texts(finished, stage)
        assert all(row["text"].strip() and 0 < row["tokens"] <= 128 for row in made)
    assert len(texts(finished, "more")) == 150
    page = (finished / "run/report.md").read_text()
    assert "The parent's own texts" in page
    assert "| more | texts | 150 |" in page
    assert texts(finished, "more")[0]["text"].split()[0] in page
    assert main(["check", str(finished / "tiny.yaml")]) == 0
    told = capsys.readouterr().out
    assert "more: 25.0% of the trained tokens from texts that prose makes of itself first: 150 of them" in told
    assert "more: kl and l2: 2 frozen copies of the parent" in told
    assert "sounds: kl: the parent is the model with its adapter off" in told


@pytest.mark.slow
@pytest.mark.long
def test_the_rest_of_a_long_making_of_texts_is_told_from_its_first_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(own_texts, "LONG", 0.001)
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False, energy=False, shift=False)
    prose = {**content["stages"][0], "training": {"max_steps": 1, "max_length": 64}}
    content["stages"] = [prose, {**prose, "name": "more", "keep": {"replay": {"rows": 150}}}]
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    told = re.findall(r"keep: (\d+) texts so far, about (\d+):(\d\d) for the rest", capsys.readouterr().out)
    assert len(told) == 1
    assert 0 < int(told[0][0]) <= own_texts.BATCH_TEXTS
    assert int(told[0][1]) < 5


@pytest.mark.slow
@pytest.mark.long
def test_own_texts_of_fine_tuning_are_a_share_of_what_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are long here and completions short."""
    monkeypatch.setattr(own_texts, "BATCH_TEXTS", 1)
    path = recipe(tmp_path, sounds={"keep": {"replay": {"share": "30%"}}, "replay": {"stage": "prose", "share": "10%"}})
    content = path.read_text()
    assert main(["run", str(path)]) == 0, content
    done = json.loads((tmp_path / "run/stages/sounds/done.json").read_text())
    own, earlier, made = done["data"]["sources"].values()
    assert earlier["rows"] / 97 == pytest.approx(0.1 / 0.6, abs=0.02)
    assert made["token_share"] < 0.3
    assert done["data"]["rows"] == pytest.approx(97 + earlier["rows"], abs=30)
    assert own["token_share"] > made["token_share"]
    whole = json.loads((tmp_path / "run/stages/sounds/keep/texts.json").read_text())["tokens"]
    assert main(["run", str(path), "--set", "stages.sounds.training.max_steps=1"]) == 0
    part = json.loads((tmp_path / "run/stages/sounds/keep/texts.json").read_text())["tokens"]
    assert 0 < part < whole / 2, "a step reads few of them"


@pytest.mark.slow
@pytest.mark.long
def test_killed_while_texts_are_made_and_while_it_trains_it_is_the_same(finished: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path)
    for place in ("more/keep/texts.json", "more/checkpoint-2/manifest.json", "sounds/checkpoint-3/manifest.json"):
        process = tiny.start("run", str(path))
        tiny.wait_for(tmp_path / "run/stages" / place, process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert main(["run", str(path)]) == 0
    assert_same(finished, tmp_path, 0.0)


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks_and_another_division_of_the_batch_are_one_rank(finished: Path, tmp_path: Path) -> None:
    for name in ("base", "prose"):  # the parent is the same to the last bit
        shutil.copytree(finished / "run/stages" / name, tmp_path / "run/stages" / name)
    path = recipe(tmp_path, data=finished)
    content = yaml.safe_load(path.read_text())
    for stage in content["stages"][1:]:
        stage["training"]["per_device_train_batch_size"] = 1
    config = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu.yaml"
    launch = ("accelerate.commands.launch", "--config_file", str(config))
    process = tiny.start("run", str(tiny.write(tmp_path, content)), launch=launch)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "prose: done before" in output
    assert_same(finished, tmp_path, 1e-6)
    start, end = weights(finished, "prose"), weights(finished, "more")
    assert all(rms(end[name] - start[name]) > 1e-4 for name in start), "each weight moved by far more than that"


@pytest.mark.slow
@pytest.mark.long
def test_a_stage_that_is_drawn_to_the_weights_of_its_parent_stays_nearer(tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False)
    prose = content["stages"][0]
    keeps = {"free": None, "drawn": {"l2": {"weight": 100.0}}}
    content["stages"] = [prose, *({**prose, "name": name, "parent": "prose", "keep": keeps[name]} for name in keeps)]
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    start = weights(tmp_path, "prose")
    moved = {
        name: sum(float((new - start[key]).square().sum()) for key, new in weights(tmp_path, name).items())
        for name in keeps
    }
    assert 0 < moved["drawn"] < moved["free"] / 2


@pytest.mark.slow
@pytest.mark.long
def test_a_parent_in_4_bits_moves_the_weights_as_the_whole_one_does_and_a_killed_run_continues(tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False, energy=False, shift=False)
    prose, sounds = content["stages"]
    prose["training"] |= {"max_steps": 60}
    training = {**prose["training"], **DOWNHILL, "learning_rate": 0.005, "max_steps": 6}
    data = [{**sounds["data"][0], "template": {"text": "{note}: {animal} {sound}"}}]
    replay = {"share": "50%", "rows": 100}
    rounded = {"replay": replay, "kl": {"weight": 10.0, "parent": "nf4"}}
    keeps: dict[str, Any] = {
        "whole": {"replay": replay, "kl": {"weight": 10.0}},
        "tokens": {"replay": replay},
        "rounded": rounded,
        "killed": rounded,
    }
    for name, keep in keeps.items():
        held = {**prose, "name": "held", "data": data, "global_batch_size": 8, "training": training, "keep": keep}
        words = {"output_dir": str(tmp_path / name / "run"), "stages": [prose, held]}
        path = tiny.write(tmp_path, content | words, f"{name}.yaml")
        for stage in ("base", "prose") if name != "whole" else ():
            shutil.copytree(tmp_path / "whole/run/stages" / stage, tmp_path / name / "run/stages" / stage)
        if name == "killed":
            tiny.run_interrupted(path, tmp_path / name / "run/stages/held/checkpoint-2/manifest.json")
        else:
            assert main(["run", str(path)]) == 0
    start = weights(tmp_path / "whole", "prose")

    def moved(name: str) -> torch.Tensor:
        new = weights(tmp_path / name, "held")
        return torch.cat([(new[key] - start[key]).double().flatten() for key in start])

    likeness = {name: float(torch.cosine_similarity(moved(name), moved("whole"), dim=0)) for name in keeps}
    print(likeness)
    assert likeness["rounded"] >= 0.97 > likeness["tokens"]
    assert not torch.equal(moved("rounded"), moved("whole"))
    assert torch.equal(moved("rounded"), moved("killed"))


class Loss:
    """The loss of one micro-batch by NearParent, and by a formula over whole logits."""

    def __init__(self, adapter: Any) -> None:
        torch.manual_seed(0)
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=97, **size))
        self.parent = LlamaForCausalLM(model.config)
        self.parent.load_state_dict(model.state_dict())
        if adapter:
            model = get_peft_model(model, LoraConfig(r=4, target_modules=adapter, init_lora_weights=False))
        else:
            for weight in model.parameters():
                weight.data += 0.05 * torch.randn_like(weight)
        self.model = model.train()
        arguments = TrainingArguments(output_dir="unused", report_to="none", use_cpu=True)
        trainer = Trainer(model=model, args=arguments)
        self.near = NearParent(trainer, None if adapter else self.parent, weight=0.7, share=0.4)
        self.ids = torch.randint(0, 97, (4, 12))
        self.labels = self.ids.masked_fill(torch.rand(4, 12) < 0.3, -100)
        self.own = torch.zeros(4, 12, dtype=torch.bool)
        self.own[1] = self.own[3, 6:] = True

    def given(self, rows: slice = slice(None)) -> torch.Tensor:
        inputs = {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids), "labels": self.labels}
        batch = {name: values[rows] for name, values in {**inputs, OWN: self.own}.items()}
        return self.near(self.model, batch, num_items_in_batch=torch.tensor(50))

    def plain(self) -> torch.Tensor:
        with torch.no_grad():
            parent = self.parent(self.ids).logits[:, :-1].log_softmax(-1)
        model = self.model(self.ids).logits[:, :-1].log_softmax(-1)
        learned, own = self.labels[:, 1:] != -100, self.own[:, 1:]
        tokens = functional.nll_loss(model[learned & ~own], self.labels[:, 1:][learned & ~own], reduction="sum")
        divergence = (parent.exp() * (parent - model)).sum(-1)[learned & own].sum()
        return tokens / 50 / 0.6 + 0.7 * divergence / 50 / 0.4

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        self.model.zero_grad()
        loss.backward()
        return [weight.grad.clone() for weight in self.model.parameters() if weight.grad is not None]


@pytest.mark.parametrize("adapter", [None, "all-linear", ["q_proj", "lm_head"]])
@pytest.mark.parametrize("logits", [2**24, 97 * 3])
def test_the_divergence_in_chunks_is_that_of_whole_logits(
    adapter: Any, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "LOGITS", logits)
    loss = Loss(adapter)
    torch.testing.assert_close(loss.given(), loss.plain(), atol=1e-5, rtol=1e-5)
    found, expected = loss.gradients(loss.given()), loss.gradients(loss.plain())
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("adapter", [None, "all-linear"])
def test_a_loss_of_micro_batches_is_that_of_the_whole(adapter: Any) -> None:
    """Rows alone: some have no token of the parent's own, and one nothing else."""
    loss = Loss(adapter)
    whole = loss.given()
    expected = loss.gradients(whole)
    parts = [loss.given(slice(row, row + 1)) for row in range(4)]
    torch.testing.assert_close(sum(parts), whole, atol=1e-6, rtol=1e-6)
    for one, other in zip(loss.gradients(sum(parts)), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    ("stage", "keep", "text"),
    [
        ({}, {}, "says nothing"),
        ({}, {"kl": {}}, "the stage has none"),
        ({}, {"replay": {"form": "self"}}, "Did you mean from?"),
        ({}, {"replay": {"share": 0.6}, "kl": {"weigth": 1}}, "Did you mean weight?"),
        ({"replay": {"stage": "prose", "share": "50%"}}, {"replay": {"share": "50%"}}, "nothing is left"),
        ({"parent": "base"}, "self", "nothing to keep"),
        ({"lora": {"r": 4}}, {"l2": {"weight": 1}}, "no effect on an adapter"),
        ({"lora": {"r": 4}}, {"replay": {}, "kl": {"parent": "nf4"}}, "beside an adapter the parent is the model"),
        ({}, {"replay": {}, "kl": {"parent": "int8"}}, "nf4"),
        ({"objective": "masked"}, "self", "masked tokens"),
        ({"kind": "classification"}, "self", "is a key of a pretrain stage, not of a classification stage"),
    ],
)
def test_what_cannot_be_kept_is_a_fault(
    tmp_path: Path, stage: dict[str, Any], keep: Any, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = tiny.recipe(tmp_path, evaluate={}, merge=False)
    prose = content["stages"][0]
    content["stages"] = [prose, {**prose, "name": "more", **stage, "keep": keep}]
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    assert text in capsys.readouterr().err
