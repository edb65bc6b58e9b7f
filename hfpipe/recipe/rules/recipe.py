"""Rules over several keys: what no single type can say. Each fault names what to do instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hfpipe.recipe.config import Model
from hfpipe.recipe.faults import Fault, did_you_mean, listed
from hfpipe.recipe.metric_table import FAMILIES, MASKED_METRICS, OUR_METRICS, is_elsewhere
from hfpipe.recipe.raw import Block, RawStage, RawSuite, as_text, mapping, sequence, stages, suites, texts
from hfpipe.recipe.row_formats import LABELLED_COLUMNS, SUITE_COLUMNS, TRAINED_COLUMNS, columns_of_stage
from hfpipe.recipe.rules.adapters import (
    adapter_of,
    check_adapter,
    check_added_tokens,
    check_continued,
    check_dial,
    check_merges,
)
from hfpipe.recipe.rules.keep import check_counterfactual, check_keep, check_samples
from hfpipe.recipe.rules.outcome import check_country, check_cures, check_push, check_repeats, check_secrets
from hfpipe.recipe.rules.sources import check_cleaning, check_overlap, check_pairs, check_source
from hfpipe.recipe.rules.training import check_training
from hfpipe.recipe.rules.without_effect import check_generation_effect
from hfpipe.recipe.signatures import encoder_types, model_types, seq2seq_types
from hfpipe.recipe.stage_config import KINDS

BASE = "base"
_SCORED_COLUMNS = tuple(dict.fromkeys((*TRAINED_COLUMNS, *LABELLED_COLUMNS, *SUITE_COLUMNS)))  # of a suite


def check_rules(data: dict[str, Any]) -> Iterator[Fault]:
    """Yields every combination of keys that cannot be."""
    yield from _check_model(Block((), data).at("model"))
    yield from _check_names(data)
    for position, stage in enumerate(stages(data)):
        yield from _check_stage(stage)
        yield from _check_ancestors(stage, stages(data)[:position])
        yield from check_continued(stage, stages(data)[:position])
        yield from _check_weights(stage)
        yield from check_keep(stage, position == 0, Block((), data).at("model"))
        yield from check_counterfactual(stage)
        yield from check_samples(stage)
        for source in stage.sources:
            yield from check_source(source, columns_of_stage(stage.kind))
    yield from _check_architecture(data)
    yield from _check_suites(data)
    yield from _check_outcome(data)
    yield from check_dial(data)
    yield from check_pairs(data)
    yield from check_overlap(data)
    yield from check_cleaning(data)
    yield from check_country(data)
    yield from check_repeats(data)
    yield from check_cures(data)
    yield from check_secrets(data)


# Keys of `model` that a file of suites takes: the model itself is an argument of `hfpipe evaluate`.
LOADING = ("dtype", "attn_implementation", "trust_remote_code")


def check_suites_file(data: dict[str, Any]) -> Iterator[Fault]:
    """Yields what is wrong with a file of suites, beside its types."""
    for key in mapping(data.get("model")):
        if key in Model.model_fields and key not in LOADING:
            text = (
                f"the model is named on the command line, `hfpipe evaluate MODEL FILE`; allowed are {listed(LOADING)}."
            )
            yield Fault(("model", key), text)
    for suite in suites(data):
        if "every" in suite.data:
            yield Fault(
                (*suite.steps, "every"), "counts the steps of a training, and this file trains nothing. Remove it."
            )
    yield from _check_names(data)
    yield from _check_suites(data)
    yield from check_secrets(data)


def _check_suites(data: dict[str, Any]) -> Iterator[Fault]:
    for suite in suites(data):
        yield from check_source(suite.source, _SCORED_COLUMNS)
        yield from _check_metrics(suite)
        yield from _check_swap(suite)
        yield from _check_lm_eval(suite)
        yield from check_generation_effect(suite)
        if suite.source.data.get("augment") is not None:
            text = "a suite is scored as it is; words are swapped in training data. Remove it (or see `swap`)."
            yield Fault((*suite.source.steps, "augment"), text)
        if suite.source.data.get("weight") is not None:
            yield Fault(
                (*suite.source.steps, "weight"),
                "a suite draws from one source, so there is nothing to weigh. Remove it.",
            )


def _check_model(model: Block) -> Iterator[Fault]:
    if not model.data:
        return
    has_id, has_architecture = (model.data.get(key) is not None for key in ("id", "architecture"))
    tokenizer = model.at("tokenizer")
    if has_id and has_architecture:
        text = "has both `id` and `architecture`: a model is loaded or made from nothing. Keep one."
        yield Fault((*model.steps, "architecture"), text)
    elif not has_id and not has_architecture:
        text = "needs `id` (a model on the Hub or in a folder) or `architecture` (a model made from nothing)."
        yield Fault(model.steps, text)
    named = [key for key in ("model_type", "from") if model.at("architecture").data.get(key) is not None]
    if has_architecture and not named:
        text = "missing; the kind of model, such as llama or gpt2, or `from`: a model whose config is taken."
        yield Fault((*model.steps, "architecture", "model_type"), text)
    if len(named) == 2:
        text = "is that of the model which `from` names. Keep one of the two."
        yield Fault((*model.steps, "architecture", "model_type"), text)
    if has_architecture and not has_id and model.data.get("tokenizer") is None:
        text = "missing; a model made from nothing needs a tokenizer, `{id: ...}` or `{train: {vocab_size: ...}}`."
        yield Fault((*model.steps, "tokenizer"), text)
    if has_architecture and model.data.get("config") is not None:
        text = "changes the config of a model that is loaded. Write its fields below `architecture`."
        yield Fault((*model.steps, "config"), text)
    if isinstance(model.data.get("tokenizer"), dict):
        yield from _check_tokenizer(tokenizer, loaded=has_id and not has_architecture)


_OF_ITS_OWN = {"id", "train", "revision"}  # all other keys change the tokenizer that a model has


def _check_tokenizer(tokenizer: Block, *, loaded: bool) -> Iterator[Fault]:
    has_id, has_train = (tokenizer.data.get(key) is not None for key in ("id", "train"))
    if has_id and has_train:
        yield Fault((*tokenizer.steps, "train"), "a tokenizer has `id` or `train`, not both. Keep one.")
    elif has_train and loaded:
        text = "a new tokenizer does not fit the embeddings of a loaded model. Remove it, or start from `architecture`."
        yield Fault((*tokenizer.steps, "train"), text)
    elif not has_id and not has_train and not (loaded and not tokenizer.data.keys() & _OF_ITS_OWN):
        yield Fault(tokenizer.steps, "needs `id` (a tokenizer to load) or `train: {vocab_size: ...}`.")


def _check_names(data: dict[str, Any]) -> Iterator[Fault]:
    """A name is a folder or a file of the run, on file systems that do not tell capitals apart too."""
    seen: dict[str, str] = {}
    for stage in stages(data):
        if stage.name is None:
            continue
        if stage.name.casefold() == BASE:
            yield Fault((*stage.steps, "name"), f"'{stage.name}' is the model before any training. Take another name.")
        elif stage.name.casefold() in seen:
            text = f"'{stage.name}' is the name of another stage too. Give every stage a name of its own."
            yield Fault((*stage.steps, "name"), text)
        seen[stage.name.casefold()] = stage.name
    names: dict[str, str] = {}
    for suite in suites(data):
        if (other := names.setdefault(suite.name.casefold(), suite.name)) != suite.name:
            text = f"'{suite.name}' and '{other}' differ in capitals only. Give every suite a name of its own."
            yield Fault(suite.steps, text)


def _check_stage(stage: RawStage) -> Iterator[Fault]:
    yield from check_training(stage)
    yield from check_adapter(stage)
    if stage.kind == "pretrain":
        yield from _check_length_of_training(stage, stage.at("training"))
        yield from _check_masking(stage)
    if stage.kind == "sft":
        yield from _check_stream(stage, stage.at("training"))


def _check_stream(stage: RawStage, training: Block) -> Iterator[Fault]:
    """Yields the keys that only a streamed sft stage has, and those that it cannot have."""
    keep = stage.data.get("keep")
    replays = keep == "self" or "replay" in mapping(keep)
    streamed = any(source.data.get("streaming") is True for source in stage.sources)
    if replays or not (streamed and _positive(training.data.get("max_steps"))):
        if stage.data.get("lanes") is not None:
            text = "is for an sft stage with `streaming: true` and `max_steps`, whose rows are read while it trains; "
            yield Fault((*stage.steps, "lanes"), text + "this one is read before. Leave it out.")
    elif training.data.get("packing") and "max_length" in training.data and training.data["max_length"] is None:
        text = "of a stream that is packed is a number: the rows are not known before. Write the tokens of a row."
        yield Fault((*training.steps, "max_length"), text)


def _check_length_of_training(stage: RawStage, training: Block) -> Iterator[Fault]:
    if not isinstance(stage.data.get("training", {}), dict):
        return
    steps, epochs = (_positive(training.data.get(key)) for key in ("max_steps", "num_train_epochs"))
    if not steps and any(source.data.get("streaming") is True for source in stage.sources):
        text = "missing; a source with `streaming: true` has no known length, so say how many steps to train."
        yield Fault((*training.steps, "max_steps"), text)
    elif not steps and not epochs:
        text = "missing; a pretrain stage needs `max_steps` or `num_train_epochs`, above 0."
        yield Fault((*training.steps, "max_steps"), text)


def _check_masking(stage: RawStage) -> Iterator[Fault]:
    masking = stage.at("masking")
    if "masking" in stage.data and _task(stage) != "masked":
        yield Fault(masking.steps, "belongs to `objective: masked`, and this stage trains on next tokens. Remove it.")
    if masking.data.get("whole_word_mask") is True:
        for key in ("mask_replace_prob", "random_replace_prob"):
            if key in masking.data:
                text = "with whole_word_mask transformers replaces every masked token by the mask token. Remove it."
                yield Fault((*masking.steps, key), text)


def _positive(value: Any) -> bool:
    """Returns True if a number is above zero; a value of another type is another check's to report."""
    return value is not None and (not isinstance(value, (int, float)) or value > 0)


