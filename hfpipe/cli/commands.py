"""The commands, by name. Heavy modules are imported once the recipe or the run folder is in order."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from hfpipe.core import display, ending, signals
from hfpipe.core.errors import MachineError, RecipeError
from hfpipe.core.importing import importing
from hfpipe.core.launch import require_launch
from hfpipe.core.run_lock import alone
from hfpipe.core.run_state import require_whole_state

# The options of `hfpipe push`, which are the words of a recipe's `push:`.
PUSH_WORDS = (
    "repo_id",
    "what",
    "stage",
    "merged_repo_id",
    "parent_repo_id",
    "private",
    "revision",
    "tag",
    "create_pr",
    "commit_message",
    "license",
    "deadline_seconds",
)


def run(options: argparse.Namespace) -> None:
    from hfpipe.pipeline.finished import require_sources
    from hfpipe.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.set)  # refused before anything heavy is imported
    require_launch()
    ending.watch(recipe.run_folder)
    if os.environ.get("WORLD_SIZE", "1") == "1":  # of several ranks the main one tells it later, once
        require_sources(recipe)
    from hfpipe.pipeline.api import run

    run(recipe)


def check(options: argparse.Namespace) -> None:
    from hfpipe.pipeline.finished import require_sources
    from hfpipe.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.set)
    if options.fast:
        display.clear()
        stages = ", ".join(f"{stage.name} ({stage.kind})" for stage in recipe.stages)
        print(f"{options.recipe}: no fault found. Stages: {stages}.")
        return
    require_sources(recipe)
    with importing():
        from hfpipe.pipeline.check import check_recipe, launch_line

    check_recipe(recipe, launch_line(options.recipe, options.set))


def cure(options: argparse.Namespace) -> None:
    from hfpipe.recipe import load_recipe
    from hfpipe.recipe.choose import curable_stage
    from hfpipe.recipe.config import Cures

    recipe = load_recipe(options.recipe, options.set)
    said = recipe.compared or Cures.model_validate({})
    curable_stage(recipe, options.stage or said.stage)
    with alone(recipe.run_folder):
        with importing():
            from hfpipe.pipeline.cure import cure_recipe

        steps = said.steps if options.steps is None else options.steps
        cure_recipe(recipe, options.stage or said.stage, steps, dial=said.dial and not options.no_dial)


def prepare(options: argparse.Namespace) -> None:
    from hfpipe.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.set)
    if options.engine == "datatrove":
        with alone(recipe.run_folder):
            from hfpipe.pipeline.clean_sources import clean_sources

            if not clean_sources(recipe, options.tasks, options.workers, options.slurm):
                return
    with importing():
        from hfpipe.pipeline.prepare import prepare_recipe

    prepare_recipe(recipe)


def preview(options: argparse.Namespace) -> None:
    from hfpipe.pipeline.finished import require_sources
    from hfpipe.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.set)
    require_sources(recipe)
    with importing():
        from hfpipe.pipeline.preview import preview

    preview(recipe, options.rows, options.html)


def evaluate(options: argparse.Namespace) -> None:
    from hfpipe.recipe import load_suites
    from hfpipe.recipe.choose import chosen_suites, require_model

    suites = chosen_suites(load_suites(options.suites, options.set), options.suite, options.limit)
    for model in (options.model, options.against):
        if model is not None:
            require_model(model)
    if Path(options.model, "recipe.yaml").is_file():
        _finished(options.model, options.stage)
    with importing():
        from hfpipe.pipeline.evaluate import evaluate_model

    evaluate_model(options.model, suites, options.output, options.against, options.stage)


def merge(options: argparse.Namespace) -> None:
    from hfpipe.pipeline.finished import finished_adapter
    from hfpipe.recipe import load_recipe

    folder = _run_folder(options.run)
    finished_adapter(folder, load_recipe(folder / "recipe.yaml"), options.stage)
    with alone(folder):
        with importing():
            from hfpipe.pipeline.merge import merge_run

        display.say(str(merge_run(folder, options.stage, options.dtype)), "result")


def dial(options: argparse.Namespace) -> None:
    folder, _ = _finished(options.run, options.stage)
    with alone(folder):
        with importing():
            from hfpipe.pipeline.dial import STRENGTHS, dial_run

        dial_run(folder, options.stage, options.strengths or STRENGTHS)


def generate(options: argparse.Namespace) -> None:
    from hfpipe.pipeline.finished import require_prompts

    folder = _speaking_run(options, "generate")
    require_prompts(options.file)
    with importing():
        from hfpipe.pipeline.use import generate_file

    generate_file(
        folder,
        options.file,
        options.output,
        **_speaking(options),
        limit=options.limit,
        batch_size=options.batch_size,
    )


def chat(options: argparse.Namespace) -> None:
    folder = _speaking_run(options, "chat")
    with importing():
        from hfpipe.pipeline.use import chat

    signals.serves()
    chat(folder, **_speaking(options))


def serve(options: argparse.Namespace) -> None:
    from hfpipe.pipeline.finished import require_merged

    folder, chosen = _finished(options.run, options.stage, "serve")
    require_merged(folder, chosen)
    with importing():
        from hfpipe.pipeline.serve import serve

    signals.serves()
    serve(folder, options.stage, options.port)


def export(options: argparse.Namespace) -> None:
    from hfpipe.pipeline.finished import require_merged
    from hfpipe.pipeline.quants import require_quant

    is_onnx = options.to == "onnx"
    folder, chosen = _finished(options.run, options.stage, None if is_onnx else "export")
    if is_onnx and options.quant is not None:
        raise RecipeError("--quant is of gguf; an ONNX graph keeps float32. Leave it out.")
    quant = options.quant or "q8_0"
    require_quant(quant)
    require_merged(folder, chosen)
    if is_onnx:
        with importing():
            from hfpipe.pipeline.export_onnx import export_onnx

        export_onnx(folder, options.stage, options.output)
        return
    with importing():
        from hfpipe.pipeline.export import export_gguf

    export_gguf(folder, options.stage, quant, options.output)


def env(options: argparse.Namespace) -> None:
    from hfpipe.pipeline.bug_report import bug_report

    print(bug_report())


def completion(options: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError as error:
        raise MachineError("shell completion needs shtab: pip install shtab.") from error
    print(shtab.complete(options.parser, options.shell))


def _speaking_run(options: argparse.Namespace, command: str) -> Path:
    """The run folder of a command that lets a trained model speak, whose words are looked at."""
    from hfpipe.recipe.choose import generation_words, require_strength

    folder, _ = _finished(options.run, options.stage, command)
    require_strength(options.strength)
    generation_words(options.set)
    return folder


def _speaking(options: argparse.Namespace) -> dict[str, Any]:
    """The options of the commands that let a trained model speak."""
    return {"stage": options.stage, "strength": options.strength, "base": options.base, "words": options.set}


def push(options: argparse.Namespace) -> None:
    folder = _run_folder(options.run)
    from hfpipe.hub import push

    push(folder, **{word: getattr(options, word) for word in PUSH_WORDS})


def report(options: argparse.Namespace) -> None:
    from hfpipe.report import write_reports

    folder = _run_folder(options.run)
    if (folder / "repeats.json").exists():
        from hfpipe.report.repeats import write_repeat_reports

        print(*write_repeat_reports(folder), sep="\n")
        return
    if not (folder / "scorecard.json").exists():
        raise RecipeError(f"{folder} has no scorecard.json yet; `hfpipe run` writes it once the base is scored.")
    print(*write_reports(folder), sep="\n")


def diff(options: argparse.Namespace) -> None:
    folders = _run_folder(options.a), _run_folder(options.b)
    from hfpipe.pipeline.diff import diff_runs

    print(diff_runs(*folders, options.stage))


def board(options: argparse.Namespace) -> None:
    from hfpipe.report.board import serve_board

    signals.serves()
    serve_board(Path(options.runs), options.port)


def clean(options: argparse.Namespace) -> None:
    from hfpipe.pipeline.clean import clean_run

    folder = _run_folder(options.run)
    with alone(folder):
        clean_run(folder, remove=options.yes)


def recipes(options: argparse.Namespace) -> None:
    from hfpipe.recipe.shipped import copy_recipe, list_recipes

    print(copy_recipe(options.copy) if options.copy else list_recipes())


def launch(options: argparse.Namespace) -> None:
    from hfpipe.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.set)
    from hfpipe.pipeline.launch_files import launch

    print(launch(recipe, options.recipe, options.nodes, options.gpus, options.memory, options.on), end="")


def schema(options: argparse.Namespace) -> None:
    from hfpipe.recipe import json_schema

    print(json.dumps(json_schema(), indent=2))


def convert(options: argparse.Namespace) -> None:
    from hfpipe.convert.command import run

    run(options.file, options.tool, options.output)


def new(options: argparse.Namespace) -> None:
    from hfpipe.convert.new import answers_of, run

    run(answers_of(options))


def _run_folder(name: str) -> Path:
    folder = Path(name)
    if not (folder / "recipe.yaml").is_file():
        known = sorted(str(path.parent) for path in Path("runs").glob("*/recipe.yaml"))
        there = f"Run folders here: {', '.join(known)}." if known else "There is none in ./runs."
        raise RecipeError(f"{name} is not a run folder (it has no recipe.yaml). {there}")
    require_whole_state(folder)
    return folder


def _finished(run: str, stage: str | None, command: str | None = None) -> tuple[Path, str]:
    """The run folder and a finished stage of it, which writes text where a command needs that."""
    from hfpipe.pipeline.finished import finished_stage, writing_stage
    from hfpipe.recipe import load_recipe

    folder = _run_folder(run)
    recipe = load_recipe(folder / "recipe.yaml")
    chosen = writing_stage(folder, recipe, stage, command) if command else finished_stage(folder, recipe, stage)
    return folder, chosen.name
