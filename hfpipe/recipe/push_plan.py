"""Plans which artifact a recipe pushes, and where: known before anything is trained."""

from __future__ import annotations

from typing import Any

from hfpipe.recipe.config import Push, Recipe

NEEDS_AN_ADAPTER = ("adapter", "merged", "both")
ONLY_OF = {"merged_repo_id": ("both",), "parent_repo_id": ("adapter", "both")}


def asked_words(push: Push | None, given: dict[str, Any]) -> dict[str, Any]:
    """The keys of a push by hand: those that are given, and those of the recipe that go with them."""
    words = push.model_dump(exclude_none=True) if push is not None else {}
    if push is not None and push.what == "both" and given.get("what") == "merged":
        words["repo_id"] = push.merged_repo_id or f"{push.repo_id}-merged"  # where the recipe puts it
    words |= given
    for key, kinds in ONLY_OF.items():
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
    """The pushes of `pushes_of`, after that of the parent which the adapter of a chain will have, by the recipe."""
    pushes = pushes_of(recipe, push)
    by_name = {stage.name: stage for stage in recipe.stages}
    trained = by_name[str(pushes[0].stage)]
    while trained.parent_adapter == "continue":  # the adapter lies on what its first stage started from
        trained = by_name[recipe.parent_of(trained.name)]
    before = by_name.get(recipe.parent_of(trained.name))
    if pushes[0].what != "adapter" or before is None:
        return pushes
    return [parent_push(push, "model" if before.adapter is None else "merged", before.name), *pushes]