def _check_ancestors(stage: RawStage, earlier: list[RawStage]) -> Iterator[Fault]:
    names = [other.name for other in earlier if other.name]
    parent, replayed = as_text(stage.data.get("parent")), stage.at("replay")
    before = [other for other in earlier if other.name == parent] if parent else earlier[-1:]
    if before and parent != BASE and stage.kind in _TRAINED_FOR and _task(before[0]) != _task(stage):
        left, wanted = _LEFT[_task(before[0])], _LEFT[_task(stage)]
        text = f"'{before[0].name}' leaves {left}, and this stage trains {wanted}. Write `parent: base` or another"
        yield Fault((*stage.steps, "parent"), f"{text} earlier stage.")
    if parent is not None and parent not in (BASE, *names):
        yield Fault((*stage.steps, "parent"), _not_among("an earlier stage", parent, [BASE, *names]))
    if (name := as_text(replayed.data.get("stage"))) is not None and name not in names:
        yield Fault((*replayed.steps, "stage"), _not_among("an earlier stage", name, names))
    elif any(other.name == name and other.kind not in ("pretrain", "sft") for other in earlier):
        text = f"'{name}' does not train on texts. Allowed is an earlier stage of kind pretrain or sft."
        yield Fault((*replayed.steps, "stage"), text)


