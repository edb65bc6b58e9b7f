"""The command line. Each command imports what it needs when it runs: `--help` and `check --fast` are instant."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfpipe import __version__
from hfpipe.core import ending, peers, signals
from hfpipe.core.errors import MachineError, RecipeError, UserError, exit_codes
from hfpipe.core.launch import require_launch
from hfpipe.core.machine import machine_error
from hfpipe.core.output import forgive_closed_pipes
from hfpipe.core.run_lock import alone
from hfpipe.core.run_state import require_whole_state
from hfpipe.core.secrets import without_secrets

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


# The tools whose configs `hfpipe convert` reads; see `hfpipe/convert`.
LAUNCHERS = ("torchrun", "slurm", "k8s", "sky")  # see `hfpipe/pipeline/launch_files.py`
CONVERTED_TOOLS = ("axolotl", "llama-factory", "trl", "torchtune", "oumi", "ms-swift")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code (see `hfpipe.core.errors`)."""
    with signals.watched():
        forgive_closed_pipes()
        code = signals.finish(_run_command(arguments))
        ending.record(code)
        return code


def _run_command(arguments: Sequence[str] | None) -> int:
    try:
        options = build_parser().parse_args(arguments)
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it warns of a kernel that it can spare
        options.command(options)
        _part()
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        if signals.exit_code() is not None:  # a library has made another error of the interruption
            return _interrupted()
        with signals.held():  # a launcher stops the other ranks at once, and they have something to say
            return _tell(error)
    return 0


def _interrupted() -> int:
    if found := peers.is_lost():  # the launcher ends all ranks once one is gone
        with signals.held():
            return _tell(found)
    signals.tell()
    peers.leave(last=False)
    return signals.exit_code() or 130


def _tell(error: Exception) -> int:
    """Says what went wrong, with the rank where it is not the main one, and returns the exit code."""
    known = error if isinstance(error, UserError) else machine_error(error) or _lost_rank(error)
    text = without_secrets(str(known or error))
    code = 1 if known is None else known.exit_code
    if not peers.fail(known or error, text, code) and known is not None:
        return code
    rank = os.environ.get("RANK", "0")
    who = "hfpipe" if rank == "0" else f"hfpipe: rank {rank}"
    if known is None:
        print(without_secrets("".join(traceback.format_exception(error))), file=sys.stderr)
        text = "this is a fault of hfpipe, not of your recipe; please report it with the lines above"
    print(f"{who}: {text}", file=sys.stderr, flush=True)
    return code


def _lost_rank(error: Exception) -> UserError | None:
    """The error of a collective call whose peer is lost, in words; None where an error is about something else."""
    if not peers.has_joined():
        return None
    signs = ("gloo/transport", "[c10d]", "NCCL")
    if type(error).__name__.startswith("Dist") or any(sign in str(error) for sign in signs):
        return peers.lost(str(error).split("\n")[0][:200])
    return None


def _part() -> None:
    """Ends what the ranks spoke through: its threads can abort a process that exits while they run."""
    peers.leave()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _run(options: argparse.Namespace) -> None:
    from hfpipe.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.set)  # refused before anything heavy is imported
    require_launch()
    ending.watch(recipe.run_folder)
    from hfpipe.api import run

    run(recipe)


def _check(options: argparse.Namespace) -> None:
    from hfpipe.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.set)
    if options.fast:
        stages = ", ".join(f"{stage.name} ({stage.kind})" for stage in recipe.stages)
        print(f"{options.recipe}: no fault found. Stages: {stages}.")
        return
    from hfpipe.pipeline.check import check_recipe

    check_recipe(recipe)
    print(f"no fault found; start it with: hfpipe run {options.recipe}")


def _cure(options: argparse.Namespace) -> None:
    from hfpipe.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.set)
    with alone(recipe.run_folder):
        from hfpipe.pipeline.cure import cure_recipe

        cure_recipe(recipe, options.stage, options.steps)


def _prepare(options: argparse.Namespace) -> None:
    from hfpipe.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.set)
    from hfpipe.pipeline.prepare import prepare_recipe

    prepare_recipe(recipe)


def _preview(options: argparse.Namespace) -> None:
    from hfpipe.pipeline.check import preview
    from hfpipe.recipe import load_recipe

    preview(load_recipe(options.recipe, options.set), options.rows)


def _evaluate(options: argparse.Namespace) -> None:
    from hfpipe.recipe import load_suites

    suites = load_suites(options.suites, options.set)
    from hfpipe.pipeline.evaluate import chosen_suites, evaluate_model

    suites = chosen_suites(suites, options.suite, options.limit)
    evaluate_model(options.model, suites, options.output, options.against, options.stage)


