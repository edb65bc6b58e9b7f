"""Exact match: the share of rows whose generated answer is the right one, white space at the ends aside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from hfpipe.metrics.accuracy import share


class ExactMatch(evaluate.Metric):
    """The model generates freely; nothing but the whole answer counts."""

    needs = "generation"
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
        result = share([p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)])
        return {"exact_match": result["value"], "stderr": result["stderr"]}
