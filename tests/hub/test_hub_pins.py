"""Every data set and tokenizer of the Hub is pinned at the first start, and stays pinned when the Hub moves on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from hub_server import HubServer

CARD = b"---\nlicense: cc-by-sa-4.0\nlanguage: [de]\n---\n"
PINS = """
import sys
from pathlib import Path
from hfpipe.hub.pins import pin_recipe
from hfpipe.recipe import dump_recipe, load_recipe

for _ in range(2):
    print(dump_recipe(pin_recipe(load_recipe(sys.argv[1]), Path(sys.argv[2]))), "=====")
"""


@pytest.mark.slow
def test_commits_are_found_once_and_kept(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("model", "me/base", {"README.md": b"---\nlicense: mit\n---\n"})
    hub.add_repo("model", "me/words")
    metric = hub.add_repo("space", "me/metric")
    wer = hub.add_repo("space", "evaluate-metric/wer")
    wer.refs[f"v{version('evaluate')}"] = wer.commit("main", "second", wer.at("main").files)
    wer.commit("main", "third", wer.at("main").files)
    law = hub.add_repo("dataset", "team/law", {"README.md": CARD, "a.jsonl": b"{}"})
    law.refs["old"] = law.commit("main", "second", law.at("main").files)
    law.commit("main", "third", law.at("main").files)
    old, main = law.refs["old"].oid, law.refs["main"].oid
    content = {
        "name": "toy",
        "model": {"id": "me/base", "tokenizer": {"id": "me/words"}},
        "stages": [
            {
                "name": "law",
                "kind": "pretrain",
                "data": [
                    {"path": "team/law"},
                    {"path": "team/law", "revision": "old"},
                    {"path": "json", "data_files": {"train": ["hf://datasets/team/law@old/a.jsonl", "b.jsonl"]}},
                    {"path": "team/absent"},
                ],
                "training": {"max_steps": 1},
            }
        ],
        "evaluate": {
            "heard": {"data": {"path": "json", "data_files": "h.jsonl"}, "metrics": ["wer", "me/metric", "exact_match"]}
        },
    }
    recipe, run = tmp_path / "toy.yaml", tmp_path / "run"
    recipe.write_text(json.dumps(content))
    environment = os.environ | hub.env(tmp_path / "home")

    def pinned() -> str:
        command = [sys.executable, "-c", PINS, str(recipe), str(run)]
        done = subprocess.run(command, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        first, second, _ = done.stdout.split("=====")
        assert first.strip() == second.strip()
        return first

    first = pinned()
    assert f"{{path: team/law, revision: {main}}}" in first
    assert f"{{path: team/law, revision: {old}}}" in first
    assert f"hf://datasets/team/law@{old}/a.jsonl" in first
    assert "{path: team/absent}" in first  # loading says that there is none
    assert f"{{id: me/words, revision: {hub.commits('me/words')[-1].oid}}}" in first
    # `evaluate` takes the tag of its own version first
    assert f"wer: {{revision: {wer.history[1].oid}}}" in first
    assert f"me/metric: {{revision: {metric.history[-1].oid}}}" in first
    facts = json.loads((run / "hub.json").read_text())
    assert facts["dataset team/law@main"] == {
        "revision": main,
        "license": "cc-by-sa-4.0",
        "license_name": None,
        "license_link": None,
        "language": ["de"],
        "private": False,
        "gated": False,
    }
    (run / "stages" / "law").mkdir(parents=True)
    (run / "stages" / "law" / "stage.json").write_text("{}")
    law.commit("main", "fourth", law.at("main").files)
    asked = len(hub.requests)
    assert pinned() == first
    assert len(hub.requests) == asked
