"""CONTRIBUTING.md is true: the files that it names are all that a new kind, metric, format or exit code touches.

One of each is added to a copy of the package, and a recipe that uses them all is run there by the command line.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny

ROOT = Path(__file__).parent.parent


class Edit(NamedTuple):
    """A change of one file: `after` in place of `before`, which stands there once; without `before` a new file."""

    path: str
    before: str
    after: str


REVERSE = '''"""`kind: reverse`: next-token training on texts that are read from their end, by Trainer."""

from transformers import Trainer

from hfpipe.core.errors import Unlucky
from hfpipe.data.cleaning.text_rules import Read, tidy_rows
from hfpipe.data.dataloader import BatchLoader
from hfpipe.data.sources.load import load_rows
from hfpipe.model.load import load_model
from hfpipe.stages.trainer import StageRun, plan_of, train, trainer_arguments, with_adapter


def run_reverse(run: StageRun):
    """Trains a reverse stage and saves its model."""
    stage, rows, sources = run.stage, [], {}
    for number, source in enumerate(stage.data):
        opened, removed = run.cleaner.rows(load_rows(source, kinds=("text",)), source)
        read = Read()
        for row in tidy_rows(opened, source, read):
            if "unlucky" in row["text"]:
                raise Unlucky(f"source {source.path!r} holds an unlucky text. Take it out.")
            ids = run.tokenizer(row["text"])["input_ids"][: -stage.longest - 1 : -1]
            rows.append({"input_ids": ids, "labels": ids})
        sources[f"{number}: {source.title}"] = {**read.facts(), **removed}
    lengths = [len(row["input_ids"]) for row in rows]
    plan = plan_of(stage, len(rows))
    model = with_adapter(run, load_model(run.parent, frozen=stage.adapter is not None))
    arguments = trainer_arguments(run, plan.max_steps, plan.per_device, plan.accumulation)
    trainer = Trainer(model=model, args=arguments, processing_class=run.tokenizer)
    loader = BatchLoader(plan.serve(run, rows, lengths), plan.per_device, run.tokenizer.pad_token_id)
    facts = train(run, trainer, loader, tokens_per_step=plan.tokens_per_step(lengths), longest=(max(lengths), 0))
    facts["data"]["sources"] = sources
    return facts
'''
KIND = [
    Edit(
        "hfpipe/recipe/stage_config.py",
        "KINDS: dict[str, type[StageBase]] = {\n",
        '''class Reverse(StageBase):
    """Training on texts that are read from their end."""

    ARGUMENTS = ("transformers.training_args", "TrainingArguments")

    kind: Literal["reverse"]
    longest: int = Field(32, gt=0, description="tokens of a row")


KINDS: dict[str, type[StageBase]] = {
    "reverse": Reverse,
''',
    ),
    Edit("hfpipe/recipe/stage_config.py", "Stage = Annotated[", "Stage = Annotated[\n    Reverse | "),
    Edit("hfpipe/recipe/row_formats.py", 'trained_by=("pretrain", "sft")', 'trained_by=("pretrain", "sft", "reverse")'),
    Edit("hfpipe/stages/reverse.py", "", REVERSE),
    Edit("hfpipe/stages/__init__.py", "STAGES = {\n", 'STAGES = {\n    "reverse": run_reverse,\n'),
    Edit(
        "hfpipe/stages/__init__.py",
        "from hfpipe.stages.sft import run_sft, sft_trainer\n",
        "from hfpipe.stages.reverse import run_reverse\nfrom hfpipe.stages.sft import run_sft, sft_trainer\n",
    ),
]
METRIC = [
    Edit(
        "hfpipe/evaluation/metrics/lengths.py",
        "",
        '''"""Lengths of generated answers."""

from hfpipe.evaluation.metrics.rows import Share


class SameLength(Share):
    """The share of rows whose answer has as many characters as the right one."""

    def hit(self, prediction: str, reference: str) -> bool:
        return len(prediction) == len(reference)
''',
    ),
    Edit(
        "hfpipe/recipe/metric_table.py",
        "OUR_METRICS: dict[str, Metric] = {\n",
        'OUR_METRICS: dict[str, Metric] = {\n    "same_length": Metric("lengths.SameLength", "equal lengths"),\n',
    ),
]
FORMAT = [
    Edit(
        "hfpipe/recipe/row_formats.py",
        "_FORMATS = (\n",
        '_FORMATS = (\n    RowFormat("riddle", ("riddle", "solution"), rank=4, becomes="prompt_completion"),\n',
    ),
    Edit(
        "hfpipe/data/sources/convert.py",
        "CONVERTERS: dict[str, Callable[[Row], Row]] = {\n",
        '''def riddle(row: Row) -> Row:
    """A riddle and its solution."""
    return {"prompt": f"Riddle: {row['riddle']}\\nSolution:", "completion": f" {row['solution']}"}


CONVERTERS: dict[str, Callable[[Row], Row]] = {
    "riddle": riddle,
''',
    ),
]
EXIT_CODE = [
    Edit(
        "hfpipe/core/errors.py",
        "class DataError(UserError):\n",
        '''class Unlucky(UserError):
    """The data is unlucky."""

    exit_code = 6


class DataError(UserError):
''',
    ),
    Edit("docs/faults.md", "| 75 |", "| 6 | the data is unlucky | take it out |\n| 75 |"),
]
# Each kind of addition, its edits, and how many files it may touch; an exit code is raised in some file beside these.
ADDITIONS = {
    "A kind of stage": (KIND, 6),
    "A metric": (METRIC, 2),
    "A format of rows": (FORMAT, 2),
    "An exit code": (EXIT_CODE, 2),
}
ARCHITECTURE = {
    "model_type": "olmo2",  # nothing in the package knows it
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with one of each added."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("hfpipe", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for edit in (edit for edits, _ in ADDITIONS.values() for edit in edits):
        path = folder / edit.path
        if edit.before:
            text = path.read_text()
            assert text.count(edit.before) == 1, edit
            path.write_text(text.replace(edit.before, edit.after))
        else:
            assert not path.exists()
            path.write_text(edit.after)
    return folder


def run(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hfpipe", *arguments]
    return subprocess.run(command, cwd=copy, env=environment, text=True, capture_output=True, timeout=300)


@pytest.mark.parametrize("what", ADDITIONS)
def test_an_addition_touches_the_files_that_are_named_and_no_more(what: str) -> None:
    edits, most = ADDITIONS[what]
    touched = {edit.path for edit in edits}
    assert len(touched) <= most
    page = (ROOT / "CONTRIBUTING.md").read_text()
    (told,) = re.findall(rf"^- \*\*{what}\*\*.*?(?=^- |^#|\Z)", page, re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`((?:hfpipe|docs)/[\w./]+)`", told))
    assert {path for path in touched if (ROOT / path).exists()} == {
        path for path in named if path.endswith((".py", ".md"))
    }
    for path in touched - named:  # a file of its own
        assert f"{Path(path).parent}/" in named


# Files in which `kind: preference` lies, and those of its formats, its metrics and other tools' words for it.
PREFERENCE = (
    *("recipe/stage_config.py", "recipe/row_formats.py", "recipe/rules/training.py"),
    *("data/preference.py", "stages/preference.py", "stages/__init__.py"),
)
BESIDE = (
    *("data/sources/formats.py", "data/sources/convert.py"),
    *("recipe/metric_table.py", "evaluation/metrics/preference.py", "evaluation/answers.py"),
    *("recipe/foreign_words.py", "convert/"),
)


def test_the_kind_of_preferences_lies_in_six_files() -> None:
    named = re.compile(r"\bpreference\b|\bPreference\w*|\w+_preference|preference_\w+|PairTokenizer", re.IGNORECASE)
    found = {
        str(path.relative_to(ROOT / "hfpipe"))
        for path in (ROOT / "hfpipe").rglob("*.py")
        if named.search(path.read_text())
    }
    found -= {"scores/scorecard.py", "evaluation/multiple_choice.py", "evaluation/metrics/bias.py"}  # other preferences
    assert {path for path in found if not path.startswith(BESIDE)} == {*PREFERENCE}
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert all(f"`{path}`" in page for path in PREFERENCE)


@pytest.mark.slow
@pytest.mark.long
def test_one_of_each_works_together_by_the_command_line(copy: Path, tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    for name, numbers in (("riddles", range(24)), ("asked", range(50, 60))):
        rows = [
            {"riddle": f"{n}: who says {tiny.SOUNDS[animal]}?", "solution": animal}
            for n in numbers
            for animal in tiny.ANIMALS
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = tiny.recipe(tmp_path, merge=False, shift=False)
    content["model"]["architecture"] = ARCHITECTURE
    content["stages"][0] |= {"kind": "reverse", "longest": 24}
    content["stages"][0]["training"].pop("max_length")
    content["stages"][1]["data"] = [{"path": str(tmp_path / "riddles.jsonl")}]
    content["evaluate"] = {"riddles": {"data": {"path": str(tmp_path / "asked.jsonl")}, "metrics": ["same_length"]}}
    recipe = str(tiny.write(tmp_path, content))
    done = run(copy, "run", recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    scores = tiny.scores(tmp_path / "run")
    assert {stage for stage, suite, metric in scores if metric == "same_length"} == {"base", "prose", "sounds"}
    assert (tmp_path / "run/stages/prose/model/model.safetensors").is_file()
    (tmp_path / "prose.jsonl").write_text(json.dumps({"text": "an unlucky text"}) + "\n")
    failed = run(copy, "run", recipe, "--set", f"output_dir={tmp_path / 'again'}")
    assert failed.returncode == 6, failed.stdout + failed.stderr
    assert failed.stderr.splitlines()[-1].endswith("holds an unlucky text. Take it out.")
    assert "6 the data is unlucky" in run(copy, "--help").stdout.replace("\n", " ").replace("  ", " ")


def test_no_file_knows_an_architecture_that_the_copy_was_run_with() -> None:
    assert not [path for path in (ROOT / "hfpipe").rglob("*.py") if ARCHITECTURE["model_type"] in path.read_text()]
