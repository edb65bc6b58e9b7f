"""Rules of what follows the stages: early stopping, seeds, folds, energy, the push, and secrets in any value.

No token or password may stand in a recipe: the run folder, the report and the Hub get a copy of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hfpipe.core.secrets import has_secret, own_tokens
from hfpipe.core.upstream import countries
from hfpipe.recipe.faults import Fault, Steps, did_you_mean, found, listed
from hfpipe.recipe.metric_table import OUR_METRICS, WITH_IDEAL, is_elsewhere, parts_of
from hfpipe.recipe.push_plan import NEEDS_AN_ADAPTER, ONLY_OF
from hfpipe.recipe.raw import Block, RawStage, RawSuite, as_text, mapping, sequence, stages, suites, texts
from hfpipe.recipe.rules.adapters import adapter_of
from hfpipe.recipe.stage_config import KEEPING


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


def check_cures(data: dict[str, Any]) -> Iterator[Fault]:
    """Yields what `cures:` gets wrong: a stage that cannot be cured, nothing to compare by, several models."""
    if data.get("cures") in (None, False):
        return
    able = [stage.name for stage in stages(data) if stage.name and is_curable(stage)]
    name = as_text(Block((), data).at("cures").data.get("stage"))
    if name is not None and name not in able:
        text = (
            f"'{name}' is not a stage that can be cured; allowed: {listed(able) or 'none'}.{did_you_mean(name, able)}"
        )
        yield Fault(("cures", "stage"), text)
    elif not able:
        text = f"no stage trains on next tokens ({listed(KEEPING)}), so none can be cured."
        yield Fault(("cures",), text)
    if not data.get("evaluate"):
        yield Fault(("cures",), "there is no suite to compare by. Add `evaluate:`, or remove it.")
    repeated = next((key for key in ("seeds", "cross_validation") if data.get(key) is not None), None)
    if repeated is not None:
        yield Fault(("cures",), f"`{repeated}` makes several models, and this compares those of one stage. Remove it.")


def is_curable(stage: RawStage) -> bool:
    """Returns True if a stage trains on next tokens, and so can keep its parent by texts of its own."""
    return stage.kind in KEEPING and stage.data.get("objective") != "masked"


def _check_early_stopping(stage: RawStage, by_name: dict[str, RawSuite]) -> Iterator[Fault]:
    block, training = stage.at("early_stopping"), stage.at("training")
    name, metric = as_text(block.data.get("suite")), as_text(block.data.get("metric"))
    if not block.data:
        return
    if name is not None and name not in by_name:
        text = f"'{name}' is not a suite; allowed: {listed(by_name)}." if by_name else "the recipe has no suite."
        yield Fault((*block.steps, "suite"), text + did_you_mean(name, by_name))
    elif name is not None and metric is not None:
        metrics = [part for other in texts(by_name[name].data.get("metrics")) for part in parts_of(other)]
        if metric not in metrics:
            text = f"'{metric}' is not a metric of {name}; allowed: {listed(metrics)}.{did_you_mean(metric, metrics)}"
            yield Fault((*block.steps, "metric"), text)
    suite = by_name[name].data if name in by_name else {}
    if suite.get("lm_eval") is not None:
        yield Fault(
            (*block.steps, "suite"), f"'{name}' is a task of lm-eval, which chooses no checkpoint. Take another."
        )
    elif (metric or next(iter(texts(suite.get("metrics"))), None)) in WITH_IDEAL:
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
    name, steps = as_text(block.get("stage")), ("cross_validation",)
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


def check_country(data: dict[str, Any]) -> Iterator[Fault]:
    """Yields a fault where `energy.country_iso_code` is no country that codecarbon knows."""
    code, known = mapping(data.get("energy")).get("country_iso_code"), countries()
    if not isinstance(code, str) or not known or code in known:
        return
    named = (known_code for known_code, name in known.items() if name.casefold().startswith(code.casefold()))
    meant = code.upper() if code.upper() in known else next(named, None)
    hint = f" Did you mean {meant}?" if meant else ""
    text = f"found {found(code)}; allowed is a country's code in three letters (ISO 3166), such as DEU, FRA or USA."
    yield Fault(("energy", "country_iso_code"), text + hint)


# Keys of fsspec's storage options that hold a secret, and the values of theirs that name a way to log in instead.
_SECRET_KEY = re.compile(
    r"(^|_|-)(token|secret|password|passwd|key|authorization|cookies?|sas|connection_string)$", re.IGNORECASE
)
_SECRET_ANYWHERE = re.compile(
    r"((api|access|secret|private)_?key|(access|auth)_?token|password|client_?secret)$", re.IGNORECASE
)
_WAYS = ("anon", "browser", "cache", "cloud", "google_default")
_TEXT = (
    "holds a token, a password or a signed address, and a recipe is copied into the run folder, the report and the "
    "Hub. Remove it from the file: log in with `hf auth login` or set HF_TOKEN; other stores read their own variables, "
    "such as AWS_SECRET_ACCESS_KEY."
)


def check_secrets(data: dict[str, Any]) -> Iterator[Fault]:
    """Yields every value that is a secret, without showing it."""
    yield from _with_tokens((), data, own_tokens())
    sources = [source for stage in stages(data) for source in stage.sources]
    for source in [*sources, *(suite.source for suite in suites(data))]:
        yield from _with_keys(source.at("storage_options"))


def _with_tokens(steps: Steps, value: Any, own: list[str]) -> Iterator[Fault]:
    if isinstance(value, str) and has_secret(value, own):
        yield Fault(steps, _TEXT)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        named = isinstance(key, str) and _SECRET_ANYWHERE.search(key) and isinstance(item, str) and item
        if (isinstance(key, str) and has_secret(key, own)) or named:
            yield Fault((*steps, key), _TEXT) if named else Fault(steps, _TEXT)
        else:
            yield from _with_tokens((*steps, key), item, own)


def _with_keys(block: Block, *, secret: bool = False) -> Iterator[Fault]:
    """Yields the values of storage options whose key says that they are secret, or a key above them."""
    for key, value in block.data.items():
        steps, named = (*block.steps, key), secret or bool(_SECRET_KEY.search(str(key)))
        if isinstance(value, dict):
            yield from _with_keys(block.at(key), secret=named)
        elif named and isinstance(value, str) and value not in _WAYS and not has_secret(value):
            yield Fault(steps, _TEXT)


def check_push(every: list[RawStage], data: dict[str, Any]) -> Iterator[Fault]:
    """Yields what cannot be pushed so."""
    push = mapping(data.get("push"))
    if not push:
        return
    names = [stage.name for stage in every if stage.name]
    adapters = [stage.name for stage in every if adapter_of(stage) is not None]
    pushed, what = as_text(push.get("stage")), push.get("what", "adapter")
    if pushed is not None and pushed not in names:
        text = f"'{pushed}' is not a stage; allowed: {listed(names)}.{did_you_mean(pushed, names)}"
        yield Fault(("push", "stage"), text)
    elif what in NEEDS_AN_ADAPTER and not (adapters if pushed is None else pushed in adapters):
        lacking = f"the stage '{pushed}' has no `lora:` block" if adapters else "no stage has a `lora:` block"
        yield Fault(("push", "what"), f"'{what}' needs an adapter, and {lacking}. Write `what: model`.")
    elif what == "model" and (pushed or "".join(names[-1:])) in adapters:
        text = f"'model' is a stage that trains all weights, and '{pushed or names[-1]}' trains an adapter."
        yield Fault(("push", "what"), f"{text} Write `what: adapter`, or `what: merged` for a whole model.")
    yield from _check_refs(push, names)
    yield from _check_places(push, what)


def _check_refs(push: dict[str, Any], stages: list[str]) -> Iterator[Fault]:
    revision, tag = as_text(push.get("revision")), as_text(push.get("tag"))
    for key in ("revision", "tag") if push.get("create_pr") is True else ():
        if push.get(key) is not None:
            text = "a pull request has a branch of its own, and no tag before it is merged. Remove it, or `create_pr`."
            yield Fault(("push", key), text)
    if push.get("create_pr") is True and push.get("checkpoints") == "every_save":
        text = "checkpoints go to branches, which a pull request does not need the right to make. Remove it."
        yield Fault(("push", "checkpoints"), text)
    if tag is not None and tag in ("main", revision):
        yield Fault(("push", "tag"), f"'{tag}' is the name of a branch too, and would mean either. Take another.")
    if push.get("checkpoints") == "every_save" and revision in [f"checkpoints-{stage}" for stage in stages]:
        yield Fault(("push", "revision"), f"'{revision}' is the branch of that stage's checkpoints. Take another.")


def _check_places(push: dict[str, Any], what: Any) -> Iterator[Fault]:
    """A repository holds one model, and a key for one has an effect."""
    for key, kinds in ONLY_OF.items():
        if push.get(key) is not None and what not in kinds:
            text = f"has an effect with `what: {' or '.join(kinds)}` only. Remove it, or write that."
            yield Fault(("push", key), text)
    names = {key: name for key in ("repo_id", *ONLY_OF) if (name := as_text(push.get(key))) is not None}
    if what == "both" and "repo_id" in names:
        names.setdefault("merged_repo_id", f"{names['repo_id']}-merged")
    places: dict[str, str] = {}
    for key, name in names.items():
        if (other := places.setdefault(name.lower(), key)) != key:  # capitals make no other name on the Hub
            where = ("push", key if key in push else other)
            text = f"'{name}' is `{other if key in push else key}` too, and a repository holds one model. Take another."
            yield Fault(where, text)
