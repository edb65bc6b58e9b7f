"""Does a stage fit into this machine, and if not, what would make it smaller, the cheapest first?"""

from __future__ import annotations

import importlib.util
import sys
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hfpipe.core.errors import MachineError
from hfpipe.core.files import GIB, gibibytes
from hfpipe.data.dataloader import SIDES
from hfpipe.data.tokenize import IGNORED
from hfpipe.model.classifier import DEFAULT_MAX_LENGTH as CLASSIFIER_LENGTH
from hfpipe.model.memory import PARTS, Memory, held_memory
from hfpipe.model.positions import learned_positions
from hfpipe.model.seq2seq import most_tokens
from hfpipe.recipe import Pretrain, Recipe, Source, Stage
from hfpipe.stages.arguments import recomputes
from hfpipe.stages.compatibility import Sample, encode_rows
from hfpipe.stages.memory import DEFAULT_LENGTH, Setting, available, predicted, setting_of
from hfpipe.stages.own_texts import LONGEST

SPARE = 0.9  # of the memory: a stage that is predicted to take more recomputes its activations
NEARLY = 1.1  # a row with less text than those that were made into tokens may have more tokens by this factor
UNSEEN = 2  # and one that was not looked at by this one
RANKS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Remedy:
    """One more change, on top of those before it.

    Args:
        text: What to write into the recipe.
        cost: What it costs, in words.
        words: The stage's words that it changes; None where a recipe alone cannot.
        memory: The prediction with it; None where it cannot be predicted.
    """

    text: str
    cost: str
    words: dict[str, Any] | None
    memory: Memory | None


@dataclass(frozen=True)
class Fit:
    """The peak memory of a stage, and the memory that there is.

    Args:
        stage: The stage; with activation checkpointing where that was chosen here.
        config: transformers' config of its model.
        setting: What the prediction is for.
        memory: The prediction, with what this process holds; None where the model cannot be run on shapes alone.
        unknown: Why not.
        room: Bytes that one rank may take.
        place: Of what: "GPU" or "machine".
        chosen: What was chosen for this machine, and why, in words.
        held: Bytes that this process holds, in every prediction.
        length: What the length of the rows follows from, in words.
    """

    stage: Stage
    config: Any
    setting: Setting
    memory: Memory | None
    unknown: str
    room: int
    place: str
    chosen: str = ""
    held: int = 0
    length: str = ""

    def predicted(self, setting: Setting) -> tuple[Memory | None, str]:
        """The prediction for another setting, and the reason where there is none."""
        return predicted(self.config, setting, self.held)

    @property
    def fits(self) -> bool:
        return self.memory is None or self.memory.total <= self.room

    def line(self) -> str:
        """The prediction with its parts, for a person."""
        if self.memory is None:
            return f"not predicted: this model's code needs the values of its tensors ({self.unknown})"
        parts = [f"{part} {gibibytes(size)}" for part in PARTS if (size := getattr(self.memory, part)) >= GIB / 200]
        rows = f"{self.setting.rows} rows of {self.setting.tokens:,} tokens{self.length and ', ' + self.length}"
        peak = f"peak memory {gibibytes(self.memory.total)} of {gibibytes(self.room)} GiB, predicted for {rows}"
        return f"{peak}: {', '.join(parts)}"


def fit_of(recipe: Recipe, stage: Stage, model: Any, tokenizer: Any, samples: Mapping[tuple[str, int], Sample]) -> Fit:
    """Predicts whether a stage fits.

    Args:
        recipe: The recipe.
        stage: The stage.
        model: The base; its shapes are enough.
        tokenizer: The run's tokenizer.
        samples: The first rows of every source, see `require_rows`.
    """
    tokens, targets, length = _longest(recipe, stage, model, tokenizer, samples)
    setting = setting_of(recipe, stage, tokens=tokens, targets=targets, vocabulary=len(tokenizer))
    held = held_memory()
    memory, unknown = predicted(model.config, setting, held)
    found = Fit(stage, model.config, setting, memory, unknown, *available(setting.device), held=held, length=length)
    return with_checkpointing(found) if recomputes(stage) is None else found