def _merge(options: argparse.Namespace) -> None:
    folder = _run_folder(options.run)
    with alone(folder):
        from hfpipe.pipeline.merge import merge_run

        print(merge_run(folder, options.stage))


def _dial(options: argparse.Namespace) -> None:
    folder = _run_folder(options.run)
    with alone(folder):
        from hfpipe.pipeline.dial import STRENGTHS, dial_run

        dial_run(folder, options.stage, options.strengths or STRENGTHS)


def _strengths(text: str) -> list[float]:
    """Reads `0,0.25,0.5`."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= strength <= 1 for strength in found):
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed are numbers from 0 to 1, such as 0,0.25,0.5,0.75,1")
    return found


def _generate(options: argparse.Namespace) -> None:
    folder = _run_folder(options.run)
    from hfpipe.pipeline.use import generate_file

    generate_file(
        folder,
        options.file,
        options.output,
        **_speaking(options),
        limit=options.limit,
        batch_size=options.batch_size,
    )


def _chat(options: argparse.Namespace) -> None:
    folder = _run_folder(options.run)
    from hfpipe.pipeline.use import chat

    chat(folder, **_speaking(options))


def _serve(options: argparse.Namespace) -> None:
    folder = _run_folder(options.run)
    from hfpipe.pipeline.serve import serve

    serve(folder, options.stage, options.port)


def _export(options: argparse.Namespace) -> None:
    folder = _run_folder(options.run)
    from hfpipe.pipeline.export import export_gguf

    export_gguf(folder, options.stage, options.quant, options.output)


def _env(options: argparse.Namespace) -> None:
    from hfpipe.pipeline.bug_report import report

    print(report())


def _completion(options: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError as error:
        raise MachineError("shell completion needs shtab: pip install shtab.") from error
    print(shtab.complete(build_parser(), options.shell))


def _speaking(options: argparse.Namespace) -> dict[str, Any]:
    """The options of the commands that let a trained model speak."""
    return {"stage": options.stage, "strength": options.strength, "base": options.base, "words": options.set}


def _push(options: argparse.Namespace) -> None:
    folder = _run_folder(options.run)
    from hfpipe.hub import push

    push(folder, **{word: getattr(options, word) for word in PUSH_WORDS})


def _report(options: argparse.Namespace) -> None:
    from hfpipe.report import write_reports

    folder = _run_folder(options.run)
    if (folder / "repeats.json").exists():
        from hfpipe.report.repeats import write_repeat_reports

        print(*write_repeat_reports(folder), sep="\n")
        return
    if not (folder / "scorecard.json").exists():
        raise RecipeError(f"{folder} has no scorecard.json yet; `hfpipe run` writes it once the base is scored.")
    print(*write_reports(folder), sep="\n")


def _clean(options: argparse.Namespace) -> None:
    from hfpipe.pipeline.clean import clean_run

    folder = _run_folder(options.run)
    with alone(folder):
        clean_run(folder, remove=options.yes)


def _recipes(options: argparse.Namespace) -> None:
    from hfpipe.recipe.shipped import copy_recipe, list_recipes

    print(copy_recipe(options.copy) if options.copy else list_recipes())


def _launch(options: argparse.Namespace) -> None:
    from hfpipe.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.set)
    from hfpipe.pipeline.launch_files import launch

    print(launch(recipe, options.recipe, options.nodes, options.gpus, options.memory, options.on), end="")


def _count(text: str) -> int:
    """Reads a whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed is a whole number from 1")
    return int(text)


def _gibibytes(text: str) -> float:
    """Reads `80` or `80GB`."""
    number = text.lower().removesuffix("gib").removesuffix("gb")
    try:
        found = float(number)
    except ValueError:
        found = 0.0
    if not 0 < found < 10_000:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed is the memory of a GPU in GiB, such as 80")
    return found


def _schema(options: argparse.Namespace) -> None:
    from hfpipe.recipe import json_schema

    print(json.dumps(json_schema(), indent=2))


def _convert(options: argparse.Namespace) -> None:
    from hfpipe.convert.command import run

    run(options.file, options.tool, options.output)


