"""Pins everything that a run takes from the Hub to a commit: found at the first start, kept in hub.json for the run's
life.

So a data set that moves on does not change a run under way, and the run folder's recipe.yaml repeats the run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, constants, hf_hub_download

from hfpipe.core import ranks
from hfpipe.core.files import read_json, write_json
from hfpipe.core.hub_errors import NoAnswer, causes
from hfpipe.evaluation.metrics import script_of, space_of
from hfpipe.recipe import Recipe, Source, Suite
from hfpipe.recipe.config import hub_id, is_on_hub

HF_URL = re.compile(r"hf://datasets/(?P<id>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/")
SECONDS = 10.0  # for one question
DEFAULT = (
    "default"  # of a metric: the tag of the installed `evaluate`, and main where a Space has none, as it loads them
)
FACTS = ("license", "license_name", "license_link", "language")
ACCESS = ("private", "gated")  # who may load it, as the Hub said at the start of the run


def pin_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with a commit wherever it names a data set, a tokenizer or a metric of the Hub.

    What could not be asked before the first stage began stays as it is written: it may come from a cache.

    Args:
        recipe: As the user wrote it.
        folder: The run folder. hub.json there says commit, licence and languages of everything; it is made once.
    """
    known = _read(folder)
    if not list((folder / "stages").glob("*/stage.json")):  # nothing has been trained: what failed may be asked again
        known = {key: facts for key, facts in known.items() if facts["revision"]}
    wanted = {_key(*one): one for one in _named(recipe)}
    asked = {key: one for key, one in wanted.items() if key not in known}
    if asked:
        known |= ranks.on_main(lambda: _ask(asked))
        if ranks.is_main():
            write_json(folder / "hub.json", known)
    commits = {key: facts["revision"] for key, facts in known.items() if facts["revision"]}
    stages = [
        stage.model_copy(update={"data": [_pinned(source, commits) for source in stage.data]})
        for stage in recipe.stages
    ]
    suites = {name: _pinned_suite(suite, commits) for name, suite in recipe.evaluate.items()}
    model, tokenizer = recipe.model, recipe.model.tokenizer
    if tokenizer is not None and (commit := commits.get(_key("model", tokenizer.id or "", tokenizer.revision))):
        model = model.model_copy(update={"tokenizer": tokenizer.model_copy(update={"revision": commit})})
    return recipe.model_copy(update={"stages": stages, "evaluate": suites, "model": model})


def _named(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """Kind, id and revision of everything on the Hub that the recipe names."""
    if recipe.model.id and is_on_hub(recipe.model.id):
        yield "model", recipe.model.id, recipe.model.revision
    tokenizer = recipe.model.tokenizer
    if tokenizer is not None and tokenizer.id and is_on_hub(tokenizer.id):
        yield "model", tokenizer.id, tokenizer.revision
    sources = [source for stage in recipe.stages for source in stage.data]
    for source in [*sources, *(suite.data for suite in recipe.evaluate.values())]:
        if (id := hub_id(source)) and is_on_hub(id):
            yield "dataset", id, source.passed_through.get("revision") or "main"
        for url in HF_URL.finditer(json.dumps(source.passed_through.get("data_files"))):
            yield "dataset", url["id"], url["revision"] or "main"
    for suite in recipe.evaluate.values():
        yield from _metrics_of(suite).values()


def _metrics_of(suite: Suite) -> dict[str, tuple[str, str, str]]:
    """Kind, id and revision of every metric of a suite whose code is a Space of the Hub, by its name."""
    spaces = {name: space for name in suite.metrics if (space := space_of(name))}
    given = {name: (suite.metric_options.get(name) or {}).get("revision") for name in spaces}
    return {name: ("space", space, given[name] or DEFAULT) for name, space in spaces.items()}


def _key(kind: str, id: str, revision: str) -> str:
    return f"{kind} {id}@{revision}"


def _ask(asked: dict[str, tuple[str, str, str]]) -> dict[str, Any]:
    """Commit, licence and languages of each; None for what cannot be asked: loading says what is wrong, if anything."""
    found: dict[str, Any] = {key: dict.fromkeys(("revision", *FACTS, *ACCESS)) for key in asked}
    if constants.is_offline_mode():
        return found
    for key, one in asked.items():
        try:
            _fill(found[key], *one)
        except Exception as error:  # no card, no access, no Hub: nothing of it stops a run
            if any(isinstance(cause, NoAnswer) for cause in causes(error)):
                break  # nor will the others be answered
    return found


def _fill(facts: dict[str, Any], kind: str, id: str, revision: str) -> None:
    if kind == "space":
        facts["revision"] = Path(script_of(id, None if revision == DEFAULT else revision)).parent.name
        return
    ask = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
    info = ask(id, revision=revision, timeout=SECONDS)
    facts |= {"revision": info.sha, "private": info.private, "gated": info.gated}
    card = hf_hub_download(id, "README.md", repo_type=kind, revision=facts["revision"], etag_timeout=SECONDS)
    data = ModelCard.load(card, ignore_metadata_errors=True).data
    facts |= {name: data.get(name) for name in FACTS}


def _pinned_suite(suite: Suite, commits: dict[str, str]) -> Suite:
    options = dict(suite.metric_options)
    for name, space in _metrics_of(suite).items():
        if commit := commits.get(_key(*space)):
            options[name] = (options.get(name) or {}) | {"revision": commit}
    return suite.model_copy(update={"data": _pinned(suite.data, commits), "metric_options": options})


def _pinned(source: Source, commits: dict[str, str]) -> Source:
    changes: dict[str, Any] = {}
    given = source.passed_through
    revision = given.get("revision") or "main"
    if commit := commits.get(_key("dataset", source.path, revision)):
        changes["revision"] = commit
    if files := given.get("data_files"):
        text = HF_URL.sub(lambda url: _pinned_url(url, commits), json.dumps(files))
        changes |= {"data_files": json.loads(text)} if json.loads(text) != files else {}
    return source.model_copy(update=changes) if changes else source


def _pinned_url(url: re.Match[str], commits: dict[str, str]) -> str:
    commit = commits.get(_key("dataset", url["id"], url["revision"] or "main"))
    return f"hf://datasets/{url['id']}@{commit}/" if commit else url[0]


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "hub.json"
    return read_json(file)