def with_checkpointing(fit: Fit) -> Fit:
    """Turns activation checkpointing on for a stage that would fill the memory without.

    It makes a step 25 to 33 % slower, and so is left off where there is room for the activations.
    """
    if fit.memory is not None and fit.memory.total <= SPARE * fit.room:
        return fit
    stage = with_words(fit.stage, {"training": {"activation_checkpointing": True}})
    setting = replace(fit.setting, checkpointing={})
    memory, unknown = fit.predicted(setting)
    needed = (
        "what it takes without is not known"
        if fit.memory is None
        else (f"without it {gibibytes(fit.memory.total)} of {gibibytes(fit.room)} GiB would be taken")
    )
    return replace(
        fit, stage=stage, setting=setting, memory=memory, unknown=unknown, chosen=f"activation checkpointing: {needed}"
    )


def _longest(
    recipe: Recipe, stage: Stage, model: Any, tokenizer: Any, samples: Mapping[tuple[str, int], Sample]
) -> tuple[int, int, str]:
    """Tokens of the longest row and of the longest target of a translation, at most, and in words why.

    The run knows them, and which it comes to: see `ResumableSampler.longest`.
    """
    asked = stage.training.get("max_length")
    if isinstance(stage, Pretrain):
        return asked or min(getattr(model.config, "max_position_embeddings", DEFAULT_LENGTH), DEFAULT_LENGTH), 0, ""
    default = min(tokenizer.model_max_length, CLASSIFIER_LENGTH if stage.kind == "classification" else DEFAULT_LENGTH)
    positions = most_tokens(model) if stage.kind == "translation" else learned_positions(model)
    limit = asked or int(min(default, positions or default))
    if stage.task == "causal" and positions is None and stage.training.get("max_length", limit) is None:
        limit = sys.maxsize  # `max_length: null`: no row is cut
    targets = stage.training.get("max_target_length") or limit
    if stage.training.get("packing"):
        return limit, targets, "which examples share"
    sampled = _sampled(recipe, stage, samples)
    if any(sample.count is None and not sample.whole for _, sample in sampled):
        return min(limit, DEFAULT_LENGTH), targets, "the most that a row of a stream may have"
    rows = said = 1
    for source, sample in sampled:
        factor = UNSEEN if not sample.whole else NEARLY if sample.longest else 1
        for row in encode_rows([*sample.rows, *sample.longest], stage, tokenizer, limit, recipe.seed, source):
            target = sum(label != IGNORED for label in row["labels"]) if stage.kind == "translation" else 0
            longest = max(len(row[side]) for side in SIDES if side in row)
            rows = max(rows, round(factor * (longest - target)))
            said = max(said, round(factor * target))
    if stage.kept.replay is not None and not stage.PAIRS and rows < min(limit, LONGEST):
        return min(limit, LONGEST), 0, "the most that the parent's own texts may have"
    if max(rows, said) >= limit:
        length = "at which longer rows are cut"
    else:
        length = "the longest of the data" + (
            "" if all(one.whole for _, one in sampled) else ", as its first rows tell"
        )
    return min(rows, limit), min(said, targets), length


def _sampled(recipe: Recipe, stage: Stage, samples: Mapping[tuple[str, int], Sample]) -> list[tuple[Source, Sample]]:
    """The sources of a stage and of one that it replays, each with its sample."""
    replay = getattr(stage, "replay", None)
    names = [stage.name, *([] if replay is None else [replay.stage])]
    stages = [next(other for other in recipe.stages if other.name == name) for name in names]
    return [(source, samples[one.name, place]) for one in stages for place, source in enumerate(one.data)]


