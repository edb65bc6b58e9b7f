"""Rules on what is for small data: early stopping on a suite, repeated seeds, folds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hfpipe.recipe.faults import Fault, did_you_mean, listed
from hfpipe.recipe.metric_table import OUR_METRICS, WITH_IDEAL, is_elsewhere, parts_of
from hfpipe.recipe.raw import Block, RawStage, RawSuite, mapping, sequence, stages, suites, text_of


def check_repeats(data: dict[str, Any]) -> Iterator[Fault]:
    """Yields what early stopping, `seeds`, `cross_validation` and `fold` get wrong."""
    by_name = {suite.name: suite for suite in suites(data)}
    for stage in stages(data):
        yield from _check_early_stopping(stage, by_name)
        for source in stage.sources:
            yield from _check_fold(source)
    for suite in by_name.values():
        yield from _check_fold(suite.source)
    repeated = [key for key in ("seeds", "cross_validation") if data.get(key) is not None]
    if len(repeated) == 2:
        yield Fault(("cross_validation",), "`seeds` repeats the run already. Keep one of the two.")
    for key in ("merge", "push") if repeated else ():
        if data.get(key):
            text = f"`{repeated[0]}` makes several models, and this is for one. Remove it; when the run is done, take "
            yield Fault((key,), text + f"`hfpipe {key}` with the folder of the repeat you want.")
    seeds = [seed for seed in sequence(data.get("seeds")) if isinstance(seed, int)]
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        yield Fault(("seeds",), f"{listed(map(str, twice))} stands there twice, and would give the same run twice.")
    yield from _check_cross_validation(data)


def _check_early_stopping(stage: RawStage, by_name: dict[str, RawSuite]) -> Iterator[Fault]:
    block, training = stage.at("early_stopping"), stage.at("training")
    name, metric = text_of(block.data.get("suite")), text_of(block.data.get("metric"))
    if not block.data:
        return
    if name is not None and name not in by_name:
        text = f"'{name}' is not a suite; allowed: {listed(by_name)}." if by_name else "the recipe has no suite."
        yield Fault((*block.steps, "suite"), text + did_you_mean(name, by_name))
    elif name is not None and metric is not None:
        named = [other for other in sequence(by_name[name].data.get("metrics")) if isinstance(other, str)]
        metrics = [part for other in named for part in parts_of(other)]
        if metric not in metrics:
            text = f"'{metric}' is not a metric of {name}; allowed: {listed(metrics)}.{did_you_mean(metric, metrics)}"
            yield Fault((*block.steps, "metric"), text)
    suite = by_name[name].data if name in by_name else {}
    if suite.get("lm_eval") is not None:
        yield Fault(
            (*block.steps, "suite"), f"'{name}' is a task of lm-eval, which chooses no checkpoint. Take another."
        )
    elif (metric or next(iter(sequence(suite.get("metrics"))), None)) in WITH_IDEAL:
        text = "can be too high and too low, so it chooses no checkpoint. Take another metric."
        yield Fault((*block.steps, "metric"), text)
    for key in ("eval_strategy", "save_strategy", "save_steps", "load_best_model_at_end", "metric_for_best_model"):
        if key in training.data:
            text = "follows from `early_stopping`: a checkpoint is saved and scored every `eval_steps`. Remove it."
            yield Fault((*training.steps, key), text)


def _check_fold(source: Block) -> Iterator[Fault]:
    fold = source.at("fold")
    if not fold.data:
        return
    number, count = [fold.data.get(key) for key in ("keep", "leave")], fold.data.get("of")
    if (number[0] is None) == (number[1] is None):
        yield Fault(fold.steps, "needs either `keep` (one fold) or `leave` (all the others).")
    for key, value in zip(("keep", "leave"), number, strict=True):
        if isinstance(value, int) and isinstance(count, int) and value > count:
            yield Fault((*fold.steps, key), f"found {value}; allowed is a fold from 1 to {count}.")
    if source.data.get("streaming") is True:
        yield Fault(fold.steps, "a stream has no folds, as its rows have no place. Remove `streaming` or `fold`.")


def _check_cross_validation(data: dict[str, Any]) -> Iterator[Fault]:
    block = mapping(data.get("cross_validation"))
    name, steps = text_of(block.get("stage")), ("cross_validation",)
    if name is None:
        return
    by_name = {stage.name: stage for stage in stages(data) if stage.name}
    if name not in by_name:
        text = f"'{name}' is not a stage; allowed: {listed(by_name)}.{did_you_mean(name, by_name)}"
        yield Fault((*steps, "stage"), text)
        return
    sources = list(by_name[name].sources)
    if len(sources) != 1 or sources[0].data.get("streaming") is True or sources[0].data.get("fold"):
        text = f"the data of '{name}' cannot be cut into folds: allowed is one source, not streamed, without `fold`."
        yield Fault((*steps, "stage"), text)
    if HELD_OUT in mapping(data.get("evaluate")):
        yield Fault(("evaluate", HELD_OUT), "is the name of the suite on the held-out fold. Take another name.")
    for index, metric in enumerate(sequence(block.get("metrics"))):
        if isinstance(metric, str) and metric not in OUR_METRICS and not is_elsewhere(metric):
            text = f"unknown metric '{metric}'; the metrics are {listed(OUR_METRICS)}."
            yield Fault((*steps, "metrics", index), text + did_you_mean(metric, OUR_METRICS))


HELD_OUT = "held_out"  # the suite of cross-validation
