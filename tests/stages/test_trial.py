"""A trainer is asked on the shapes of the run's own base: what it takes of one architecture it refuses of another."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from hfpipe.cli import main

DENSE = tiny.recipe(Path())["model"]["architecture"]
ROUTED = DENSE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
SAID = {
    "sft": {"prompt": "{note}: what does the {animal} say?", "completion": " {sound}"},
    "preference": {"prompt": "{note}: what does the {animal} say?", "chosen": " {sound}", "rejected": " {animal}"},
}


@pytest.mark.parametrize(("architecture", "code"), [(DENSE, 2), (ROUTED, 0)])
@pytest.mark.parametrize("kind", SAID)
def test_the_loss_of_routers_is_of_mixtures_alone(
    kind: str, architecture: dict, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_data(tmp_path)
    content = tiny.recipe(tmp_path, evaluate={}, merge=False, energy=False)
    content["model"]["architecture"] = architecture
    stage = content["stages"][1]
    stage |= {"kind": kind, "data": [stage["data"][0] | {"template": SAID[kind]}]}
    stage["training"]["router_aux_loss_coef"] = 0.01
    assert main(["check", str(tiny.write(tmp_path, content | {"stages": [stage]}))]) == code
    assert ("is not a Mixture-of-Experts model" in capsys.readouterr().err) is (code == 2)
