"""Statistics on trial: how often 95 % intervals hold, and how often a change is told where nothing changed.

    python benchmarks/coverage.py [--runs 2000] [--rows 6 10 30 100 300]

Rows are simulated as suites have them: texts of very different length (log-normal), right and wrong answers of two
models that agree on most rows, classes of unequal size. The true score is that of a million rows. For each metric and
number of rows it prints, as a Markdown table:

- coverage: how often the 95 % interval of a score holds the true score (nominal 95);
- false alarms: how often `paired_test` tells a difference of two models that differ by chance alone (nominal 5);

and then, for whole runs of which nothing changed, how often `forgotten` is told of any suite (at most 5).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hfpipe.evaluation.metrics import load_metric
from hfpipe.evaluation.metrics.rows import RowMetric, paired_test
from hfpipe.scores.scorecard import Score, forgetting

Answers = tuple[list[Any], list[Any]]  # predictions and references
Draw = Callable[[np.random.Generator, int, int], list[Answers]]  # of several models on the same rows


def texts(chance: np.random.Generator, rows: int, models: int) -> list[Answers]:
    """Bits and bytes: how hard a text is varies more than the models do."""
    size = np.maximum(20, chance.lognormal(6, 1, rows)).astype(int)
    hard = chance.normal(2.5, 0.6, rows)
    return [((size * (hard + chance.normal(0, 0.02, rows))).tolist(), size.tolist()) for _ in range(models)]


def answers(chance: np.random.Generator, rows: int, models: int) -> list[Answers]:
    """Texts that are right or wrong: an easy row is right with any model."""
    easy = chance.beta(0.8, 0.5, rows)
    return [(["a" if right else "b" for right in chance.random(rows) < easy], ["a"] * rows) for _ in range(models)]


def classes(chance: np.random.Generator, rows: int, models: int) -> list[Answers]:
    """Three classes, the rarest one row in ten; seven answers in ten are right."""
    names, shares = ["x", "y", "z"], [0.6, 0.3, 0.1]
    right = chance.choice(names, rows, p=shares)
    said = [np.where(chance.random(rows) < 0.7, right, chance.choice(names, rows, p=shares)) for _ in range(models)]
    return [(one.tolist(), right.tolist()) for one in said]


def numbers(chance: np.random.Generator, rows: int, models: int) -> list[Answers]:
    right = chance.normal(0, 1, rows)
    return [((right + chance.normal(0, 1, rows)).tolist(), right.tolist()) for _ in range(models)]


SUITES: dict[str, Draw] = {
    "bits_per_byte": texts,
    "perplexity": texts,
    "exact_match": answers,
    "f1": classes,
    "matthews_correlation": classes,
    "mae": numbers,
    "pearsonr": numbers,
}


def of_metric(name: str, rows: int, runs: int) -> tuple[float, float]:
    """Coverage and false alarms of a metric, in percent."""
    metric, draw = load_metric(name), SUITES[name]
    chance = np.random.default_rng(rows)
    truth = _value(metric, draw(np.random.default_rng(0), 200_000, 1)[0])
    held = told = 0
    for _ in range(runs):
        one, other = draw(chance, rows, 2)
        _, low, high = metric.interval(_value(metric, one), metric.statistics(*one))
        held += low is not None and high is not None and low <= truth <= high
        told += paired_test(metric, one, other).p < 0.05
    return 100 * held / runs, 100 * told / runs


def _value(metric: RowMetric, model: Answers) -> float:
    return float(metric.value(metric.statistics(*model).sum(0)))


def of_runs(suites: int, stages: int, rows: int, runs: int) -> float:
    """Whole runs of which nothing changed: how many say `forgotten` of a suite, in percent."""
    names = [("bits_per_byte", "exact_match")[number % 2] for number in range(suites)]
    metrics: dict[str, RowMetric] = {name: load_metric(name) for name in names}
    chance = np.random.default_rng(suites * stages)
    told = 0
    for _ in range(runs):
        scores: list[Score] = []
        for number, name in enumerate(names):
            scores += _scored(f"suite {number}", name, metrics[name], SUITES[name](chance, rows, stages + 1))
        keys = {score.key for score in scores}
        changes = [forgetting(sorted(scores, key=lambda one: one.stage), f"stage {stages}", key) for key in keys]
        told += any(change is not None and change.gain < 0 and change.beyond_noise for change in changes)
    return 100 * told / runs


def _scored(suite: str, name: str, metric: RowMetric, models: Sequence[Answers]) -> list[Score]:
    scores = []
    for place, model in enumerate(models):
        last = place == len(models) - 1
        paired = {f"stage {at}": paired_test(metric, models[at], model) for at in range(place)} if last else {}
        value, better = _value(metric, model), metric.higher_is_better
        scores.append(Score(f"stage {place}", suite, name, value, 0.0, len(model[0]), better, paired=paired))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--rows", type=int, nargs="+", default=[6, 10, 30, 100, 300])
    options = parser.parse_args()
    print("| metric | " + " | ".join(f"{rows} rows" for rows in options.rows) + " |")
    print("| --- |" + " ---: |" * len(options.rows))
    for name in SUITES:
        found = [of_metric(name, rows, options.runs) for rows in options.rows]
        print(f"| {name} | " + " | ".join(f"{held:.1f} / {told:.1f}" for held, told in found) + " |", flush=True)
    print("\nCoverage of the 95 % interval / false alarms of two models, in percent.\n")
    print("| suites | earlier models | runs that say forgotten |\n| ---: | ---: | ---: |")
    for suites, stages in ((1, 1), (5, 1), (5, 3), (10, 6)):
        told = of_runs(suites, stages, 50, max(200, options.runs // 10))
        print(f"| {suites} | {stages} | {told:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
