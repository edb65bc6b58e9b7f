"""Cures for forgetting in the report and the card: what is likely to help, and what a stage would have lost without.

What was measured comes first: other versions of a stage, from the same parent on the same data, in the run itself and
in the `cure` folder that `hfpipe cure` leaves in it. Nothing is told of a version that was not trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfpipe.core.files import read_json
from hfpipe.recipe import Keep, Recipe, Stage, load_recipe
from hfpipe.recipe.signatures import training_fields
from hfpipe.recipe.stage_config import KEEPING
from hfpipe.scores.scorecard import Score, of_lineage, read_scorecard
from hfpipe.scores.tradeoff import Point, kept_keys, kept_suites, point, scales_of
from hfpipe.scores.wording import loss_words, percent, share_words, with_interval

CURE = "cure"  # the folder of the comparison, in that of the run
COMPARED = "compared.json"  # in it: what the comparison found, for its page
STEEP = 4  # times the trainer's own learning rate (of an adapter, ten times that): what is above is told
OF_ADAPTERS = 10  # Schulman et al. 2025, LoRA Without Regret: their best rate is about ten times that of all weights
_LENGTH = ("max_steps", "num_train_epochs")


@dataclass(frozen=True)
class TrainedStage:
    """A stage that was trained, and where it stands.

    Args:
        stage: The stage.
        where: Its gain and forgetting.
    """

    stage: Stage
    where: Point


def how_kept(stage: Stage) -> list[str]:
    """Returns how a stage is kept near its parent, in words."""
    keep = stage.kept
    near = [] if keep.replay is None else [f"{percent(keep.replay.share)} of it on its parent's own texts"]
    if keep.kl is not None:
        near.append(f"KL to the parent{' in 4 bits' if keep.kl.parent else ''} there by {keep.kl.weight:g}")
    near += [f"L2 to its weights by {keep.l2.weight:g}"] if keep.l2 is not None else []
    return near


def next_cure(folder: Path, recipe: Recipe, scores: Sequence[Score], stage: Stage) -> str:
    """Returns what is likely to make a stage forget less: by what was measured, its rate, its data, and what it does.

    Args:
        folder: The run folder.
        recipe: The recipe of the run.
        scores: Its scores.
        stage: A stage that is over its budget.
    """
    measured = _measured(folder, recipe, scores, stage)
    return " ".join([*measured, *_too_steep(stage), *_far(folder, stage), _likely(stage)])


def cured_sentence(folder: Path, recipe: Recipe, scores: Sequence[Score], name: str) -> str | None:
    """Returns what a stage forgot, and what the same stage forgot without its `keep:`, where that was trained too."""
    stage = next(one for one in recipe.stages if one.name == name)
    kept = kept_suites(recipe.evaluate)
    if not how_kept(stage) or not kept:
        return None
    found = list(_versions(folder, recipe, scores, stage))
    own = next((one for one in found if one.stage.name == name), None)
    plain = next((one for one in found if not how_kept(one.stage) and _alike(one.stage, stage, _LENGTH)), None)
    if own is None or own.where.forgetting is None:
        return None
    told = (
        f"Stage {name} keeps what its parent can do ({', '.join(how_kept(stage))}): it forgot "
        f"{with_interval(*loss_words(own.where.forgetting))} of {', '.join(kept)}"
    )
    if plain is None or plain.where.forgetting is None:
        return f"{told}. What it would have lost without was not measured (`hfpipe cure` does)."
    steps = "" if _alike(plain.stage, stage) else f", of {_length(plain.stage)} and not {_length(stage)}"
    without = with_interval(*loss_words(plain.where.forgetting))
    return f"{told}. Without that the same stage{steps} forgot {without}."


def _measured(folder: Path, recipe: Recipe, scores: Sequence[Score], stage: Stage) -> Iterator[str]:
    """Yields what other versions of a stage say: the best inside the budgets, or the one that forgets least."""
    others = [one for one in _versions(folder, recipe, scores, stage) if one.stage.name != stage.name]
    others = [one for one in others if one.where.forgetting is not None]
    if not others or not kept_suites(recipe.evaluate):
        return
    inside = [one for one in others if not one.where.over]
    if inside:
        best = max(inside, key=lambda one: one.where.gain.value if one.where.gain else 0.0)
        gain = with_interval(*share_words(best.where.gain)) or "an unknown amount"
        cured = folder / CURE / "cured.yaml"
        written = f", see {cured}" if cured.exists() else ""
        how = _difference(best.stage, stage)
        yield f"Measured: {best.stage.name} ({how}) gains {gain} inside the budgets{written}."
        return
    least = min(others, key=lambda one: one.where.forgetting.value if one.where.forgetting else 0.0)
    forgot = with_interval(*loss_words(least.where.forgetting))
    yield f"Measured: {least.stage.name} ({_difference(least.stage, stage)}) forgets least, {forgot}, and is over too."


def _too_steep(stage: Stage) -> Iterator[str]:
    """Yields that a learning rate is far above the trainer's own."""
    fields = training_fields(stage.kind)
    if not fields or "learning_rate" not in fields:
        return
    usual = float(fields["learning_rate"].default) * (1 if stage.adapter is None else OF_ADAPTERS)
    rate = float(stage.training.get("learning_rate", 0))
    if rate > STEEP * usual:
        what = "of all weights" if stage.adapter is None else "of an adapter"
        times = f"{rate / usual:.0f} times the usual {usual:g} {what}"
        yield f"Its learning_rate of {rate:g} is {times}: a quarter of it forgets less."


