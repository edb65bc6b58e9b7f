"""The folder that is uploaded: built whole on disk before anything is sent."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from hfpipe.core.errors import RecipeError
from hfpipe.core.files import link_or_copy, read_json, whole_folder, write_json, write_text
from hfpipe.core.run_layout import ADAPTER_CONFIG, model_of, recorded_files, require_whole, strength_of
from hfpipe.core.secrets import has_secret, without_secrets
from hfpipe.recipe import Push, Recipe, dump_recipe, shared_recipe
from hfpipe.recipe.config import is_on_hub
from hfpipe.recipe.push_plan import pushed_stage
from hfpipe.report.card import model_card
from hfpipe.report.price import dial_section, dials_of
from hfpipe.report.usage import Usage, card_facts, data_facts

# Weights, configurations, tokenizers; never a pickle.
PUSHED = {".safetensors", ".json", ".jinja", ".txt", ".model", ".spm"}
WEIGHTS, SMALL = {".safetensors", ".model", ".spm"}, 2**18  # bytes of a text file that is searched for secrets
NOT_PUSHED = {"trainer_state.json"}


def prepare_artifact(run_dir: Path, push: Push, recipe: Recipe, parent: tuple[str, str] | None = None) -> Path:
    """Builds the folder that is uploaded: weights, tokenizer, card, recipe and scorecard, in one piece.

    Args:
        run_dir: The run folder.
        push: What to push, one artefact, and where.
        recipe: The recipe of the run.
        parent: Hub id and commit of the earlier stage that an adapter of a chain is loaded on.

    Returns:
        `<run_dir>/push/<what>`, and for a parent `<run_dir>/push/<what>-<stage>`. Weights are hard links to the run's
        own where the file system has them.

    Raises:
        RecipeError: The stage did not make what `push.what` asks for, or others could not load it.
    """
    stage = pushed_stage(recipe, push)
    made = find_made(run_dir, push.what, stage, recipe)
    environment = read_json(run_dir / "environment.json")
    known_base = environment.get("base") or {}
    base, revision = recipe.model.id, known_base.get("revision")
    adapter = read_json(made / ADAPTER_CONFIG) if push.what == "adapter" else {}
    if adapter:
        base, revision = parent or _base_of(adapter, known_base, stage)
        adapter |= {"base_model_name_or_path": base, "revision": revision}
    shared = shared_recipe(recipe)
    if base and not is_on_hub(base):
        base, revision = shared.model.id, None
    usage = _usage(run_dir, push, recipe, made, (base, revision))
    plots = {f"dial-{n}.svg": plot for n, plot in enumerate(usage.dial.plots if usage.dial else (), start=1)}
    scorecard = run_dir / "scorecard.json"
    name = push.what if stage == pushed_stage(recipe, recipe.push or push) else f"{push.what}-{stage}"
    with whole_folder(target := run_dir / "push" / name) as folder:
        for file in _pushed_files(made, pushed_suffixes(recipe)):
            link_or_copy(file, folder / file.relative_to(made))
        for name, plot in plots.items():
            write_text(folder / name, plot)
        if adapter:
            write_json(folder / ADAPTER_CONFIG, adapter)
        write_text(folder / "recipe.yaml", without_secrets(dump_recipe(shared)))
        if scorecard.is_file():
            write_text(folder / scorecard.name, without_secrets(scorecard.read_text()))
        card = model_card(usage, shared, run_dir, list(plots))
        write_text(folder / "README.md", without_secrets(card))
    return target


def _usage(run_dir: Path, push: Push, recipe: Recipe, made: Path, base: tuple[str | None, str | None]) -> Usage:
    """Returns what the card says of a pushed model; `base` is the id and commit of what it belongs to."""
    stage = pushed_stage(recipe, push)
    dials = [dial_section(dial) for dial in dials_of(run_dir, recipe) if dial["stage"] == stage]
    return Usage(
        place=push.repo_id,
        what=push.what,
        stage=stage,
        revision=push.revision,
        base=base[0],
        base_revision=base[1],
        chat=(made / "chat_template.jinja").exists(),
        quantized="quantization_config" in read_json(made / "config.json"),
        license=push.license,
        strength=strength_of(run_dir / "stages" / stage),
        base_facts=card_facts(run_dir, "model", recipe.model.id or ""),
        data_facts=data_facts(run_dir, recipe, stage),
        dial=dials[0] if dials else None,
    )


def _pushed_files(made: Path, suffixes: set[str]) -> list[Path]:
    """The files of a model that are pushed: those that the run wrote, and no others that came to lie there.

    Raises:
        RecipeError: A text file holds a token or a password.
    """
    recorded = recorded_files(made)
    names = sorted(recorded) if recorded is not None else [str(file.relative_to(made)) for file in made.rglob("*")]
    files = [made / name for name in names]
    files = [
        file
        for file in sorted(files)
        if file.suffix in suffixes and file.name not in NOT_PUSHED and file.is_file() and not file.is_symlink()
    ]
    for file in files:
        text = file.suffix not in WEIGHTS and file.stat().st_size < SMALL
        if text and has_secret(file.read_text(encoding="utf-8", errors="replace")):
            raise RecipeError(
                f"{file} holds a token or a password, so nothing was pushed. Take it out (and revoke it: it may lie in "
                "the base too), then move the stage folder away and run the recipe again."
            )
    return files


def pushed_suffixes(recipe: Recipe) -> set[str]:
    """Returns the suffixes of the files that are pushed, a model's own code included where transformers lacks it."""
    return PUSHED | ({".py"} if recipe.model.trust_remote_code else set())


def _base_of(adapter: dict[str, Any], known: dict[str, Any], stage: str) -> tuple[str, str | None]:
    """Hub id and commit of the model that an adapter is loaded on."""
    base = adapter.get("base_model_name_or_path")
    if not base or not is_on_hub(base):
        raise RecipeError(
            f"push.what: adapter, but the adapter of stage {stage!r} belongs to the local model {base!r}, which "
            "nobody else has. Push the merged model instead (`push: {what: merged}`, or --what merged)."
        )
    return base, adapter.get("revision") or (known.get("revision") if base == known.get("id") else None)


def parent_in_run(run_dir: Path, stage: str, recipe: Recipe) -> tuple[str, str] | None:
    """The stage of this run that a stage's adapter was trained on, and whether on its `model` or its `merged` one.

    None when the adapter belongs to a model from elsewhere.
    """
    config = read_json(model_of(run_dir / "stages" / stage) / ADAPTER_CONFIG)
    parts = Path(config.get("base_model_name_or_path") or "").parts[-3:]  # the run folder may have been moved
    if len(parts) == 3 and parts[0] == "stages" and parts[1] in [s.name for s in recipe.stages]:
        return parts[1], "merged" if parts[2] == "merged" else "model"
    return None


def find_made(run_dir: Path, what: str, stage: str, recipe: Recipe) -> Path:
    """The folder of the stage that holds what is asked for.

    Raises:
        RecipeError: There is none.
    """
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
    require_whole(folder)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if is_adapter != (what == "adapter"):
        found, allowed = (
            ("an adapter", "`what: adapter`, or `what: merged` once it is merged")
            if is_adapter
            else ("a whole model", "`what: model`")
        )
        raise RecipeError(f"push.what: {what}, but stage {stage!r} made {found} ({folder}). Allowed here: {allowed}.")
    return folder
