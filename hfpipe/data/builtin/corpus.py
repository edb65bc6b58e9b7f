"""The built-in corpus (`path: builtin`): the docstrings of Python and of the packages that every hfpipe has.

It is English prose on every machine that runs hfpipe: no download, no account. Tables:

- `text`: documents with columns like FineWeb's;
- `package`: which package does this docstring belong to? prompt and completion, the same number of each package;
- `summary`: from a function's signature to the first sentence of its docstring;
- `numbers`: numbers in English, German and Chinese words, see numbers.py.

Paragraphs that occur twice are dropped, whatever identifiers they name (transformers repeats thousands). A stable hash
of its first words then decides whether a document is held out (`test`); one that shares a long line or its first words
with another never is. The tasks come from the same documents on the same side.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from huggingface_hub.constants import HF_HOME
from huggingface_hub.utils import WeakFileLock

from hfpipe.core.errors import MachineError, RecipeError
from hfpipe.data.builtin import docstrings
from hfpipe.data.builtin.numbers import numbers
from hfpipe.recipe.faults import did_you_mean, listed

FORMAT = 2  # raise it when the documents change: part of the cache's name
PYTHON = "python"  # the standard library, among the packages
# What hfpipe requires, and what that requires, in a fixed order; a package that is not installed gives nothing.
PACKAGES = (
    *("accelerate", "aiohttp", "datasets", "evaluate", "fsspec", "huggingface_hub", "jinja2", "mpmath", "networkx"),
    *("numpy", "packaging", "pandas", "peft", "pyarrow", "pydantic", "sympy", "torch", "transformers", "trl"),
)
NOT_PROSE = {"test", "tests", "testing", "site-packages", "dist-packages", "lib2to3", "idlelib", "turtledemo"}
TABLES = ("text", "package", "summary", "numbers")
SPLITS = ("train", "test")
TEST_DRAW = 0.1  # of the documents that may be held out: about 5 % of all
PLAIN_WORD = re.compile(r"(?<![\w`.])[A-Za-z]?[a-z]+(?![\w`(])")
MIN_PROSE = 0.4  # of a document's characters, in plain words
LABELS = ("networkx", "numpy", "pandas", PYTHON, "sympy", "torch", "transformers")
OWN_NAMES = re.compile(rf"(?i)\b(np|pd|nx)\b|{'|'.join(LABELS)}")
PROMPT_CHARACTERS = 300

Row = dict[str, Any]


def builtin(name: str = "text", split: str = "train") -> Dataset:
    """One table of the built-in corpus; the first call reads the sources (seconds), later ones a cache.

    Args:
        name: `text` (text, id, url, module, package, token_count), `package` (id, prompt, completion, label), `summary`
            (id, prompt, completion) or `numbers`. `token_count` counts words and marks, not a tokenizer's tokens.
        split: `train` or `test`.

    Returns:
        The rows, memory-mapped, the packages mixed; the same on every run with the same versions installed.

    Raises:
        RecipeError: Unknown table or split.
        MachineError: The cache cannot be written, or Python's sources are not on this machine.
    """
    for word, value, allowed in (("table", name, TABLES), ("split", split, SPLITS)):
        if value not in allowed:
            raise RecipeError(
                f"the built-in corpus has no {word} {value!r}; allowed is one of {listed(allowed)}."
                f"{did_you_mean(value, allowed)}"
            )
    folder = _cache_folder()
    if not folder.exists():
        try:
            _write_cache(folder)
        except OSError as error:
            raise MachineError(
                f"the built-in corpus cannot be written to {folder.parent} ({error.strerror or error}). Set "
                "HFPIPE_CACHE to a folder with room that you may write to."
            ) from error
    return Dataset.from_file(str(folder / f"{name}-{split}.arrow"))


def _cache_folder() -> Path:
    """The cache of this environment's tables: another version of a package is another corpus."""
    versions = [f"{FORMAT} {sys.version}"]
    for package in PACKAGES:
        installed = _installed(package)
        versions.append(f"{package} {installed.version if installed else 'absent'}")
    key = hashlib.sha256("\n".join(versions).encode()).hexdigest()[:16]
    return Path(os.environ.get("HFPIPE_CACHE") or Path(HF_HOME, "hfpipe")) / f"builtin-{key}"


def _installed(package: str) -> Distribution | None:
    try:
        return distribution(package)
    except PackageNotFoundError:
        return None


def _write_cache(folder: Path) -> None:
    """Builds all tables, once however many ranks ask: the others wait, and where locks do not work the first wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.with_suffix(".lock")):
        if folder.exists():
            return
        documents = _documents(_read_all())
        if not documents:
            raise MachineError(
                "the built-in corpus is made of the docstrings of Python and of the packages installed with hfpipe, "
                "and no source file of them was found. Install them from wheels, or name another data set."
            )
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            for split in SPLITS:
                rows = [row for row in documents if row["split"] == split]
                for name, table in (("text", _text), ("package", _package), ("summary", _summary)):
                    _write_arrow(beside / f"{name}-{split}.arrow", table(rows))
                _write_arrow(beside / f"numbers-{split}.arrow", numbers(split))
            beside.chmod(0o755)  # mkdtemp lets nobody else read
            if not folder.exists():
                os.rename(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _write_arrow(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)


def _read_all() -> list[Row]:
    """Every package's docstrings, in an order that does not depend on the disk or on who was faster."""
    jobs = []
    for package in (PYTHON, *PACKAGES):
        files = _files_of(package)
        jobs += [(package, files[start : start + 300]) for start in range(0, len(files), 300)]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as threads:  # each waits for a process
        parts = threads.map(_read, [files for _, files in jobs])
        return [{**row, "package": package} for (package, _), part in zip(jobs, parts, strict=True) for row in part]


