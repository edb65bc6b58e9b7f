"""Names that the Hub takes: of repositories, of branches and tags, of licences; and the title of a commit."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

# https://git-scm.com/docs/git-check-ref-format
_NO_REF = re.compile(r"[\x00-\x20~^:?*\[\\\x7f]|\.\.|//|/\.|@\{|^[-/.]|[/.]$|\.lock(/|$)|^@?$")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
LONGEST = 96  # characters of a repository's name


def _repo_id(text: str) -> str:
    """As `huggingface_hub.utils.validate_repo_id`, which cannot be imported in half a second."""
    parts = text.split("/")
    if any(re.search(r"^[-.]|[-.]$|--|\.\.|\.git$", part) for part in parts) or len(parts[-1]) > LONGEST:
        raise ValueError(
            f"found the text '{text}'; a name on the Hub has at most {LONGEST} letters, does not begin or end with '-' "
            "or '.', does not end with '.git', and has no '--' or '..' in it."
        )
    return text


def _ref(text: str) -> str:
    if text.startswith("refs/"):
        raise ValueError(f"found the text '{text}'; `create_pr: true` adds to the open pull request of the same title.")
    if _COMMIT.fullmatch(text):
        raise ValueError(f"found '{text}', which reads as a commit; allowed is a name such as v1 or dev/long.")
    if _NO_REF.search(text):
        raise ValueError(f"found the text '{text}', which git does not take; allowed is a name such as v1 or dev/long.")
    return text


def _title(text: str) -> str:
    if text != text.strip() or len(text.splitlines()) != 1:  # the Hub takes the first line for the title
        raise ValueError("allowed is one line of text, without blanks around it.")
    return text


def _license(text: str) -> str:
    if not _LICENSE.fullmatch(text):
        near = re.sub(r"[\s_]+", "-", text.strip().lower())
        hint = f" Did you mean {near}?" if _LICENSE.fullmatch(near) else ""
        raise ValueError(
            f"found the text '{text}'; allowed is a licence by its name on the Hub, such as apache-2.0 or mit.{hint}"
        )
    return text


RepoId = Annotated[str, Field(pattern=r"^([\w.-]+/)?[\w.-]+$"), AfterValidator(_repo_id)]
Ref = Annotated[str, AfterValidator(_ref)]
Title = Annotated[str, AfterValidator(_title)]
License = Annotated[str, AfterValidator(_license)]
