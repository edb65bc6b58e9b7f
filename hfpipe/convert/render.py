"""A recipe as YAML that a person reads: blocks in the usual order, short ones on a line, with comments."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from hfpipe.recipe.document import Dumper

WIDTH = 116
_ORDER = ("name", "seed", "output_dir", "model", "stages", "evaluate", "merge", "push")
_STAGE = ("name", "kind", "objective", "parent", "data", "train_on", "quantization", "lora", "peft")


def render(recipe: Mapping[str, Any], head: Iterable[str], comments: Mapping[str, str]) -> str:
    """A recipe with comments.

    Args:
        recipe: The recipe as plain data.
        head: Paragraphs above it; a line that begins with two spaces is kept as it stands.
        comments: By key (`training.learning_rate`, `model.id`), what stands behind it.
    """
    lines = [f"# {line}".rstrip() for paragraph in head for line in _wrapped(paragraph)]
    ordered = {key: recipe[key] for key in (*_ORDER, *recipe) if key in recipe}
    ordered["stages"] = [{key: stage[key] for key in (*_STAGE, *stage) if key in stage} for stage in recipe["stages"]]
    return "\n".join([*lines, *_mapping(ordered, "", comments, "")]) + "\n"


def _wrapped(paragraph: str) -> list[str]:
    if paragraph.startswith("  "):
        return textwrap.wrap(paragraph.strip(), WIDTH - 6, initial_indent="  ", subsequent_indent="    ") or [""]
    return textwrap.wrap(paragraph, WIDTH - 2, break_on_hyphens=False) or [""]


def _mapping(block: Mapping[str, Any], indent: str, comments: Mapping[str, str], before: str) -> list[str]:
    lines = []
    for key, value in block.items():
        place = f"{before}{key}"
        comment = f"  # {comments[place]}" if place in comments else ""
        short = f"{indent}{_flow(key)}: {_flow(value)}"
        if _is_short(value, short) or (not isinstance(value, Mapping | list)):
            lines.append(_scalar(indent, key, value, short) + comment)
        elif isinstance(value, Mapping):
            lines += [f"{indent}{_flow(key)}:{comment}", *_mapping(value, f"{indent}  ", comments, f"{place}.")]
        else:
            lines.append(f"{indent}{_flow(key)}:{comment}")
            inner = "" if place == "stages" else f"{place}."
            for item in value:
                lines += _item(item, indent, comments, inner)
    return lines


def _item(item: Any, indent: str, comments: Mapping[str, str], before: str) -> list[str]:
    flow = f"{indent}  - {_flow(item)}"
    if not isinstance(item, Mapping) or _is_short(item, flow):
        return [flow]
    first, *rest = _mapping(item, f"{indent}    ", comments, before)
    return [f"{indent}  - {first.strip()}", *rest]


def _is_short(value: Any, line: str) -> bool:
    """Returns True if a block stands on one line: it is short, and holds no other block but short lists."""
    if isinstance(value, Mapping):
        plain = all(not isinstance(inner, Mapping) and "\n" not in str(inner) for inner in value.values())
        return plain and len(line) <= 88
    if isinstance(value, list):
        return not any(isinstance(inner, Mapping) for inner in value) and len(line) <= WIDTH
    return False


def _scalar(indent: str, key: Any, value: Any, short: str) -> str:
    """A long text of several lines stands as a block of lines."""
    lines = value.splitlines() if isinstance(value, str) and len(value) > 60 and not value.startswith(" ") else []
    if len(lines) > 1 and all(line == line.rstrip() for line in lines):
        ending = "|" if value.endswith("\n") and not value.endswith("\n\n") else "|-"
        if not value.endswith("\n") or ending == "|":
            body = textwrap.indent(value.removesuffix("\n"), f"{indent}  ")
            return f"{indent}{_flow(key)}: {ending}\n{body}"
    return short


def _flow(value: Any) -> str:
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...").strip()
