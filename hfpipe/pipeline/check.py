"""`hfpipe check`: what can be known before training."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hfpipe.core import display
from hfpipe.core.command import our_command
from hfpipe.core.errors import MachineError, UserError
from hfpipe.core.files import GIB
from hfpipe.core.output import has_colours, painted
from hfpipe.data.cleaning.contamination import overlap_lines
from hfpipe.data.dedup import cleaning_of
from hfpipe.data.mixture import mixture
from hfpipe.data.sources.load import open_source
from hfpipe.evaluation.suites import suite_rows
from hfpipe.model.base import shapes_of, texts_for_tokenizer
from hfpipe.model.create import architecture_of, create_model, train_tokenizer
from hfpipe.model.load import ModelRef, task_of, task_of_type
from hfpipe.model.tokenizer import added_ids, load_tokenizer, prepare_tokenizer, template_warning
from hfpipe.pipeline.context import quiet_libraries
from hfpipe.pipeline.first_rows import FEW, facts_of, flaws_of
from hfpipe.pipeline.requirements import Loaded, require_start, require_training
from hfpipe.recipe import Recipe, Source, Stage
from hfpipe.stages.compatibility import Sample, long_rows
from hfpipe.stages.fit import Fit, fitted, require_memory
from hfpipe.stages.memory import copies
from hfpipe.stages.own_texts import MOST_TEXTS, opening_of
from hfpipe.stages.trainer import divide_batch, read_share, warmup_warning

FEW_ROWS = 50  # of a suite: fewer tell only large changes from noise
TIGHT = 0.9  # of the room: a prediction above it may be short


def check_recipe(recipe: Recipe, launch: str) -> None:
    """Prints the note on a recipe; of one that is repeated, on its first repeat: they differ in seeds or folds alone.

    Args:
        recipe: The recipe.
        launch: The command that runs it, for the end of the note.

    Raises:
        UserError: Something that would stop the run.
    """
    if recipe.seeds or recipe.cross_validation:
        from hfpipe.pipeline.repeats import repeats_of

        _, recipe = next(repeats_of(recipe))
    note = Note()
    try:
        preflight(recipe, note)
    except UserError:
        note.stop()
        raise
    note.close(launch)


def launch_line(path: str, overrides: Sequence[str]) -> str:
    """The command that runs a recipe on all GPUs of this machine, or on its CPU."""
    words = shlex.join([path, *(word for one in overrides for word in ("--set", one))])
    gpus = torch.cuda.device_count()
    if gpus > 1:
        return f"accelerate launch --multi_gpu --num_processes {gpus} -m hfpipe run {words}"
    return f"{our_command()} run {words}"


def preflight(recipe: Recipe, note: Note) -> None:
    """Tells of model, memory, disk, rows and tokens of each source, steps, suites, the Hub.

    Raises:
        UserError: Something that would stop the run.
    """
    quiet_libraries()
    require_start(recipe)
    loaded = _loaded(recipe)
    tokenizer, model = loaded.tokenizer, loaded.model
    parameters = model.num_parameters()
    note.fine("model", f"{recipe.model.id or 'from nothing'}: {parameters:,} parameters, {len(tokenizer):,} tokens")
    if warning := template_warning(tokenizer, recipe.model.tokenizer):
        note.look("template", warning)
    _tell_suites(recipe, loaded, note)
    answers = require_training(loaded)
    for line in answers.hub:
        tell = note.look if line.startswith("warning: ") else note.fine
        tell("hub", line.removeprefix("warning: "))
    for stage, fit in zip(recipe.stages, answers.fits, strict=True):
        if warning := long_rows(stage, model):
            note.look("length", warning)
        _tell_stage(recipe, stage, tokenizer, answers.samples, fit, note)
        _tell_memory(recipe, fit, note)
    _tell_overlap(answers.overlap, note)
    _check_disk(recipe, parameters, note)
    if recipe.fit != "auto":
        require_memory(recipe, answers.fits)


def _tell_suites(recipe: Recipe, loaded: Loaded, note: Note) -> None:
    if not recipe.evaluate:
        note.look("suite", "none, so nothing is measured", "to do: add `evaluate:` (docs/evaluation.md)")
    for name, rows in loaded.suites.items():
        suite = recipe.evaluate[name]
        told = f"{name}: {len(rows):,} rows, {', '.join(suite.metrics) or 'scored by lm-eval'}"
        if suite.lm_eval is not None:
            note.fine("suite", told)
            continue
        taken = str(open_source(suite.data, default_split="test").taken)
        if len(rows) < FEW_ROWS:
            note.look("suite", told, taken, "so few rows tell only large changes from noise: score more, if you can")
        else:
            note.fine("suite", told, taken)


def _tell_overlap(pairs: Sequence[Mapping[str, Any]], note: Note) -> None:
    """Tells which suites' rows stand in which source; of the suites without any, in one line for each source."""
    told = list(zip(pairs, overlap_lines(pairs), strict=True))
    suites = len({pair["suite"] for pair in pairs})
    for begin in range(0, len(told), suites or 1):  # each source with all suites
        free = []
        for pair, line in told[begin : begin + suites]:
            if pair["which"]:
                note.look("overlap", line, "to do: `decontaminate: true` of that source leaves these rows out")
            elif pair["near"]:
                note.fine("overlap", line)
            else:
                free.append(line.removeprefix(f"suite {pair['suite']}: "))
                first = line
        if free:
            note.fine("overlap", first if len(free) == 1 else f"{len(free):,} suites: {free[0]}")


