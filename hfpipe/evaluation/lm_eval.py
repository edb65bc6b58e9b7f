"""Tasks of the Language Model Evaluation Harness (lm-eval, an extra) as suites: `arc: {lm_eval: arc_easy}`."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

from hfpipe.core import ranks
from hfpipe.core.errors import MachineError, RecipeError
from hfpipe.model.spread import in_step
from hfpipe.recipe import Suite
from hfpipe.recipe.faults import did_you_mean
from hfpipe.scores.scorecard import Score, Z

BOOTSTRAP = 1000  # for the standard errors of the metrics that have no formula


def lm_eval_rows(suite: Suite) -> list[dict[str, Any]]:
    """Returns the questions of a task as rows of text: they are looked for in the training data like those of any
    suite.

    Raises:
        MachineError: lm-eval is not installed, or the task's data cannot be had.
        RecipeError: There is no such task.
    """
    rows = []
    for name, task in _tasks(suite).items():
        documents = task.eval_docs
        for number in range(min(len(documents), suite.limit or len(documents))):
            document = documents[number]
            text = task.doc_to_text(document)
            if isinstance(text, int):  # the contexts are choices, as in Winogrande
                text = " ".join(map(str, task.doc_to_choice(document)))
            rows.append({"id": f"{name} {number}", "text": str(text)})
    return [row for row in rows if row["text"].strip()] or [{"id": "none", "text": suite.lm_eval}]


def score_lm_eval(name: str, suite: Suite, model: Any, tokenizer: Any, stage: str) -> list[Score]:
    """Scores a task by lm-eval itself, on the main process while the others wait.

    Args:
        name: The suite's name.
        suite: The suite.
        model: A causal language model in evaluation mode.
        tokenizer: The model's tokenizer.
        stage: What the scores are filed under.

    Returns:
        The task's metrics under lm-eval's names, on every rank; of a group without scores of its own, those of its
        tasks as `task/metric`.
    """
    with in_step(model):
        result = _evaluated(suite, model, tokenizer) if ranks.is_main() else None
    return ranks.on_main(lambda: list(_scores(name, suite, result or {}, stage)))


def _evaluated(suite: Suite, model: Any, tokenizer: Any) -> dict[str, Any]:
    manager = _manager(suite)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    return simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=suite.batch_size, max_length=suite.max_length),
        tasks=[suite.lm_eval],
        num_fewshot=suite.num_fewshot,
        limit=suite.limit,
        bootstrap_iters=BOOTSTRAP,
        log_samples=False,
        task_manager=manager,
        random_seed=None,  # the run has seeds of its own; lm-eval draws its examples by `fewshot_random_seed`
        numpy_random_seed=None,
        torch_random_seed=None,
    )


def _scores(name: str, suite: Suite, result: dict[str, Any], stage: str) -> Iterator[Score]:
    from hfpipe.evaluation.metrics.rows import wilson  # late, see `is_row_metric`

    tables = {**result["results"], **result.get("groups", {})}
    own = suite.lm_eval if any(isinstance(value, float) for value in tables.get(suite.lm_eval, {}).values()) else None
    counts = {task: facts["effective"] for task, facts in result["n-samples"].items()}
    for task, table in tables.items():
        if own is not None and task != own:
            continue
        for key, value in table.items():
            metric, _, of = key.partition(",")
            if not of or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):  # lm-eval's own word for a score that these rows do not have
                continue
            error = table.get(f"{metric}_stderr,{of}")
            error = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
            count = counts.get(task, sum(counts.values()))
            low, high = (None, None) if error is None else (value - Z * error, value + Z * error)
            if error is not None and _is_share(value, error, count):
                low, high = wilson(value, count)
            yield Score(
                stage,
                name,
                metric if own else f"{task}/{metric}",
                float(value),
                error,
                n=count,
                higher_is_better=bool(result.get("higher_is_better", {}).get(task, {}).get(metric, True)),
                low=low,
                high=high,
            )


def _is_share(value: float, error: float, count: int) -> bool:
    """Tells a share of rows by its standard error, which lm-eval has from the spread of its ones and zeros."""
    return 0 <= value <= 1 and count > 1 and math.isclose(error**2, value * (1 - value) / (count - 1), abs_tol=1e-12)


def _manager(suite: Suite) -> Any:
    if importlib.util.find_spec("lm_eval") is None:
        raise MachineError(
            f"the suite `lm_eval: {suite.lm_eval}` needs the package lm-eval, which is not installed. Install it: "
            'pip install "hfpipe[lm-eval]", or pip install lm_eval.'
        )
    manager = _index(suite.include_path)
    if suite.lm_eval not in manager.all_tasks:
        near = did_you_mean(suite.lm_eval, manager.all_tasks)
        raise RecipeError(
            f"lm-eval has no task {suite.lm_eval!r}; `lm-eval ls tasks` lists its own, and `include_path` names a "
            f"folder with yours.{near}"
        )
    return manager


@cache
def _index(include_path: str | None) -> Any:
    """Reads the thousands of task files once."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=include_path)


def _tasks(suite: Suite) -> dict[str, Any]:
    """The tasks of a name, which may be a group, with their data."""
    manager = _manager(suite)
    try:
        return manager.load(suite.lm_eval)["tasks"]
    except (OSError, ConnectionError) as error:
        raise MachineError(f"the data of lm-eval's task {suite.lm_eval!r} cannot be had: {error}") from error
