"""Pushes what a run made to the Hub, so that neither a failure nor a second try can lose or double anything.

Each artefact is built whole on disk first (`bundle.py`); `upload.py` then brings it to the Hub in a process of its own,
which is ended past a deadline.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import WeakFileLock
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from hfpipe.core import display
from hfpipe.core.command import our_command, python_command
from hfpipe.core.errors import MachineError, RecipeError
from hfpipe.core.run_layout import ADAPTER_CONFIG, model_of
from hfpipe.core.secrets import without_secrets
from hfpipe.hub.bundle import find_made, parent_in_run, prepare_artifact
from hfpipe.recipe import Push, Recipe, load_recipe
from hfpipe.recipe.config import is_on_hub
from hfpipe.recipe.push_plan import asked_words, parent_push, planned_pushes, pushed_stage, pushes_of
from hfpipe.recipe.raw import stages
from hfpipe.recipe.rules.outcome import check_push

START, SLOWEST = 300.0, 500_000.0  # seconds and bytes per second: an upload may take START + size / SLOWEST
CHECKING = 90.0  # seconds that all questions before training may take


def push(run_dir: Path, **given: Any) -> str:
    """Pushes an adapter or model of a run to the Hub, as one commit. Doing it again sends only what is missing.

    With `what="both"`, adapter and merged model go to two repositories; before the adapter of a chain, the earlier
    stage that it is loaded on goes to another.

    Args:
        run_dir: The run folder.
        given: The words of a recipe's `push:` (see `Push`); what is not given or None is taken from the run's
            recipe.yaml. Without a word about `what`, it is what the stage made.

    Returns:
        The page of the repository; of `both`, the merged model's.

    Raises:
        RecipeError: The run does not hold what is to be pushed, or others could not load it.
        MachineError: The Hub did not take it. The message says why, where the artefact lies, and how to finish.
    """
    if not (run_dir / "recipe.yaml").is_file():
        raise RecipeError(f"{run_dir} is not a run folder: it has no recipe.yaml. A run folder is runs/<name>.")
    recipe = load_recipe(run_dir / "recipe.yaml")
    given = {key: value for key, value in given.items() if value is not None}
    asked = _asked(run_dir, recipe, given)
    again = _command(run_dir, given)
    url, parent = "", None
    with _alone(run_dir / "push" / "lock"):
        for one in _with_parent(run_dir, recipe, asked):
            is_parent = one.stage != pushed_stage(recipe, asked)
            folder = prepare_artifact(run_dir, one, recipe, parent if one.what == "adapter" else None)
            done = _upload(folder, one, recipe.name, again)
            parent = (done["repo_id"], done["commit"]) if is_parent else parent
            url = str(done["url"])
    return url


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Keeps a second push of the run out: it would build the artefact anew under the first.

    Raises:
        MachineError: One is under way.
    """
    lock.parent.mkdir(exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(WeakFileLock(lock, timeout=0.1))
        except TimeoutError as error:
            raise MachineError(
                f"another push of this run is under way, which holds {lock}. Wait for its end."
            ) from error
        yield


def _with_parent(run_dir: Path, recipe: Recipe, asked: Push) -> Iterator[Push]:
    """The pushes in order: an adapter names the commit of the model it is loaded on, so that goes first."""
    pushes = pushes_of(recipe, asked)
    for one in pushes:
        find_made(run_dir, one.what, str(one.stage), recipe)  # before the first is sent
    if pushes[0].what == "adapter" and (found := parent_in_run(run_dir, str(pushes[0].stage), recipe)):
        stage, what = found
        yield parent_push(asked, what, stage)
    yield from pushes


def deadline_of(push: Push, size: int) -> float:
    """Seconds that the upload of some bytes may take."""
    return push.deadline_seconds or START + size / SLOWEST


def _upload(folder: Path, push: Push, run: str, again: str) -> dict[str, Any]:
    task: dict[str, Any] = {"folder": str(folder), "message": push.commit_message or f"{push.what} of hfpipe run {run}"}
    task |= push.model_dump(include={"repo_id", "private", "revision", "tag", "create_pr"}) | {"run": run}
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    try:
        done = _in_own_process(task, deadline_of(push, size))
    except MachineError as error:
        raise MachineError(
            f"The push to {push.repo_id} failed: {error} Nothing is lost: the artefact is whole in {folder}. "
            f"Finish with: {again}"
        ) from error
    state = "has it now" if done["new"] else "had it already, nothing was sent"
    display.say(f"{without_secrets(done['url'])} {state} (commit {done['commit'][:8]}).", "result")
    return done


def check_access(recipe: Recipe, *, deadline_seconds: float = CHECKING) -> list[str]:
    """Asks the Hub, before anything is trained, whether this machine may push what the recipe says.

    Returns:
        One line for each repository, that it may; none without `push:`.

    Raises:
        RecipeError: Others could not load what would be pushed.
        MachineError: It may not, or the Hub cannot be reached.
    """
    if recipe.push is None:
        return []
    pushes = planned_pushes(recipe, recipe.push)
    if pushes[0].what == "adapter" and not (recipe.model.id and is_on_hub(recipe.model.id)):
        raise RecipeError(
            f"push.what: '{recipe.push.what}', but the adapter's base is {recipe.model.id or 'made in this run'}, "
            "which nobody else has. Write `what: merged`."
        )
    words = {"repo_id", "private", "revision", "tag", "create_pr", "license"}
    own = [one.repo_id for one in pushes_of(recipe, recipe.push)]
    said = dict(zip(own, ("repo_id", "merged_repo_id"), strict=False))
    base = (recipe.model.id, False) if len(pushes) == len(own) else (pushes[0].repo_id, True)
    asked = [
        one.model_dump(include=words)
        | {"run": recipe.name, "word": said.get(one.repo_id, "parent_repo_id")}
        | {"base": base if one.what == "adapter" else None}
        for one in pushes
    ]
    try:
        return list(_in_own_process({"check": asked}, deadline_seconds)["lines"])
    except MachineError as error:
        raise MachineError(
            f"{error} (To train now and push later, leave `push:` out, and afterwards: hfpipe push RUN --repo-id "
            f"{recipe.push.repo_id})"
        ) from error


def _asked(run_dir: Path, recipe: Recipe, given: dict[str, Any]) -> Push:
    words = asked_words(recipe.push, given)
    if "repo_id" not in words:
        raise RecipeError(
            f"Nothing says where to push {run_dir}: give --repo-id OWNER/NAME, or `push: {{repo_id: OWNER/NAME}}` "
            "in the recipe."
        )
    if "what" not in words:
        stage = words.get("stage") or recipe.stages[-1].name
        made = model_of(run_dir / "stages" / stage)
        words["what"] = "adapter" if (made / ADAPTER_CONFIG).is_file() else "model"
    try:
        asked = Push(**words)
    except ValidationError as error:
        found = "; ".join(f"{one['loc'][0]}: {_fault_of(one)}" for one in error.errors())
        raise RecipeError(f"push.{found} Nothing was sent.") from error
    data = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    for fault in check_push(stages(data), {"push": words}):
        raise RecipeError(f"{'.'.join(fault.steps)}: {fault.text}")
    return asked


def _fault_of(error: ErrorDetails) -> str:
    """A word of the command line that is not what it must be."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"found {error['input']!r}. {error['msg']}."


def _command(run_dir: Path, given: dict[str, Any]) -> str:
    """The command that does the same push again."""
    words = ["push", str(run_dir)]
    for key, value in given.items():
        if key == "deadline_seconds":  # the next push may have all the time it needs
            continue
        option = key.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
    return f"{our_command()} {shlex.join(words)}"


def _in_own_process(task: dict[str, Any], limit: float) -> dict[str, Any]:
    try:
        process = subprocess.run(
            python_command("hfpipe.hub.upload"),
            input=json.dumps(task | {"seconds": limit}),
            stdout=subprocess.PIPE,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        print(file=sys.stderr)  # after what is left of a progress bar
        raise MachineError(f"the Hub was not done after {limit:g} seconds, the deadline.") from None
    lines = process.stdout.strip().splitlines()
    answer = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    if process.returncode:
        raise MachineError(answer.get("error") or f"the upload process ended with code {process.returncode}.")
    return answer
