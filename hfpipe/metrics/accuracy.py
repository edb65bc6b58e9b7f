"""Accuracy: the share of rows whose chosen answer is the right one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate


def share(hits: Sequence[bool]) -> dict[str, float]:
    """A share of hits with its standard error, that of a binomial."""
    value = sum(hits) / len(hits)
    return {"value": value, "stderr": math.sqrt(value * (1 - value) / len(hits))}


class Accuracy(evaluate.Metric):
    """The model chooses, among the answers of the suite, the one it finds most likely after the prompt."""

    needs = "choice"
    higher_is_better = True

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
        result = share([p == r for p, r in zip(predictions, references, strict=True)])
        return {"accuracy": result["value"], "stderr": result["stderr"]}
