"""The client of the Hub for a push: logged in, and what its errors mean there."""

from __future__ import annotations

import json
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, get_token

from hfpipe.core.errors import MachineError
from hfpipe.core.http import Patience, limit_waiting
from hfpipe.core.hub_errors import (
    NoAnswer,
    WebPage,
    one_line,
    refusing_storage,
    response_of,
    status_of,
    told,
    trouble,
    unwrapped,
)


def logged_in(patience: Patience | None = None) -> HfApi:
    """The client with this machine's token.

    Args:
        patience: How long to wait for the Hub, where not as long as everywhere.

    Raises:
        MachineError: It has none, or may not talk to the Hub.
    """
    if constants.is_offline_mode():
        raise MachineError("HF_HUB_OFFLINE is set, which forbids all traffic with the Hub. Unset it.")
    token = get_token()
    if not token:
        raise MachineError("this machine is not logged in to the Hub. Run `hf auth login`, or set HF_TOKEN.")
    limit_waiting(patience)
    return HfApi(token=token)


def who_may_write(api: HfApi) -> dict[str, Any]:
    """Asks the Hub for the token's owner.

    Raises:
        MachineError: The token may only read.
    """
    me = api.whoami(cache=True)  # the Hub answers it a few times an hour only
    if access_token(me).get("role") == "read":
        raise MachineError(
            "the token of this machine may only read. Make one that may write at https://huggingface.co/settings/tokens"
            " and log in with it: `hf auth login`."
        )
    return me


def access_token(me: dict[str, Any]) -> dict[str, Any]:
    """Role and scopes of the token, as far as the Hub tells them."""
    return (me.get("auth") or {}).get("accessToken") or {}


def full_name(repo_id: str, me: dict[str, Any]) -> str:
    return repo_id if "/" in repo_id else f"{me['name']}/{repo_id}"


def is_passing(error: BaseException) -> bool:
    """Returns True if trying again soon may help: the Hub is busy, a connection broke, somebody committed at the same
    time.
    """
    status, error = status_of(error), unwrapped(error)
    if isinstance(error, NoAnswer):
        return False
    if status is None:
        # A ConnectionError is Xet's, which has tried for minutes already; a ValueError will be one again, unless it is
        # about an answer that is no JSON.
        return isinstance(error, json.JSONDecodeError) or not isinstance(error, (ValueError, ConnectionError))
    again = status >= 500 or status in (408, 429)
    if again and response_of(error) is None:  # an error of Xet's client, which has tried it six times
        return False
    passing = again or status in (409, 412)
    return passing or isinstance(error, WebPage) or refusing_storage(error) is not None


def explain(error: BaseException, repo_id: str) -> str:
    """Tells in one or two sentences what happened to a push and what helps."""
    if known := trouble(error):
        return known
    status, reason = status_of(error), told(error)
    owner = repo_id.split("/")[0] if "/" in repo_id else "your account"
    if status == 401:
        return "the Hub does not accept the token (401). Log in again with `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return (
            f"the token may not write to {repo_id} (403).{f' The Hub says: {reason}.' if reason else ''} Use a token "
            f"with write access to {owner}, or another owner."
        )
    if status == 404:
        return (
            f"the Hub does not find {repo_id}, or does not show it to this token (404). Look whether it was deleted or "
            f"renamed, and whether the token may see what {owner} has."
        )
    if status in (409, 412):
        return f"the repository was changed by somebody else at the same time ({status})."
    if status is not None and reason:
        return f"the Hub answered {status}: {reason}."
    error = unwrapped(error)
    if isinstance(error, KeyError | httpx2.DecodingError):  # a client that reads the answer
        return f"what answers at {constants.ENDPOINT} is not the Hub ({type(error).__name__}: {one_line(str(error))})."
    name, text = type(error).__name__, (one_line(str(error)) or "no reason was given")
    return f"{text}." if type(error) in (ValueError, RuntimeError) else f"{name}: {text}."
