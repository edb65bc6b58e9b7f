"""The cost of training: summed over attempts, measured without a network, in every view of the run."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from hfpipe.cli import main
from hfpipe.stages.cost import flops_per_token, peak_flops, total_of

# Runs in the process under test before anything else: no one connects anywhere, and who tries is written down.
NO_NETWORK = """
import os, socket
def refuse(self, address):
    if self.family != socket.AF_UNIX:
        with open(os.environ["TRIED"], "a") as file:
            file.write(f"{address}\\n")
        raise OSError("no network in this test")
    return connect(self, address)
connect, socket.socket.connect = socket.socket.connect, refuse
"""
TOKENS_PER_STEP = 4 * 64


def small(folder: Path, **changes: object) -> dict:
    """One pretrain stage of six steps and one suite."""
    content = tiny.recipe(folder, merge=False, **changes)
    content["stages"] = content["stages"][:1]
    content["evaluate"] = {"general": content["evaluate"]["general"]}
    return content


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed at its first checkpoint and run again, with settings of a user that ask for a network."""
    pytest.importorskip("codecarbon")
    folder = tmp_path_factory.mktemp("energy")
    tiny.write_data(folder)
    (folder / "sitecustomize.py").write_text(NO_NETWORK)
    (folder / "cwd").mkdir()
    path = tiny.write(folder, small(folder, energy={"country_iso_code": "DEU"}))
    environment = {
        "PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parents[2])]),
        "TRIED": str(folder / "tried"),
        "CODECARBON_ELECTRICITYMAPS_API_TOKEN": "secret",
        "CODECARBON_EMISSIONS_ENDPOINT": "http://192.0.2.1/",
        "CODECARBON_OUTPUT_METHODS": "csv,api",
    }
    before = Path.cwd()
    os.chdir(folder / "cwd")
    try:
        first, manifest = tiny.start("run", str(path), **environment), folder / "run/stages/prose/checkpoint-2"
        deadline = time.monotonic() + 120
        while not (manifest / "manifest.json").exists():
            assert first.poll() is None, first.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.001)
        first.send_signal(signal.SIGKILL)
        first.communicate(timeout=60)
        second = tiny.start("run", str(path), **environment)
        output = second.communicate(timeout=180)[0]
    finally:
        os.chdir(before)
    assert second.returncode == 0, output
    (folder / "output").write_text(output)
    return folder


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_attempt_counts_and_the_sum_is_what_was_spent(killed: Path) -> None:
    cost = json.loads((killed / "run/stages/prose/cost.json").read_text())
    first, second = cost["attempts"]
    total = cost["total"]
    assert total["attempts"] == 2
    assert first["steps"] >= 1
    assert second["steps"] == 4, "continued from step 2 of 6"
    assert total["steps"] == first["steps"] + 4
    assert total["tokens"] == total["steps"] * TOKENS_PER_STEP
    per_step = second["flops"] / second["steps"]
    assert total["flops"] == pytest.approx(total["steps"] * per_step)
    # 115,008 parameters, 320 x 64 of them embeddings; a head as large counts.
    assert per_step == 6 * (115_008 - 320 * 64) * TOKENS_PER_STEP
    assert total["seconds"] == pytest.approx(first["seconds"] + second["seconds"])
    assert total["device_hours"] == pytest.approx(total["seconds"] / 3600)
    assert total["tokens_per_second"] == pytest.approx(
        total["tokens"] / (first["training_seconds"] + second["training_seconds"])
    )


@pytest.mark.slow
@pytest.mark.long
def test_every_attempt_records_its_peak_memory_and_the_last_its_prediction(killed: Path) -> None:
    cost = json.loads((killed / "run/stages/prose/cost.json").read_text())
    last = cost["attempts"][-1]
    assert all(attempt["peak_memory"] >= attempt["memory_before"] > 0 for attempt in cost["attempts"])
    assert cost["total"]["peak_memory"] == max(attempt["peak_memory"] for attempt in cost["attempts"])
    assert cost["total"]["predicted_memory"] == last["predicted_memory"]["total"] > last["predicted_memory"]["weights"]


