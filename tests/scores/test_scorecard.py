"""Scorecards are read as they were written, by later versions too."""

import json
from pathlib import Path

from hfpipe.scores.scorecard import Paired, Score, read_scorecard, write_scorecard


def test_a_scorecard_is_read_as_it_was_written_and_unknown_keys_are_passed_over(tmp_path: Path) -> None:
    paired = {"base": Paired(stderr=0.1, p=0.2, low=-0.1, high=0.3)}
    score = Score("chat", "asked", "exact_match", 0.5, 0.1, 30, True, 0.3, 0.7, paired, baselines={"chance": 0.2})
    path = tmp_path / "scorecard.json"
    write_scorecard([score], path)
    assert read_scorecard(path) == [score]
    row = json.loads(path.read_text())[0]
    later = row | {"unit": "share", "paired": {"base": row["paired"]["base"] | {"effect": 1.0}}}
    path.write_text(json.dumps([later]))
    assert read_scorecard(path) == [score]
