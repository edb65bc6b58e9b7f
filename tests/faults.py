"""Spoilt inputs against the command line: none may end in a traceback, exit code 1, a crash or a hang.

`make faults` runs all of them (about half an hour of one core): 10,000 recipes, 1,000 data files, 500 run folders and
500 model folders, each with something wrong. Every input is made from its number alone, so that a fault comes again by

    python tests/faults.py recipes --first 4711 --count 1 --show

tests/test_faults.py runs a tenth of them. Commands run in one process after another, for speed; a process that dies is
told by the number that it was at, and the next one goes on behind it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutants
import tiny
import yaml

COUNTS = {"recipes": 10_000, "data": 1_000, "runs": 500, "models": 500}
ALLOWED = {0, 2, 3, 4, 5}
PATIENCE = 300  # seconds for one input
LONGEST = 30_000  # letters of a message
WORDS = tuple(
    "lora peft training masking replay push merge seeds cross_validation early_stopping fold where columns "  # noqa: SIM905
    "template take skip weight split name streaming deduplicate decontaminate chat_template add_tokens swap "
    "metric_options generation choices budget energy shift overlap quantization labels parent parent_adapter "
    "objective lm_eval optim warmup_steps neftune_noise_alpha packing target_modules modules_to_save delimiter "
    "data_files data_dir revision config dtype".split()
)


@dataclass(frozen=True)
class Outcome:
    """The outcome of one command on one spoilt input.

    Args:
        number: Of the input.
        command: The arguments.
        code: The exit code.
        said: The standard error, or the traceback.
        done: What was spoilt.
    """

    number: int
    command: list[str]
    code: int
    said: str
    done: str = ""

    @property
    def is_fault(self) -> bool:
        """Returns True if hfpipe must not end so."""
        lengthy = len(self.said) > LONGEST and self.code != 0
        return self.code not in ALLOWED or "Traceback (most recent call last)" in self.said or lengthy

    @property
    def where(self) -> str:
        """The error and the last line of hfpipe's own code in its traceback."""
        lines = [line.strip() for line in self.said.splitlines() if line.strip() and not line.startswith("hfpipe:")]
        frames = [line for line in lines if line.startswith("File") and "/hfpipe/" in line]
        place = frames[-1].split("/hfpipe/")[-1] if frames else ""
        return f"{lines[-1][:160] if lines else ''} | {place}"


def call(*command: str) -> tuple[int, str]:
    """Runs a command in this process; returns its exit code and what it said on standard error."""
    from hfpipe.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            code: Any = main(list(command))
        except SystemExit as error:
            code = error.code
        except BaseException:
            code = 1
            said.write(traceback.format_exc())
    return int(code or 0), said.getvalue()


