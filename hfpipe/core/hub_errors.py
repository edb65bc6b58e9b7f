"""The one translator of errors of the Hub, its clients and its storage: into words, and into whether to ask again.

- `trouble`: the Hub, its storage or the way there is at fault; None where the error is about something else.
- `not_readable`: why a model, a data set or a metric cannot be read, with the exit code of its family.
- `not_written`: why a push failed.
- `is_short`, `is_passing`: whether one request, or one try of a push, is made again.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from hfpipe.core.errors import MachineError, RecipeError, Unreachable, UserError
from hfpipe.core.secrets import without_secrets

LONGEST_TEXT = 300  # characters of a message of the Hub or its client that are shown
LOGIN = "log in with `hf auth login` (or set HF_TOKEN) as somebody who may read it"
CACHED = "What is in the cache needs no Hub."

# hf_xet's errors have the status and the address in their text only.
XET_ERROR = re.compile(
    r"(?:Network error|Server error|Rate limited|CAS Client Error): (?:.*HTTP status \w+ error \((\d+).*?(https?://[^\s)]+)?$)?"
)


# When a thread of huggingface_hub cannot connect, it closes the client of all: others find none, or a closed one.
RACES = re.compile(r"'NoneType' object has no attribute '(request|stream|get)'|client has been closed")


HUB_PATHS = re.compile(r"/api/|/resolve/|\.git/")  # what the Hub itself answers; everything else is storage


class NoAnswer(HfHubHTTPError):
    """Another try cannot help soon; the text says what the Hub did. The clients repeat no request that ends so."""


class WebPage(HfHubHTTPError):
    """A web page came in place of an answer."""


def asks_to_wait(response: httpx2.Response) -> float | None:
    """Seconds that an answer says to wait (`RateLimit`, once nothing remains, or `Retry-After`); None for none."""
    if response.status_code not in (408, 429) and response.status_code < 500:
        return None
    limit = parse_ratelimit_headers(response.headers)  # every answer has it
    if limit is not None and limit.remaining == 0 and response.status_code == 429:
        return limit.reset_in_seconds + 1.0
    text = response.headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def spoken(seconds: float) -> str:
    """A time in words: 45 seconds, 60 minutes, 25 hours."""
    unit, name = (1, "seconds") if seconds < 120 else (60, "minutes") if seconds < 7200 else (3600, "hours")
    return f"{seconds / unit:.0f} {name}"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it, or what it came from."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def unwrapped(error: BaseException) -> BaseException:
    """The error inside the RuntimeError in which the client puts what happens to one file of an upload."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error


def response_of(error: BaseException | None) -> httpx2.Response | None:
    """The answer behind an error, or behind what caused it."""
    return next((found for one in causes(error) if (found := getattr(one, "response", None)) is not None), None)


def status_of(error: BaseException | None) -> int | None:
    """The Hub's status code behind an error, or behind what caused it."""
    for one in causes(error):
        response = getattr(one, "response", None)
        if response is not None:
            return int(response.status_code)
        xet = XET_ERROR.search(str(one))
        if xet and xet[1]:
            return int(xet[1])
    return None


def refusing_storage(error: BaseException) -> str | None:
    """The host of the storage that refused a file, or does not know it; None where it was the Hub that refused.

    The address of a file in storage is signed for a while, or has a token of its own: what it refuses is not about the
    token of the user.
    """
    if status_of(error) not in (401, 403, 404, 409, 412):
        return None
    response = response_of(error)
    if response is not None:
        is_storage = "Authorization" not in response.request.headers
        address = str(response.request.url) if is_storage else ""
    else:
        address = next((xet[2] or "" for one in causes(error) if (xet := XET_ERROR.search(str(one)))), "")
    url = httpx2.URL(address)
    return url.host if url.host and not HUB_PATHS.search(url.path) else None


