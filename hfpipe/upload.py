"""The conversation with the Hub, as a process of its own: `python -m hfpipe.upload` with a task on standard input.

An upload has no timeout and cannot be stopped from within, so hub.py ends this process past a deadline. It looks what
the Hub already has, sends only what is missing as one commit on top of the commit it has seen, and looks again whenever
it is unsure whether a commit landed. `create_commit` is used and not `upload_folder`: with Xet the latter repeats a
commit whose reply was lost.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from hfpipe.errors import MachineError, UserError

ADAPTER_CONFIG = "adapter_config.json"
# Of an earlier push of another kind or with other shards: `transformers` would load these instead of the new weights.
REPLACED_BY_A_MODEL = (
    "model*.safetensors",
    "model.safetensors.index.json",
    ADAPTER_CONFIG,
    "adapter_model.safetensors",
)
WAITS = (1.0, 2.0, 4.0)  # seconds between the tries
SILENCE = 120.0  # seconds without a word from the Hub that end a request
XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})")  # hf_xet's errors have it only in their text
TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}")


def upload(task: dict[str, Any]) -> dict[str, Any]:
    """Brings a folder to the Hub: as one commit, or none when it is there already.

    Args:
        task: folder, repo_id, private, revision (a branch or None), tag (or None), message.

    Returns:
        url and commit of what is there now, and whether it is `new`.

    Raises:
        MachineError: It could not be done; the message says why.
    """
    api = logged_in()
    for wait in (*WAITS, None):  # the last time it only looks whether the commit of the time before landed
        try:
            sent = _send(api, task, only_look=wait is None)
        except UserError:
            raise
        except Exception as error:  # the clients raise a dozen unrelated types; here each means: the Hub did not do it
            reason = explain(error, task["repo_id"])
            if wait is None or not is_passing(error):
                break
            print(f"push: {without_tokens(reason)} Trying again in {wait:g} s.", file=sys.stderr, flush=True)
            time.sleep(wait)
        else:
            if sent:
                return sent
    raise MachineError(reason)


def check(repo_id: str) -> dict[str, Any]:
    """Asks the Hub, without changing anything, whether `upload` could write to a repository.

    Returns:
        The full repo_id, and whether it `exists`.

    Raises:
        MachineError: It could not; the message says why. What the Hub does not tell (the scopes of a fine-grained
            token) is taken as allowed.
    """
    api = logged_in()
    try:
        me = _who_may_write(api)
        repo = _full_name(repo_id, me)
        owner = repo.split("/")[0]
        roles = {org["name"]: org.get("roleInOrg") for org in me.get("orgs") or []}
        if owner != me["name"] and "orgs" in me and roles.get(owner, "none") in ("none", "read"):
            raise MachineError(
                f"{me['name']}, to whom the token belongs, may not write under {owner}. Allowed: "
                f"{', '.join([me['name'], *(name for name, role in roles.items() if role != 'read')])}."
            )
        exists = api.repo_exists(repo)
        if exists:
            _check_write(api, repo)
    except UserError:
        raise
    except Exception as error:  # as in `upload`
        raise MachineError(explain(error, repo_id)) from error
    return {"repo_id": repo, "exists": exists}


def logged_in() -> HfApi:
    token = get_token()
    if not token:
        raise MachineError("this machine is not logged in to the Hub. Run `hf auth login`, or set HF_TOKEN.")
    get_session().timeout = SILENCE
    return HfApi(token=token)


def _who_may_write(api: HfApi) -> dict[str, Any]:
    me = api.whoami(cache=True)
    if ((me.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise MachineError(
            "the token of this machine may only read. Make one that may write at https://huggingface.co/settings/tokens"
            " and log in with it: `hf auth login`."
        )
    return me


def _full_name(repo_id: str, me: dict[str, Any]) -> str:
    return repo_id if "/" in repo_id else f"{me['name']}/{repo_id}"


def _check_write(api: HfApi, repo: str) -> None:
    try:
        api.auth_check(repo, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):  # anything else is no answer to the question
            raise


def _send(api: HfApi, task: dict[str, Any], only_look: bool) -> dict[str, Any] | None:
    """One try; every step of it may be repeated without harm. None when something is missing and it may only look."""
    repo, branch = _full_name(task["repo_id"], _who_may_write(api)), task["revision"]
    if not api.repo_exists(repo):
        api.create_repo(repo, private=task["private"], exist_ok=True)
    if branch:
        api.create_branch(repo, branch=branch, exist_ok=True)
    url = f"{api.endpoint}/{repo}" + (f"/tree/{branch}" if branch else "")
    head = str(api.repo_info(repo, revision=branch).sha)
    operations = _missing(Path(task["folder"]), [f for f in api.list_repo_tree(repo, recursive=True, revision=head)])
    if not operations:
        _tag(api, repo, task["tag"], head)
        return {"url": url, "commit": head, "new": "tried" in task}
    if only_look:
        return None
    task["tried"] = True
    done = api.create_commit(
        repo, operations, commit_message=task["message"], revision=branch, parent_commit=head, num_threads=4
    )
    _tag(api, repo, task["tag"], str(done.oid))
    return {"url": url, "commit": done.oid, "new": True}


def _tag(api: HfApi, repo: str, tag: str | None, commit: str) -> None:
    """Gives the commit a name, unless it has it; a name of another commit is not taken from it."""
    if tag is None:
        return
    known = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo).tags}
    if known.get(tag, commit) != commit:
        raise MachineError(
            f"the files are there (commit {commit[:8]}), but the tag {tag!r} names another commit "
            f"({known[tag][:8]}). Take another tag."
        )
    if tag not in known:
        api.create_tag(repo, tag=tag, revision=commit, exist_ok=True)


def _missing(folder: Path, listed: list[Any]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What a commit must do so that the Hub has the folder's files, and no weights of an earlier push beside them."""
    remote = {file.path: file for file in listed if isinstance(file, RepoFile)}
    local = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    stale = [path for path in remote if path not in local and any(fnmatch(path, p) for p in REPLACED_BY_A_MODEL)]
    if ADAPTER_CONFIG in local:
        stale = []
    return [
        *(CommitOperationAdd(path, file) for path, file in local.items() if not _is_same(file, remote.get(path))),
        *(CommitOperationDelete(path) for path in stale),
    ]