def _far(folder: Path, stage: Stage) -> Iterator[str]:
    """Yields that the base finds the data of a stage harder than what is to be kept, from `shift.json`."""
    for pair in read_json(folder / "shift.json").get("pairs", []):
        if pair["stage"] == stage.name and pair["about"] == "general" and pair["bits_per_byte"]:
            trained, held_out = pair["bits_per_byte"]
            if trained["low"] > held_out["high"]:
                bits = f"{trained['value']:.2f} against {held_out['value']:.2f} bits per byte"
                yield f"Its data is harder for the base than {pair['suite']} ({bits}), so the training moves it far."
                return


def _likely(stage: Stage) -> str:
    """Returns what is likely to help by what a stage does against forgetting already; see docs/cure.md."""
    keep = stage.kept
    if stage.kind not in KEEPING or stage.task == "masked":
        return "A lower learning_rate or fewer steps forget less."
    if keep.replay is None:
        return (
            f"`keep: self` in {stage.name} is likely to help: a part of what it trains on is then made by its parent, "
            "so nobody's data is needed. So do an earlier stage's data (`replay:`) and a lower learning_rate."
        )
    share = f"a share above {percent(keep.replay.share)}"
    if keep.kl is None:
        return f"`kl: {{weight: 1}}` beside `replay` in the `keep` of {stage.name}, or {share}, keeps more."
    return (
        f"A `kl` weight above {keep.kl.weight:g} or {share} in the `keep` of {stage.name} keeps more and learns less; "
        "so does a lower learning_rate."
    )


def _versions(folder: Path, recipe: Recipe, scores: Sequence[Score], stage: Stage) -> Iterator[TrainedStage]:
    """Yields the versions of a stage that were scored: those of its run, then those of its comparison of cures."""
    yield from _versions_in(recipe, scores, recipe, stage)
    place = folder / CURE
    if (place / "recipe.yaml").exists() and (place / "scorecard.json").exists():
        compared, measured = load_recipe(place / "recipe.yaml"), read_scorecard(place / "scorecard.json")
        yield from _versions_in(compared, measured, recipe, stage)


def _versions_in(recipe: Recipe, scores: Sequence[Score], of: Recipe, stage: Stage) -> Iterator[TrainedStage]:
    """Yields the stages of a recipe that differ from a stage of another in their words alone, not in data or parent."""
    parent = of.parent_of(stage.name)
    ours = [one for one in recipe.stages if recipe.parent_of(one.name) == parent and _same_data(one, stage)]
    start = [score for score in scores if score.stage == parent]
    ends = {one.name: [score for score in scores if score.stage == one.name] for one in ours}
    every = [*start, *(score for end in ends.values() for score in end)]
    scales, kept = scales_of(every), kept_keys(recipe.evaluate, start, list(ends.values()))
    line = of_lineage(scores, recipe.lineage(parent)) if start else []
    for one in ours:
        if ends[one.name] and start:
            yield TrainedStage(one, point(recipe.evaluate, line, start, ends[one.name], scales, kept))


def _same_data(one: Stage, other: Stage) -> bool:
    return one.kind == other.kind and one.data == other.data


def _alike(one: Stage, other: Stage, but: Sequence[str] = ()) -> bool:
    """Returns True if two stages are trained alike, apart from `keep` and some words of `training`."""
    words = []
    for stage in (one, other):
        content = stage.model_dump(exclude={"name", "keep", "parent"})
        content["training"] = {key: value for key, value in content["training"].items() if key not in but}
        words.append(content)
    return bool(words[0] == words[1])


def _length(stage: Stage) -> str:
    steps = stage.training.get("max_steps", -1)
    return f"{steps:,} steps" if steps > 0 else f"{stage.training.get('num_train_epochs', 1):g} epochs"


def _difference(one: Stage, other: Stage) -> str:
    """Returns the words in which a version of a stage differs from it."""
    told: list[str] = []
    if one.kept != other.kept:
        told.append(", ".join(how_kept(one)) if one.kept != Keep.model_validate({}) else "nothing kept")
    names = dict.fromkeys([*one.training, *other.training])
    said: list[tuple[str, Any, Any]] = [(name, one.training.get(name), other.training.get(name)) for name in names]
    told += [f"{name} {new}" for name, new, old in said if new != old and new is not None]
    rank, before = ((stage.adapter or {}).get("r") for stage in (one, other))
    told += [f"rank {rank}"] if rank != before and rank is not None else []
    return ", ".join(told) or "the same again"