def _new(options: argparse.Namespace) -> None:
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


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of every command; `docs/make_references.py` writes the command reference from it."""
    parser = argparse.ArgumentParser(
        prog="hfpipe",
        description="One recipe from raw text to a scored adapter on the Hub.",
        epilog="exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in exit_codes().items()),
    )
    parser.add_argument("--version", action="version", version=f"hfpipe {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, function: object, text: str, *, recipe: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        if recipe:
            sub.add_argument("recipe", metavar="RECIPE", help="a recipe file")
            sub.add_argument(
                "--set",
                action="append",
                default=[],
                metavar="KEY=VALUE",
                help="override a key, e.g. stages.chat.lora.r=8",
            )
        return sub

    command("run", _run, "run the whole recipe; run again to continue where it stopped", recipe=True)
    check = command(
        "check",
        _check,
        "find faults of a recipe, its data and this machine before training; show rows, tokens, steps, memory",
        recipe=True,
    )
    check.add_argument("--fast", action="store_true", help="look at the recipe alone, in half a second")
    text = "train a stage with several cures for forgetting, and compare what they learn and keep"
    cure = command("cure", _cure, text, recipe=True)
    cure.add_argument("--stage", help="which stage; the last one that trains on next tokens when absent")
    cure.add_argument("--steps", type=int, metavar="N", help="steps of the stage, each time; the recipe's when absent")
    command("prepare", _prepare, "read, clean and tokenize the data, on a machine without a GPU", recipe=True)
    preview = command(
        "preview", _preview, "show the first rows as the model sees them, trained tokens coloured", recipe=True
    )
    preview.add_argument("--rows", type=int, default=2, help="number of rows of each stage (default: 2)")
    evaluate = command("evaluate", _evaluate, "score any model, adapter or run folder on suites, without a training")
    evaluate.add_argument("model", metavar="MODEL", help="Hub id, folder of a model or an adapter, or run folder")
    evaluate.add_argument("suites", metavar="SUITES", help="a file with an `evaluate:` block, or a recipe")
    evaluate.add_argument("--suite", action="append", metavar="NAME", help="this suite alone; give it again for more")
    evaluate.add_argument("--limit", type=int, metavar="N", help="the first N rows of each suite")
    evaluate.add_argument("--stage", help="of a run folder: which stage's model or adapter; the last one when absent")
    evaluate.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe"
    )
    evaluate.add_argument("--against", metavar="MODEL", help="another model: print the differences, paired row by row")
    evaluate.add_argument("--output", metavar="FILE", help="write the scores here as JSON")
    merge = command(
        "merge", _merge, "merge the adapter of a run into its base, and verify the merged model against the adapter"
    )
    merge.add_argument("run", metavar="RUN", help="a run folder")
    merge.add_argument("--stage", help="which adapter; the last one when absent")
    dial = command(
        "dial", _dial, "score a stage at strengths from 0 (its parent) to 1, and choose the best inside the budgets"
    )
    dial.add_argument("run", metavar="RUN", help="a run folder")
    dial.add_argument("--stage", help="which stage; the last one when absent")
    dial.add_argument(
        "--strengths",
        type=_strengths,
        metavar="0,0.25,...",
        help="the strengths; 0,0.1,0.25,0.5,0.75,0.9,1 when absent",
    )
    generate = command(
        "generate", _generate, "answer a file of prompts by a trained model, in batches, into JSON lines"
    )
    generate.add_argument("run", metavar="RUN", help="a run folder")
    generate.add_argument("file", metavar="FILE", help="JSON lines or CSV with prompts, or text with one a line")
    _speaking_options(generate)
    generate.add_argument("--limit", type=int, metavar="N", help="the first N prompts")
    generate.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts at once (default: 16)")
    generate.add_argument("-o", "--output", metavar="FILE", help="the answers; FILE-answers.jsonl when absent")
    chat = command("chat", _chat, "talk to a trained model; or answer the prompt on standard input")
    chat.add_argument("run", metavar="RUN", help="a run folder")
    _speaking_options(chat)
    serve = command("serve", _serve, "serve a trained model on this machine, for any client of OpenAI's protocol")
    serve.add_argument("run", metavar="RUN", help="a run folder")
    serve.add_argument("--stage", help="which stage's model, of an adapter the merged one; the last one when absent")
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="the port on 127.0.0.1 (default: 8000)")
    export = command("export", _export, "write a trained model as one file for llama.cpp and Ollama, with a Modelfile")
    export.add_argument("run", metavar="RUN", help="a run folder")
    export.add_argument("--to", choices=["gguf"], default="gguf", help="the format")
    export.add_argument(
        "--quant", default="q8_0", metavar="FORM", help="f16, q8_0 (default), q4_k_m or another of llama.cpp"
    )
    export.add_argument("--stage", help="which stage's model, of an adapter the merged one; the last one when absent")
    export.add_argument("-o", "--output", metavar="FOLDER", help="where it is written; RUN/export when absent")
    push = command("push", _push, "upload an adapter or a model with its card to the Hub")
    _push_options(push)
    report = command("report", _report, "write report.md and report.html again from the scorecard, without a model")
    report.add_argument("run", metavar="RUN", help="a run folder")
    clean = command(
        "clean", _clean, "show, or remove, what a run keeps beside its results: earlier versions of stages, checkpoints"
    )
    clean.add_argument("run", metavar="RUN", help="a run folder")
    clean.add_argument("--yes", action="store_true", help="remove it")
    recipes = command("recipes", _recipes, "list the recipes that come with hfpipe, or copy one")
    recipes.add_argument("--copy", metavar="NAME", help="copy one here, to start from")
    launch = command("launch", _launch, "print the file that starts a recipe on a cluster, and its line", recipe=True)
    launch.add_argument("--nodes", type=_count, default=1, metavar="N", help="machines (default: 1)")
    launch.add_argument("--gpus", type=_count, default=8, metavar="G", help="GPUs of each machine (default: 8)")
    launch.add_argument("--memory", type=_gibibytes, default=80.0, metavar="GIB", help="memory of a GPU (default: 80)")
    launch.add_argument("--on", choices=LAUNCHERS, default="torchrun", help="launcher (default: torchrun)")
    command("env", _env, "print what a bug report needs: versions and hardware, without any secret")
    completion = command(
        "completion", _completion, 'print the completion script of a shell: eval "$(hfpipe completion bash)"'
    )
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"], help="which shell")
    command("schema", _schema, "print the JSON schema of a recipe, for editors")
    new = command(
        "new", _new, "write a recipe for your own data, from five answers; what the options do not say is asked"
    )
    new.add_argument("--data", metavar="FILE", help="a file, a folder, or a data set of the Hub")
    new.add_argument("--model", metavar="ID", help="the base model: its id on the Hub, or a folder")
    new.add_argument("--task", metavar="TASK", help="chat, instructions, pretrain, classification or translation")
    new.add_argument("--hardware", metavar="WHAT", help="cpu, or the memory of one GPU such as 24GB")
    new.add_argument("-o", "--output", metavar="RECIPE", help="a file to write; NAME-OF-THE-DATA.yaml when absent")
    convert = command("convert", _convert, "write a recipe from a config of another tool")
    convert.add_argument("file", metavar="FILE", help="YAML, JSON, or a shell script that starts the tool")
    convert.add_argument(
        "--from", dest="tool", choices=CONVERTED_TOOLS, help="whose config it is; told by its keys when absent"
    )
    convert.add_argument("-o", "--output", metavar="RECIPE", help="a file to write; standard output when absent")
    return parser


def _speaking_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", action="store_true", help="the base model answers beside it")
    parser.add_argument("--stage", help="which stage's model or adapter; the last one when absent")
    parser.add_argument("--strength", type=float, metavar="X", help="from 0 (the stage's parent) to 1 (as trained)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a field of transformers.GenerationConfig, e.g. max_new_tokens=200 or do_sample=true",
    )


def _push_options(push: argparse.ArgumentParser) -> None:
    """The words of a recipe's `push:`, see `PUSH_WORDS`."""
    push.add_argument("run", metavar="RUN", help="a run folder")
    push.add_argument("--repo-id", help="OWNER/NAME; the recipe's push.repo_id when absent, as with all that follow")
    push.add_argument(
        "--what",
        choices=["adapter", "model", "merged", "both"],
        help="the adapter, a fully trained model, the merged model, or adapter and merged model",
    )
    push.add_argument("--stage", help="which stage's; the last one when absent")
    push.add_argument(
        "--merged-repo-id", metavar="ID", help="for the merged model of `both`; REPO_ID-merged when absent"
    )
    push.add_argument("--parent-repo-id", metavar="ID", help="for what a chain's adapter is loaded on; REPO_ID-base")
    push.add_argument("--revision", metavar="BRANCH", help="a branch; made when it does not exist")
    push.add_argument("--tag", metavar="NAME", help="a name for the pushed commit, such as v1")
    push.add_argument(
        "--create-pr", action=argparse.BooleanOptionalAction, default=None, help="as a pull request, one at a time"
    )
    push.add_argument("--commit-message", metavar="TEXT", help="title of the commit or of the pull request, one line")
    push.add_argument("--license", metavar="NAME", help="as the Hub writes it; the base's when absent")
    push.add_argument(
        "--private", action=argparse.BooleanOptionalAction, default=None, help="private unless told not to be"
    )
    push.add_argument("--deadline-seconds", type=float, metavar="S", help="time for each repository")
