"""The conversation with the Hub, as a process of its own: `python -m hfpipe.hub.upload`, a task on standard input.

An upload has no timeout and cannot be stopped from within, so push.py ends this process past a deadline. It looks what
the Hub already has, sends only what is missing as one commit on top of the commit it has seen, and looks again whenever
it is unsure whether a commit landed. `create_commit` is used and not `upload_folder`: with Xet the latter repeats a
commit whose reply was lost.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from hfpipe.core.errors import MachineError, UserError
from hfpipe.core.http import Patience
from hfpipe.core.hub_errors import asks_to_wait, is_passing, not_written, response_of, status_of
from hfpipe.core.run_layout import ADAPTER_CONFIG
from hfpipe.core.secrets import without_secrets
from hfpipe.core.upstream import left_out_of_commit
from hfpipe.hub.access import check, check_is_ours
from hfpipe.hub.client import full_name, logged_in, who_may_write

# Of an earlier push of another kind or with other shards: `transformers` would load these instead of the new weights.
REPLACED_BY_A_MODEL = (
    "model*.safetensors",
    "model.safetensors.index.json",
    ADAPTER_CONFIG,
    "adapter_model.safetensors",
)
NOTHING_IGNORED = "# every file of a push is meant\n"  # in place of the repository's .gitignore
TRIES = 8  # of one address in a row: half a minute of errors that come at once
GRACE = 5.0  # seconds past its deadline
WAITS = (1.0, 3.0, 8.0, 2.0)  # seconds between the tries, where the Hub does not say how long; then one last look


def upload(task: dict[str, Any]) -> dict[str, Any]:
    """Brings a folder to the Hub: as one commit, or none when it is there already.

    Args:
        task: folder, repo_id, private, revision (a branch or None), tag (or None), create_pr, message; run (its name),
            where the place must be free or have what it pushed; and seconds, the time it has.

    Returns:
        url, repo_id and commit of what is there now, and whether it is `new`.

    Raises:
        MachineError: It could not be done; the message says why.
    """
    api = logged_in(Patience(task["seconds"], time.monotonic() + task["seconds"], TRIES))
    for wait in (*WAITS, None):  # the last time it only looks whether the commit of the time before landed
        try:
            sent = _send(api, task, only_look=wait is None)
        except UserError:
            raise
        except Exception as error:  # the clients raise a dozen unrelated types; here each means: the Hub did not do it
            reason = not_written(error, task["repo_id"])
            if wait is None or not is_passing(error):
                break
            response = response_of(error)
            wait = max(wait, (response is not None and asks_to_wait(response)) or 0.0)
            print(f"push: {without_secrets(reason)} Trying again in {wait:g} s.", file=sys.stderr, flush=True)
            time.sleep(wait)
        else:
            if sent:
                return sent
    raise MachineError(reason)


def _send(api: HfApi, task: dict[str, Any], only_look: bool) -> dict[str, Any] | None:
    """One try; every step of it may be repeated without harm. None when something is missing and it may only look."""
    me = who_may_write(api)
    repo, branch = full_name(task["repo_id"], me), task["revision"]
    if not api.repo_exists(repo):
        api.create_repo(repo, private=task["private"] is not False, exist_ok=True)
    elif task["private"] and api.repo_info(repo).private is False:
        raise MachineError(
            f"{repo} is public, and `private: true` was asked for. Make it private on its page, or write `private: "
            "false` (--no-private)."
        )
    if branch:
        api.create_branch(repo, branch=branch, exist_ok=True)
    url = f"{api.endpoint}/{repo}" + (f"/tree/{branch}" if branch else "")
    if task["create_pr"]:
        branch, head, operations = _in_pull_request(api, repo, task, me["name"])
        url += f"/discussions/{branch.rpartition('/')[2]}" if branch else ""
    else:
        head, operations = _missing(api, repo, Path(task["folder"]), branch)
    known = {"url": url, "repo_id": repo, "commit": head}
    if not operations:
        _tag(api, repo, task["tag"], str(head))
        return known | {"new": "tried" in task}
    if only_look:
        return None
    if "run" in task and not task["create_pr"]:
        check_is_ours(api, repo, branch, task["run"])
    new_request = task["create_pr"] and branch is None
    _send_weights(api, repo, operations, branch, new_request)
    task["tried"] = True
    done = api.create_commit(
        repo,
        operations,
        commit_message=task["message"],
        revision=branch,
        parent_commit=head,
        num_threads=4,
        create_pr=new_request,
    )
    _tag(api, repo, task["tag"], str(done.oid))
    return known | {"url": done.pr_url or url, "commit": done.oid, "new": True}


def _send_weights(
    api: HfApi, repo: str, operations: list[CommitOperationAdd | CommitOperationDelete], branch: str | None, pr: bool
) -> None:
    """Sends the large files, which the commit then names.

    Raises:
        MachineError: The Hub would leave a file out of the commit, as it does without a word with what a `.gitignore`
            of the repository names, although it is asked here to pay no heed to that.
    """
    added = [one for one in operations if isinstance(one, CommitOperationAdd)]
    _ask_for_xet(api, repo, branch, pr)
    api.preupload_lfs_files(
        repo, added, revision=branch, create_pr=pr, num_threads=4, free_memory=False, gitignore_content=NOTHING_IGNORED
    )
    ignored = left_out_of_commit(added)
    if ignored:
        raise MachineError(
            f"the Hub would leave out {', '.join(ignored)}, which a .gitignore in {repo} names. Delete that file there."
        )


def _ask_for_xet(api: HfApi, repo: str, branch: str | None, pr: bool) -> None:
    """Asks for the right to write into the storage of Xet, as its client does, which does not tell what is wrong."""
    if constants.HF_HUB_DISABLE_XET:
        return
    url = f"{api.endpoint}/api/models/{repo}/xet-write-token/{quote(branch or 'main', safe='')}"
    answer = get_session().get(url, headers=build_hf_headers(token=api.token), params={"create_pr": 1} if pr else None)
    if answer.status_code != 404:  # of a Hub without Xet
        hf_raise_for_status(answer)


def _in_pull_request(
    api: HfApi, repo: str, task: dict[str, Any], author: str
) -> tuple[str | None, str | None, list[CommitOperationAdd | CommitOperationDelete]]:
    """The branch of the pull request that is open for this already, its head, and what it lacks.

    Without one, no branch, and what main lacks.
    """
    folder = Path(task["folder"])
    for branch, is_ours in _pull_requests(api, repo, task["message"], author):
        head, operations = _missing(api, repo, folder, branch)
        if is_ours or not operations:
            return branch, head, operations
    return (None, *_missing(api, repo, folder, None))


def _pull_requests(api: HfApi, repo: str, title: str, author: str) -> Iterator[tuple[str, bool]]:
    """Branches of pull requests, and whether one is open, of this author, and of this title.

    A server that does not list its discussions is asked for the branches alone: then ours is the one with our files.
    """
    try:
        for found in api.get_repo_discussions(repo, discussion_type="pull_request"):
            if found.status in ("open", "draft") and found.author == author and found.title == title:
                yield f"refs/pr/{found.num}", True
    except HfHubHTTPError as error:
        if status_of(error) not in (403, 404, 405):
            raise
        for ref in api.list_repo_refs(repo, include_pull_requests=True).pull_requests or []:
            yield ref.ref, False


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
        api.create_tag(repo, tag=tag, revision=commit)  # a 409 means that it must be looked at again


def _missing(
    api: HfApi, repo: str, folder: Path, branch: str | None
) -> tuple[str | None, list[CommitOperationAdd | CommitOperationDelete]]:
    """The head of a branch (None of one without a commit), and what a commit on it must do.

    Then the Hub has the folder's files, and no weights of an earlier push beside them.
    """
    head = api.repo_info(repo, revision=branch).sha
    listed = api.list_repo_tree(repo, recursive=True, revision=head) if head else ()
    remote = {file.path: file for file in listed if isinstance(file, RepoFile)}
    local = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    stale = [path for path in remote if path not in local and any(fnmatch(path, p) for p in REPLACED_BY_A_MODEL)]
    if ADAPTER_CONFIG in local:
        stale = []
    return head, [
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


def main() -> int:
    """Reads a task from standard input and writes one line of JSON to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the process that started this one says that it was interrupted
    try:
        task = json.load(sys.stdin)
        signal.alarm(math.ceil(task["seconds"] + GRACE))  # where nobody ends this process, it does so itself
        answer = {"lines": check(task["check"])} if "check" in task else upload(task)
        code = 0
    except MachineError as error:
        answer, code = {"error": without_secrets(str(error))}, error.exit_code
    with contextlib.suppress(BrokenPipeError):  # the one who asked is gone
        os.write(sys.stdout.fileno(), f"{json.dumps(answer)}\n".encode())
    return code


if __name__ == "__main__":
    sys.exit(main())