def _tell_memory(recipe: Recipe, fit: Fit, note: Note) -> None:
    """Tells what a stage needs; of one that does not fit, what `fit: auto` changes."""
    line = f"{fit.stage.name}: {fit.line()}"
    if fit.memory is None:
        note.look("memory", line)
    elif not fit.fits and recipe.fit != "auto":
        note.wrong("memory", line)
    elif fit.fits and fit.memory.total > TIGHT * fit.room:
        note.look("memory", line, "to do: nothing, or `fit: auto`, which makes a stage smaller if memory runs out")
    else:
        note.fine("memory", line)
    if fit.chosen:
        note.fine("memory", f"{fit.stage.name}: {fit.chosen}")
    for change in fitted(recipe, fit)[1] if recipe.fit == "auto" else ():
        note.fine("fit", f"{fit.stage.name}: {change}")


def run_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer that a run of this recipe would use; a small one is trained where the recipe trains its own."""
    block, options, task = recipe.model.tokenizer, recipe.model, _task(recipe)
    if block is not None and block.train is not None:
        sample = block.train.model_copy(update={"take": 2000})
        tokenizer: Any = train_tokenizer(texts_for_tokenizer(recipe, sample), block.train.vocab_size, 1024, task)
    else:
        trust, words = options.trust_remote_code, block.passed_through if block is not None else {}
        own = block is not None and block.id is not None
        path, revision = (block.id, block.revision) if own and block else (options.id, options.revision)
        tokenizer = load_tokenizer(path or "", revision=revision, trust_remote_code=trust, task=task, words=words)
    return prepare_tokenizer(tokenizer, block)


def _task(recipe: Recipe) -> str:
    """Returns the task of the base, a key of `AUTO_CLASSES`."""
    options = recipe.model
    if options.architecture is not None:
        return task_of_type(str(architecture_of(options).get("model_type")))
    return task_of(ModelRef(options.id or "", options, revision=options.revision))


def _loaded(recipe: Recipe) -> Loaded:
    """Returns what a run would load: a model without its weights, and of a tokenizer that it trains a small one."""
    options, tokenizer = recipe.model, run_tokenizer(recipe)
    if options.id is not None:
        model = shapes_of(ModelRef(options.id, options, revision=options.revision))
    else:
        with torch.device("meta"):  # shapes without memory, and tied weights stay one
            model = create_model(architecture_of(options), tokenizer, recipe.seed)
    added = added_ids(tokenizer, options.tokenizer, model.config.get_text_config().vocab_size)
    suites = {name: suite_rows(suite) for name, suite in recipe.evaluate.items()}
    return Loaded(recipe, tokenizer, added, model, _task(recipe), suites)


def _tell_stage(
    recipe: Recipe,
    stage: Stage,
    tokenizer: Any,
    samples: Mapping[tuple[str, int], Sample],
    fit: Fit,
    note: Note,
) -> None:
    """Tells of rows, tokens and steps of a stage."""
    per_device, accumulation = divide_batch(stage)
    max_length = stage.training.get("max_length") or 1024
    tokens_known = trained_known = 0.0
    rows_known = 0
    for place, source in enumerate(stage.data):
        sample = samples[stage.name, place]
        facts = facts_of(sample.rows, stage, tokenizer, max_length, source)
        rows_known += sample.count or 0
        tokens_known += (sample.count or 0) * facts["tokens"]
        trained_known += (sample.count or 0) * facts["tokens"] * facts["trained"]
        _tell_source(stage, source, sample, facts, tokenizer, max_length, note)
    replayed = [part for part in mixture(recipe, stage) if part.replayed]
    for part in replayed:
        unit = "tokens" if stage.kind == "pretrain" else "rows"
        note.fine("replay", f"{stage.name}: {part.share:.1%} of the {unit} from {part.source.title}")
    global_batch = per_device * accumulation
    kept = stage.kept.replay
    own = 0.0 if kept is None else kept.share
    left = 1 - sum(part.share for part in replayed) - own
    steps = stage.training.get("max_steps", -1)
    if steps <= 0:
        epochs = stage.training.get("num_train_epochs", 1)
        size = rows_known if stage.kind != "pretrain" else tokens_known / max_length
        beside = own if stage.PAIRS else 0.0  # own texts come with pairs, and make no rows of their own
        steps = math.ceil(size * epochs / (left + beside) / global_batch)
    if kept is not None:
        if stage.kind == "pretrain":
            whole = steps * global_batch * max_length
        else:
            rows = tokens_known / max_length if stage.training.get("packing") else rows_known
            whole = trained_known / left * read_share(stage, rows)
        _tell_kept(recipe, stage, tokenizer, whole * kept.share, note)
    _tell_near(fit, note)
    batch = f"{global_batch} rows ({per_device} x {accumulation}) on one rank"
    note.fine("stage", f"{stage.name}: {steps:,} steps of {batch}")
    if warning := warmup_warning(stage, steps):
        note.look("warmup", f"{stage.name}: {warning}", "to do: a share of the steps, such as `warmup_steps: 0.1`")


def _tell_source(
    stage: Stage,
    source: Source,
    sample: Sample,
    facts: dict[str, float],
    tokenizer: Any,
    max_length: int,
    note: Note,
) -> None:
    """Tells of one source, and of rows in it that do not train as they should."""
    count, title = sample.count, f"{stage.name}: {source.title}"
    known = "streamed" if count is None else f"{count:,} rows, about {count * facts['tokens']:,.0f} tokens"
    trained = f", {facts['trained']:.0%} of them trained on" if stage.kind == "sft" else ""
    cleaned = [f"cleaned first, in one pass over it: {cleaning_of(source)}"] if source.cleaned else []
    note.fine("data", f"{title}: {known}; {facts['tokens']:.0f} tokens a row{trained}", str(sample.taken), *cleaned)
    for flaw in flaws_of(sample.rows, stage, tokenizer, max_length, source):
        if flaw.share >= FEW:
            note.look("data", f"{title}: {flaw.share:.0%} of the sampled rows {flaw.what}", f"to do: {flaw.remedy}")
        elif flaw.share:
            note.fine("data", f"{title}: {flaw.share:.1%} of the sampled rows {flaw.what}")


def _tell_kept(recipe: Recipe, stage: Stage, tokenizer: Any, tokens: float, note: Note) -> None:
    """Tells what a stage's parent has to make of itself, before the stage is trained."""
    kept = stage.kept.replay
    assert kept is not None
    chat = "texts and chats" if opening_of(recipe, stage, tokenizer) else "texts"
    parent = recipe.parent_of(stage.name)
    if kept.rows is not None:
        size = f"{kept.rows:,} of them"
    else:
        size = f"about {tokens:,.0f} tokens, at most {MOST_TEXTS:,} of them" if tokens else f"{MOST_TEXTS:,} of them"
    told = f"{kept.share:.1%} of the trained tokens from {chat} that {parent} makes of itself first"
    note.fine("keep", f"{stage.name}: {told}: {size}")