def trouble(error: BaseException) -> str | None:
    """Puts a fault of the Hub, or of the way to it, into words with a remedy; None for any other error."""
    if known := next((one for one in causes(error) if isinstance(one, NoAnswer | WebPage)), None):
        return f"{known}."
    status, response = status_of(error), response_of(error)
    if host := refusing_storage(error):
        return (
            f"the storage of the Hub ({host}) refuses a file ({status}), which is not about your token: what it was "
            "given has expired, or a proxy changes requests. Try again, and look at HTTPS_PROXY if it is set."
        )
    if status == 429:
        wait = asks_to_wait(response) if response is not None else None
        return f"the Hub asks to slow down (429). Wait {spoken(wait) if wait else 'some minutes'}."
    if status is not None and status >= 500:
        return f"the Hub is in trouble (it answered {status}). Try again later."
    if status is not None:
        return None
    for one in causes(error):
        name, text = type(one).__name__, one_line(str(one)) or "no reason was given"
        if isinstance(one, json.JSONDecodeError | FileMetadataError):
            return f"what answers at {constants.ENDPOINT} is not the Hub. Look at HF_ENDPOINT and HTTPS_PROXY if set."
        if isinstance(one, AttributeError | RuntimeError) and RACES.search(text):
            return "the connection to the Hub broke. Try again."
        if "Consistency check failed" in text:  # huggingface_hub's, which names the signed address
            return (
                "what came of a file is not all of it, or a web page in its place. Try again, and look at HTTPS_PROXY."
            )
        if isinstance(one, ConnectionError | RuntimeError) and XET_ERROR.search(str(one)):
            return (
                f"the storage of the Hub does not answer as it should ({text}). Try again later; where a proxy or "
                "firewall is in the way, set HF_HUB_DISABLE_XET=1, and files go by another road."
            )
        if not isinstance(one, httpx2.TransportError):
            continue
        if isinstance(one, httpx2.ConnectError):
            return f"the Hub cannot be reached ({text}). Look at the network, and at HF_ENDPOINT if it is set."
        if isinstance(one, httpx2.TimeoutException):
            return f"the Hub did not answer in time ({name}). Try again later."
        return f"the connection to the Hub broke ({text}). Try again."
    return None


def told(error: BaseException) -> str:
    """The reason that the Hub's answer gives, as far as it gives one."""
    found = (one.server_message for one in causes(error) if isinstance(one, HfHubHTTPError) and one.server_message)
    return one_line(next(found, ""))


def one_line(text: str) -> str:
    """A message of several lines as the end of a sentence, without secrets, of which a cut would leave a part."""
    text = without_secrets(" ".join(text.split()))
    return (text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ...").rstrip(".")


def is_short(found: httpx2.Response | BaseException) -> bool:
    """Says whether one request is sent again at once: its connection broke, or the Hub is busy for a moment."""
    if isinstance(found, httpx2.Response):
        return found.status_code >= 500 or found.status_code == 429
    return isinstance(found, httpx2.ReadError | httpx2.RemoteProtocolError)


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


def not_readable(error: BaseException, thing: str, missing: type[UserError]) -> UserError | None:
    """Puts into words why something of the Hub cannot be read; None where the Hub has nothing to do with it.

    Args:
        error: As the clients, `datasets` or transformers raise it, which wrap those of the Hub in others.
        thing: What is read, such as "model 'me/toy'".
        missing: The error for one that does not exist, or is private.
    """
    kinds = [*causes(error)]
    if any(isinstance(one, GatedRepoError) or "is a gated dataset" in str(one) for one in kinds):
        return MachineError(
            f"{thing} is gated. Accept its conditions on its page of the Hub, then {LOGIN}; nothing else helps."
        )
    if any(isinstance(one, RevisionNotFoundError) for one in kinds):
        return RecipeError(f"{thing}: {_first_line(error)} Correct `revision`, or leave it out for `main`.")
    if any(
        isinstance(one, RepositoryNotFoundError | HFValidationError) or type(one).__name__ == "DatasetNotFoundError"
        for one in kinds
    ):
        return missing(
            f"{thing} was found neither as a folder nor on the Hub, where a private one looks like a missing one. "
            f"Check the spelling; if it is private, {LOGIN}."
        )
    if any(_is_offline(one) for one in kinds):
        return MachineError(
            f"{thing} is not in the cache, and HF_HUB_OFFLINE is set. Unset it, or load it once with a network."
        )
    if known := trouble(error):
        return Unreachable(f"{thing}: {known} {CACHED}", known.rstrip("."))
    if (status := status_of(error)) in (401, 403):
        reason = told(error)
        return MachineError(f"{thing}: the Hub refuses it ({status}{reason and f': {reason}'}). Please {LOGIN}.")
    return None


def not_written(error: BaseException, repo_id: str) -> str:
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


def _is_offline(error: BaseException) -> bool:
    if constants.is_offline_mode() and isinstance(error, LocalEntryNotFoundError | ConnectionError):
        return True
    return isinstance(error, OfflineModeIsEnabled) or "OfflineModeIsEnabled" in str(error)


def _first_line(error: BaseException) -> str:
    """Returns the first line of an error as a sentence."""
    line = one_line((str(error).strip().splitlines() or [type(error).__name__])[0])
    return line if line.endswith(("!", "?")) else f"{line}."
