"""`push:` of a recipe: a push that would fail at the end is refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pushing import RECIPE

from hfpipe.core.errors import RecipeError
from hfpipe.recipe import Push, load_recipe
from hfpipe.recipe.push_plan import asked_words


def said(folder: Path, push: dict[str, Any]) -> str:
    """The fault of a recipe with this `push:`; nothing where there is none."""
    (folder / "r.yaml").write_text(json.dumps(RECIPE | {"push": {"repo_id": "me/toy"} | push}))
    try:
        load_recipe(folder / "r.yaml")
    except RecipeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("push", "words"),
    [
        ({"repo_id": "me/toy.git"}, "push.repo_id: found the text 'me/toy.git'; a name on the Hub"),
        ({"repo_id": "me/to--y"}, "no '--'"),
        ({"repo_id": "me/" + "x" * 97}, "at most 96"),
        ({"revision": ""}, "push.revision: found the text '', which git does not take"),
        ({"revision": "a b"}, "such as v1 or dev/long"),
        ({"revision": "../x"}, "git does not take"),
        ({"revision": "refs/pr/1"}, "`create_pr: true`"),
        ({"revision": "c" * 40}, "reads as a commit"),
        ({"tag": "-v1"}, "push.tag: found the text '-v1', which git does not take"),
        ({"tag": "v1", "revision": "v1"}, "push.tag: 'v1' is the name of a branch too"),
        ({"tag": "main"}, "would mean either"),
        ({"tag": "v1", "create_pr": True}, "push.tag: a pull request has a branch of its own"),
        ({"create_pr": True, "checkpoints": "every_save"}, "push.checkpoints: checkpoints go to branches"),
        ({"revision": "checkpoints-chat", "checkpoints": "every_save"}, "the branch of that stage's checkpoints"),
        ({"commit_message": ""}, "push.commit_message: allowed is one line of text"),
        ({"commit_message": "one\ntwo"}, "allowed is one line of text"),
        ({"license": "Apache 2.0"}, "Did you mean apache-2.0?"),
        ({"deadline_seconds": 1e9}, "of at most 604800"),
        ({"what": "model"}, "'chat' trains an adapter. Write `what: adapter`, or `what: merged`"),
        ({"what": "model", "stage": "chat"}, "'chat' trains an adapter"),
        ({"merged_repo_id": "me/whole"}, "push.merged_repo_id: has an effect with `what: both` only"),
        ({"what": "merged", "parent_repo_id": "me/law"}, "with `what: adapter or both` only"),
        ({"what": "both", "merged_repo_id": "Me/Toy"}, "'Me/Toy' is `repo_id` too"),
        ({"what": "both", "parent_repo_id": "me/toy-merged"}, "'me/toy-merged' is `merged_repo_id` too"),
    ],
)
def test_what_could_not_be_pushed_is_refused(tmp_path: Path, push: dict[str, Any], words: str) -> None:
    fault = said(tmp_path, push)
    assert words in fault
    assert fault.startswith("1 fault in")


@pytest.mark.parametrize(
    "push",
    [
        {"repo_id": "toy"},
        {"what": "model", "stage": "law"},
        {"what": "both", "merged_repo_id": "me/whole", "parent_repo_id": "me/law", "revision": "dev/1.x", "tag": "v1"},
        {"create_pr": True, "commit_message": "An adapter, at last", "license": "apache-2.0"},
        {"checkpoints": "every_save", "revision": "chat", "deadline_seconds": 60},
    ],
)
def test_what_can_be_pushed_is_not(tmp_path: Path, push: dict[str, Any]) -> None:
    assert said(tmp_path, push) == ""


def test_the_words_of_a_push_by_hand_go_before_those_of_the_recipe() -> None:
    both = Push(repo_id="me/toy", what="both", merged_repo_id="me/whole", parent_repo_id="me/law", tag="v1")
    merged = asked_words(both, {"what": "merged"})
    assert (merged["repo_id"], merged["tag"]) == ("me/whole", "v1")  # where the recipe puts the merged model
    assert not merged.keys() & {"merged_repo_id", "parent_repo_id"}
    assert asked_words(both, {"what": "merged", "repo_id": "me/other"})["repo_id"] == "me/other"
    assert "tag" not in asked_words(both, {"create_pr": True})
    assert asked_words(Push(repo_id="me/toy", create_pr=True), {"tag": "v2"})["create_pr"] is False
    assert asked_words(None, {"repo_id": "me/toy"})["repo_id"] == "me/toy"