@pytest.mark.slow
@pytest.mark.long
def test_what_an_earlier_stage_has_freed_is_not_counted_as_held(tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False, shift=False, energy=False)
    content["model"]["architecture"] |= {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 6}
    first = content["stages"][0] | {"global_batch_size": 8}
    first["training"] = {"max_steps": 2, "max_length": 128, "per_device_train_batch_size": 8}
    content["stages"] = [first, first | {"name": "again", "parent": "base"}]
    process = tiny.start("run", str(tiny.write(tmp_path, content)))
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    prose, again = (
        json.loads((tmp_path / "run/stages" / name / "cost.json").read_text())["attempts"][-1]
        for name in ("prose", "again")
    )
    taken = prose["peak_memory"] - prose["memory_before"]
    assert taken > 150 * 2**20
    assert again["memory_before"] - prose["memory_before"] < 0.3 * taken
    assert again["predicted_memory"]["total"] == pytest.approx(prose["predicted_memory"]["total"], rel=0.15)


@pytest.mark.slow
def test_peak_memory_is_one_number_on_the_terminal_the_pages_and_in_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_data(tmp_path)
    path = str(tiny.write(tmp_path, small(tmp_path)))
    assert main(["check", path]) == 0
    checked = re.search(r"prose: peak memory ([\d.]+) of [\d.]+ GiB, predicted", capsys.readouterr().out)
    assert main(["run", path]) == 0
    told = re.search(r"peak memory ([\d.]+) GiB \(([\d.]+) predicted\)", capsys.readouterr().out)
    total = json.loads((tmp_path / "run/stages/prose/cost.json").read_text())["total"]
    measured, predicted = (f"{total[key] / 2**30:.2f}" for key in ("peak_memory", "predicted_memory"))
    assert checked is not None
    assert told is not None
    assert told.groups() == (measured, predicted)
    assert float(checked[1]) == pytest.approx(float(predicted), rel=0.15), "the process holds more once it has scored"
    assert float(predicted) == pytest.approx(float(measured), rel=0.15)
    for page in ("report.md", "report.html"):
        text = (tmp_path / "run" / page).read_text()
        assert all(f"{number} GiB" in text for number in (measured, predicted))
        assert "Peak memory is that of one rank" in text
    again = tiny.write(tmp_path, small(tmp_path, name="again", output_dir=str(tmp_path / "again")), "again.yaml")
    assert main(["run", str(again)]) == 0
    capsys.readouterr()
    assert main(["diff", str(tmp_path / "run"), str(tmp_path / "again")]) == 0
    told = re.search(r"peak memory +([\d.]+) GiB", capsys.readouterr().out)
    assert told is None or told[1] == measured, "it says what differs"


@pytest.mark.slow
@pytest.mark.long
def test_energy_is_measured_without_a_network_a_word_or_a_file(killed: Path) -> None:
    total = json.loads((killed / "run/stages/prose/cost.json").read_text())["total"]
    assert 0 < total["kwh"] < 0.01
    assert 0.1 < total["kg_co2"] / total["kwh"] < 0.7, "kg of CO2 a kWh of German electricity"
    assert not (killed / "tried").exists(), (killed / "tried").read_text()
    assert list((killed / "cwd").iterdir()) == []
    assert "codecarbon" not in (killed / "output").read_text().lower()


@pytest.mark.slow
@pytest.mark.long
def test_the_pages_hold_the_cost(killed: Path) -> None:
    from hfpipe.hub import prepare_artifact
    from hfpipe.recipe import Push, load_recipe

    run = killed / "run"
    total = json.loads((run / "stages/prose/cost.json").read_text())["total"]
    push, recipe = Push(repo_id="me/tiny", what="model"), load_recipe(run / "recipe.yaml")
    card = (prepare_artifact(run, push, recipe) / "README.md").read_text()
    for page in ((run / "report.md").read_text(), (run / "report.html").read_text(), card):
        assert f"{total['tokens']:,}" in page
        assert f"{total['flops']:,.0f}" in page
        assert f"{total['kwh']:.3g}" in page
        assert all(f"{total[key] / 2**30:.2f} GiB" in page for key in ("peak_memory", "predicted_memory"))
        assert "Peak memory is that of one rank" in page
        assert "electricity mix of DEU" in page
        assert ("a lower bound" in page) == (total["measured"] == 1), "the kill may come before the first reading"
    told = "peak memory {:.2f} GiB ({:.2f} predicted)".format(
        *(total[key] / 2**30 for key in ("peak_memory", "predicted_memory"))
    )
    assert told in (killed / "output").read_text(), "the terminal tells of all attempts what the pages tell"
    assert ("co2_eq_emissions" in card) == (total["measured"] == 2), "the Hub is told the whole, or nothing"

    path = run / "stages/prose/cost.json"
    whole = path.read_text()
    second = json.loads(whole)["attempts"][1]
    grams = float(f"{second['kg_co2'] * 1000:.3g}")
    path.write_text(json.dumps({"attempts": [second], "total": total_of([second])}))
    card = (prepare_artifact(run, push, recipe) / "README.md").read_text()
    path.write_text(whole)
    assert f"emissions: {grams}" in card
    assert "hardware_used: CPU" in card


