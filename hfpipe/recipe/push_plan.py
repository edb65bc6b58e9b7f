"""What a recipe pushes, and where: known before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hfpipe.recipe.adapters import adapter_of
from hfpipe.recipe.config import Push, Recipe
from hfpipe.recipe.faults import Fault, did_you_mean, listed
from hfpipe.recipe.raw import RawStage, mapping, text_of

NEEDS_AN_ADAPTER = ("adapter", "merged", "both")
_ONLY_OF = {"merged_repo_id": ("both",), "parent_repo_id": ("adapter", "both")}


def check_push(every: list[RawStage], data: dict[str, Any]) -> Iterator[Fault]:
    """Yields what cannot be pushed so."""
    push = mapping(data.get("push"))
    if not push:
        return
    names = [stage.name for stage in every if stage.name]
    adapters = [stage.name for stage in every if adapter_of(stage) is not None]
    pushed, what = text_of(push.get("stage")), push.get("what", "adapter")
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
    revision, tag = text_of(push.get("revision")), text_of(push.get("tag"))
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
    """A repository holds one model, and a word for one has an effect."""
    for key, kinds in _ONLY_OF.items():
        if push.get(key) is not None and what not in kinds:
            text = f"has an effect with `what: {' or '.join(kinds)}` only. Remove it, or write that."
            yield Fault(("push", key), text)
    names = {key: name for key in ("repo_id", *_ONLY_OF) if (name := text_of(push.get(key))) is not None}
    if what == "both" and "repo_id" in names:
        names.setdefault("merged_repo_id", f"{names['repo_id']}-merged")
    places: dict[str, str] = {}
    for key, name in names.items():
        if (other := places.setdefault(name.lower(), key)) != key:  # capitals make no other name on the Hub
            where = ("push", key if key in push else other)
            text = f"'{name}' is `{other if key in push else key}` too, and a repository holds one model. Take another."
            yield Fault(where, text)


def asked_words(push: Push | None, given: dict[str, Any]) -> dict[str, Any]:
    """The words of a push by hand: those that are given, and those of the recipe that go with them."""
    words = push.model_dump(exclude_none=True) if push is not None else {}
    if push is not None and push.what == "both" and given.get("what") == "merged":
        words["repo_id"] = push.merged_repo_id or f"{push.repo_id}-merged"  # where the recipe puts it
    words |= given
    for key, kinds in _ONLY_OF.items():
        if key not in given and words.get("what") not in kinds:
            words.pop(key, None)
    if given.get("create_pr"):
        words = {key: value for key, value in words.items() if key not in ("revision", "tag") or key in given}
    elif given.get("revision") or given.get("tag"):
        words["create_pr"] = given.get("create_pr", False)
    return words | {"checkpoints": "end"}  # they were for the training


def pushed_stage(recipe: Recipe, push: Push) -> str:
    """The stage whose work is pushed: the one that is named, else the last with an adapter where one is asked for."""
    adapters = [stage.name for stage in recipe.stages if stage.adapter is not None]
    if push.stage is None and push.what in NEEDS_AN_ADAPTER and adapters:
        return adapters[-1]
    return push.stage or recipe.stages[-1].name


def parent_push(push: Push, what: str, stage: str) -> Push:
    """The push of the earlier stage that an adapter of a chain is loaded on: at once, not as a pull request."""
    repo_id = push.parent_repo_id or f"{push.repo_id}-base"
    return push.model_copy(update={"repo_id": repo_id, "what": what, "stage": stage, "create_pr": False})


def pushes_of(recipe: Recipe, push: Push) -> list[Push]:
    """One push for each repository that `push:` fills, of one artefact each; without the parent of an adapter."""
    stage = pushed_stage(recipe, push)
    if push.what != "both":
        return [push.model_copy(update={"stage": stage})]
    merged = {"repo_id": push.merged_repo_id or f"{push.repo_id}-merged", "what": "merged"}
    return [push.model_copy(update={"stage": stage, **place}) for place in ({"what": "adapter"}, merged)]


def planned_pushes(recipe: Recipe, push: Push) -> list[Push]:
    """As `pushes_of`, and first the parent that the adapter of a chain will have, as the recipe lets foresee."""
    pushes = pushes_of(recipe, push)
    by_name = {stage.name: stage for stage in recipe.stages}
    trained = by_name[str(pushes[0].stage)]
    while trained.parent_adapter == "continue":  # the adapter lies on what its first stage started from
        trained = by_name[recipe.parent_of(trained.name)]
    before = by_name.get(recipe.parent_of(trained.name))
    if pushes[0].what != "adapter" or before is None:
        return pushes
    return [parent_push(push, "model" if before.adapter is None else "merged", before.name), *pushes]
