"""The table of what cannot be combined with sharding: each entry is refused at once, and stands in the docs."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from hfpipe.cli import main
from hfpipe.stages.sharding import REFUSALS

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
LORA = {"r": 4, "target_modules": "all-linear"}
# Of each entry: how it is launched, and what the stage says.
CASES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "FSDP on CPUs": (FSDP, {}),
    "FSDP of the first version (`fsdp_version: 1`)": (FSDP | {"FSDP_VERSION": "1"}, {}),
    "tensor, context or sequence parallelism (`parallelism_config`)": ({"PARALLELISM_CONFIG_CP_SIZE": "2"}, {}),
    "`quantization: int8` with FSDP or ZeRO-3": (ZERO3, {"quantization": "int8", "lora": LORA}),
    "`quantization: nf4` in bytes with FSDP or ZeRO-3": (FSDP, {"quantization": "nf4", "lora": LORA}),
    "rows of embeddings beside an adapter (`trainable_token_indices`, added tokens) with ZeRO-3": (
        ZERO3,
        {"lora": LORA | {"trainable_token_indices": {"embed_tokens": [1, 5]}}},
    ),
    "`muon` with FSDP or ZeRO-3": (FSDP, {"muon": {}}),
    "`qat` with FSDP or ZeRO-3": (ZERO3, {"qat": {"weights": "int4"}}),
    "`kl` or `l2` of `keep:` with DeepSpeed": (ZERO3, {"keep": {"l2": {"weight": 0.1}}}),
    "`counterfactual` with FSDP or DeepSpeed": (FSDP, {"counterfactual": {"weight": 1.0, "swap": "gender"}}),
    "`early_stopping` with DeepSpeed": (ZERO3, {"early_stopping": {"suite": "sounds"}}),
}


def test_every_entry_is_tried() -> None:
    assert CASES.keys() == {refusal.name for refusal in REFUSALS}


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
def test_a_combination_is_refused_before_anything_is_loaded_and_the_docs_say_why(
    refusal: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment, words = CASES[refusal.name]
    content = tiny.recipe(tmp_path, merge=False)  # its data is not written: nobody may look for it
    content["model"] = {"id": "team/base"}
    content["stages"] = content["stages"][1:]
    content["stages"][0].pop("lora")
    content["stages"][0]["training"].pop("save_steps")
    content["stages"][0] |= words
    path = tiny.write(tmp_path, content)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["run", str(path)]) == 2
    said = capsys.readouterr().err
    assert f"stages.sounds: {refusal.name} cannot be: {refusal.reason}" in said
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    assert f"| {refusal.name} | {refusal.reason} |" in page


def test_sizes_of_hybrid_sharding_that_are_not_those_of_the_launch_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8"}
    for name, value in (FSDP | sizes | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}).items():
        monkeypatch.setenv(name, value)
    assert main(["run", str(tiny.write(tmp_path, tiny.recipe(tmp_path)))]) == 2
    assert "2 copies of the weights over 8 ranks each" in capsys.readouterr().err