def _is_same(file: Path, remote: RepoFile | None) -> bool:
    if remote is None or file.stat().st_size != remote.size:
        return False
    if remote.lfs is None:
        content = file.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == remote.blob_id
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == remote.lfs.sha256


def without_tokens(text: str) -> str:
    """The text with every Hugging Face token, this machine's own included, made unreadable."""
    token = get_token()
    return TOKEN.sub("hf_***", text.replace(token, "hf_***") if token else text)


def status_of(error: BaseException | None) -> int | None:
    """The Hub's status code behind an error, or behind what caused it."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return int(response.status_code)
        told = XET_STATUS.search(str(error))
        if told:
            return int(told[1])
        error = error.__cause__
    return None


def is_passing(error: Exception) -> bool:
    """Whether trying again may help: the Hub is busy, a connection broke, somebody else committed at the same time."""
    if isinstance(error, (ValueError, ConnectionError)):  # the latter is Xet's, which has tried for minutes already
        return False
    status = status_of(error)
    return status is None or status >= 500 or status in (408, 409, 412, 429)


def explain(error: Exception, repo_id: str) -> str:
    """What happened and what helps, in one or two sentences."""
    status = status_of(error)
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set, which forbids all traffic with the Hub. Unset it."
    if status == 401:
        return "the Hub does not accept the token (401). Log in again with `hf auth login`, or set HF_TOKEN."
    if status == 403:
        owner = repo_id.split("/")[0] if "/" in repo_id else "your account"
        return (
            f"the token may not write to {repo_id} (403). Use a token with write access to {owner}, or another owner."
        )
    if status in (409, 412):
        return f"the repository was changed by somebody else at the same time ({status})."
    if status == 429:
        return "the Hub asks to slow down (429). Wait some minutes."
    if status is not None and status >= 500:
        return f"the Hub is in trouble (it answered {status}). Try again later."
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason was given")
    return f"{type(error).__name__}: {text.rstrip('.')}."


def main() -> int:
    """Reads a task from standard input and writes one line of JSON to standard output."""
    try:
        task = json.load(sys.stdin)
        answer, code = upload(task) if "folder" in task else check(task["repo_id"]), 0
    except MachineError as error:
        answer, code = {"error": without_tokens(str(error))}, error.exit_code
    print(json.dumps(answer), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
