"""Counts of what `hfpipe convert` says of other tools' configs, and of what is lost.

    python benchmarks/convert.py CLONE...

Each YAML file below a clone of a tool's repository is converted. One that trains on text becomes a recipe, which has to
pass `hfpipe check --fast`; the others (launchers, evaluations, images, rewards) end with a reason, which is counted.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from hfpipe.convert.command import convert_file
from hfpipe.convert.draft import OutOfScope
from hfpipe.core.errors import RecipeError
from hfpipe.recipe import load_recipe


def main() -> None:
    """Prints the counts as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clones", nargs="+", type=Path, help="folders with the files of a repository")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: Counter[str] = Counter()
    lost: dict[str, list[str]] = defaultdict(list)
    for clone in parser.parse_args().clones:
        for file in sorted(clone.rglob("*.y*ml")):
            try:
                recipe, notes = convert_file(file)
            except OutOfScope as error:
                counts[clone.name]["left out"] += 1
                reasons[re.sub(r"this \w+-?\w* config |\(.*|^\S+\.ya?ml ", "", str(error)).strip()] += 1
                continue
            except RecipeError:
                counts[clone.name]["no config"] += 1
                continue
            _require_right(recipe, file)
            keys = sorted({note.key for note in notes if note.kind == "lost"})
            counts[clone.name]["lost" if keys else "full"] += 1
            for key in keys:
                lost[re.sub(r"\[\d+\]", "", key)].append(str(file))
    _tell(counts, reasons, lost)


def _require_right(recipe: str, file: Path) -> None:
    """Stops where a recipe has a fault."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as written:
        written.write(recipe)
        written.flush()
        try:
            load_recipe(written.name)
        except RecipeError as error:
            raise SystemExit(f"the recipe of {file} has a fault: {error}") from error


def _tell(counts: dict[str, Counter[str]], reasons: Counter[str], lost: dict[str, list[str]]) -> None:
    kinds = ("full", "lost", "left out", "no config")
    print("| clone | " + " | ".join(kinds) + " |\n| --- |" + " --- |" * len(kinds))
    for name, found in counts.items():
        print(f"| {name} | " + " | ".join(str(found[kind]) for kind in kinds) + " |")
    full, some = (sum(found[kind] for found in counts.values()) for kind in ("full", "lost"))
    print(f"\n{full} of {full + some} text configs in full ({full / max(1, full + some):.1%})\n\nLeft out:")
    for reason, number in reasons.most_common():
        print(f"- {number} {reason}")
    print("\nLost:")
    for key, files in sorted(lost.items(), key=lambda one: -len(one[1])):
        print(f"- {len(files)} {key}: {', '.join(files)}")


if __name__ == "__main__":
    main()
