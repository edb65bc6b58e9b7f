"""Pushes what a run made to the Hub, so that neither a failure nor a second try can lose or double anything.

The artefact is built whole on disk first (`prepare_artifact`); `upload.py` then brings it to the Hub in a process of
its own, which is ended past a deadline.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache

from hfpipe.errors import MachineError, RecipeError
from hfpipe.files import whole_folder, write_json, write_text
from hfpipe.folders import model_of, strength_of
from hfpipe.recipe import Push, Recipe, load_recipe
from hfpipe.report.card import HUB_ID, Artefact, model_card
from hfpipe.report.facts import stage_costs
from hfpipe.scores import read_scorecard
from hfpipe.upload import ADAPTER_CONFIG, without_tokens

PUSHED = {".safetensors", ".json", ".jinja", ".txt", ".model"}  # weights, configurations, tokenizers; never a pickle
NOT_PUSHED = {"trainer_state.json"}


def prepare_artifact(run_dir: Path, push: Push, recipe: Recipe) -> Path:
    """Builds the folder that is uploaded: weights, tokenizer, card, recipe and scorecard, in one piece.

    Args:
        run_dir: The run folder.
        push: What to push, and where.
        recipe: The recipe of the run.

    Returns:
        `<run_dir>/push/<what>`. Weights are hard links to the run's own where the file system has them.

    Raises:
        RecipeError: The stage did not make what `push.what` asks for, or others could not load it.
    """
    stage = push.stage or recipe.stages[-1].name
    made = _find_made(run_dir, push.what, stage, recipe)
    environment = _read_json(run_dir / "environment.json")
    known_base = environment.get("base") or {}
    base, revision = recipe.model.id, known_base.get("revision")
    adapter = _read_json(made / ADAPTER_CONFIG) if push.what == "adapter" else {}
    if adapter:
        base = adapter.get("base_model_name_or_path")
        if base != known_base.get("id"):
            revision = None
        revision = adapter["revision"] = adapter.get("revision") or revision
        if not base or not is_on_hub(base):
            raise RecipeError(
                f"push.what: adapter, but the adapter of stage {stage!r} belongs to the local model {base!r}, which "
                "nobody else has. Push the merged model instead (`merge: true` and `push: {what: merged}`)."
            )
    elif base and not is_on_hub(base):
        base = revision = None
    license = known_base.get("license") or (_cached_license(base, revision) if base else None)
    strength = strength_of(run_dir / "stages" / stage)
    artefact = Artefact(push.repo_id, push.what, stage, push.revision, base, revision, license, strength)
    scorecard = run_dir / "scorecard.json"
    scores = read_scorecard(scorecard) if scorecard.is_file() else []
    target = run_dir / "push" / push.what
    with whole_folder(target) as folder:
        for file in sorted(made.rglob("*")):
            if file.is_file() and file.suffix in PUSHED and file.name not in NOT_PUSHED:
                _link(file, folder / file.relative_to(made))
        if adapter:
            write_json(folder / ADAPTER_CONFIG, adapter)
        for name in ("recipe.yaml", "scorecard.json"):
            if (run_dir / name).is_file():
                write_text(folder / name, without_tokens((run_dir / name).read_text()))
        card = model_card(artefact, recipe, scores, environment, stage_costs(run_dir, recipe))
        write_text(folder / "README.md", without_tokens(card))
    return target


def _find_made(run_dir: Path, what: str, stage: str, recipe: Recipe) -> Path:
    """The folder of the stage that holds what is asked for."""
    names = [s.name for s in recipe.stages]
    if stage not in names:
        raise RecipeError(f"push.stage: there is no stage {stage!r} in {run_dir}. Its stages are: {', '.join(names)}.")
    place = run_dir / "stages" / stage
    folder = place / "merged" if what == "merged" else model_of(place)
    if not folder.is_dir():
        remedy = (
            f"Merge it: hfpipe merge {shlex.quote(str(run_dir))} (or `merge: true` in the recipe)."
            if what == "merged"
            else "Run the recipe to its end: hfpipe run RECIPE continues where it stopped."
        )
        raise RecipeError(f"push.what: {what}, but {folder} does not exist. {remedy}")
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if is_adapter != (what == "adapter"):
        found, allowed = (
            ("an adapter", "`what: adapter`, or `what: merged` once it is merged")
            if is_adapter
            else ("a whole model", "`what: model`")
        )
        raise RecipeError(f"push.what: {what}, but stage {stage!r} made {found} ({folder}). Allowed here: {allowed}.")
    return folder


def is_on_hub(name: str) -> bool:
    """Whether a model's name is a Hub id, and not a folder of this machine."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def _cached_license(base: str, revision: str | None) -> str | None:
    """The licence in the base model's own card, when that is in the cache."""
    card = try_to_load_from_cache(base, "README.md", revision=revision)
    if not isinstance(card, str):
        return None
    license = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
    return license if isinstance(license, str) else None


