"""Finds earlier training again after a recipe has changed, and continues it where only its length has.

A stage folder belongs to one version of its stage, by the hash in its stage.json. The folder of another version is
moved aside to `stages/<stage>.<hash>`; it comes back when its recipe does. A run deletes none of them: `hfpipe clean`
shows and removes them.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from hfpipe.core.errors import MachineError
from hfpipe.core.files import link_or_copy, read_json, whole_folder, write_json
from hfpipe.core.run_layout import MODEL, damage_of
from hfpipe.stages.checkpoints import by_step, version_of

STAGE = "stage.json"


def versions_aside(folder: Path) -> list[Path]:
    """The folders of other versions of a stage that were moved aside, in the order of their names."""
    others = folder.parent.glob(f"{folder.name}.*") if folder.parent.is_dir() else ()
    return sorted(path for path in others if read_json(path / STAGE).get("hash"))


def move_aside(folder: Path) -> Path:
    """Moves a stage folder aside and returns where it is now."""
    name = f"{folder.name}.{str(read_json(folder / STAGE).get('hash', 'unknown'))[:8]}"
    places = [folder.with_name(name), *(folder.with_name(f"{name}-{number}") for number in range(2, 1000))]
    aside = next(place for place in places if not place.exists())
    os.replace(folder, aside)
    return aside


@dataclass(frozen=True)
class Version:
    """One version of a stage.

    Args:
        hash: Identifies what it leaves.
        any_length: The same for all versions that differ in the number of their steps only.
        bound: Why a longer version is another training from its first step on; None where it is not.
    """

    hash: str
    any_length: str
    bound: str | None

    @property
    def trajectory(self) -> str:
        """The same for all versions whose checkpoints it can go on from."""
        return self.hash if self.bound else self.any_length


def take_up(folder: Path, version: Version) -> list[str]:
    """Makes the folder of a stage that of the version that is asked for.

    Args:
        folder: `stages/<stage>`.
        version: The version.

    Returns:
        Lines that say what was done, for the log.
    """
    lines = []
    found = read_json(folder / STAGE)
    if found.get("hash") == version.hash and (folder / "done.json").exists():
        damage = damage_of(folder / MODEL)
        if damage is None:
            return []
        lines += _set_aside_damaged(folder, version, damage)
        found = {}
    elif found.get("hash") == version.hash:
        return []
    if found:
        lines.append(f"the recipe has changed; the earlier work is now in {move_aside(folder)}")
        if found.get("any_length") == version.any_length and version.bound:
            lines.append(f"only its length has changed, but {version.bound}: it is trained from its beginning")
    aside = versions_aside(folder)
    for earlier in aside:
        if read_json(earlier / STAGE)["hash"] == version.hash:
            os.replace(earlier, folder)
            return [*lines, f"what this recipe trained before is back from {earlier}"]
    for earlier in () if version.bound else aside:
        if read_json(earlier / STAGE).get("any_length") == version.any_length and _lend(earlier, folder, version):
            lines.append(f"it differs from {earlier} in its length only, and may go on from its checkpoints")
    write_json(folder / STAGE, {"hash": version.hash, "any_length": version.any_length})
    return lines


def _set_aside_damaged(folder: Path, version: Version, damage: str) -> list[str]:
    """Moves a finished stage aside whose weights are not those that were trained, so that it is trained again.

    Raises:
        MachineError: Only another file has changed, which may have been meant.
    """
    if ".safetensors" not in damage.split()[0]:
        raise MachineError(
            f"{folder / MODEL} is not what the stage wrote: {damage}. Put the file back, or, to train the stage again, "
            f"move the folder away: mv {folder} {folder}.old"
        )
    aside = move_aside(folder)
    write_json(aside / STAGE, {"hash": f"damaged-{version.hash}", "damaged": version.hash})
    _lend(aside, folder, version)
    return [f"the finished stage is damaged ({damage}), so it is trained again; what is left of it is now in {aside}"]


def _lend(earlier: Path, folder: Path, version: Version) -> bool:
    """Gives a stage folder the checkpoints of another version that it can go on from, with their log and cost."""
    checkpoints = [one for one in by_step(earlier) if version_of(one) in (version.hash, version.trajectory)]
    for checkpoint in checkpoints:
        if not (folder / checkpoint.name).exists():
            with whole_folder(folder / checkpoint.name) as beside:
                for file in filter(Path.is_file, checkpoint.rglob("*")):
                    link_or_copy(file, beside / file.relative_to(checkpoint))
    if checkpoints and (earlier / "log.jsonl").exists():
        shutil.copyfile(earlier / "log.jsonl", folder / "log.jsonl")
    if checkpoints and (cost := read_json(earlier / "cost.json")):
        write_json(folder / "cost.json", cost | {"stage": version.hash})
    return bool(checkpoints)


def forget_checkpoints(folder: Path, version: Version) -> None:
    """Removes the checkpoints of a finished stage, but the newest that a longer version could go on from."""
    kept = next((one for one in by_step(folder) if not version.bound and version_of(one) == version.trajectory), None)
    for checkpoint in by_step(folder):
        if checkpoint != kept:
            shutil.rmtree(checkpoint, ignore_errors=True)
