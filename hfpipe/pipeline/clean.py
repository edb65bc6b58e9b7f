"""Shows and removes the files that a run folder keeps beside its results: `hfpipe clean RUN [--yes]`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from hfpipe.core.files import read_json
from hfpipe.recipe import load_recipe


def clean_run(folder: Path, *, remove: bool) -> None:
    """Prints what could be removed from a run folder, with its size, and removes it where it is told to.

    Args:
        folder: The run folder.
        remove: Whether to remove it.
    """
    stages = {stage.name for stage in load_recipe(folder / "recipe.yaml").stages}
    found = [(path, why, _size(path)) for path, why in _removable(folder, stages)]
    for path, why, size in found:
        print(f"{_in_words(size):>10}  {path}: {why}")
    total = _in_words(sum(size for _, _, size in found))
    if not found:
        print(f"{folder} holds its results and nothing else.")
    elif not remove:
        print(f"{total:>10}  in all. Nothing was removed; with --yes it is: hfpipe clean {folder} --yes")
    else:
        for path, _, _ in found:
            shutil.rmtree(path)
        print(f"{total:>10}  removed.")


def _removable(folder: Path, stages: set[str]) -> Iterator[tuple[Path, str]]:
    """Folders that no result of the run lies in, and what each is. None lies in another."""
    for place in sorted((folder / "stages").glob("*")):
        stage = read_json(place / "stage.json")
        known = stage.get("hash")
        if known and place.name not in stages and place.name.rpartition(".")[0] in stages:
            done = read_json(place / "done.json")
            if "damaged" in stage:
                yield place, f"stage {place.name.rpartition('.')[0]}, whose weights were damaged"
                continue
            trained = f"trained to its end, {done.get('steps', '?')} steps" if done else "not trained to its end"
            yield place, f"another version of stage {place.name.rpartition('.')[0]}, {trained}"
            continue
        if (place / "done.json").exists():
            for checkpoint in sorted(place.glob("checkpoint-*")):
                yield checkpoint, "a longer training of the finished stage would go on from it"
        for cut in sorted([*place.glob(".*.writing"), *place.glob("rank[0-9]*")]):
            yield cut, "writing it was cut short"


def _size(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _in_words(size: int) -> str:
    number, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if number < 1000:
            break
        number, unit = number / 1000, larger
    return f"{number:.0f} {unit}" if unit in ("B", "kB") else f"{number:.1f} {unit}"