def _read(files: list[tuple[str, str]]) -> list[Row]:
    command = [sys.executable, "-I", "-S", docstrings.__file__]
    done = subprocess.run(command, input=json.dumps(files).encode(), stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def _files_of(package: str) -> list[tuple[str, str]]:
    """Module names and paths of a package's sources in alphabetical order, tests left out.

    The folder is where the package is installed, so that a folder of the same name in a project is not taken for it.
    """
    if package == PYTHON:
        top = Path(sysconfig.get_paths()["stdlib"])
    else:
        installed = _installed(package)
        if installed is None:
            return []
        top = Path(str(installed.locate_file(package)))
    files = []
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if name not in NOT_PROSE]
        inside = Path(folder).relative_to(top if package == PYTHON else top.parent).parts
        for name in names:
            if name.endswith(".py") and not name.startswith("test_"):
                parts = inside if name == "__init__.py" else (*inside, name[:-3])
                files.append((".".join(parts), str(Path(folder, name))))
    return sorted(files)


def _documents(found: list[Row]) -> list[Row]:
    """Documents without repeated paragraphs, each on its side of the split, mixed but in a fixed order."""
    rows = []
    seen: set[bytes] = set()
    for docstring in found:
        text = docstring["text"].encode("utf-8", "replace").decode().replace("\x00", "")
        parts = [(part, _plain(part)) for part in re.split(r"\n\s*\n", text)]
        kept = [_is_new(part, plain, seen) for part, plain in parts]
        text = "\n\n".join(part for (part, _), keep in zip(parts, kept, strict=True) if keep)
        plain = " ".join(plain for (_, plain), keep in zip(parts, kept, strict=True) if keep)
        if len(text) < docstrings.MIN_CHARACTERS or len(plain) < MIN_PROSE * len(text):
            continue
        url = f"python://{docstring['module']}" + (f"/{docstring['name']}" if docstring["name"] else "")
        rows.append(
            {
                "text": text,
                "id": f"<{url}#{_digest(text).hex()}>",
                "url": url,
                "module": docstring["module"],
                "package": docstring["package"],
                "token_count": len(re.findall(r"\w+|[^\w\s]", text)),
                "signature": docstring["signature"] if kept[0] else "",
                "beginning": plain[:100],
            }
        )
    _split(rows)
    return sorted(rows, key=lambda row: row["id"][-17:])


def _is_new(paragraph: str, plain: str, seen: set[bytes]) -> bool:
    """Returns True if a paragraph was not there before; one with few plain words counts with its code and marks."""
    key = _digest(plain if len(plain) >= 40 else " ".join(paragraph.split()))
    if key in seen:
        return False
    seen.add(key)
    return True


def _plain(text: str) -> str:
    """The plain words of a text, without code, identifiers, numbers and marks."""
    return " ".join(PLAIN_WORD.findall(text)).lower()


def _split(rows: list[Row]) -> None:
    """Draws the held-out documents from those that share neither a long line nor the first words with another."""
    marks = [
        {row["beginning"], *(line for line in map(str.strip, row["text"].split("\n")) if len(line) >= 60)}
        for row in rows
    ]
    counts = Counter(mark for own in marks for mark in own)
    for row, own in zip(rows, marks, strict=True):
        alone = all(counts[mark] == 1 for mark in own)
        drawn = int.from_bytes(_digest(row["beginning"]), "big") < TEST_DRAW * 2**64
        row["split"] = "test" if alone and drawn else "train"


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _text(rows: list[Row]) -> pa.Table:
    names = ("text", "id", "url", "module", "package", "token_count")
    return pa.table({name: [row[name] for row in rows] for name in names})


def _package(rows: list[Row]) -> pa.Table:
    """Rows of the packages in turn, as many of each as the smallest has, with the names of all of them masked."""
    counts = Counter(row["package"] for row in rows)
    each = min(counts[label] for label in LABELS if counts[label])
    by_label = {label: [row for row in rows if row["package"] == label][:each] for label in LABELS if counts[label]}
    chosen = [row for turn in zip(*by_label.values(), strict=True) for row in turn]
    return pa.table(
        {
            "id": [row["id"] for row in chosen],
            "prompt": [f"Docstring: {_masked_beginning(row['text'])}\nPackage:" for row in chosen],
            "completion": [f" {row['package']}" for row in chosen],
            "label": [row["package"] for row in chosen],
        }
    )


def _masked_beginning(text: str) -> str:
    words = OWN_NAMES.sub("_", " ".join(text[: 2 * PROMPT_CHARACTERS].split()))
    return words if len(words) <= PROMPT_CHARACTERS else words[:PROMPT_CHARACTERS].rsplit(" ", 1)[0]


def _summary(rows: list[Row]) -> pa.Table:
    """Functions whose docstring begins with one sentence on its first line."""
    chosen = list(_summaries(rows))
    return pa.table({name: [row[name] for row in chosen] for name in ("id", "prompt", "completion")})


def _summaries(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        line = row["text"].split("\n", 1)[0].strip()
        if row["signature"] and len(row["signature"]) <= 200 and 20 <= len(line) <= 120 and line.endswith("."):
            prompt = f"def {row['signature']}:\n    Summary:"
            yield {"id": row["id"], "prompt": prompt, "completion": f" {line}"}