def _tell_near(fit: Fit, note: Note) -> None:
    """Tells what holding a stage near its parent takes."""
    stage = fit.stage
    if stage.kept.kl is None and stage.kept.l2 is None:
        return
    takes = "the parent is the model with its adapter off, so there is no second one"
    if many := sum(one is not None for one in (fit.setting.parent, fit.setting.drawn)):
        takes = f"{many} frozen copies of the parent" if many > 1 else "a frozen copy of the parent"
        takes += " (that of kl in 4 bits)" if fit.setting.rounded else ""
        if fit.memory is not None:
            takes += f", {sum(copies(fit.config, fit.setting)) / GIB:.2f} GiB (counted in memory below)"
    held = " and ".join(word for word in ("kl", "l2") if getattr(stage.kept, word) is not None)
    note.fine("keep", f"{stage.name}: {held}: {takes}")


def _check_disk(recipe: Recipe, parameters: int, note: Note) -> None:
    """Two checkpoints with optimizer and the final model of each full stage must find room."""
    need = sum((2 * 12 + 4) * parameters if stage.adapter is None else 0.5 * parameters for stage in recipe.stages)
    place = recipe.run_folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    tell = note.wrong if need > free else note.look if need > TIGHT * free else note.fine
    tell("disk", f"about {need / GIB:.1f} GiB for checkpoints and models; {free / GIB:.1f} GiB free in {place}")
    if need > free:
        raise MachineError(
            f"the run needs about {need / GIB:.1f} GiB of disk and {place} has {free / GIB:.1f} GiB. Set output_dir to "
            "a larger disk, or training.save_total_limit: 1."
        )


