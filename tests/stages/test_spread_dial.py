"""The dial with weights that are spread over ranks: the scores at each strength, and what is handed on, of one rank."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from spreading import QUIET, assert_same, assert_same_weights, run_on

pytestmark = [pytest.mark.slow, pytest.mark.long]


def dialled(folder: Path) -> dict[str, Any]:
    """Two stages that exceed a budget, all weights and an adapter with a whole module beside it, each from prose."""
    content = tiny.recipe(folder, merge=False, **QUIET)
    content["evaluate"]["general"] |= {"budget": "9%", "budget_action": "dial"}
    content["evaluate"]["sounds"]["metrics"] = ["bits_per_byte"]
    first, second = content["stages"]
    second["training"] |= {"learning_rate": 0.05, "save_strategy": "no"}
    beside = {"lora": {"r": 4, "use_dora": True, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}}
    whole = {key: value for key, value in second.items() if key != "lora"} | {"name": "whole"}
    whole["training"] = second["training"] | {"learning_rate": 0.015}
    content["stages"] = [first, whole, second | beside | {"name": "beside", "parent": "prose"}]
    return content


def test_a_dialled_stage_is_that_of_one_rank(tmp_path: Path) -> None:
    for place, ranks in (("one", 1), ("two", 2)):
        folder = tmp_path / place
        folder.mkdir()
        tiny.write_data(folder)
        path = tiny.write(folder, dialled(folder))
        run_on(path, ranks)
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    assert_same(two, one, ["whole", "beside"])
    for stage in ("whole", "beside"):
        found, expected = (json.loads((run / "stages" / stage / "dial.json").read_text()) for run in (two, one))
        assert 0 < found["best"] == expected["best"] < 1
        for point, other in zip(found["points"], expected["points"], strict=True):
            values, others = ([score["value"] for score in each["scores"]] for each in (point, other))
            assert values == pytest.approx(others, abs=2e-3)
        assert_same_weights(*(run / "stages" / stage / "dial" for run in (two, one)))
