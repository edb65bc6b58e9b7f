"""`kind: preference` beside TRL's DPOTrainer on the same rows: the same tokens, the same losses, the same weights."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tokenizer_families import FAMILIES, make
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from hfpipe.cli import main
from hfpipe.core.errors import RecipeError
from hfpipe.data.preference import PairTokenizer
from hfpipe.data.sources.load import load_rows
from hfpipe.model.create import create_model, train_tokenizer
from hfpipe.recipe import Source, load_recipe
from hfpipe.recipe.rules.training import preference_losses

pytestmark = pytest.mark.slow

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEMPLATE = (
    "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def pair(number: int) -> dict[str, Any]:
    animal, other = tiny.ANIMALS[number % 6], tiny.ANIMALS[(number + 1 + number // 6 % 5) % 6]
    prompt = f"{number}: what does the {animal} say" + " to you" * (number % 4) + "?"
    return {
        "id": f"p{number}",
        "prompt": prompt,
        "chosen": f" {tiny.SOUNDS[animal]}",
        "rejected": f" {tiny.SOUNDS[other]}" * (1 + number % 3),
    }


def in_turns(row: dict[str, Any]) -> dict[str, Any]:
    asked = [{"role": "user", "content": row["prompt"]}]
    said = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    return {"prompt": asked, **said}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([" ".join(map(str, pair(n).values())) for n in range(40)], 320, 128)
    tokenizer.chat_template = TEMPLATE
    create_model({"model_type": "llama", **SHAPE}, tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def by_trl(base: Path, rows: list[dict[str, Any]], folder: Path, peft: Any = None, **words: Any) -> DPOTrainer:
    arguments = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=DPOConfig(str(folder / "trl"), disable_tqdm=True, save_strategy="no", **arguments | words),
        train_dataset=Dataset.from_list([{key: row[key] for key in row if key != "id"} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=peft,
    )


def implicit(row: dict[str, Any]) -> dict[str, Any]:
    return {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}


FORMS = {
    "texts": pair,
    "implicit": lambda n: implicit(pair(n)),
    "turns": lambda n: in_turns(pair(n)),
    "implicit turns": lambda n: implicit(in_turns(pair(n))),
}


def tokens_of(tokenizer: Any, rows: list[dict[str, Any]], length: int | None) -> list[tuple[list[int], ...]]:
    found = PairTokenizer(tokenizer, length).encode(rows)
    return [
        (one.tolist(), other.tolist(), begin) for (one, other), begin in zip(found.sides, found.begins, strict=True)
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cut", [False, True])
def test_tokens_and_masks_are_those_of_dpo_trainer(base: Path, tmp_path: Path, form: str, cut: bool) -> None:
    rows = [FORMS[form](number) for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = list(load_rows(Source(path=str(tmp_path / "rows.jsonl")), kinds=("preference",)))
    tokenizer = AutoTokenizer.from_pretrained(base)
    length = max(len(one) for one, _, _ in tokens_of(tokenizer, read, None)) - 3 if cut else None
    trainer = by_trl(base, rows, tmp_path, max_length=length)
    ours = tokens_of(tokenizer, read, length)
    theirs = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        sides = [ids[mask == 1].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        theirs.append((*sides, len(row["prompt_ids"])))
    assert ours == theirs
    assert 5 < len(ours) <= 20
    assert not cut or any(len(one) == length for one, _, _ in ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_begin_where_dpo_trainer_lets_them_begin(family: str, base: Path, tmp_path: Path) -> None:
    tokenizer = make(family)
    rows = [
        {"prompt": prompt, "chosen": one, "rejected": other}
        for prompt, one, other in [
            ("The fox said", " yelp", " moo"),
            ("The fox said ", "yelp", "moo, and more"),
            ("", "The cow", "The fox"),
            ("12", "345", "3 45"),
            ("def moo(x):\n", "    return x", "  return x + 1"),
            ("Grüße! 牛", "呢", "呢呢 2024"),
            ("the e", "nd", "xit"),
        ]
    ]
    trainer = DPOTrainer(
        model=create_model({"model_type": "llama", **SHAPE}, tokenizer, 0),
        ref_model=create_model({"model_type": "llama", **SHAPE}, tokenizer, 0),
        args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    theirs = [
        (row["prompt_ids"] + row["chosen_ids"], row["prompt_ids"] + row["rejected_ids"], len(row["prompt_ids"]))
        for row in trainer.train_dataset
    ]
    assert tokens_of(tokenizer, rows, None) == theirs


def write(folder: Path, base: Path, rows: list[dict[str, Any]], output: str, **words: Any) -> Path:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {"max_length": 64, "learning_rate": 2e-3, "save_steps": 2, "logging_steps": 1, **words.pop("training")}
    stage = {"name": "dpo", "kind": "preference", "data": [{"path": str(folder / "pairs.jsonl")}], **words}
    content = {"name": "x", "output_dir": str(folder / output), "model": {"id": str(base)}, "seed": 0, "energy": False}
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(content | {"stages": [stage | {"training": training}]}))
    return path


def log_of(folder: Path, output: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / output / "stages/dpo/log.jsonl").read_text().splitlines()]


# Of every loss of DPOTrainer, what is said beside it.
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "ipo": {"beta": 0.5},
    "hinge": {"disable_dropout": False},
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 1e-3},
    "apo_zero": {"f_divergence_type": "reverse_kl", "use_weighting": True},
    "sigmoid_norm": {"ld_alpha": 0.5},
    "nca_pair": {},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {},
    "aot_unpaired": {"label_smoothing": 0.1},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.1},
    "sft": {},
    "sigmoid, sft": {"loss_weights": [1.0, 0.2]},
}
# Of these the result depends on how a batch is divided, in TRL too.
OF_A_WHOLE_BATCH = {"aot", "aot_unpaired", "sft", "sigmoid, sft"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "LoRA", "LoRA precomputed"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_those_of_dpo_trainer_over_accumulation(loss: str, method: str, base: Path, tmp_path: Path) -> None:
    """Eight pairs are one step here as there, whatever their order; every metric that TRL logs is compared too."""
    if method != "full" and loss not in ("sigmoid", "ipo"):
        pytest.skip("the reference does not depend on the loss")
    rows, own = [pair(number) for number in range(8)], LOSSES[loss]
    same = {"max_steps": 4, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_length": 64, **own}
    names = loss.split(", ")
    words: dict[str, Any] = {"loss": names if len(names) > 1 else loss, "global_batch_size": 8}
    if method != "full":
        words["lora"] = {"r": 4}
    more = {"precompute_ref_log_probs": True} if "precomputed" in method else {}
    divided = {"per_device_train_batch_size": 8 if loss in OF_A_WHOLE_BATCH else 2}
    assert main(["run", str(write(tmp_path, base, rows, "ours", training=same | divided | more, **words))]) == 0
    ours = log_of(tmp_path, "ours")
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if method != "full" else None
    trainer = by_trl(
        base,
        rows,
        tmp_path,
        peft,
        **same,
        loss_type=names,
        learning_rate=2e-3,
        logging_steps=1,
        seed=0,
        per_device_train_batch_size=8,
    )
    trainer.train()
    theirs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(ours) == len(theirs) == 4
    for one, other in zip(ours, theirs, strict=True):
        for name in ("loss", "rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected"):
            assert one[name] == pytest.approx(other[name], abs=1e-5, rel=1e-5), name
    assert ours[-1]["loss"] != pytest.approx(ours[0]["loss"], abs=1e-4)


def losses_of(folder: Path, output: str) -> dict[float, float]:
    return {row["step"]: row["loss"] for row in log_of(folder, output) if "loss" in row}


def weights(folder: Path, output: str) -> dict[str, torch.Tensor]:
    (file,) = (folder / output / "stages/dpo/model").glob("*model.safetensors")
    return load_file(file)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("method", ["full", "LoRA", "full kept", "LoRA kept"])
def test_a_stage_is_the_same_killed_divided_and_on_two_ranks(method: str, base: Path, tmp_path: Path) -> None:
    rows = [pair(number) for number in range(37)]
    words: dict[str, Any] = {"global_batch_size": 8} | ({"lora": {"r": 4}} if "LoRA" in method else {})
    if "kept" in method:
        words["keep"] = {"replay": {"share": 0.3, "rows": 24}} | (
            {"kl": {}} if "LoRA" in method else {"l2": {"weight": 0.1}}
        )

    def recipe(output: str, **training: Any) -> str:
        return str(write(tmp_path, base, rows, output, training={"num_train_epochs": 3, **training}, **words))

    assert main(["run", recipe("whole")]) == 0
    done = json.loads((tmp_path / "whole/stages/dpo/done.json").read_text())
    assert (done["steps"], done["data"]["rows"]) == (14, 112)  # 3 x 37 pairs, and one more that fills the last step
    assert main(["run", recipe("divided", per_device_train_batch_size=1)]) == 0
    stopped = tiny.start("run", recipe("stopped"))
    outputs: list[str] = []
    for step, how in ((2, signal.SIGKILL), (6, signal.SIGTERM)):
        tiny.wait_for(tmp_path / f"stopped/stages/dpo/checkpoint-{step}/manifest.json", stopped)
        stopped.send_signal(how)
        said = stopped.communicate()[0]
        assert stopped.returncode in (0, 75, -signal.SIGKILL), said
        outputs.append(said)
        stopped = tiny.start("run", str(tmp_path / "stopped.yaml"))
    said = stopped.communicate()[0]
    assert stopped.returncode == 0, said
    assert "continuing from checkpoint-" in outputs[1]
    launch = ("accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml")
    both = tiny.start("run", recipe("ranks"), launch=launch)
    said = both.communicate(timeout=300)[0]
    assert both.returncode == 0, said
    whole = weights(tmp_path, "whole")
    for other in ("divided", "stopped", "ranks"):
        found, exact = weights(tmp_path, other), other == "stopped"
        assert losses_of(tmp_path, other) == pytest.approx(losses_of(tmp_path, "whole"), abs=1e-5)
        for name, weight in whole.items():
            torch.testing.assert_close(found[name], weight, atol=0 if exact else 2e-5, rtol=0 if exact else 1e-4)


def test_every_loss_of_dpo_trainer_is_known_and_others_are_refused(base: Path, tmp_path: Path) -> None:
    assert {"sigmoid", "ipo", "apo_zero", "sft", "sigmoid_norm"} <= {*preference_losses()}
    path = write(
        tmp_path,
        base,
        [pair(0)],
        "bad",
        training={"loss_type": "ipo", "sync_ref_model": True, "label_smoothing_factor": 0.1, "ref_model_sync_steps": 3},
        loss="sigmiod",
        lora={"lora_dropout": 0.1},
    )
    with pytest.raises(RecipeError) as told:
        load_recipe(path)
    assert {*preference_losses()} == {name for loss in LOSSES for name in loss.split(", ")}
    for words in (
        "Did you mean sigmoid?",
        "loss_type: is the `loss`",
        "sync_ref_model: cannot be True: the reference",
        "label_smoothing_factor: has no effect",
        "ref_model_sync_steps: has no effect",
        "lora_dropout: has no effect: DPOTrainer turns every dropout off",
    ):
        assert words in str(told.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"loss": "simpo"}, "TRL has simpo in a trainer of its own, which it calls experimental; hfpipe does not."),
        ({"training": {"padding_free": True}}, "padding_free: cannot be True"),
        (
            {"lora": {"init_lora_weights": "pissa"}, "keep": {"replay": {}, "kl": {}}},
            "keep.kl: compares with the model without its adapter, and `init_lora_weights: pissa` moves a part of",
        ),
        ({"lora": {}, "keep": {"l2": {"weight": 1.0}}}, "keep.l2: has no effect on an adapter"),
        ({"data": [{"path": "x", "columns": {"text": "chosen"}}]}, "data.0.columns"),
    ],
)
def test_words_that_do_not_go_with_preferences_are_refused(
    words: dict[str, Any], told: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, base, [pair(0)], "bad", **{"training": {}, **words}))
    assert told in str(error.value)


@pytest.mark.slow
def test_what_dpo_trainer_refuses_is_refused_before_anything_is_scored(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (loss, training, words) in enumerate(
        [
            ("exo_pair", {}, "DPOTrainer refuses it: Label smoothing must be greater than 0.0"),
            ("aot", {"use_weighting": True}, "DPOTrainer refuses it: WPO-style weighting"),
            ("sppo_hard", {"f_divergence_type": "js_divergence"}, "is only supported for the following loss types"),
        ]
    ):
        path = str(write(tmp_path, base, [pair(0), pair(1)], f"refused{number}", training=training, loss=loss))
        for command in ("check", "run"):
            assert main([command, path]) == 2
            told = capsys.readouterr().err
            assert words in told
            assert "Traceback" not in told
        assert not (tmp_path / f"refused{number}/stages/base/scores.json").exists()


MODES: dict[str, tuple[dict[str, Any], bool]] = {
    "full": ({}, True),
    "LoRA": ({"lora": {"r": 4}}, False),
    "MiCA": ({"lora": {"r": 4, "init_lora_weights": "mica"}}, False),
    "PiSSA": ({"lora": {"r": 4, "init_lora_weights": "pissa"}}, True),
    "QLoRA": ({"lora": {"r": 4}, "quantization": "nf4"}, False),
    "IA3": ({"peft": {"type": "ia3"}}, False),
    "an adapter that is continued": ({"parent_adapter": "continue"}, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_reference_is_the_parent(mode: str, base: Path, tmp_path: Path) -> None:
    """At the first step the model is its reference, so the loss is log 2 and no reward is there; later there is."""
    words, kept = MODES[mode]
    path = write(tmp_path, base, [pair(number) for number in range(8)], "run", training={"max_steps": 3}, **words)
    if "parent_adapter" in words:
        content = yaml.safe_load(path.read_text())
        data = [
            {
                "path": str(tmp_path / "pairs.jsonl"),
                "columns": {"prompt": "prompt", "completion": "chosen"},
                "format": "prompt_completion",
            }
        ]
        training = {"max_steps": 4, "learning_rate": 5e-2}
        content["stages"].insert(
            0, {"name": "sft", "kind": "sft", "data": data, "lora": {"r": 4}, "training": training}
        )
        path.write_text(yaml.safe_dump(content))
    assert main(["run", str(path)]) == 0
    first, *_, last = log_of(tmp_path, "run")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert (first["rewards/chosen"], first["rewards/rejected"]) == pytest.approx((0, 0), abs=1e-4)
    assert last["loss"] < first["loss"] - 1e-6
    assert (tmp_path / "run/stages/dpo/reference.json").exists() == kept
    config = tmp_path / "run/stages/dpo/model/adapter_config.json"
    assert config.exists() == (mode != "full")
    assert not (tmp_path / "run/stages/dpo/model/ref").exists()
