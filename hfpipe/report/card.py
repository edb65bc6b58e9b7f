"""The model card: what a pushed artefact is, how to load it, what it gained and what it cost.

The metadata block goes through huggingface_hub's own `ModelCardData`, so that the Hub shows the base model, the data
sets and the scores (`model-index`). The text holds nothing that changes from one push of a run to the next: the same
run gives the same card, and a repeated push changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hfpipe.recipe import Recipe, Source, Stage
from hfpipe.recipe.config import BUILDERS, hub_id
from hfpipe.report.facts import cost_section
from hfpipe.report.usage import TASKS, Artefact, how_to_load, lineage
from hfpipe.scores.scorecard import Change, Score, forgetting, how_counted, of_lineage, stages_of

TRANSLATED = {"bleu", "chrf", "ter"}  # metrics of a translation, where rouge is of a summary
LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")  # what the Hub takes


def model_card(
    artefact: Artefact,
    recipe: Recipe,
    scores: Sequence[Score],
    environment: Mapping[str, Any],
    costs: Mapping[str, dict[str, Any]] | None = None,
) -> str:
    """The README.md of a pushed artefact.

    Args:
        artefact: What is pushed.
        recipe: The recipe of the run.
        scores: Its scorecard; may be empty.
        environment: environment.json; every key is optional.
        costs: What each stage cost, see `stage_costs`.

    Returns:
        A metadata block and Markdown.
    """
    scores = of_lineage(scores, recipe.lineage(artefact.stage))  # what other stages did is not about this artefact
    costs = costs or {}
    spent = {stage.name: costs[stage.name] for stage in lineage(recipe, artefact.stage) if stage.name in costs}
    cost = cost_section(spent)
    sections = [
        f"# {artefact.repo_id.split('/')[-1]}",
        _what_it_is(artefact, recipe),
        "## How to load it\n\n" + how_to_load(artefact, recipe),
        "## Scores\n\n" + _scores(artefact, scores),
        *([artefact.dial] if artefact.dial else []),
        "## Training\n\n" + _training(artefact, recipe),
        *([cost.markdown()] if cost else []),
        "## Environment\n\n" + _environment(environment),
        "## Limits\n\n" + _limits(artefact, environment),
    ]
    return f"---\n{_metadata(artefact, recipe, scores, spent).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _metadata(
    artefact: Artefact, recipe: Recipe, scores: Sequence[Score], spent: Mapping[str, dict[str, Any]]
) -> ModelCardData:
    adapter = artefact.what == "adapter"
    stages = lineage(recipe, artefact.stage)
    task = _hub_task(recipe, stages[-1])
    used = dict.fromkeys(found for stage in stages for source in stage.data if (found := hub_id(source)))
    here = [score for score in scores if score.stage == artefact.stage]
    tags = ["hfpipe", *dict.fromkeys(stage.kind for stage in stages), *([stages[-1].method.lower()] if adapter else [])]
    relation = "adapter" if adapter else "quantized" if artefact.quantized else "finetune"
    license = artefact.license or stated(artefact.base_facts)
    terms: dict[str, Any] = {key: artefact.base_facts.get(key) for key in ("license_name", "license_link")}
    return ModelCardData(
        base_model=artefact.base,
        base_model_relation=relation if artefact.base else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=task,
        license=license,
        language=_languages(artefact) or None,
        datasets=list(used) or None,
        tags=tags,
        model_name=artefact.repo_id.split("/")[-1],
        eval_results=[_eval_result(score, recipe, task) for score in here] or None,
        **(terms if license == "other" and not artefact.license else {}),
        **_emissions(spent),
    )


def _languages(artefact: Artefact) -> list[str]:
    """The languages that the data sets were said to be in, then those of the base."""
    found = []
    for facts in (*artefact.data_facts.values(), artefact.base_facts):
        told = facts.get("language") or []
        found += [told] if isinstance(told, str) else list(told)
    return [name for name in dict.fromkeys(map(str, found)) if LANGUAGE.fullmatch(name)]


def _hub_task(recipe: Recipe, stage: Stage) -> str:
    """The Hub's name of what the model is for; an encoder-decoder that is measured by ROUGE alone summarizes."""
    metrics = {name for suite in recipe.evaluate.values() for name in suite.metrics}
    if stage.task == "seq2seq" and not metrics & TRANSLATED and any(name.startswith("rouge") for name in metrics):
        return "summarization"
    return TASKS[stage.task][0]


