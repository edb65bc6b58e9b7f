"""Several adapters on one base: one trained further, one beside it, one on top of a merge."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from hfpipe.cli import main

SIX = {"max_steps": 6, "learning_rate": 0.01, "max_length": 64, "save_strategy": "no", "warmup_steps": 0}


def chain(folder: Path) -> dict:
    """`first` on the base; `still` and `more` train it further, the one without a step; `beside`; `top` on a merge."""
    content = tiny.recipe(folder, merge=False, shift=False, energy=False)
    sft = content["stages"][1] | {"training": SIX}
    further = {key: value for key, value in sft.items() if key != "lora"}
    further |= {"parent": "first", "parent_adapter": "continue"}
    content["stages"] = [
        sft | {"name": "first"},
        further | {"name": "still", "training": SIX | {"learning_rate": 0, "max_steps": 2}},
        further | {"name": "more", "training": SIX | {"save_strategy": "steps", "save_steps": 2}},
        sft | {"name": "beside", "parent": "base", "peft": {"type": "ia3"}},
        sft | {"name": "top", "parent": "more"},
    ]
    del content["stages"][3]["lora"]
    content["evaluate"] = {"sounds": content["evaluate"]["sounds"] | {"metrics": ["bits_per_byte"]}}
    return content


def adapter(run: Path, stage: str) -> tuple[dict[str, torch.Tensor], dict]:
    folder = run / "stages" / stage / "model"
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    tiny.write_data(folder)
    assert main(["run", str(tiny.write(folder, chain(folder)))]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.long
def test_an_adapter_is_trained_further_from_where_it_was(finished: Path) -> None:
    (first, config), (still, _), (more, further) = (
        adapter(finished / "run", name) for name in ("first", "still", "more")
    )
    assert all(torch.equal(still[name], first[name]) for name in first), "without a step it is the same adapter"
    assert more.keys() == first.keys()
    assert all(not torch.equal(more[name], first[name]) for name in first)
    assert further == config
    assert config["target_modules"] == sorted(config["target_modules"])  # PEFT writes a set as it comes
    found = tiny.scores(finished / "run")
    first_bits, still_bits, more_bits = (found[name, "sounds", "bits_per_byte"] for name in ("first", "still", "more"))
    assert still_bits == pytest.approx(first_bits, abs=1e-6)
    assert more_bits < first_bits


@pytest.mark.slow
@pytest.mark.long
def test_every_adapter_names_the_base_it_was_trained_on(finished: Path) -> None:
    stages = finished / "run" / "stages"
    for name, base in {
        "first": "base/model",
        "more": "base/model",
        "beside": "base/model",
        "top": "more/merged",
    }.items():
        assert adapter(finished / "run", name)[1]["base_model_name_or_path"] == str(stages / base)
    assert not (stages / "first" / "merged").exists(), "nothing starts from its merge"


@pytest.mark.slow
@pytest.mark.long
def test_a_stage_of_a_run_is_evaluated_and_merged_by_name(
    finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe, output = str(finished / "tiny.yaml"), tmp_path / "scores.json"
    for name in ("first", "beside"):
        assert main(["evaluate", str(finished / "run"), recipe, "--stage", name, "--output", str(output)]) == 0
        found = tiny.scores(finished / "run")[name, "sounds", "bits_per_byte"]
        assert json.loads(output.read_text())[0]["value"] == pytest.approx(found, abs=1e-6)
    assert main(["merge", str(finished / "run"), "--stage", "beside"]) == 0
    assert (finished / "run/stages/beside/merged/model.safetensors").exists()
    capsys.readouterr()
    assert main(["evaluate", str(finished / "run"), recipe, "--stage", "besides"]) == 2
    assert "it has first, still, more, beside, top" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_a_run_folder_that_was_moved_is_whole(finished: Path, tmp_path: Path) -> None:
    moved = (finished / "run").rename(tmp_path / "moved")
    try:
        output = tmp_path / "scores.json"
        assert main(["evaluate", str(moved), str(finished / "tiny.yaml"), "--output", str(output)]) == 0
        found = tiny.scores(moved)["top", "sounds", "bits_per_byte"]
        assert json.loads(output.read_text())[0]["value"] == pytest.approx(found, abs=1e-6)
    finally:
        moved.rename(finished / "run")


@pytest.mark.slow
@pytest.mark.long
def test_interrupted_is_uninterrupted_where_an_adapter_is_trained_further(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_data(tmp_path)
    content = chain(tmp_path)
    content["stages"] = [content["stages"][0], content["stages"][2]]
    path = str(tiny.write(tmp_path, content))
    checkpoint = tmp_path / "run/stages/more/checkpoint-2/manifest.json"

    def stop() -> None:
        while not checkpoint.exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # in case it comes too late, which the exit code shows
    try:
        thread = threading.Thread(target=stop, daemon=True)
        thread.start()
        assert main(["run", path]) == 75
        thread.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert main(["run", path]) == 0
    assert "continuing from checkpoint-" in capsys.readouterr().out
    whole, resumed = adapter(finished / "run", "more")[0], adapter(tmp_path / "run", "more")[0]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": {"r": 8}}, "`r` is the number 8, and there the number 4. Leave `lora` out to take it over"),
        ({"peft": {"type": "ia3"}}, "peft: differs from that of 'first'"),
        ({"quantization": "nf4"}, "quantization: differs from that of 'first'"),
        ({"parent": "base"}, "there is no adapter to continue: it starts from the base"),
        ({"parent": "prose"}, "there is no adapter to continue: 'prose' trains all weights"),
        ({"kind": "classification"}, "the adapter of a sft stage is not trained further by a classification stage"),
        ({"parent_adapter": "stack"}, "one of merge, continue"),
    ],
)
def test_what_cannot_be_trained_further_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, message: str
) -> None:
    content = chain(tmp_path)
    prose = tiny.recipe(tmp_path)["stages"][0]
    content["stages"] = [prose, content["stages"][0] | {"parent": "base"}, content["stages"][2] | change]
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    assert message in capsys.readouterr().err


def test_a_fault_in_words_that_are_taken_over_is_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = chain(tmp_path)
    content["stages"][0]["lora"] = {"rr": 4}
    assert main(["check", "--fast", str(tiny.write(tmp_path, content))]) == 2
    message = capsys.readouterr().err
    assert "1 fault in" in message
    assert "stages.first.lora.rr" in message