def _link(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, place)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(file, place)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def push(
    run_dir: Path,
    *,
    repo_id: str | None = None,
    what: str | None = None,
    stage: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str | None = None,
    deadline_seconds: float | None = None,
) -> str:
    """Pushes an adapter or model of a run to the Hub, as one commit. Doing it again sends only what is missing.

    Args:
        run_dir: The run folder. What is not given below is taken from `push:` in its recipe.yaml.
        repo_id: Where to push; without a namespace, to the user's own.
        what: `adapter`, `merged` or `model`; without a word about it, what the stage made.
        stage: The stage whose work is pushed; the last by default.
        private: Who may see a repository that does not exist yet; only its owners by default.
        revision: A branch, made when it does not exist.
        tag: A name for the commit.
        commit_message: The commit's title.
        deadline_seconds: Time for the whole conversation; by default 30 minutes and one more per gigabyte.

    Returns:
        The page of the repository.

    Raises:
        RecipeError: The run does not hold what is to be pushed.
        MachineError: The Hub did not take it. The message says why, where the artefact lies, and how to finish.
    """
    if not (run_dir / "recipe.yaml").is_file():
        raise RecipeError(f"{run_dir} is not a run folder: it has no recipe.yaml. A run folder is runs/<name>.")
    recipe = load_recipe(run_dir / "recipe.yaml")
    given = {"repo_id": repo_id, "what": what, "stage": stage, "private": private, "revision": revision}
    given |= {"tag": tag, "commit_message": commit_message}
    given = {key: value for key, value in given.items() if value is not None}
    asked = _asked(run_dir, recipe, given)
    folder = prepare_artifact(run_dir, asked, recipe)
    again = _command(run_dir, given)
    task = {"folder": str(folder), "repo_id": asked.repo_id, "private": asked.private, "revision": asked.revision}
    task["tag"] = asked.tag
    task["message"] = asked.commit_message or f"{asked.what} of hfpipe run {recipe.name}"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    limit = deadline_seconds if deadline_seconds is not None else 1800 + 60 * size / 1e9
    try:
        done = _in_own_process(task, limit)
    except MachineError as error:
        raise MachineError(
            f"The push to {asked.repo_id} failed: {error} Nothing is lost: the artefact is whole in {folder}. "
            f"Finish with: {again}"
        ) from error
    state = "has it now" if done["new"] else "had it already, nothing was sent"
    print(f"{done['url']} {state} (commit {done['commit'][:8]}).", flush=True)
    return str(done["url"])


def check_access(repo_id: str, *, deadline_seconds: float = 60.0) -> str:
    """Asks the Hub, before anything is trained, whether this machine may write to a repository.

    Returns:
        One line that says it may.

    Raises:
        MachineError: It may not, or the Hub cannot be reached.
    """
    try:
        found = _in_own_process({"repo_id": repo_id}, deadline_seconds)
    except MachineError as error:
        raise MachineError(f"push.repo_id: nothing could be pushed to {repo_id}: {error}") from error
    return f"may write to {found['repo_id']}, which {'exists' if found['exists'] else 'will be made'}"


def _asked(run_dir: Path, recipe: Recipe, given: dict[str, Any]) -> Push:
    words = (recipe.push.model_dump() if recipe.push else {}) | given
    if "repo_id" not in words:
        raise RecipeError(
            f"Nothing says where to push {run_dir}: give --repo-id OWNER/NAME, or `push: {{repo_id: OWNER/NAME}}` "
            "in the recipe."
        )
    if "what" not in words:
        stage = words.get("stage") or recipe.stages[-1].name
        is_adapter = (run_dir / "stages" / stage / "model" / ADAPTER_CONFIG).is_file()
        words["what"] = "adapter" if is_adapter else "model"
    try:
        return Push(**words)
    except ValueError as error:
        raise RecipeError(f"push: {error}") from error


def _command(run_dir: Path, given: dict[str, Any]) -> str:
    """The command that does the same push again."""
    words = ["hfpipe", "push", str(run_dir)]
    for key, value in given.items():
        if key == "private":
            words.append("--private" if value else "--no-private")
        else:
            words += ["--" + key.replace("_", "-"), str(value)]
    return shlex.join(words)


def _in_own_process(task: dict[str, Any], limit: float) -> dict[str, Any]:
    try:
        process = subprocess.run(
            [sys.executable, "-m", "hfpipe.upload"],
            input=json.dumps(task),
            stdout=subprocess.PIPE,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        raise MachineError(f"the Hub was not done after {limit:g} seconds, the deadline.") from None
    lines = process.stdout.strip().splitlines()
    answer = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    if process.returncode:
        raise MachineError(answer.get("error") or f"the upload process ended with code {process.returncode}.")
    return answer