def _emissions(spent: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """`co2_eq_emissions` of the Hub, in grams; nothing when an attempt at a stage was not measured."""
    totals = list(spent.values())
    if not totals or any(total["kg_co2"] is None or total["measured"] < total["attempts"] for total in totals):
        return {}
    grams = 1000 * sum(total["kg_co2"] for total in totals)
    last = totals[-1]
    facts = {"emissions": float(f"{grams:.3g}"), "source": last["energy_by"], "hardware_used": last["device"]}
    return {"co2_eq_emissions": {**facts, "geographical_location": last["country"]}}


def _eval_result(score: Score, recipe: Recipe, task: str) -> EvalResult:
    suite = recipe.evaluate.get(score.suite)
    source = suite.data if suite else None
    arguments = source.passed_through if source else {}
    return EvalResult(
        task_type=task,
        dataset_type=(hub_id(source) if source else None) or score.suite,
        dataset_name=score.suite,
        dataset_config=arguments.get("name"),
        dataset_split=arguments.get("split"),
        dataset_revision=arguments.get("revision"),
        metric_type=score.metric,
        metric_name=f"{score.metric} on {score.suite} (n = {score.n})",
        metric_value=round(score.value, 6),
    )


def _what_it_is(artefact: Artefact, recipe: Recipe) -> str:
    last = lineage(recipe, artefact.stage)[-1]
    a = "An" if last.method[0] in "aeio" else "A"
    made = {
        "adapter": f"{a} {last.method} adapter for {{base}}",
        "merged": f"{{base}} with {a.lower()} {last.method} adapter merged into its weights",
        "model": "{base}, fine-tuned in full",
    }[artefact.what]
    if artefact.base:
        made = made.format(base=f"[{artefact.base}](https://huggingface.co/{artefact.base})")
    else:
        made = "A language model trained from nothing" + (", with an adapter merged in" if "{base} w" in made else "")
    if artefact.base and artefact.base_revision:
        made += f" (commit `{artefact.base_revision}`)"
    how = f", on the base in {last.quantized.type}" if last.quantized else ""
    text = f"{made}, made by stage `{artefact.stage}` of the hfpipe recipe `{recipe.name}`{how}."
    if artefact.strength is not None:
        text += (
            f"\n\nIt has {artefact.strength:g} of the strength that was trained, on the line from the model that the "
        )
        text += "stage started from to the trained one: the most gain inside the forgetting that the recipe allows. "
        text += "The strength is folded into the weights here; nothing has to be scaled."
    return text


def _scores(artefact: Artefact, scores: Sequence[Score]) -> str:
    if not scores:
        return "No suite was scored."
    order = stages_of(scores)
    by_place = {(score.key, score.stage): score for score in scores}
    lines = ["| suite | metric | n | " + " | ".join(order) + " |", "| --- " * (3 + len(order)) + "|"]
    for key in dict.fromkeys(score.key for score in scores):
        cells = [_cell(by_place.get((key, stage))) for stage in order]
        some = next(score for score in scores if score.key == key)
        lines.append(f"| {some.suite} | {some.metric} {some.arrow} | {some.n} | " + " | ".join(cells) + " |")
    note = "↑ higher is better, ↓ lower is better, → nearest is best; ± is one standard error."
    table = "\n".join(lines) + f"\n\n{note}{how_counted(scores)}"
    if artefact.stage not in order:
        return f"{table}\n\nStage `{artefact.stage}`, which made this artefact, was not scored."
    return f"{table}\n\n{_gain_and_forgetting(artefact.stage, scores)}"


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{score.value:.4g}" + (f" ± {score.stderr:.2g}" if score.stderr is not None else "")


def _gain_and_forgetting(stage: str, scores: Sequence[Score]) -> str:
    """One line per suite and metric: better or worse than the best before, or within the noise."""
    changes = [forgetting(scores, stage, score.key) for score in scores if score.stage == stage]
    lines = [_in_words(change) for change in changes if change is not None]
    intro = "Against the best score before this stage, the base included (± is the standard error of the difference):"
    return "\n".join([intro, "", *lines]) if lines else "There is no score from before this stage to compare with."


def _in_words(change: Change) -> str:
    before, after = change.before, change.after
    word = ("gained" if change.gain > 0 else "forgotten") if change.beyond_noise else "no difference beyond the noise"
    found = f"{before.value:.4g} ({before.stage}) to {after.value:.4g}, {abs(change.gain):.3g} ± {change.stderr:.2g}"
    return f"- **{word}**: {after.suite}, {after.metric}: {found}"


def _training(artefact: Artefact, recipe: Recipe) -> str:
    lines = []
    for number, stage in enumerate(lineage(recipe, artefact.stage), start=1):
        sources = ", ".join(_source(source) for source in stage.data)
        how = f"LoRA of rank {stage.adapter.get('r', 8)}" if stage.method == "LoRA" and stage.adapter else stage.method
        how = "all weights" if stage.adapter is None else how
        options = ", ".join(f"{key} {value}" for key, value in stage.training.items())
        lines.append(
            f"{number}. `{stage.name}` ({stage.kind}, {how}) on {sources}" + (f": {options}" if options else "")
        )
    files = dict.fromkeys(file for source in _sources(recipe) for file in _local_files(source))
    beside = f", beside these files, which are not here: {', '.join(f'`{file}`' for file in files)}" if files else ""
    again = f"[recipe.yaml](recipe.yaml) repeats the run: `hfpipe run recipe.yaml`{beside}."
    return "\n".join(lines) + f"\n\nSeed {recipe.seed}. {again}"


def _sources(recipe: Recipe) -> list[Source]:
    return [*(source for stage in recipe.stages for source in stage.data), *(s.data for s in recipe.evaluate.values())]


def _local_files(source: Source) -> list[str]:
    """The files and folders of the machine of the run that a source reads, as the recipe names them."""
    given = source.passed_through
    files = given.get("data_files") or []
    groups = files.values() if isinstance(files, dict) else [files]
    named = [name for group in groups for name in ([group] if isinstance(group, str) else group)]
    if hub_id(source):
        return []
    folder = [source.path] if source.path not in BUILDERS else []
    return [name for name in (*folder, given.get("data_dir"), *named) if name and "://" not in name]


def _source(source: Source) -> str:
    found = hub_id(source)
    name = f"[{found}](https://huggingface.co/datasets/{found})" if found else f"`{source.path}`"
    config = source.passed_through.get("name")
    return (
        name + (f" ({config})" if config else "") + (f", weight {source.weight:g}" if source.weight is not None else "")
    )


def _environment(environment: Mapping[str, Any]) -> str:
    """Versions and hardware as they were recorded; what was empty is left out."""
    versions = {name: environment[name] for name in ("hfpipe", "python") if environment.get(name)}
    versions |= environment.get("packages") or {}
    lines = []
    for title, values in [
        ("versions", versions),
        *((key, environment.get(key) or {}) for key in ("hardware", "launch")),
    ]:
        told = [f"{key} {', '.join(map(str, v)) if isinstance(v, list) else v}" for key, v in values.items() if v]
        if told:
            lines.append(f"- {title}: {'; '.join(told)}")
    return "\n".join(lines) or "Not recorded."


def _limits(artefact: Artefact, environment: Mapping[str, Any]) -> str:
    lines = [
        "- What is known about this artefact is in the table above and nothing else: no suite measured its safety, its "
        "truthfulness, or its use in other languages and fields.",
        "- It learned from the data sets above and may repeat what is wrong or offensive in them.",
    ]
    if artefact.base:
        lines.append(f"- It inherits the limits and the terms of use of {artefact.base}.")
    if environment.get("trust_remote_code"):
        lines.append("- The code in the base's repository ran (`trust_remote_code`); loading it may need the same.")
    if remote := environment.get("remote_metrics"):
        lines.append(f"- Some of the scores are by code of the Hub: {', '.join(remote)}.")
    base_license = stated(artefact.base_facts)
    license = artefact.license or base_license
    lines += [f"- {line}" for line in licence_lines(license, artefact.base, base_license, artefact.data_facts)]
    return "\n".join(lines)


# What a licence asks that another may not, by its name on the Hub: https://huggingface.co/docs/hub/repositories-licenses
TERMS = {
    "forbids commercial use": re.compile(r"-nc\b|noncommercial|-research"),
    "forbids to pass on what is made of it": re.compile(r"-nd\b"),
    "asks that what is made of it carries the same licence": re.compile(r"-sa\b|^(a|l)?gpl|^odbl|^cdla-sharing|^eupl"),
    "has terms of its own": re.compile(r"^(other|unknown|llama|gemma|openrail|bigscience|creativeml|deepfloyd)"),
}


def stated(facts: Mapping[str, Any]) -> str | None:
    """The one licence that a card of the Hub names."""
    license = facts.get("license")
    return license if isinstance(license, str) and license else None


def terms_of(license: str) -> set[str]:
    return {term for term, pattern in TERMS.items() if pattern.search(license.lower())}


def licence_lines(
    license: str | None, base: str | None, base_license: str | None, data: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """What a reader must know about the licence: where it comes from, and every conflict.

    Args:
        license: What the card states; None for nothing.
        base: Hub id of the base model; None for a model that was trained from nothing.
        base_license: Its licence; None where it is not known.
        data: What the cards of the data sets say, by Hub id.
    """
    if license is None:
        yield "No licence is stated here: that of the base and of the data sets must be looked up."
    if license and base_license and license != base_license:
        yield f"**Licence conflict**: stated here is {license}, and the base {base} is under {base_license}."
    for id, facts in data.items():
        theirs = stated(facts)
        if theirs is None:
            yield f"The licence of the data set {id} is not known."
        elif more := sorted(terms_of(theirs) - terms_of(license or "")):
            here = f"{license} does not" if license else "no licence is stated here"
            yield (
                f"**Licence conflict**: the data set {id} is under {theirs}, which {' and '.join(more)}; {here}. "
                "Whether that reaches a model trained on it has to be settled before the model is used so."
            )
