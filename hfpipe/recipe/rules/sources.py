"""Rules of a source: its columns, where it may be cleaned, and that no suite shares rows with the training data.

Two sources are known to share rows when they are the same table (or name a file in common) and their splits and rows
meet. What only the data can tell is looked for when it is loaded.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from typing import Any

from hfpipe.recipe.faults import Fault, did_you_mean, dotted, found, listed
from hfpipe.recipe.raw import Block, RawStage, mapping, sequence, stages, suites
from hfpipe.recipe.row_formats import ROW_FORMATS, SUITE_COLUMNS, TRAINED_COLUMNS
from hfpipe.recipe.source_config import file_kind

TOGETHER = (("prompt", "completion"), ("source", "target"))
CHOICE = ("chosen", "rejected")
BUILTIN_TABLES = ("text", "package", "summary", "numbers")
BUILTIN_SPLITS = ("train", "test")
_TURNS = 'is a list of turns: `messages: [{role: user, content: "{asked}"}, {role: assistant, content: "{said}"}]`.'


def check_source(source: Block, forms: tuple[tuple[str, ...], ...] = TRAINED_COLUMNS) -> Iterator[Fault]:
    """Yields what is wrong with a source, whose rows may have the roles of `forms`."""
    if "token" in source.data:
        text = "a token does not belong in a file. Log in with `hf auth login`, or set HF_TOKEN."
        yield Fault((*source.steps, "token"), text)
    if source.data.get("path") == "builtin":
        for key, allowed in (("name", BUILTIN_TABLES), ("split", BUILTIN_SPLITS)):
            value = source.data.get(key)
            if value is not None and value not in allowed:
                text = f"found {found(value)}; allowed with `path: builtin` is one of {listed(allowed)}."
                yield Fault((*source.steps, key), text + did_you_mean(value, allowed))
    swap = source.at("augment").data.get("swap")
    if isinstance(swap, list) and not all(len(sequence(words)) > 1 for words in swap):
        text = "each list needs two words or more, which take each other's place: [[he, she], [his, her]]."
        yield Fault((*source.steps, "augment", "swap"), text)
    yield from _check_roles(source, forms)


def _are_turns(template: Any) -> bool:
    return isinstance(template, list) and any(isinstance(turn, dict) for turn in template)


def _check_roles(source: Block, forms: tuple[tuple[str, ...], ...]) -> Iterator[Fault]:
    if (said := ROW_FORMATS.get(str(source.data.get("format")))) is not None:
        forms = (said.all_columns,)
    roles = list(dict.fromkeys(role for form in forms for role in form))
    given: dict[Any, str] = {}
    named = {role for key in ("columns", "template") for role in mapping(source.data.get(key))}
    in_turns = ("messages", *(("prompt", *CHOICE) if named & {*CHOICE} else ()))
    for key in ("columns", "template"):
        for role, column in mapping(source.data.get(key)).items():
            steps = (*source.steps, key, role)
            if role not in roles:
                only = any(role in form for form in SUITE_COLUMNS)
                text = f"unknown role; the roles are {listed(roles)}.{did_you_mean(role, roles)}"
                yield Fault(steps, f"is a role of a suite's rows: nothing is trained on it. {text}" if only else text)
            elif role in given:
                yield Fault(steps, f"`{given[role]}` gives this role already. Keep one.")
            elif key == "template" and _are_turns(column) and role not in in_turns:
                yield Fault(steps, "is a text, and has no turns.")
            elif key == "template" and role == "messages" and not _are_turns(column):
                yield Fault(steps, _TURNS)
            elif isinstance(column, list) and role not in ("choices", *in_turns):
                yield Fault(steps, "is one text, not a list; a row has several `choices` only.")
            given[role] = key
    for role, other in (*TOGETHER, *(pair[::-1] for pair in TOGETHER)):
        is_choice = role in ("prompt", "target") and forms != TRAINED_COLUMNS  # the rest may be columns as they stand
        if role in given and other in roles and other not in given and not (is_choice or named & {*CHOICE}):
            text = f"`{role}` is given without `{other}`, and the two go together. Add it: `{other}: <column>`."
            yield Fault((*source.steps, given[role], role), text)
    known = [role for role in roles if role in given]
    if not any(set(known) <= set(form) for form in forms):
        text = f"the source gives {listed(known)}; a row is "
        text += ", or ".join(" and ".join(form) for form in forms if len(form) < 6)
        yield Fault(source.steps, f"{text}. Keep one of them.")


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


WORDS = ("deduplicate", "decontaminate")


def check_cleaning(data: dict[str, Any]) -> Iterator[Fault]:
    """Yields the sources that ask for a cleaning which they cannot have."""
    for stage in stages(data):
        for source in stage.sources:
            asked = [key for key in WORDS if source.data.get(key)]
            if "decontaminate" in asked and not suites(data):
                text = "there is no suite whose rows could be left out. Remove it, or give the recipe `evaluate:`."
                yield Fault((*source.steps, "decontaminate"), text)
    for suite in suites(data):
        for key in WORDS:
            if suite.source.data.get(key):
                text = "cleans what is trained on; a suite is scored as it is, or its scores compare with no others."
                yield Fault((*suite.source.steps, key), f"{text} Remove it.")


TRAIN, TEST = "train", "test"  # the split of a source that names none: of a stage, and of a suite


def check_overlap(data: dict[str, Any]) -> Iterator[Fault]:
    """Yields the suites that share rows with what a stage is trained on, unless the recipe lets them.

    With `overlap: report` the rows are still looked for before training, and the report tells of them.
    """
    if data.get("overlap") == "report":
        return
    sources = [source for stage in stages(data) for source in stage.sources]
    trained = [source for source in sources if source.data.get("decontaminate") is not True]  # looked at row by row
    for suite in suites(data):
        shared = next((source for source in trained if _share_rows(source.data, suite.source.data)), None)
        if shared is not None:
            where = dotted(shared.steps, data)
            folds = shared.data.get("fold") and suite.source.data.get("fold")
            remedy = "Give both folds the same `skip` and `take`" if folds else "Take another split, or `skip:`"
            text = f"has rows of {where}, and nothing is trained on what a suite holds. {remedy},"
            yield Fault(suite.source.steps, f"{text} or write `overlap: report` to go on and have it in the report.")


def _share_rows(trained: dict[Any, Any], held_out: dict[Any, Any]) -> bool:
    if not trained.get("path") or _table(trained) != _table(held_out):
        return False
    if trained.get("where") != held_out.get("where"):
        return False  # two conditions may well exclude each other
    first, second = _split(trained, TRAIN), _split(held_out, TEST)
    if first[0] != second[0] or not _files_meet(trained, first[0], held_out, second[0]):
        return False
    if first[1] != second[1] and first[1] and second[1]:
        return _slices_meet(first[1], second[1])
    if first[1] != second[1]:
        return True  # one is a slice of the other
    (start, end), (other_start, other_end) = _rows(trained), _rows(held_out)
    if (start, end) == (other_start, other_end) and not _folds_meet(trained.get("fold"), held_out.get("fold")):
        return False  # of the same rows, so counted from the same place
    return max(start, other_start) < min(end, other_end)


def _folds_meet(first: Any, second: Any) -> bool:
    """Returns True if two folds of the same rows have rows in common."""
    one, other = mapping(first), mapping(second)
    if not one or not other or one.get("of") != other.get("of"):
        return True
    if None not in (one.get("keep"), other.get("keep")):
        return one["keep"] == other["keep"]
    return not any(None is not a.get("keep") == b.get("leave") for a, b in ((one, other), (other, one)))


def _table(source: dict[Any, Any]) -> tuple[str, ...]:
    path = str(source.get("path"))
    name = source.get("name") or ("text" if path == "builtin" else "")
    return os.path.normpath(path), str(name), os.path.normpath(str(source.get("data_dir") or ""))


def _split(source: dict[Any, Any], default: str) -> tuple[str, str]:
    """Name of the split and its slice: "train[:5%]" -> ("train", ":5%"). Files without a split's name are `train`."""
    files = source.get("data_files")
    is_file = file_kind(str(source.get("path"))) is not None
    if "split" not in source and (is_file or (files is not None and not isinstance(files, dict))):
        return TRAIN, ""
    split = re.fullmatch(r"\s*([^\[]*?)\s*(?:\[(.*)\])?\s*", str(source.get("split") or default))
    return (split[1], split[2] or "") if split else (str(source.get("split")), "")


