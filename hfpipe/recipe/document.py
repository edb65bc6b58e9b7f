"""YAML that remembers on which line each key stands.

The reading is YAML 1.2's, as editors have it: `2e-4` is a number; `no`, `on` and `yes` are text and not truth values.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hfpipe.core.errors import RecipeError
from hfpipe.core.secrets import without_secrets
from hfpipe.recipe.faults import Fault, Place, Steps, dotted

_TAG = "tag:yaml.org,2002:"
# Far above any recipe; what lies beyond is a file of another kind, or made to keep a machine busy.
MOST_BYTES, MOST_VALUES, DEEPEST = 200_000, 20_000, 30
MOST_TOLD, LONGEST_LINE = 40, 600  # faults of a message, and letters of one of them
_RESOLVERS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)
_ROWS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")  # files of data
_REMEDIES = {
    r"'\t'": "Indent with spaces; YAML takes no tabs.",
    "mapping values are not allowed here": "Put a value that contains ': ' in quotes, and give a key one value only.",
    "could not find expected ':'": "A line must be `key: value` or `- item`; look at this line and the one before it.",
    "expected <block end>": "Look at the indent: keys of one block begin in one column.",
    "undefined alias": "An alias (*name) needs its anchor (&name) above it; quote a value that begins with *.",
    "cannot start any token": "Put a value that begins with @, `, % or & in quotes.",
    "expected a single document": "A recipe is one document: remove the line '---' between the two.",
}


class Loader(yaml.SafeLoader):
    """The safe loader with the numbers and truth values of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - pyyaml's own class attribute


class Dumper(yaml.SafeDumper):
    """The safe dumper, which also quotes text that `Loader` would take for a number."""


for _name, _pattern, _first in _RESOLVERS:
    Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), list(_first))
    if _name in ("int", "float"):
        Dumper.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), list(_first))


@dataclass
class Document:
    """A recipe as written: plain data, where each part of it stands, and what was wrong in the writing itself."""

    name: str
    data: dict[str, Any]
    places: dict[Steps, Place]
    faults: list[Fault] = field(default_factory=list)

    def place(self, steps: Steps) -> Place:
        """The place of a key; a key that is missing has that of the block it is missing from."""
        while steps and steps not in self.places:
            steps = steps[:-1]
        return self.places.get(steps, Place(f"{self.name}:1", (0, 1, 0)))


def read_document(path: Path) -> Document:
    """Reads a recipe file.

    Raises:
        RecipeError: The file is missing, is not UTF-8, not YAML, empty, or no mapping.
    """
    if path.suffix.lower() in _ROWS and path.is_file():
        raise RecipeError(f"{path} holds rows, not a recipe. A recipe for them: hfpipe new --data {path}")
    document = Document(str(path), {}, {})
    node = _compose(_read_text(path), str(path))
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "null"):
        raise RecipeError(f"{path} is empty. A recipe has at least `name`, `model` and `stages`.")
    if not isinstance(node, yaml.MappingNode):
        found = "a list" if isinstance(node, yaml.SequenceNode) else "text"
        raise RecipeError(
            f"{path}:{node.start_mark.line + 1}: found {found}; a recipe is a mapping, of lines such as `name: my-run`."
        )
    document.data = _Builder(document).build(node, ())
    return document