@pytest.mark.parametrize(
    ("device", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("CPU", None),
    ],
)
def test_the_peak_of_a_device_is_that_of_its_form(device: str, teraflops: float | None) -> None:
    assert peak_flops(device) == (teraflops and teraflops * 1e12)


def test_the_share_of_the_peak_is_that_of_all_attempts_on_known_devices() -> None:
    known = {"device": "X", "devices": 1, "energy_by": "", "country": None, "tokens": 100, "waited_seconds": 1.0}
    attempts = [
        known | {"flops": 4e12, "training_seconds": 8.0, "peak_flops": 1e12},
        known | {"flops": 2e12, "training_seconds": 1.0, "peak_flops": 4e12},
    ]
    total = total_of(attempts)
    assert total["mfu"] == pytest.approx(6 / 12)
    assert total["data_wait"] == pytest.approx(2 / 9)
    assert total_of([*attempts, known | {"flops": 1e12, "training_seconds": 1.0, "peak_flops": None}])["mfu"] is None


@pytest.mark.slow
def test_on_a_known_device_the_share_of_its_peak_is_told_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hfpipe.stages.cost.PEAKS", {"CPU": 1e-3})  # a gigaflop a second
    tiny.write_data(tmp_path)
    content = small(tmp_path)
    content["stages"][0]["training"]["logging_steps"] = 2
    assert main(["run", str(tiny.write(tmp_path, content))]) == 0
    said = capsys.readouterr().out
    place = tmp_path / "run/stages/prose"
    total = json.loads((place / "cost.json").read_text())["total"]
    assert total["mfu"] == pytest.approx(total["flops"] / total["training_seconds"] / 1e9)
    rows = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
    per_token = total["flops"] / total["tokens"]
    assert all(row["mfu"] == pytest.approx(row["tokens_per_second"] * per_token / 1e9, rel=1e-3) for row in rows)
    assert f"MFU {rows[0]['mfu']:.0%}" in said
    assert f"MFU {total['mfu']:.0%}" in said
    assert f"{100 * total['mfu']:.1f} %" in (tmp_path / "run/report.md").read_text()


@pytest.mark.slow
def test_without_codecarbon_the_report_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)  # as Python marks a module that is not there
    tiny.write_data(tmp_path)
    assert main(["run", str(tiny.write(tmp_path, small(tmp_path)))]) == 0
    report = (tmp_path / "run/report.md").read_text()
    assert "Energy was not measured: codecarbon is not installed (`pip install 'hfpipe[energy]'`)" in report
    total = json.loads((tmp_path / "run/stages/prose/cost.json").read_text())["total"]
    assert total["kwh"] is None
    assert total["tokens"] == 6 * TOKENS_PER_STEP


@pytest.mark.parametrize(
    ("energy", "fault"),
    [
        (
            {"country_iso_code": "GER"},
            "a country's code in three letters (ISO 3166), such as DEU, FRA or USA. Did you mean DEU?",
        ),
        ({"country_iso_code": "germany"}, "Did you mean DEU?"),
        ({"country": "DEU"}, "unknown key of `energy`. Did you mean country_iso_code?"),
        ("yes please", "allowed is true or false"),
    ],
)
def test_a_wrong_country_is_found_before_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], energy: object, fault: str
) -> None:
    pytest.importorskip("codecarbon")
    assert main(["check", "--fast", str(tiny.write(tmp_path, small(tmp_path, energy=energy)))]) == 2
    assert fault in capsys.readouterr().err


def flops(model: Any) -> float:
    """The FLOPs a token of a model, counted by torch over a step's products of matrices."""
    ids = torch.arange(16)[None] % 300
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    attention = sum(count for kind, count in counter.get_flop_counts()["Global"].items() if "bmm" in str(kind))
    return (counter.get_total_flops() - attention) / ids.numel()


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_takes_fewer_flops_than_all_weights_and_as_many_as_torch_counts(tied: bool) -> None:
    torch.manual_seed(0)
    words = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=320, tie_word_embeddings=tied, attn_implementation="eager", **words)
    full = LlamaForCausalLM(config)
    assert flops_per_token(full) == pytest.approx(flops(full), rel=0.03)
    adapted = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"))
    assert flops_per_token(adapted) == pytest.approx(flops(adapted), rel=0.06)
    assert flops_per_token(adapted) < 0.8 * flops_per_token(full)
