"""The client of the Hub: logged in, with an end to every silence, and its errors in words."""

from __future__ import annotations

import json
import re
from typing import Any

from huggingface_hub import HfApi, constants, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError

from hfpipe.errors import MachineError

SILENCE = 60.0  # seconds without a word from the Hub that end a request; the clients themselves wait for ever
LONGEST_WAIT = 60.0  # seconds that the Hub may ask to wait before another try; a longer wait is left to the user
XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})")  # hf_xet's errors have it only in their text


def logged_in() -> HfApi:
    """The client with this machine's token.

    Raises:
        MachineError: It has none, or may not talk to the Hub.
    """
    if constants.is_offline_mode():
        raise MachineError("HF_HUB_OFFLINE is set, which forbids all traffic with the Hub. Unset it.")
    token = get_token()
    if not token:
        raise MachineError("this machine is not logged in to the Hub. Run `hf auth login`, or set HF_TOKEN.")
    get_session().timeout = SILENCE
    return HfApi(token=token)


def who_may_write(api: HfApi) -> dict[str, Any]:
    """What the Hub says of the token's owner.

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


def asked_to_wait(error: BaseException) -> float | None:
    """Seconds that the Hub's answer says to wait (`Retry-After`)."""
    response = getattr(error, "response", None)
    text = response.headers.get("Retry-After", "") if response is not None else ""
    return float(text) if text.isdigit() else None


def is_passing(error: Exception) -> bool:
    """Whether trying again soon may help: the Hub is busy, a connection broke, somebody committed at the same time."""
    status = status_of(error)
    if status is None:
        # A ConnectionError is Xet's, which has tried for minutes already; a ValueError will be one again, unless it is
        # about an answer that is no JSON.
        return isinstance(error, json.JSONDecodeError) or not isinstance(error, (ValueError, ConnectionError))
    return (status >= 500 or status in (408, 409, 412, 429)) and (asked_to_wait(error) or 0.0) <= LONGEST_WAIT


def explain(error: Exception, repo_id: str) -> str:
    """What happened and what helps, in one or two sentences."""
    status = status_of(error)
    owner = repo_id.split("/")[0] if "/" in repo_id else "your account"
    if status == 401:
        return "the Hub does not accept the token (401). Log in again with `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return (
            f"the token may not write to {repo_id} (403). Use a token with write access to {owner}, or another owner."
        )
    if status == 404:
        return (
            f"the Hub does not find {repo_id}, or does not show it to this token (404). Look whether it was deleted or "
            f"renamed, and whether the token may see what {owner} has."
        )
    if status in (409, 412):
        return f"the repository was changed by somebody else at the same time ({status})."
    if status == 429:
        wait = asked_to_wait(error)
        return f"the Hub asks to slow down (429). Wait {f'{wait:g} seconds' if wait else 'some minutes'}."
    if status is not None and status >= 500:
        return f"the Hub is in trouble (it answered {status}). Try again later."
    if status is not None and isinstance(error, HfHubHTTPError) and error.server_message:
        return f"the Hub answered {status}: {error.server_message.strip().rstrip('.')}."
    name = type(error).__name__
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason was given").rstrip(".")
    if name == "ConnectError":
        return f"the Hub cannot be reached ({text}). Look at the network, and at HF_ENDPOINT if it is set."
    if name.endswith("Timeout"):
        return f"the Hub said nothing for {SILENCE:g} seconds ({name}). Try again later."
    if name in ("RemoteProtocolError", "ReadError", "WriteError"):
        return f"the connection to the Hub broke ({text}). Try again."
    return f"{name}: {text}."