_TRAINED_FOR = KINDS.keys() - {"classification"}  # a task that the model has; a classifier's head fits any
_LEFT = {
    "classification": "a classifier, which says no text",
    "masked": "an encoder, which fills masked tokens",
    "causal": "a model of next tokens",
    "seq2seq": "an encoder-decoder model",
}


def _task(stage: RawStage) -> str:
    """Returns the task of the model that a stage leaves; `stage_config.StageBase.task` of a stage as plain data."""
    if stage.kind in ("classification", "translation"):
        return "seq2seq" if stage.kind == "translation" else "classification"
    return "masked" if stage.kind == "pretrain" and stage.data.get("objective") == "masked" else "causal"


def _check_architecture(data: dict[str, Any]) -> Iterator[Fault]:
    """A model from nothing is an encoder, a decoder or both, and the stages that start from it train what it is."""
    model_type = as_text(Block((), data).at("model").at("architecture").data.get("model_type"))
    if model_type is None or model_type not in model_types():
        return
    task = "masked" if model_type in encoder_types() else "seq2seq" if model_type in seq2seq_types() else "causal"
    for number, stage in enumerate(stages(data)):
        from_base = stage.data.get("parent") == BASE or (number == 0 and "parent" not in stage.data)
        if not from_base or stage.kind not in _TRAINED_FOR or _task(stage) == task:
            continue
        key, instead = "kind", _INSTEAD[task]
        if stage.kind == "pretrain" and task != "seq2seq":
            key, instead = "objective", f"Write `objective: {task}`"
        text = (
            f"the architecture {model_type} is {_LEFT[task]}, and this stage trains {_LEFT[_task(stage)]}. {instead}."
        )
        yield Fault((*stage.steps, key), text)


_INSTEAD = {
    "masked": "Take `kind: pretrain` with `objective: masked`, or `kind: classification`",
    "causal": "Take `kind: sft`, or another architecture such as t5",
    "seq2seq": "Take `kind: translation`, or another architecture such as llama",
}


def _not_among(what: str, name: str, names: list[str]) -> str:
    allowed = f"allowed: {listed(names)}" if names else "there is none"
    return f"'{name}' is not {what}; {allowed}.{did_you_mean(name, names)}"


