"""The client of the Hub: logged in, with an end to every silence, and its errors in words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from huggingface_hub import HfApi, constants, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import parse_ratelimit_headers
from huggingface_hub.utils._http import default_client_factory

from hfpipe.errors import MachineError
from hfpipe.secrets import without_secrets

SILENCE = 60.0  # seconds without a word from the Hub that end a request; the clients themselves wait for ever
LONGEST_WAIT = 60.0  # seconds that the Hub may ask to wait before another try; a longer wait is left to the user
LONGEST_TEXT = 300  # characters of a message of the Hub or its client that are shown
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
    end_every_silence()
    return HfApi(token=token)


@cache  # once: it closes the client that there was, in the hands of whatever reads
def end_every_silence() -> None:
    """Gives every request of this process to the Hub an end, also those of the libraries, which ask for none."""
    set_client_factory(_client)


def _client() -> Any:
    client = default_client_factory()
    client.event_hooks = {"request": [*client.event_hooks["request"], _limit], "response": []}
    return client


def _limit(request: Any) -> None:
    """`model_info` and its like ask httpx for no timeout at all, so a default of the client would not do."""
    given = request.extensions.get("timeout") or {}
    kinds = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {kind: given.get(kind) or SILENCE for kind in kinds}


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


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it."""
    while error is not None:
        yield error
        error = error.__cause__


def unwrapped(error: BaseException) -> BaseException:
    """The error inside the RuntimeError in which the client puts what happens to one file of an upload."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error


def status_of(error: BaseException | None) -> int | None:
    """The Hub's status code behind an error, or behind what caused it."""
    for one in causes(error):
        response = getattr(one, "response", None)
        if response is not None:
            return int(response.status_code)
        told = XET_STATUS.search(str(one))
        if told:
            return int(told[1])
    return None


def asked_to_wait(error: BaseException) -> float | None:
    """Seconds that the Hub's answer says to wait (`RateLimit`, once nothing remains, or `Retry-After`)."""
    response = next((found for one in causes(error) if (found := getattr(one, "response", None)) is not None), None)
    if response is None:
        return None
    limit = parse_ratelimit_headers(response.headers)  # every answer has it
    if limit is not None and limit.remaining == 0 and response.status_code == 429:
        return limit.reset_in_seconds + 1.0
    text = response.headers.get("Retry-After", "").strip()
    return float(text) if text.isdigit() else None


def is_passing(error: BaseException) -> bool:
    """Whether trying again soon may help: the Hub is busy, a connection broke, somebody committed at the same time."""
    status, error = status_of(error), unwrapped(error)
    if status is None:
        # A ConnectionError is Xet's, which has tried for minutes already; a ValueError will be one again, unless it is
        # about an answer that is no JSON.
        return isinstance(error, json.JSONDecodeError) or not isinstance(error, (ValueError, ConnectionError))
    return (status >= 500 or status in (408, 409, 412, 429)) and (asked_to_wait(error) or 0.0) <= LONGEST_WAIT


def explain(error: BaseException, repo_id: str) -> str:
    """What happened and what helps, in one or two sentences."""
    status = status_of(error)
    told = _told(error)
    owner = repo_id.split("/")[0] if "/" in repo_id else "your account"
    if status == 401:
        return "the Hub does not accept the token (401). Log in again with `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return (
            f"the token may not write to {repo_id} (403).{f' The Hub says: {told}.' if told else ''} Use a token with "
            f"write access to {owner}, or another owner."
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
    if status is not None and told:
        return f"the Hub answered {status}: {told}."
    error = unwrapped(error)
    name, text = type(error).__name__, (_one_line(str(error)) or "no reason was given")
    if isinstance(error, json.JSONDecodeError):
        return (
            "a web page came in place of the Hub's answer: the Hub is in trouble, or a network or proxy asks for a "
            "login. Open the Hub in a browser, and look at HF_ENDPOINT and HTTPS_PROXY if they are set."
        )
    if name == "ConnectError":
        return f"the Hub cannot be reached ({text}). Look at the network, and at HF_ENDPOINT if it is set."
    if name.endswith("Timeout"):
        return f"the Hub said nothing for {SILENCE:g} seconds ({name}). Try again later."
    if name in ("RemoteProtocolError", "ReadError", "WriteError"):
        return f"the connection to the Hub broke ({text})."
    return f"{text}." if type(error) in (ValueError, RuntimeError) else f"{name}: {text}."


def _told(error: BaseException) -> str:
    """The reason that the Hub's answer gives, as far as it gives one."""
    told = (one.server_message for one in causes(error) if isinstance(one, HfHubHTTPError) and one.server_message)
    return _one_line(next(told, ""))


def _one_line(text: str) -> str:
    """A message of several lines as the end of a sentence, without secrets, of which a cut would leave a part."""
    text = without_secrets(" ".join(text.split()))
    return (text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ...").rstrip(".")