def long_recipe(home: Path) -> dict[str, Any]:
    """A recipe with a stage of nearly every kind and most words in it."""
    recipe = tiny.recipe(home)
    sounds = recipe["stages"][1]["data"]
    recipe["stages"] += [
        {
            "name": "more",
            "kind": "sft",
            "parent": "sounds",
            "parent_adapter": "continue",
            "data": sounds,
            "replay": {"stage": "prose", "share": 0.1},
            "early_stopping": {"suite": "sounds", "metric": "accuracy", "patience": 2},
            "training": {"max_steps": 2, "eval_steps": 1, "max_length": 64, "report_to": "none"},
        },
        {
            "name": "class",
            "kind": "classification",
            "parent": "prose",
            "data": [
                {
                    **{key: value for key, value in sounds[0].items() if key != "template"},
                    "columns": {"sentence": "note", "label": "sound"},
                    "fold": {"of": 4, "keep": 1},
                }
            ],
            "labels": ["mew", "bark"],
            "training": {"max_steps": 1},
        },
    ]
    recipe["stages"][0]["data"][0] |= {"where": "id != 'x'", "take": 100, "deduplicate": "exact"}
    recipe["evaluate"]["general"] |= {"budget": "3%", "budget_action": "dial", "batch_size": 4}
    recipe["evaluate"]["sounds"]["generation"] = {"max_new_tokens": 4}
    recipe["push"] = {"repo_id": "me/x", "what": "merged", "private": True, "tag": "v1"}
    recipe["energy"] = {"country_iso_code": "DEU"}
    recipe["model"]["tokenizer"] |= {
        "add_tokens": ["<a>"],
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    return recipe


def short_recipe(**changes: Any) -> dict[str, Any]:
    """A recipe of one stage on a small base in the folder `model`; all that it names lies in the working directory."""
    recipe = tiny.recipe(Path(), output_dir="run", model={"id": "model"}, energy=False, **changes)
    recipe["stages"] = [dict(recipe["stages"][1], training={"max_steps": 1, "max_length": 64, "report_to": "none"})]
    return recipe


def prepare(home: Path) -> None:
    """Makes what is spoilt: data, a base, and the folder of a finished run."""
    from hfpipe.model.create import create_model, train_tokenizer

    tiny.write_data(home)
    texts = [json.loads(line)["text"] for line in (home / "prose.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer(texts, 320, 128)
    create_model(tiny.recipe(home)["model"]["architecture"], tokenizer, 0).save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    recipe = short_recipe()
    recipe["stages"][0]["training"] |= {"max_steps": 3, "eval_steps": 1, "learning_rate": 2e-2}
    recipe["stages"][0]["early_stopping"] = {"suite": "sounds", "metric": "bits_per_byte"}
    recipe["evaluate"]["general"] |= {"budget": "0.01%", "budget_action": "dial"}
    with contextlib.chdir(home):
        code, said = call("run", str(tiny.write(Path(), recipe, "whole.yaml")))
    if code not in (0, 3):
        raise RuntimeError(said)


def spoilt_recipe(home: Path, number: int, chance: random.Random) -> Iterator[Outcome]:
    """A recipe through `check --fast`; every tenth is drawn until that finds nothing, and goes through `check`."""
    whole = number % 10 == 0
    for _ in range(8 if whole else 1):
        recipe = mutants.mutated(short_recipe() if whole else long_recipe(home), chance, WORDS)
        content = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode()
        if not whole and chance.random() < 0.15:
            content = mutants.spoilt(content, chance)
        Path("spoilt.yaml").write_bytes(content)
        command = ["check", "--fast", "spoilt.yaml"]
        code, said = call(*command)
        yield Outcome(number, command, code, said)
        if code == 0:
            break
    if code == 0 and whole:
        code, said = call("check", "spoilt.yaml")
        yield Outcome(number, ["check", "spoilt.yaml"], code, said, content.decode())


def spoilt_data(home: Path, number: int, chance: random.Random) -> Iterator[Outcome]:
    """A data file of any format, for a stage of any kind, through `preview` and `check`."""
    ending = chance.choice(("jsonl", "jsonl", "json", "csv", "tsv", "txt", "parquet"))
    kind = chance.choice(("pretrain", "sft", "sft", "classification"))
    path = Path(f"spoilt.{ending}")
    path.write_bytes(mutants.data_file(ending, kind, chance))
    source: dict[str, Any] = {"path": str(path)}
    if chance.random() < 0.3:
        source = {"path": {"jsonl": "json", "tsv": "csv", "txt": "text"}.get(ending, ending), "data_files": str(path)}
    if chance.random() < 0.2:
        source["streaming"] = True
    stage = {"name": "s", "kind": kind, "data": [source], "training": {"max_steps": 1, "max_length": 64}}
    recipe = {"name": "d", "output_dir": "never", "model": {"id": "model"}, "stages": [stage], "energy": False}
    suite = chance.choice(("held.jsonl", str(path)))
    recipe |= {"evaluate": {"held": {"data": {"path": suite}, "metrics": ["bits_per_byte"]}}, "overlap": "report"}
    tiny.write(Path(), recipe, "data.yaml")
    for command in (["preview", "data.yaml"], ["check", "data.yaml"]):
        code, said = call(*command)
        yield Outcome(number, command, code, said, f"{json.dumps(source)} {path.read_bytes()[:300]!r}")
    path.unlink()


def spoilt_run(home: Path, number: int, chance: random.Random) -> Iterator[Outcome]:
    """The folder of a finished run, with one file spoilt, through the commands on a run, and through `run` itself."""
    shutil.rmtree("run", ignore_errors=True)
    shutil.copytree(home / "run", "run")
    done = mutants.spoil_folder(Path("run"), chance)
    shutil.copy(home / "whole.yaml", "whole.yaml")
    push = ["push", "run", "--repo-id", "me/x", "--what", "adapter", "--deadline-seconds", "1"]
    others = [["merge", "run"], ["evaluate", "run", "whole.yaml"], ["dial", "run", "--strengths", "0,1"], push]
    for command in (["report", "run"], ["clean", "run"], chance.choice(others), ["run", "whole.yaml"]):
        code, said = call(*command)
        yield Outcome(number, command, code, said, done)


def spoilt_model(home: Path, number: int, chance: random.Random) -> Iterator[Outcome]:
    """The folder of a base or of an adapter, with one file spoilt, through `check`, `evaluate` and `run`."""
    whole = chance.choice((home / "model", home / "run/stages/sounds/model"))
    shutil.rmtree("spoilt", ignore_errors=True)
    shutil.rmtree("run", ignore_errors=True)
    shutil.copytree(whole, "spoilt")
    done = f"{whole.parent.name}/{whole.name}: {mutants.spoil_folder(Path('spoilt'), chance)}"
    recipe = short_recipe()
    recipe["model"] = {"id": "spoilt"}
    tiny.write(Path(), recipe, "spoilt.yaml")
    tiny.write(Path(), short_recipe(), "suites.yaml")
    commands = [["check", "spoilt.yaml"], ["evaluate", "spoilt", "suites.yaml"]]
    if whole.name == "model" and number % 5 == 0:
        commands.append(["run", "spoilt.yaml"])
    for command in commands:
        code, said = call(*command)
        yield Outcome(number, command, code, said, done)


KINDS: dict[str, Callable[[Path, int, random.Random], Iterator[Outcome]]] = {
    "recipes": spoilt_recipe,
    "data": spoilt_data,
    "runs": spoilt_run,
    "models": spoilt_model,
}


def outcomes(kind: str, home: Path, numbers: range) -> Iterator[Outcome]:
    """Spoils and tries the inputs of these numbers, in the working directory.

    Args:
        kind: A key of `KINDS`.
        home: The folder that `prepare` made.
        numbers: Of the inputs.
    """
    for number in numbers:
        yield from KINDS[kind](home, number, random.Random(f"{kind} {number}"))


def in_processes(kind: str, home: Path, numbers: range) -> Iterator[Outcome]:
    """Makes `outcomes` in processes of their own, which may die or hang over an input."""
    at = numbers.start
    while at < numbers.stop:
        command = [sys.executable, __file__, kind, "--first", str(at), "--count", str(numbers.stop - at)]
        process = subprocess.Popen(
            [*command, "--home", str(home)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=home
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                told = json.loads(line)
                at = told.pop("next")
                if told:
                    yield Outcome(**told)
        finally:
            if at < numbers.stop:  # it died, or no more is asked for
                process.kill()
        if process.wait() != 0:
            yield Outcome(at, [kind], process.returncode, f"the process died ({process.returncode})")
            at += 1


def _work(kind: str, home: Path, numbers: range) -> None:
    """Tells the outcomes as JSON lines, and ends the process where an input takes too long."""
    import signal

    told = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries write to the descriptor, past Python
    sys.stdout = io.StringIO()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("prose", "held", "sounds", "asked"):
            shutil.copy(home / f"{name}.jsonl", scratch)
        os.symlink(home / "model", Path(scratch) / "model")
        os.chdir(scratch)
        for number in numbers:
            signal.alarm(PATIENCE)
            print(json.dumps({"next": number}), file=told, flush=True)
            for one in outcomes(kind, home, range(number, number + 1)):
                print(json.dumps({"next": number, **vars(one)}), file=told, flush=True)
        print(json.dumps({"next": numbers.stop}), file=told, flush=True)


def summary(found: list[Outcome]) -> str:
    """Tells every kind of fault once, with how often it came and its first number."""
    kinds: dict[str, list[Outcome]] = {}
    for one in found:
        kinds.setdefault(one.where, []).append(one)
    return "\n".join(
        f"{len(ones):4} x {where} | number {ones[0].number}: {' '.join(ones[0].command)} | {ones[0].done[:300]}"
        for where, ones in sorted(kinds.items(), key=lambda item: -len(item[1]))
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="all when absent")
    parser.add_argument("--share", type=float, default=1.0, help="of the inputs of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--count", type=int, help="how many inputs, instead of a share")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop each kind after so long")
    parser.add_argument("--show", action="store_true", help="print what every command said")
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Runs what is asked for, prints the faults, and returns 1 where there was one."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    options = _arguments()
    kinds = options.kinds or list(KINDS)
    if options.home is not None:
        _work(kinds[0], options.home, range(options.first, options.first + options.count))
        return 0
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        prepare(home)
        for kind in kinds:
            count = options.count or round(COUNTS[kind] * options.share)
            codes: Counter[int] = Counter()
            found: list[Outcome] = []
            end, tried = time.monotonic() + options.seconds, set()
            for one in in_processes(kind, home, range(options.first, options.first + count)):
                if time.monotonic() > end:
                    break
                tried.add(one.number)
                codes[one.code] += 1
                if one.is_fault:
                    found.append(one)
                    print(f"{kind} {one.number}: {' '.join(one.command)}: {one.where}", flush=True)
                if options.show:
                    print(f"{one.number} {' '.join(one.command)}: {one.code}\n{one.done}\n{one.said}\n")
            told = ", ".join(f"{code}: {times:,}" for code, times in sorted(codes.items()))
            commands = sum(codes.values())
            print(f"{kind}: {len(tried):,} inputs, {commands:,} commands; exit codes {told}; {len(found)} faults")
            if found:
                print(summary(found), flush=True)
            bad += len(found)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
