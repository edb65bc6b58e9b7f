"""The parser of the command line; `docs/make_references.py` writes the command reference from it."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import Any, NoReturn, Protocol

from hfpipe.cli import commands
from hfpipe.core.errors import exit_codes
from hfpipe.core.version import __version__

LAUNCHERS = ("torchrun", "slurm", "k8s", "sky")  # see `hfpipe/pipeline/launch_files.py`
CONVERTED_TOOLS = ("axolotl", "llama-factory", "trl", "torchtune", "oumi", "ms-swift")  # see `hfpipe/convert`

LONG_WORK = ("run", "cure", "prepare", "evaluate", "dial", "merge", "generate", "push")
SHOWN_WORK = ("check", "preview", "export", "chat")  # a line says what they wait for; then they print what they found

NEAR = 0.7  # of a misspelt word, by difflib: the share of letters that it has in common with the one that is meant


class _Parser(argparse.ArgumentParser):
    """A parser that answers a misspelt word with the nearest one, in place of the list of all."""

    def error(self, message: str) -> NoReturn:
        found = re.fullmatch(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL)
        if found and found[1] == "COMMAND":
            hint = _did_you_mean(found[2], re.findall(r"'([^']*)'", found[3]))
            self.exit(2, f"hfpipe: there is no command {found[2]!r}.{hint} `hfpipe --help` lists them.\n")
        super().error(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Reads the words of a command line; one that the command does not take is told with the nearest option."""
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            own = options.own
            word = next((word for word in rest if word.startswith("-")), rest[0])
            kind = "option" if word.startswith("-") else "place for"
            hint = _did_you_mean(word.partition("=")[0], _options_of(own))
            self.exit(2, f"{own.prog}: there is no {kind} {word}.{hint} `{own.prog} --help` lists what it takes.\n")
        return options


def _options_of(parser: argparse.ArgumentParser) -> list[str]:
    """The long options that a command takes, by the first column of its help; the texts beside it name others too."""
    lines = [line.strip().split("  ")[0] for line in parser.format_help().splitlines() if line.startswith("  -")]
    return [name for line in lines for name in re.findall(r"(?<![\w-])--[\w-]+", line)]