def _check_weights(stage: RawStage) -> Iterator[Fault]:
    weighted = [source.data.get("weight") is not None for source in stage.sources]
    for source, has_weight in zip(stage.sources, weighted, strict=True):
        if any(weighted) and not has_weight and source.data:
            yield Fault(
                source.steps, "has no `weight`, and other sources of the stage do. Give every source one, or none."
            )


def _check_metrics(suite: RawSuite) -> Iterator[Fault]:
    names = texts(suite.data.get("metrics"))
    if (masked := [name for name in names if name in MASKED_METRICS]) and len(masked) < len(names):
        other = next(name for name in names if name not in MASKED_METRICS)
        text = f"{masked[0]} asks an encoder and {other} does not, so no model has both. Make two suites of them."
        yield Fault((*suite.steps, "metrics"), text)
    for index, name in enumerate(names):
        if name not in OUR_METRICS and name not in FAMILIES and not is_elsewhere(name):
            text = f"unknown metric '{name}'; the metrics are {listed(OUR_METRICS)}. One of the Hub is named with its "
            text += f"owner (owner/metric), one of your own as a script (./metric.py).{did_you_mean(name, OUR_METRICS)}"
            yield Fault((*suite.steps, "metrics", index), text)
    for name, options in mapping(suite.data.get("metric_options")).items():
        steps = (*suite.steps, "metric_options", name)
        if name not in names:
            yield Fault(steps, f"is not among the suite's metrics ({listed(names)}).{did_you_mean(name, names)}")
        metric = OUR_METRICS.get(FAMILIES[name][0] if name in FAMILIES else name)
        for option in mapping(options):
            if metric is not None and option not in metric.options:
                allowed = f"they are {listed(metric.options)}" if metric.options else "it has none"
                text = f"unknown option of {name}; {allowed}.{did_you_mean(option, metric.options)}"
                yield Fault((*steps, option), text)


def _check_lm_eval(suite: RawSuite) -> Iterator[Fault]:
    """A suite has data and metrics, or a task of lm-eval, which brings its own."""
    own, its = ("data", "metrics"), ("limit", "num_fewshot", "include_path")
    if suite.data.get("lm_eval") is not None:
        for key in (*own, "swap", "target", "choices", "generation"):
            if suite.data.get(key):
                yield Fault((*suite.steps, key), "a task of lm-eval brings its own. Remove it, or `lm_eval`.")
        return
    for key in own:
        if key not in suite.data:
            about = "the held-out data, a source" if key == "data" else "a list of what is measured"
            yield Fault((*suite.steps, key), f"missing; {about} (or `lm_eval: TASK` instead of data and metrics).")
    if suite.data.get("metrics") == []:
        yield Fault((*suite.steps, "metrics"), "found an empty list; allowed is a list with at least one item.")
    for key in its:
        if suite.data.get(key) is not None:
            instead = " Use `take` of the source." if key == "limit" else ""
            yield Fault((*suite.steps, key), f"has an effect with `lm_eval` only.{instead}")


def _check_swap(suite: RawSuite) -> Iterator[Fault]:
    swap, steps = suite.data.get("swap"), (*suite.steps, "swap")
    asked = "flip_rate" in texts(suite.data.get("metrics"))
    if asked and swap is None:
        text = "missing; flip_rate needs the words to swap: [[he, she], [his, her]], or {name: {women: [Anna], ...}}."
        yield Fault(steps, text)
    elif swap is not None and not asked:
        yield Fault(steps, "has an effect on the metric flip_rate only. Add it to `metrics`, or remove `swap`.")
    if isinstance(swap, list) and not all(len(sequence(words)) > 1 for words in swap):
        yield Fault(steps, "each list needs two words or more, which take each other's place: [[he, she], [his, her]].")
    groups = [mapping(words) for words in mapping(swap).values()]
    if any(len(words) < 2 or list(words) != list(groups[0]) or not all(words.values()) for words in groups):
        text = "each mark needs the same two groups or more, each with words: {name: {women: [Anna], men: [Ali]}}."
        yield Fault(steps, text)


def _check_outcome(data: dict[str, Any]) -> Iterator[Fault]:
    every = stages(data)
    if not every:
        return
    adapters = [stage.name for stage in every if adapter_of(stage) is not None]
    if data.get("merge") and not adapters:
        yield Fault(("merge",), "no stage has a `lora:` block, so there is no adapter to merge. Remove it.")
    yield from check_added_tokens(every, data)
    yield from check_merges(every, data)
    yield from check_push(every, data)
