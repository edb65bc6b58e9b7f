"""Rules of source + target: `kind: translation`, the suites of such models, and what belongs to neither."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hfpipe.recipe.faults import Fault, listed
from hfpipe.recipe.raw import Block, RawStage, mapping, stages, suites

PAIR = ("source", "target")
LANGUAGES = ("src_lang", "tgt_lang")


def check_pairs(data: dict[str, Any]) -> Iterator[Fault]:
    """Yields what is wrong with the rows of translation stages, and of suites that none of the models could answer."""
    every = stages(data)
    for stage in every:
        if stage.kind is not None:
            yield from _check_rows(stage)
    kinds = {stage.kind for stage in every}
    if None in kinds or not kinds:
        return
    for suite in suites(data):
        given = _roles(suite.source)
        if given & {*PAIR} and "translation" not in kinds:
            text = "`source` and `target` are for encoder-decoder models, and no stage is of `kind: translation`. "
            text += 'A decoder says what follows: `template: {prompt: "English: {en}\\nGerman:", completion: " {de}"}`.'
            yield Fault(suite.source.steps, text)
        elif given and not given & {*PAIR} and kinds == {"translation"}:
            text = f"gives {listed(sorted(given))}, and an encoder-decoder model reads `source` and says `target`. "
            text += "Write `columns: {source: ..., target: ...}`, or build them with `template:`."
            yield Fault(suite.source.steps, text)


def _check_rows(stage: RawStage) -> Iterator[Fault]:
    for source in stage.sources:
        given, named = _roles(source), [key for key in LANGUAGES if source.data.get(key) is not None]
        if stage.kind != "translation":
            if named:
                text = f"belongs to `kind: translation`, and this is a {stage.kind} stage. Remove it."
                yield Fault((*source.steps, named[0]), text)
            if given & {*PAIR}:
                text = f"`source` and `target` belong to `kind: translation`, and this is a {stage.kind} stage."
                yield Fault(source.steps, text)
            continue
        if given and not given & {*PAIR}:
            text = f"gives {listed(sorted(given))}, and a translation stage is trained on `source` and `target`. "
            text += "Write `columns: {source: ..., target: ...}`, or build them with `template:`."
            yield Fault(source.steps, text)
        if source.data.get("streaming") is True and source.data.get("take") is None:
            text = "a translation stage reads all its rows before it begins, so a stream needs an end: add `take:`, or "
            yield Fault((*source.steps, "streaming"), text + "remove `streaming: true`.")


def _roles(source: Block) -> set[str]:
    return {str(role) for key in ("columns", "template") for role in mapping(source.data.get(key)) if role != "id"}