def _files_meet(trained: dict[Any, Any], split: str, held_out: dict[Any, Any], other_split: str) -> bool:
    files, other_files = _files(trained, split), _files(held_out, other_split)
    return files == other_files or bool(files & other_files)


def _files(source: dict[Any, Any], split: str) -> set[str]:
    files = source.get("data_files")
    files = mapping(files).get(split) if isinstance(files, dict) else files
    return {os.path.normpath(str(file)) for file in (files if isinstance(files, list) else [files]) if file is not None}


def _rows(source: dict[Any, Any]) -> tuple[float, float]:
    """The rows [start, end) that `skip` and `take` leave."""
    skip, take = source.get("skip"), source.get("take")
    start = skip if isinstance(skip, int) else 0
    return start, start + take if isinstance(take, int) else math.inf


def _slices_meet(first: str, second: str) -> bool:
    """Returns True if two slices such as ":90%" and "90%:" meet; False where they cannot be compared."""
    units = {"%" in part for part in (first, second)}
    ranges = [re.fullmatch(r"(\d*)%?:(\d*)%?", part) for part in (first, second)]
    if len(units) > 1 or not all(ranges):
        return False
    (start, end), (other_start, other_end) = ((int(m[1] or 0), float(m[2] or "inf")) for m in ranges if m)
    return max(start, other_start) < min(end, other_end)