def remedies(fit: Fit, recipe: Recipe) -> list[Remedy]:
    """Changes that make a stage smaller, the cheapest first, each on top of those before it, until it fits.

    Args:
        fit: What does not fit.
        recipe: The recipe; one that pushes a whole model keeps it whole.
    """
    found: list[Remedy] = []
    setting = fit.setting
    for text, cost, words, changed in _steps(fit, recipe):
        setting = changed
        memory, _ = fit.predicted(setting)
        found.append(Remedy(text, cost, words, memory))
        if memory is not None and memory.total <= fit.room:
            break
    return found


Step = tuple[str, str, dict[str, Any] | None, Setting]  # text, cost, words of the recipe, and what then trains


def _smaller_batches(fit: Fit) -> Step | None:
    """Returns the change to the largest micro-batch that fits, or to one row; None of a single row."""
    setting = fit.setting
    divisors = [n for n in range(1, setting.rows) if setting.rows % n == 0]
    if not divisors:
        return None

    def with_rows(rows: int) -> Setting:
        return replace(setting, rows=rows, accumulation=setting.accumulation * setting.rows // rows)

    fitting = bisect_left(divisors, True, key=lambda rows: not _fits(fit, with_rows(rows)))
    rows = divisors[max(fitting - 1, 0)]
    changed = with_rows(rows)
    words: dict[str, Any] = {"per_device_train_batch_size": rows}
    text = f"per_device_train_batch_size: {rows}"
    if fit.stage.global_batch_size is None:
        words["gradient_accumulation_steps"] = changed.accumulation
        text += f" with gradient_accumulation_steps: {changed.accumulation}"
    return text, "the same result, a little slower", {"training": words}, changed


def _steps(fit: Fit, recipe: Recipe) -> Iterator[Step]:
    """Yields the changes, each on top of those before it."""
    stage, setting = fit.stage, fit.setting
    if smaller := _smaller_batches(fit):
        yield smaller
        setting = smaller[-1]
    if setting.checkpointing is None:
        setting = replace(setting, checkpointing={})
        yield (
            "activation_checkpointing: true",
            "the same result, 25 to 33 % slower",
            {"training": {"activation_checkpointing": True}},
            setting,
        )
    has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    if setting.parent is not None and not setting.rounded and has_bitsandbytes:
        setting = replace(setting, rounded=True)
        assert stage.kept.kl is not None
        keep = stage.kept.model_copy(update={"kl": stage.kept.kl.model_copy(update={"parent": "nf4"})})
        yield (
            "keep: kl: parent: nf4",
            "the parent is rounded to 4 bits: a little more is forgotten",
            {"keep": keep},
            setting,
        )
    if setting.adapter is None:
        for optim in (
            ("adamw_8bit", "paged_adamw_8bit") if setting.device == "cuda" and has_bitsandbytes else ("adafactor",)
        ):
            if setting.optim in (optim, "sgd"):
                continue
            cost = "another optimizer: look at the learning rate" if optim == "adafactor" else "nearly the same result"
            yield f"optim: {optim}", cost, {"training": {"optim": optim}}, (setting := replace(setting, optim=optim))
        kept_whole = isinstance(stage, Pretrain) or (recipe.push is not None and recipe.push.what == "model")
        if not kept_whole:
            lora = {"r": 16}
            setting = replace(
                setting, adapter={"type": "lora", **lora}, optim=fit.setting.optim, parent=None, rounded=False
            )
            yield (
                "lora: {r: 16}",
                "an adapter is trained, and not all weights",
                {"lora": lora, "training": {"optim": fit.setting.optim}},
                setting,
            )
    if setting.adapter is not None and setting.bits is None and has_bitsandbytes and setting.qat is None:
        setting = replace(setting, bits=4, compute=setting.autocast)
        yield "quantization: nf4", "the base is rounded to 4 bits; slower", {"quantization": "nf4"}, setting
    if setting.bits != 8:
        for count in RANKS:
            spread = replace(setting, ranks=count, sharding="fsdp")
            if _fits(fit, spread) or count == RANKS[-1]:
                stored = ", and bnb_4bit_quant_storage: bfloat16 of `quantization`" if setting.bits else ""
                yield f"{count} ranks with FSDP", f"{count} devices{stored}", None, spread
                break
    for tokens in (setting.tokens // 2, setting.tokens // 4):
        if tokens >= 64:
            shorter = replace(setting, tokens=tokens, targets=min(setting.targets, tokens))
            yield f"max_length: {tokens}", "longer rows are cut", None, shorter


def _fits(fit: Fit, setting: Setting) -> bool:
    memory, _ = fit.predicted(setting)
    return memory is not None and memory.total <= fit.room


def with_words(stage: Stage, words: Mapping[str, Any]) -> Stage:
    """A stage with the words of a remedy in the place of its own."""
    training = {**stage.training, **words.get("training", {})}
    if "activation_checkpointing" in words.get("training", {}):
        training.pop("gradient_checkpointing", None)  # its older name
    return stage.model_copy(update={**words, "training": training})


def fitted(recipe: Recipe, fit: Fit) -> tuple[Stage, list[str]]:
    """The stage of a `fit: auto` recipe with the cheapest remedies that make it fit, and what was done, in words.

    Raises:
        MachineError: Even with all of them it does not fit.
    """
    if fit.fits:
        return fit.stage, []
    stage, told = fit.stage, []
    for remedy in remedies(fit, recipe):
        if remedy.words is None or remedy.memory is None:
            break
        stage = with_words(stage, remedy.words)
        told.append(f"{remedy.text} ({remedy.cost}; {gibibytes(remedy.memory.total)} GiB)")
        if remedy.memory.total <= fit.room:
            return stage, told
    raise MachineError(refusal(fit, recipe, "and `fit: auto` finds no way to make it fit"))


def refusal(fit: Fit, recipe: Recipe, why: str = "") -> str:
    """Returns the message for a stage that does not fit, with the ranked remedies."""
    assert fit.memory is not None
    ranked = [
        f"{number}. {remedy.text} -> {gibibytes(remedy.memory.total) + ' GiB' if remedy.memory else 'unknown'}"
        f" ({remedy.cost})"
        for number, remedy in enumerate(remedies(fit, recipe), start=1)
    ]
    return (
        f"stage {fit.stage.name} has a predicted peak memory of {gibibytes(fit.memory.total)} GiB and this {fit.place} "
        f"has {gibibytes(fit.room)} GiB for it{', ' + why if why else ''}. What would make it smaller, each on top of "
        f"those before it, the cheapest first: {'; '.join(ranked) or 'nothing that is known here'}. "
        + ("" if recipe.fit == "auto" else "`fit: auto` in the recipe takes those of them that a recipe can say.")
    ).strip()


def require_memory(recipe: Recipe, fits: list[Fit]) -> None:
    """Refuses a stage that does not fit.

    Raises:
        MachineError: With the remedies, ranked.
    """
    for fit in fits:
        if not fit.fits:
            raise MachineError(refusal(fit, recipe))


def smaller(stage: Stage, rows: int, accumulation: int, *, checkpointing: bool) -> tuple[Stage, str] | None:
    """The cheapest change after which the same steps take less memory; None where there is none left.

    Args:
        stage: A stage that ran out of memory.
        rows: Rows of its micro-batch.
        accumulation: Micro-batches of its step.
        checkpointing: Whether it has activation checkpointing.
    """
    if rows > 1:
        less = max(n for n in range(1, rows) if rows % n == 0)
        words: dict[str, Any] = {"per_device_train_batch_size": less}
        if stage.global_batch_size is None:
            words["gradient_accumulation_steps"] = accumulation * rows // less
        return with_words(
            stage, {"training": words}
        ), f"{less} rows at once, {accumulation * rows // less} times a step"
    if not checkpointing:
        return with_words(stage, {"training": {"activation_checkpointing": True}}), "with activation checkpointing"
    return None