FINE, LOOK, WRONG = ("✓", "green"), ("!", "yellow"), ("✗", "red")
LABEL = 10  # characters of the column of labels
INDENT = " " * (2 + LABEL + 1)


class Note:
    """Prints findings as they are made, and counts those to look at."""

    def __init__(self) -> None:
        self.to_look_at = 0
        self._coloured = has_colours(sys.stdout)

    def fine(self, label: str, text: str, *more: str) -> None:
        """Tells what is in order, or a plain fact.

        Args:
            label: Its subject: `model`, `data`, `memory`.
            text: The finding.
            more: Lines below it.
        """
        self._print(FINE, label, text, more)

    def look(self, label: str, text: str, *more: str) -> None:
        """Tells what a run is not stopped by, though it may not be what is wanted; with what to do about it."""
        self.to_look_at += 1
        self._print(LOOK, label, text, more)

    def wrong(self, label: str, text: str, *more: str) -> None:
        """Tells what stops a run; an error with the remedy follows."""
        self._print(WRONG, label, text, more)

    def stop(self) -> None:
        """Ends the note of a recipe that would not run; the error itself is printed after it."""
        display.clear()
        print(f"\n{self._marked(WRONG)} a run would stop here:", flush=True)

    def close(self, launch: str) -> None:
        """Ends the note of a recipe that can be run, with the line that does it."""
        display.clear()
        many = f"{self.to_look_at} thing{'s' if self.to_look_at > 1 else ''}"
        told = f"no fault found, {many} to look at (!)" if self.to_look_at else "no fault found"
        mark = LOOK if self.to_look_at else FINE
        print(f"\n{self._marked(mark)} {told}; start it with:\n  {launch}")

    def _print(self, mark: tuple[str, str], label: str, text: str, more: Sequence[str]) -> None:
        head = f"{self._marked(mark)} {label:{LABEL}} "
        for place, line in enumerate((text, *more)):
            first = head if place == 0 else INDENT
            print(first + self._wrapped(line))

    def _marked(self, mark: tuple[str, str]) -> str:
        return painted(*mark) if self._coloured else mark[0]

    def _wrapped(self, line: str) -> str:
        if not sys.stdout.isatty():
            return line
        width = max(40, shutil.get_terminal_size().columns - len(INDENT))
        return f"\n{INDENT}".join(textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""])
