"""Asks the Hub before anything is trained whether a push could be made. Changes nothing there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from hfpipe.core.errors import MachineError, UserError
from hfpipe.core.hub_errors import not_written, status_of
from hfpipe.hub.client import access_token, full_name, logged_in, who_may_write

WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


def check(asked: list[dict[str, Any]]) -> list[str]:
    """Asks the Hub whether `upload` could write to some repositories.

    Args:
        asked: For each: repo_id, the word of the recipe that says it, run (the name of the run), private, revision,
            tag, create_pr, license; and base: of an adapter, the id of its base and whether that is pushed too.

    Returns:
        One line for each, that it could; and one for an adapter that others could see, and not load.

    Raises:
        MachineError: It could not; the message says why, and what to do. What the Hub does not tell is taken as
            allowed.
    """
    api = logged_in()
    lines: list[str] = []
    for one in asked:
        try:
            lines += _check(api, one)
        except (UserError, Exception) as error:  # the clients raise a dozen unrelated types
            reason = str(error) if isinstance(error, UserError) else not_written(error, one["repo_id"])
            where = f"push.{one['word']}: nothing could be pushed to {one['repo_id']}"
            raise MachineError(f"{where}: {reason}") from error
    return lines


def _check(api: HfApi, asked: Mapping[str, Any]) -> Iterator[str]:
    me = who_may_write(api)
    repo = full_name(asked["repo_id"], me)
    validate_repo_id(repo)
    if asked["license"]:
        _check_license(asked["license"])
    if not asked["create_pr"]:  # which everybody may open who sees the repository
        _check_owner(me, repo)
    is_private = asked["private"] is not False
    if api.repo_exists(repo):
        if not asked["create_pr"]:
            _check_write(api, repo)
        is_private = api.repo_info(repo).private is not False
        if asked["private"] and not is_private:
            raise MachineError(
                "it exists and is public, and the recipe says `private: true`. Make it private on its page, take "
                "another name, or write `private: false`."
            )
        _check_names(api, repo, asked)
        kind = "private" if is_private else "public"
        yield f"may {'open a pull request on' if asked['create_pr'] else 'write to'} {repo}, which exists and is {kind}"
    elif asked["create_pr"]:
        raise MachineError("a pull request needs a repository that exists. Remove `create_pr`.")
    else:
        yield f"may write to {repo}, which will be made, {'private' if is_private else 'public'}"
    if asked["base"] and not is_private and (reason := _why_not_for_all(api, asked, me)):
        yield (
            f"warning: everybody will see the adapter in {repo}, but load it only with access to {asked['base'][0]}, "
            f"which is {reason}. A merged model (`what: merged`) needs no base."
        )


def _check_license(license: str) -> None:
    """The Hub refuses a card with a licence that it does not know."""
    try:
        ModelCard(f"---\nlicense: {license}\n---\n", ignore_metadata_errors=True).validate()
    except ValueError as error:
        names = "https://huggingface.co/docs/hub/repositories-licenses"
        raise MachineError(f"the Hub does not know the licence {license!r}. Take one of {names}.") from error
    except Exception:  # no answer to the question, which is not asked again
        return


def _why_not_for_all(api: HfApi, asked: Mapping[str, Any], me: Mapping[str, Any]) -> str | None:
    """The reason why not everybody can load the base of an adapter; None where they can, or the Hub does not tell."""
    base, is_pushed = asked["base"]
    try:
        info = api.model_info(full_name(base, dict(me)) if is_pushed else base)
    except RepositoryNotFoundError:
        return "private" if is_pushed and asked["private"] is not False else None
    except HfHubHTTPError:  # no answer to the question
        return None
    return "private" if info.private else "gated" if info.gated else None


def _check_owner(me: Mapping[str, Any], repo: str) -> None:
    """The owner must be the user, or an organisation in which the user, and the token, may write."""
    owner, name = repo.split("/")[0], me["name"]
    roles = {org["name"]: org.get("roleInOrg") for org in me.get("orgs") or []}
    if owner != name and "orgs" in me and roles.get(owner, "none") in ("none", "read"):
        allowed = ", ".join([name, *(org for org, role in roles.items() if role != "read")])
        raise MachineError(f"{name}, to whom the token belongs, may not write under {owner}. Allowed: {allowed}.")
    token = access_token(dict(me))
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") != "fineGrained" or not isinstance(scopes, list):
        return
    may = set(_writable(scopes))
    if not may & {owner, repo}:
        allowed = f"It may write to: {', '.join(sorted(may))}." if may else "It may write nowhere."
        raise MachineError(
            f"the token of this machine is fine-grained and may not write to {repo}. {allowed} Give it write access at "
            "https://huggingface.co/settings/tokens."
        )


def _writable(scopes: list[dict[str, Any]]) -> Iterator[str]:
    """The users, organisations and repositories that a fine-grained token may write to."""
    for scope in scopes:
        if "repo.write" in (scope.get("permissions") or ()):
            yield str((scope.get("entity") or {}).get("name"))


def _check_write(api: HfApi, repo: str) -> None:
    try:
        api.auth_check(repo, write=True)
    except HfHubHTTPError as error:
        if status_of(error) in (401, 403):  # anything else is no answer to the question
            raise


def _check_names(api: HfApi, repo: str, asked: Mapping[str, Any]) -> None:
    """The tag must be free, and the place must hold no weights that are not of an earlier push of this run."""
    branch, tag = asked["revision"], asked["tag"]
    if branch or tag:
        refs = api.list_repo_refs(repo)
        if tag in [ref.name for ref in refs.tags]:
            raise MachineError(f"it has a tag {tag!r} already, and a tag is not moved. Take another tag.")
        if branch and branch not in [ref.name for ref in refs.branches]:
            return
    if not asked["create_pr"]:
        check_is_ours(api, repo, branch, asked["run"])


def check_is_ours(api: HfApi, repo: str, branch: str | None, run: str) -> None:
    """A branch must hold no weights but those of an earlier push of this run, and what it has from the main branch.

    Raises:
        MachineError: It does: the name is taken.
    """
    if branch not in (None, "main") and api.repo_info(repo, revision=branch).sha == api.repo_info(repo).sha:
        return
    files = api.list_repo_files(repo, revision=branch)
    weights = [file for file in files if file.endswith(WEIGHTS)]
    if weights and _run_in(api, repo, branch, files) != run:
        raise MachineError(
            f"the name is taken: {branch or 'its main branch'} holds weights that this run did not make "
            f"({weights[0]}). Take another name, or push to a branch of it (`revision: NAME`, --revision NAME) or as a "
            "pull request (`create_pr: true`, --create-pr)."
        )


def _run_in(api: HfApi, repo: str, branch: str | None, files: list[str]) -> str | None:
    """The name of the run that was pushed here; None for anything else."""
    if "recipe.yaml" not in files:
        return None
    with open(api.hf_hub_download(repo, "recipe.yaml", revision=branch), encoding="utf-8") as file:
        content = yaml.safe_load(file)
    return content.get("name") if isinstance(content, dict) else None
