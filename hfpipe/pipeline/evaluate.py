"""Scores any model on suites, without a training: `hfpipe evaluate MODEL SUITES.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hfpipe.core import display, ranks
from hfpipe.core.errors import RecipeError
from hfpipe.core.files import write_json
from hfpipe.evaluation.answers import can_score
from hfpipe.evaluation.generation import require_generation
from hfpipe.evaluation.suites import Scored, compare_rows, score_suite, suite_metrics, suite_rows
from hfpipe.model.load import ModelRef, load_to_score, task_of
from hfpipe.model.tokenizer import require_room
from hfpipe.pipeline.context import quiet_libraries
from hfpipe.pipeline.trained import model_named, tokenizer_named
from hfpipe.recipe import Suites
from hfpipe.scores.scorecard import Change, Score
from hfpipe.scores.wording import change_words, describe

SuiteRows = Mapping[str, list[dict[str, Any]]]


def evaluate_model(
    name: str, suites: Suites, output: str | None, against: str | None = None, stage: str | None = None
) -> list[Score]:
    """Scores a model, an adapter or a stage of a run folder on suites, and prints the scores.

    Args:
        name: Hub id, folder, or run folder.
        suites: The suites, and how models are loaded.
        output: A JSON file for the scores; None for none.
        against: Another model, scored on the same rows first; the differences are printed, with their paired errors.
        stage: Of a run folder; its last finished stage when absent.

    Returns:
        The scores, those of `against` first, each filed under the name of its model.

    Raises:
        RecipeError: There is no such model or stage, or it can answer no suite.
    """
    quiet_libraries()
    labels = {model: Path(model).name for model in (name, against) if model is not None}
    if stage is not None:
        labels[name] = f"{labels[name]}/{stage}"
    if against is not None and (against == name or labels[against] == labels[name]):
        if against == name:
            raise RecipeError(f"--against names the model itself ({name}). Name another one.")
        labels = {model: model for model in labels}
    for suite in suites.evaluate.values():
        suite_metrics(suite)  # an unknown metric is refused before anything is loaded
    ref = model_named(name, suites.model, stage)
    other_ref = model_named(against, suites.model) if against is not None else None
    rows = {suite: suite_rows(block) for suite, block in suites.evaluate.items()}
    other = _evaluate(other_ref, against, labels[against], suites, rows) if other_ref and against else {}
    found = _evaluate(ref, name, labels[name], suites, rows)
    scores = [score for scored in other.values() for score in scored.scores]
    for suite_name, scored in found.items():
        compared = suite_name in other
        differences = (
            compare_rows(suites.evaluate[suite_name], other[suite_name].records, scored.records) if compared else {}
        )
        for number_of, score in enumerate(scored.scores):
            if against is not None and score.metric in differences:
                score = replace(score, paired={labels[against]: differences[score.metric]})
            scores.append(score)
            if compared:
                change = Change(other[suite_name].scores[number_of], score)
                ranks.say(f"difference {change_words(change)}", "result")
    if output and ranks.is_main():
        write_json(Path(output), [asdict(score) for score in scores])
    return scores


def _evaluate(ref: ModelRef, name: str, label: str, suites: Suites, rows: SuiteRows) -> dict[str, Scored]:
    """Scores one model on all suites that it can answer, and prints the scores."""
    first, second = (max(map(len, names)) for names in ([label], suites.evaluate))
    answered = {suite: can_score(block, rows[suite], ref) for suite, block in suites.evaluate.items()}
    for suite in [suite for suite, can in answered.items() if not can]:
        ranks.say(f"{label:{first}}  {suite:{second}}  not scored: its answers need another head than this model has")
    if not any(answered.values()):
        raise RecipeError(f"no suite asks what {name} can answer: it is a {task_of(ref)} model.")
    tokenizer = tokenizer_named(ref)
    model = load_to_score(replace(ref, vocabulary=len(tokenizer)))
    size = model.get_input_embeddings().num_embeddings
    require_room(tokenizer, size, ref.path)
    for suite, block in suites.evaluate.items():
        require_generation(block, suite, size, tokenizer, reads_pairs="source" in rows[suite][0])
    found = {}
    for suite, block in suites.evaluate.items():
        if answered[suite]:
            found[suite] = score_suite(suite, block, rows[suite], model, tokenizer, label)
            for score in found[suite].scores:
                ranks.say(f"{label:{first}}  {suite:{second}}  {describe(score)}", "result")
                if ranks.is_main():
                    display.event("score", **asdict(score))
    return found