def read_value(text: str) -> Any:
    """Reads the value of an override, with the same numbers and truth values as a file.

    Raises:
        RecipeError: The text is not YAML.
    """
    node = _compose(text, "value")
    return None if node is None else _Builder(Document("value", {}, {})).build(node, ())


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise RecipeError(f"{path} is a folder. Name the recipe, a YAML file{_near(path / path.name)}")
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"There is no recipe at {path}{_near(path)}") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}. Name a YAML file that you may read.") from error
    if len(content) > MOST_BYTES:
        raise RecipeError(
            f"{path} is no recipe: it has more than {MOST_BYTES // 1000} kB. Put data into files of its own."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: found a byte that is not UTF-8 text. Save the recipe as UTF-8.") from error


MOST_NAMED = 20  # recipes of a folder


def _near(path: Path) -> str:
    """Ends the sentence "There is no recipe at ...": the file that may be meant, or all that there are."""
    from hfpipe.recipe.shipped import shipped_recipes

    shipped = shipped_recipes()
    folders = [path.parent, *(folder for folder in (Path("recipes"),) if folder.is_dir())]
    files = shipped | {file.stem: file for folder in reversed(folders) for file in sorted(folder.glob("*.y*ml"))}
    close = difflib.get_close_matches(path.stem, files, n=1, cutoff=0.6)
    if close:
        return f". Did you mean {files[close[0]]}?"
    own = [str(file) for name, file in files.items() if file != shipped.get(name)]
    here = f" There are {', '.join(own[:MOST_NAMED])}." if own else ""
    return f".{here} With hfpipe come {', '.join(shipped)}: `hfpipe recipes --copy NAME` copies one here."


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        return Loader(text).get_single_node()
    except RecursionError as error:
        raise RecipeError(_too_deep(name)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{name}:{line}: found a control character, which YAML does not allow. Remove it.") from error
    except yaml.MarkedYAMLError as error:
        problem = error.problem or str(error.context)
        problem = f"{error.context}, {problem}" if problem.startswith("but") else problem
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        indented_by_tab = line <= len(lines := text.splitlines()) and re.match(r"\s*\t", lines[line - 1])
        remedy = _REMEDIES[r"'\t'"] if indented_by_tab else ""
        remedy = remedy or next((remedy for sign, remedy in _REMEDIES.items() if sign in problem), "Correct this line.")
        raise RecipeError(f"{name}:{line}: this is not YAML: {problem}. {remedy}") from error


def _too_deep(place: str) -> str:
    return f"{place}: blocks lie in blocks more than {DEEPEST} deep; a recipe needs a few. Look at its brackets."


class _Builder:
    """Turns YAML's nodes into plain data and notes the place of each key."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.open: list[yaml.Node] = []  # the nodes being built, to notice one that holds itself
        self.built = 0

    def build(self, node: yaml.Node, steps: Steps) -> Any:
        if any(node is outer for outer in self.open):
            raise self.error(node, "an alias (*) stands inside its own anchor (&). Write the block out")
        self.built += 1
        if len(self.open) > DEEPEST:
            raise RecipeError(_too_deep(self.at(node).text))
        if self.built > MOST_VALUES:  # aliases of aliases multiply
            raise self.error(node, f"the recipe has more than {MOST_VALUES:,} values, those of aliases (*) counted")
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return {key: self.build(value, (*steps, key)) for key, value in self.pairs(node, steps)}
            if isinstance(node, yaml.SequenceNode):
                for index, item in enumerate(node.value):
                    self.note((*steps, index), item)
                return [self.build(item, (*steps, index)) for index, item in enumerate(node.value)]
            return self.scalar(node)
        finally:
            self.open.pop()

    def pairs(self, node: yaml.MappingNode, steps: Steps) -> list[tuple[Any, yaml.Node]]:
        """The keys of a mapping and those it takes in with `<<`; its own keys win."""
        own: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                merged = self.merge(value_node) | merged
                continue
            key = self.key(key_node)
            if key in own:
                first = own[key][0].start_mark.line + 1
                self.document.faults.append(
                    Fault((*steps, key), f"given twice, here and on line {first}. Keep one.", self.at(key_node))
                )
                continue
            own[key] = (key_node, value_node)
        every = merged | own
        for key, (key_node, _) in every.items():
            self.note((*steps, key), key_node)
        return [(key, value_node) for key, (_, value_node) in every.items()]

    def merge(self, node: yaml.Node) -> dict[Any, tuple[yaml.Node, yaml.Node]]:
        blocks = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if any(not isinstance(block, yaml.MappingNode) or block in self.open for block in blocks):
            raise self.error(node, "`<<` takes in another block, as in `<<: *name`")
        found: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        for block in reversed(blocks):
            for key_node, value_node in block.value:
                if key_node.tag == _TAG + "merge":
                    found = self.merge(value_node) | found
                else:
                    found[self.key(key_node)] = (key_node, value_node)
        return found

    def key(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(node, "a key must be a word. Put text that begins with { or [ in quotes")
        return self.scalar(node)

    def scalar(self, node: yaml.Node) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                number = int(text, 0) if text[:2] in ("0o", "0x") else int(text)
                if number.bit_length() > 63:
                    raise self.error(node, f"found a whole number of {number.bit_length()} bits; allowed are up to 63")
                return number
            if kind == "float":
                return _float(text)
        except (ValueError, KeyError):
            raise self.error(node, f"found '{text}' with the tag !!{kind}, which it is not") from None
        if kind in ("str", "merge"):
            return text
        raise self.error(node, f"found the tag {node.tag}; a recipe has plain values only. Remove the tag")

    def note(self, steps: Steps, node: yaml.Node) -> None:
        self.document.places[steps] = self.at(node)

    def at(self, node: yaml.Node) -> Place:
        line = node.start_mark.line + 1
        return Place(f"{self.document.name}:{line}", (0, line, node.start_mark.column))

    def error(self, node: yaml.Node, text: str) -> RecipeError:
        return RecipeError(f"{self.at(node).text}: {text}.")


def _float(text: str) -> float:
    special = re.fullmatch(r"([-+]?)\.(inf|nan)", text.lower())
    if special is None:
        return float(text)
    value = math.inf if special[2] == "inf" else math.nan
    return -value if special[1] == "-" else value


def faults_text(document: Document, faults: Iterable[Fault]) -> str:
    """All faults in reading order as one message, which begins with their number and ends with what to do."""
    lines = {}
    for fault in faults:
        place = fault.place or document.place(fault.steps)
        path = dotted(fault.steps, document.data)
        separator = ": " if path else ""
        lines[f"{place.text}: {path}{separator}{fault.text}"] = place.order
    count = f"{len(lines)} faults" if len(lines) > 1 else "1 fault"
    told = [_shortened(line) for line in sorted(lines, key=lambda line: lines[line])]
    if len(told) > MOST_TOLD:
        told[MOST_TOLD:] = [f"... and {len(told) - MOST_TOLD} more"]
    ordered = "\n".join(told)
    remedy = "Nothing was loaded or started. Correct the recipe and run the same command again."
    return without_secrets(f"{count} in {document.name}\n\n{ordered}\n\n{remedy}")


def _shortened(line: str) -> str:
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 3 :]}"