def _did_you_mean(word: str, known: list[str]) -> str:
    """Returns the question whether the nearest of the known words is meant; nothing where none is near."""
    plain = {name.lstrip("-"): name for name in known}  # dashes are no likeness
    begun = [name for name in plain if len(word) > 2 and name.startswith(word)]  # `eval`
    near = begun or difflib.get_close_matches(word.lstrip("-"), plain, n=1, cutoff=NEAR)
    return f" Did you mean {plain[near[0]]}?" if near else ""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of every command."""
    parser = _Parser(
        prog="hfpipe",
        description="One recipe from raw text to a scored adapter on the Hub.",
        epilog="exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in exit_codes().items()),
    )
    parser.add_argument("--version", action="version", version=f"hfpipe {__version__}")
    parser.set_defaults(parser=parser, voice=None)  # for `completion`; of commands that are soon done
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, text: str, takes: str = "") -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text)
        sub.set_defaults(command=getattr(commands, name), own=sub)
        if takes == "RUN":
            sub.add_argument("run", metavar="RUN", help="a run folder")
        if takes == "RECIPE":
            sub.add_argument("recipe", metavar="RECIPE", help="a recipe file")
            _set_option(sub, "override a key, e.g. stages.chat.lora.r=8")
        if name in LONG_WORK:
            _voice_options(sub)
        elif name in SHOWN_WORK:
            sub.set_defaults(voice="auto")
        return sub

    for add in (_writing_commands, _training_commands, _scoring_commands, _using_commands, _keeping_commands):
        add(command)
    return parser


class AddCommand(Protocol):
    """Adds a command to the parser: its name, as in `commands`, its help, and RECIPE or RUN if it takes one."""

    def __call__(self, name: str, text: str, takes: str = "") -> argparse.ArgumentParser: ...


def _training_commands(command: AddCommand) -> None:
    """Adds the commands that take a recipe."""
    command("run", "run the whole recipe; run again to continue where it stopped", "RECIPE")
    check = command(
        "check",
        "find faults of a recipe, its data and this machine before training; show rows, tokens, steps, memory",
        "RECIPE",
    )
    check.add_argument("--fast", action="store_true", help="look at the recipe alone, in half a second")
    text = "train a stage with several cures for forgetting, and compare what they learn and keep"
    cure = command("cure", text, "RECIPE")
    cure.add_argument("--stage", help="which stage; the last one that trains on next tokens when absent")
    cure.add_argument("--steps", type=int, metavar="N", help="steps of the stage, each time; the recipe's when absent")
    cure.add_argument("--no-dial", action="store_true", help="score none of them between its parent and itself")
    prepare = command("prepare", "read, clean and tokenize the data, on a machine without a GPU", "RECIPE")
    _engine_options(prepare)
    preview = command("preview", "show the first rows as the model sees them, trained tokens coloured", "RECIPE")
    preview.add_argument("--rows", type=int, default=2, help="number of rows of each stage (default: 2)")
    preview.add_argument("--html", metavar="FILE", help="write a page of HTML, token by token, in place of printing")


def _engine_options(prepare: argparse.ArgumentParser) -> None:
    """Adds the options on who cleans the sources of pretraining."""
    text = "who cleans the sources of pretraining: each stage before it trains, or datatrove now (docs/stream.md)"
    prepare.add_argument("--engine", choices=["hfpipe", "datatrove"], default="hfpipe", help=text)
    text = "datatrove: tasks that share the work; as many as workers when absent"
    prepare.add_argument("--tasks", type=int, metavar="N", help=text)
    text = "datatrove: tasks that run at a time; as many as cores when absent, on SLURM all"
    prepare.add_argument("--workers", type=int, metavar="N", help=text)
    text = "datatrove: run on SLURM, by arguments of its SlurmPipelineExecutor, e.g. partition=cpu time=24:00:00"
    prepare.add_argument("--slurm", nargs="+", metavar="KEY=VALUE", help=text)


def _scoring_commands(command: AddCommand) -> None:
    """Adds the commands that score and merge."""
    evaluate = command("evaluate", "score any model, adapter or run folder on suites, without a training")
    evaluate.add_argument("model", metavar="MODEL", help="Hub id, folder of a model or an adapter, or run folder")
    evaluate.add_argument("suites", metavar="SUITES", help="a file with an `evaluate:` block, or a recipe")
    evaluate.add_argument("--suite", action="append", metavar="NAME", help="this suite alone; give it again for more")
    evaluate.add_argument("--limit", type=int, metavar="N", help="the first N rows of each suite")
    evaluate.add_argument("--stage", help="of a run folder: which stage's model or adapter; the last one when absent")
    _set_option(evaluate, "override a key of the recipe")
    evaluate.add_argument("--against", metavar="MODEL", help="another model: print the differences, paired row by row")
    evaluate.add_argument("--output", metavar="FILE", help="write the scores here as JSON")
    merge = command(
        "merge", "merge the adapter of a run into its base, and verify the merged model against the adapter", "RUN"
    )
    merge.add_argument("--stage", help="which adapter; the last one when absent")
    text = "precision of the merged weights; the recipe's merge.dtype, or that of the base's files, when absent"
    merge.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help=text)
    dial = command(
        "dial", "score a stage at strengths from 0 (its parent) to 1, and choose the best inside the budgets", "RUN"
    )
    dial.add_argument("--stage", help="which stage; the last one when absent")
    dial.add_argument(
        "--strengths",
        type=_strengths,
        metavar="0,0.25,...",
        help="the strengths; 0,0.1,0.25,0.5,0.75,0.9,1 when absent",
    )


def _using_commands(command: AddCommand) -> None:
    """Adds the commands that use a trained model."""
    generate = command("generate", "answer a file of prompts by a trained model, in batches, into JSON lines", "RUN")
    generate.add_argument("file", metavar="FILE", help="JSON lines or CSV with prompts, or text with one a line")
    _speaking_options(generate)
    generate.add_argument("--limit", type=int, metavar="N", help="the first N prompts")
    generate.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts at once (default: 16)")
    generate.add_argument("-o", "--output", metavar="FILE", help="the answers; FILE-answers.jsonl when absent")
    chat = command("chat", "talk to a trained model; or answer the prompt on standard input", "RUN")
    _speaking_options(chat)
    serve = command("serve", "serve a trained model on this machine, for any client of OpenAI's protocol", "RUN")
    serve.add_argument("--stage", help="which stage's model, of an adapter the merged one; the last one when absent")
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="the port on 127.0.0.1 (default: 8000)")
    text = "write a trained model for llama.cpp and Ollama, with a Modelfile, or as an ONNX graph"
    export = command("export", text, "RUN")
    export.add_argument("--to", choices=["gguf", "onnx"], default="gguf", help="the format (default: gguf)")
    export.add_argument("--quant", metavar="FORM", help="of gguf: f16, q8_0 (default), q4_k_m or another of llama.cpp")
    export.add_argument("--stage", help="which stage's model, of an adapter the merged one; the last one when absent")
    text = "where it is written; RUN/export or RUN/export/onnx when absent"
    export.add_argument("-o", "--output", metavar="FOLDER", help=text)
    push = command("push", "upload an adapter or a model with its card to the Hub", "RUN")
    _push_options(push)


def _keeping_commands(command: AddCommand) -> None:
    """Adds the commands on run folders, recipes and the machine."""
    command("report", "write report.md and report.html again from the scorecard, without a model", "RUN")
    diff = command("diff", "compare two runs without a model: recipes, scores with paired errors, answers, cost")
    diff.add_argument("a", metavar="A", help="a run folder")
    diff.add_argument("b", metavar="B", help="another one")
    diff.add_argument("--stage", help="which stage of both; the last scored one of each when absent")
    board = command("board", "show runs on read-only pages on this machine: how far they are, curves, scores, samples")
    board.add_argument(
        "runs", nargs="?", default="runs", metavar="RUNS", help="a folder of runs, or one; runs when absent"
    )
    board.add_argument("--port", type=int, default=8765, metavar="N", help="the port on 127.0.0.1 (default: 8765)")
    clean = command(
        "clean", "show, or remove, what a run keeps beside its results: earlier versions of stages, checkpoints", "RUN"
    )
    clean.add_argument("--yes", action="store_true", help="remove it")
    recipes = command("recipes", "list the recipes that come with hfpipe, or copy one")
    recipes.add_argument("--copy", metavar="NAME", help="copy one here, to start from")
    launch = command("launch", "print the file that starts a recipe on a cluster, and its line", "RECIPE")
    launch.add_argument("--nodes", type=_count, default=1, metavar="N", help="machines (default: 1)")
    launch.add_argument("--gpus", type=_count, default=8, metavar="G", help="GPUs of each machine (default: 8)")
    launch.add_argument("--memory", type=_gibibytes, default=80.0, metavar="GIB", help="memory of a GPU (default: 80)")
    launch.add_argument("--on", choices=LAUNCHERS, default="torchrun", help="launcher (default: torchrun)")
    command("env", "print what a bug report needs: versions and hardware, without any secret")
    completion = command("completion", 'print the completion script of a shell: eval "$(hfpipe completion bash)"')
    completion.add_argument("shell", metavar="SHELL", choices=["bash", "zsh", "tcsh"], help="bash, zsh or tcsh")
    command("schema", "print the JSON schema of a recipe, for editors")


def _writing_commands(command: AddCommand) -> None:
    """Adds the commands that write a recipe."""
    new = command("new", "write a recipe for your own data, from five answers; what the options do not say is asked")
    new.add_argument("--data", metavar="FILE", help="a file, a folder, or a data set of the Hub")
    new.add_argument("--model", metavar="ID", help="the base model: its id on the Hub, or a folder")
    new.add_argument("--task", metavar="TASK", help="chat, instructions, pretrain, classification or translation")
    text = "what columns of other names are, e.g. prompt=Frage,completion=Antwort"
    new.add_argument("--columns", metavar="ROLE=COLUMN,...", help=text)
    new.add_argument(
        "--format", metavar="NAME", help="what the rows are (docs/data.md), where their columns fit several"
    )
    new.add_argument("--hardware", metavar="WHAT", help="cpu, or the memory of one GPU such as 24GB")
    new.add_argument("-o", "--output", metavar="RECIPE", help="a file to write; NAME-OF-THE-DATA.yaml when absent")
    convert = command("convert", "write a recipe from a config of another tool")
    convert.add_argument("file", metavar="FILE", help="YAML, JSON, or a shell script that starts the tool")
    convert.add_argument(
        "--from", dest="tool", choices=CONVERTED_TOOLS, help="whose config it is; told by its keys when absent"
    )
    convert.add_argument("-o", "--output", metavar="RECIPE", help="a file to write; standard output when absent")


def _voice_options(parser: argparse.ArgumentParser) -> None:
    """Adds the ways in which a command that works for a while speaks, see `display.start`."""
    group = parser.add_mutually_exclusive_group()
    for mode, text in (
        ("quiet", "say warnings, results and errors alone"),
        ("verbose", "say every line on a terminal too, with what the libraries say"),
        ("json", "one JSON object a line on standard output (docs/display.md)"),
    ):
        group.add_argument(f"--{mode}", dest="voice", action="store_const", const=mode, default="auto", help=text)


def _set_option(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)


def _speaking_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", action="store_true", help="the base model answers beside it")
    parser.add_argument("--stage", help="which stage's model or adapter; the last one when absent")
    parser.add_argument("--strength", type=float, metavar="X", help="from 0 (the stage's parent) to 1 (as trained)")
    _set_option(parser, "a field of transformers.GenerationConfig, e.g. max_new_tokens=200 or do_sample=true")


def _push_options(push: argparse.ArgumentParser) -> None:
    """The words of a recipe's `push:`, see `PUSH_WORDS`."""
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


def _strengths(text: str) -> list[float]:
    """Reads `0,0.25,0.5`."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= strength <= 1 for strength in found):
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed are numbers from 0 to 1, such as 0,0.25,0.5,0.75,1")
    return found


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
