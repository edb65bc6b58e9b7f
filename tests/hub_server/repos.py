"""The repositories, commits and files that the Hub keeps."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATE = "2026-01-01T00:00:00.000Z"
LARGE = re.compile(r"\.(safetensors|bin|pt|parquet|arrow|model|npy|png|gz|zip)$")  # what goes to LFS or Xet


class Refused(Exception):
    """An answer that is an error; `code` is the Hub's own word for it, which the clients turn into exceptions."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


def is_large(path: str, size: int, sample: bytes) -> bool:
    return size > 0 and bool(LARGE.search(path) or size > 10_000_000 or b"\0" in sample)


@dataclass(frozen=True)
class File:
    """One file of a commit; a large one is stored by its SHA-256 behind a pointer, as Git LFS does."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """The git object id: of the content, or of the pointer that git holds instead."""
        text = self.content
        if self.large:
            text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(text)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()

    @property
    def oid(self) -> str:
        """The hash that clients compare with their local file to find out whether it changed."""
        return self.sha256 if self.large else self.blob_id


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, File]


@dataclass
class Repo:
    kind: str  # model, dataset or space
    id: str
    private: bool = False
    history: list[Commit] = field(default_factory=list)  # oldest first, of every branch
    refs: dict[str, Commit] = field(default_factory=dict)  # branches, tags and pull requests
    tags: set[str] = field(default_factory=set)
    pull_requests: list[dict[str, Any]] = field(default_factory=list)

    def commit(self, ref: str, title: str, files: dict[str, File]) -> Commit:
        parent = self.refs[ref].oid if ref in self.refs else ""
        oid = hashlib.sha1(f"{self.id} {parent} {len(self.history)} {title}".encode()).hexdigest()
        self.refs[ref] = Commit(oid, title, files)
        self.history.append(self.refs[ref])
        return self.refs[ref]

    def at(self, revision: str) -> Commit:
        found = self.refs.get(revision) or next((c for c in self.history if c.oid == revision), None)
        if found is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found


def entries(commit: Commit, xet_hashes: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Every file and folder of a commit by its path, as the Hub lists them.

    Args:
        commit: The commit.
        xet_hashes: The Xet hash of a file by its SHA-256.
    """
    last = {"id": commit.oid, "title": commit.title, "date": DATE}
    found: dict[str, dict[str, Any]] = {}
    for path, file in commit.files.items():
        entry = {"type": "file", "path": path, "oid": file.blob_id, "size": len(file.content), "lastCommit": last}
        if file.large:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 135}
            if file.sha256 in xet_hashes:
                entry["xetHash"] = xet_hashes[file.sha256]
        found[path] = entry
        for parent in [str(p) for p in Path(path).parents if str(p) != "."]:
            oid = hashlib.sha1(parent.encode()).hexdigest()
            found[parent] = {"type": "directory", "path": parent, "oid": oid, "size": 0, "lastCommit": last}
    return dict(sorted(found.items()))
