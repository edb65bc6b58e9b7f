"""A stage that does not fit is refused before anything is loaded, with what would make it smaller."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoConfig

from hfpipe.cli import main
from hfpipe.recipe import Pretrain, load_recipe
from hfpipe.stages.fit import Fit, fitted, with_checkpointing
from hfpipe.stages.memory import Setting, predict


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """A recipe whose one step takes far more memory than any machine has: logits of a million rows at once."""
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False)
    content["stages"] = content["stages"][:1]
    content["stages"][0]["global_batch_size"] = 2**20
    content["stages"][0]["training"]["per_device_train_batch_size"] = 2**20
    return content


def test_the_most_rows_that_fit_are_named(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content["stages"][0]["global_batch_size"] = content["stages"][0]["training"]["per_device_train_batch_size"] = 720720
    assert main(["check", str(tiny.write(tmp_path, content))]) == 4
    told = capsys.readouterr().err
    found = re.search(r"per_device_train_batch_size: (\d+) -> ([\d.]+) GiB", told)
    room = re.search(r"has ([\d.]+) GiB for it", told)
    assert found is not None
    assert room is not None
    assert 720720 % int(found[1]) == 0
    assert 0.5 * float(room[1]) < float(found[2]) <= float(room[1]), "720,720 has a divisor below every other"


@pytest.mark.parametrize("command", ["check", "run"])
def test_what_does_not_fit_is_refused_with_ranked_remedies(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([command, str(tiny.write(tmp_path, content))]) == 4
    told = capsys.readouterr().err
    assert "stage prose has a predicted peak memory of" in told
    assert re.search(r"1\. per_device_train_batch_size: \d+ -> [\d.]+ GiB \(the same result", told)
    assert not (tmp_path / "run/stages/prose").exists()


def test_fit_auto_takes_the_cheapest_and_keeps_the_global_batch(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(tiny.write(tmp_path, content | {"fit": "auto"}))]) == 0
    told = capsys.readouterr().out
    assert "6 steps of 1048576 rows" in told
    assert re.search(
        r"fit +prose: per_device_train_batch_size: \d+ \(the same result, a little slower; [\d.]+ GiB\)", told
    )


def test_check_shows_the_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False)
    content["model"]["architecture"] |= {"hidden_size": 512, "intermediate_size": 2048}
    assert main(["check", str(tiny.write(tmp_path, content))]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("✓ memory     prose"))
    assert all(
        part in line
        for part in ("prose: peak memory ", "predicted for 4 rows of 64 tokens", "weights", "optimizer", "framework")
    )


@pytest.mark.slow
def test_the_longest_row_counts_and_in_a_run_only_what_it_comes_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False, shift=False)
    content["stages"] = [{**content["stages"][1], "global_batch_size": 4}]
    content["stages"][0]["training"] = {"max_length": 120}
    rows = [{"note": f"number {n}", "animal": "cat", "sound": "mew"} for n in range(300)]
    rows[250]["sound"] = "mew " * 12  # behind those that are made into tokens anyway
    (tmp_path / "sounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def told(*changes: str) -> tuple[int, str]:
        assert main(["check", str(tiny.write(tmp_path, content)), *changes]) == 0
        found = re.search(r"predicted for 4 rows of (\d+) tokens, ([\w ,']+):", capsys.readouterr().out)
        assert found is not None
        return int(found[1]), found[2]

    def ran(name: str, **training: Any) -> dict[str, Any]:
        stage = {**content["stages"][0], "training": {"max_length": 120, **training}}
        words = {"stages": [stage], "output_dir": str(tmp_path / name)}
        assert main(["run", str(tiny.write(tmp_path, content | words))]) == 0
        return json.loads((tmp_path / name / "stages/sounds/cost.json").read_text())["attempts"][-1]

    expected, why = told()
    whole, part = ran("whole", num_train_epochs=1), ran("part", max_steps=1)
    assert why == "the longest of the data"
    assert whole["predicted_tokens"] <= expected <= 1.1 * whole["predicted_tokens"] + 1 < 120
    assert part["predicted_tokens"] < 0.6 * whole["predicted_tokens"], "the long row is in no batch of one step"
    assert part["predicted_memory"]["activations"] < 0.7 * whole["predicted_memory"]["activations"]
    cut = whole["predicted_tokens"] - 3
    assert told("--set", f"stages.sounds.training.max_length={cut}") == (cut, "at which longer rows are cut")
    content["stages"][0]["data"][0]["streaming"] = True
    content["stages"][0]["training"]["max_steps"] = 1
    assert told() == (120, "the most that a row of a stream may have")


@pytest.mark.parametrize(("room", "chosen"), [(2.0, False), (0.8, True)])
def test_a_gpu_recomputes_activations_only_where_they_do_not_fit(room: float, chosen: bool) -> None:
    config = AutoConfig.for_model("llama", hidden_size=512, num_hidden_layers=8, vocab_size=1000)
    setting = Setting("causal", "cuda", rows=64, tokens=512, autocast=torch.bfloat16)
    stage = Pretrain(kind="pretrain", name="prose", data=[{"path": "x"}])
    needed = predict(config, setting)
    fit = with_checkpointing(Fit(stage, config, setting, needed, "", round(room * needed.total), "GPU"))
    assert (fit.stage.training == {"activation_checkpointing": True}) is chosen is bool(fit.chosen)
    assert fit.fits
    if chosen:
        assert re.search(r"activation checkpointing: without it [\d.]+ of [\d.]+ GiB would be taken", fit.chosen)
        assert fit.memory.total < needed.total


def test_a_copy_of_the_parent_is_counted_and_may_be_in_4_bits() -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = AutoConfig.for_model("llama", vocab_size=1000, tie_word_embeddings=False, **sizes)
    linear = 4 * (4 * 512**2 + 3 * 512 * 2048)
    ends = 2 * 1000 * 512 + 512
    whole, rounded = 4 * (linear + ends + 4 * 2 * 512), linear // 2 + linear // 64 * 4 + 4 * (ends + 4 * 2 * 512)

    def weights(**words: Any) -> int:
        return predict(config, Setting("causal", rows=2, tokens=64, **words)).weights

    fsdp = {"ranks": 4, "sharding": "fsdp"}
    copy: dict[str, Any] = {"parent": torch.float32}
    assert weights(**copy) - weights() == pytest.approx(whole, abs=100_000)
    assert weights(**copy, rounded=True) - weights() == pytest.approx(rounded, abs=100_000)
    assert weights(**copy, **fsdp) - weights(**fsdp) == pytest.approx(whole / 4 + 4 * 1000 * 512, abs=100_000)
    scales, head = linear // 64 * 4, 4 * 1000 * 512
    spread = (rounded - scales) / 4 + scales + head
    assert weights(**copy, **fsdp, rounded=True) - weights(**fsdp) == pytest.approx(spread, abs=100_000)


def test_of_a_base_in_4_bits_that_is_spread_a_rank_has_its_part_the_scales_and_the_adapter() -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = AutoConfig.for_model("llama", vocab_size=1000, tie_word_embeddings=False, **sizes)
    linear = 4 * (4 * 512**2 + 3 * 512 * 2048)
    ends = 2 * 1000 * 512 + 512 + 4 * 2 * 512
    adapter = 4 * 8 * (4 * (512 + 512) + 3 * (512 + 2048)) * 4
    words: dict[str, Any] = {"adapter": {"type": "lora", "r": 8}, "bits": 4, "ranks": 4, "sharding": "fsdp"}
    trained = predict(config, Setting("causal", rows=32, tokens=512, **words))
    assert trained.weights == pytest.approx((linear / 2 + 4 * ends) / 4 + linear / 16 + adapter, rel=0.02)
    assert trained.optimizer == 2 * adapter
    # Of little work the most is held before it, while the part is there as it was read.
    read = predict(config, Setting("causal", rows=1, tokens=8, **words, dtype=torch.float32))
    assert read.weights == pytest.approx(4 * (linear + ends) / 4 + linear / 16, rel=0.02)
    assert read.optimizer == 0


def test_a_parent_in_4_bits_is_a_remedy(content: dict[str, Any], tmp_path: Path) -> None:
    prose = content["stages"][0]
    content["stages"] = [prose, {**prose, "name": "more", "keep": {"replay": {}, "kl": {}}}]
    recipe = load_recipe(tiny.write(tmp_path, content))
    config = AutoConfig.for_model("llama", vocab_size=1000, hidden_size=512, num_hidden_layers=4)
    setting = Setting("causal", rows=1, tokens=64, checkpointing={}, parent=torch.float32)
    needed, rounded = (predict(config, replace(setting, rounded=rounded)) for rounded in (False, True))
    fit = Fit(recipe.stages[1], config, setting, needed, "", rounded.total, "GPU")
    stage, (told,) = fitted(recipe.model_copy(update={"fit": "auto"}), fit)
    assert told.startswith("keep: kl: parent: nf4")
    assert stage.kept.kl is not None
    assert stage.kept.kl.parent == "nf4"
    assert stage.kept.replay == recipe.stages[1].kept.replay


OUT_OF_MEMORY = """
import re, resource, sys
from pathlib import Path
import hfpipe.pipeline.run, trl
from hfpipe.cli import main
now = int(re.search(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (now + 1500 * 2**20,) * 2)
sys.exit(main(["run", sys.argv[1]]))
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_training_out_of_memory_goes_on_in_smaller_pieces_or_ends_with_what_would_help(tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False, shift=False, energy=False)
    stage = content["stages"][0]
    content["stages"], stage["global_batch_size"] = [stage], 4096
    stage["training"] |= {"per_device_train_batch_size": 4096, "max_steps": 1, "max_length": 32}

    def run(fit: str) -> subprocess.CompletedProcess[str]:
        recipe = tiny.write(tmp_path, content | {"fit": fit})
        command = [sys.executable, "-c", OUT_OF_MEMORY, str(recipe)]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})

    refused = run("refuse")
    assert refused.returncode == 4
    assert (
        "stage prose ran out of memory while it trained, with 4096 rows at once. Next would be 2048" in refused.stderr
    )
    done = run("auto")
    assert done.returncode == 0, done.stderr
    assert "it goes on from its last checkpoint, 2048 rows at once, 2 times a step" in done.stdout
    assert json.loads((tmp_path / "run/stages/prose/done.json").read_text())["steps"] == 1
