"""The traffic of this process with the Hub: every request has an end, and its errors are said in words.

The clients of the Hub wait for ever for an answer that does not come, and sleep for as long as a server asks them to.
`limit_waiting` exchanges the HTTP client that they share for one that does neither.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextvars import copy_context
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from huggingface_hub import constants, get_session, set_client_factory
from huggingface_hub.errors import FileMetadataError, HfHubHTTPError
from huggingface_hub.utils import parse_ratelimit_headers

from hfpipe.secrets import without_secrets

SILENCE = max(30.0, float(constants.HF_HUB_DOWNLOAD_TIMEOUT))  # seconds that one answer may take
SILENCE_OF_A_WRITE = 2 * SILENCE  # a commit is work
SHORTEST = 5.0  # seconds that it may take once the Hub has been silent for all that its patience allows
SLOWEST = 1000.0  # bytes per second; an answer that drips is none
READS = ("GET", "HEAD")
WAITS = (1.0, 3.0)  # seconds before a question that met a short trouble is asked again
BIG = 100_000  # bytes; how long the sending of more takes is for the network to say
PATIENCE = 2 * SILENCE  # seconds that all tries together may take, and that the Hub may ask to wait
LONGEST_TEXT = 300  # characters of a message of the Hub or its client that are shown
# hf_xet's errors have the status and the address in their text only.
XET_ERROR = re.compile(
    r"(?:Network error|Server error|Rate limited|CAS Client Error): (?:.*HTTP status \w+ error \((\d+).*?(https?://[^\s)]+)?$)?"
)
# hf_xet has a client of its own, which tries for many minutes; these are its settings, where the user has none.
XET_TRIES = {"HF_XET_CLIENT_RETRY_MAX_DURATION": "10s"}
XET_READS = {"HF_XET_CLIENT_READ_TIMEOUT": "20s", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2"}
# When a thread of huggingface_hub cannot connect, it closes the client of all: others find none, or a closed one.
RACES = re.compile(r"'NoneType' object has no attribute '(request|stream|get)'|client has been closed")
HUB_PATHS = re.compile(r"/api/|/resolve/|\.git/")  # what the Hub itself answers; everything else is storage


class NoAnswer(HfHubHTTPError):
    """No try can help soon: the text says what the Hub did. The clients repeat no request that ends so."""


class WebPage(HfHubHTTPError):
    """A web page came in place of an answer."""


class Patience:
    """How long this process waits for the Hub.

    Args:
        seconds: For an answer, whatever is tried meanwhile.
        until: When (by `time.monotonic`) no answer is of use any more.
        tries: How often in a row an address may be in trouble; its clients try six times, and are called again.
    """

    def __init__(self, seconds: float = PATIENCE, until: float = float("inf"), tries: float = float("inf")) -> None:
        self.seconds, self.until, self.tries = seconds, until, tries
        self._since: float | None = None  # when the first request without an answer was sent
        self._failed = 0.0  # when the last one was given up
        self._mute: set[str] = set()  # addresses that gave no answer, while others did
        self._troubles: Counter[tuple[str, str]] = Counter()  # of an address, since it gave an answer
        self.last: str | None = None  # what was the matter with the last request, in words

    def begin(self, request: httpx2.Request) -> float:
        """A request is sent; returns the seconds that its answer may take."""
        now = time.monotonic()
        if self._since is None or now - self._failed > self.seconds:  # an old failure says nothing of today
            self._since = self._failed = now
        left = self._since + self.seconds - now
        if request.method not in READS:
            return max(SHORTEST, min(SILENCE_OF_A_WRITE, left))
        return SHORTEST if str(request.url) in self._mute else max(SHORTEST, min(SILENCE, left))

    def answered(self, request: httpx2.Request) -> None:
        self._since = None
        self._mute.discard(str(request.url))

    def failed(self, request: httpx2.Request) -> bool:
        """No answer came; returns whether the patience is at its end."""
        self._failed = time.monotonic()
        self._mute.add(str(request.url))
        return self._since is not None and self._failed - self._since >= self.seconds - 1.0

    def note(self, request: httpx2.Request, trouble: str | None) -> None:
        """What was the matter with a request, in words; None for nothing.

        Raises:
            NoAnswer: It was the last try.
        """
        self.last, address = trouble, (request.method, f"{request.url.host}{request.url.path}")
        self._troubles[address] = self._troubles[address] + 1 if trouble else 0
        if trouble and self._troubles[address] >= self.tries:
            raise NoAnswer(trouble.rstrip("."), response=httpx2.Response(504, request=request))

    def allows(self, wait: float) -> bool:
        return wait <= min(self.seconds, self.until - time.monotonic())


_patience = Patience()


def limit_waiting(patience: Patience | None = None) -> None:
    """Gives every request of this process to the Hub an end, also those of the libraries, which ask for none.

    Args:
        patience: Another than that of the commands that only read.
    """
    global _patience
    _patience = patience or _patience
    for name, value in (XET_TRIES | XET_READS).items():
        if patience is None or name in XET_TRIES:
            os.environ.setdefault(name, value)
        elif os.environ.get(name) == value:  # of the command that started this process
            del os.environ[name]
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_masked)  # its warnings show signed addresses; a second time adds nothing
    if not isinstance(get_session(), _Client):  # the exchange closes the client that there was
        hooks = get_session().event_hooks
        set_client_factory(lambda: _Client(event_hooks=hooks, follow_redirects=True))


def _masked(record: logging.LogRecord) -> bool:
    record.msg, record.args = without_secrets(record.getMessage()), ()
    return True


class _Client(httpx2.Client):
    def send(self, request: httpx2.Request, *, stream: bool = False, **how: Any) -> httpx2.Response:
        """As httpx sends, within the limits of the patience; a question that meets a short trouble is asked again.

        Raises:
            NoAnswer: The patience is at its end, or the Hub asks to wait longer.
            WebPage: What answers is not the Hub, nor its storage.
            httpx2.TransportError: No answer came; another try may be made.
        """
        may_repeat = request.method in READS and _patience.last is None  # in an outage, nothing is asked twice
        for wait in (*(WAITS if may_repeat else ()), None):
            try:
                response = self._send_once(request, stream, how)
            except (httpx2.TransportError, NoAnswer) as error:
                _patience.note(request, trouble(error))
                if wait is None or not isinstance(error, httpx2.ReadError | httpx2.RemoteProtocolError):
                    raise
            else:
                _patience.note(request, trouble(HfHubHTTPError("", response=response)) if response.is_error else None)
                if wait is None or (response.status_code < 500 and response.status_code != 429):
                    break
                wait = max(wait, asks_to_wait(response) or 0.0)
                response.close()
            time.sleep(wait or 0.0)
        return response

    def _send_once(self, request: httpx2.Request, stream: bool, how: dict[str, Any]) -> httpx2.Response:
        limit = _patience.begin(request)
        given, kinds = request.extensions.get("timeout") or {}, ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {kind: min(given.get(kind) or limit, limit) for kind in kinds}
        send = super().send
        try:
            if "Transfer-Encoding" in request.headers or int(request.headers.get("Content-Length", 0)) > BIG:
                response = send(request, stream=True, **how)
            else:
                response = _within(limit, lambda: send(request, stream=True, **how), request)
            _refuse(response)
            response.stream = _Timed(response.stream, limit, request)
            if not stream:
                response.read()
        except httpx2.TimeoutException as error:
            if _patience.failed(request):
                raise _silent(request) from error
            raise
        return response


class _Timed(httpx2.SyncByteStream):
    """The body of an answer, which must come faster than it drips; the time that its reader takes does not count."""

    def __init__(self, parts: Any, limit: float, request: httpx2.Request) -> None:
        self._parts, self._limit, self._request = parts, limit, request

    def __iter__(self) -> Iterator[bytes]:
        waited, size, parts = 0.0, 0, iter(self._parts)
        try:
            while True:
                asked = time.monotonic()
                part = next(parts, None)
                waited += time.monotonic() - asked
                if part is None:
                    break
                size += len(part)
                if waited > self._limit + size / SLOWEST:
                    raise httpx2.ReadTimeout("the answer drips", request=self._request)
                if size > BIG:
                    _patience.answered(self._request)
                yield part
        except httpx2.TimeoutException as error:
            if _patience.failed(self._request):
                raise _silent(self._request) from error
            raise
        except httpx2.NetworkError as error:  # huggingface_hub goes on behind what it has after the other kind alone
            raise httpx2.RemoteProtocolError(str(error), request=self._request) from error
        _patience.answered(self._request)

    def close(self) -> None:
        self._parts.close()


def _within(seconds: float, call: Callable[[], httpx2.Response], request: httpx2.Request) -> httpx2.Response:
    """What a call returns, which is left behind in a thread of its own when it takes longer.

    A limit on each read, which is all that HTTP clients have, does not end a header that comes byte by byte.
    """
    done: Future[httpx2.Response] = Future()
    context = copy_context()  # the clients mark their downloads in it

    def work() -> None:
        try:
            done.set_result(context.run(call))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return done.result(seconds + 1.0)
    except TimeoutError as error:
        if done.done():  # it is the call's own
            raise
        raise httpx2.ReadTimeout("no answer came in time", request=request) from error


def _silent(request: httpx2.Request) -> NoAnswer:
    text = (
        f"{_who(request)} has not answered for {spoken(_patience.seconds)}. Try again later; look at the network, and "
        "at HF_ENDPOINT and HTTPS_PROXY if they are set"
    )
    return NoAnswer(text, response=httpx2.Response(504, request=request))


def _refuse(response: httpx2.Response) -> None:
    """Ends here what the clients would sleep for, or take for an answer."""
    wait = asks_to_wait(response)
    if wait is not None and not _patience.allows(wait):
        response.read()
        text = f"{_who(response.request)} asks to wait {spoken(wait)} before another try ({response.status_code})"
        raise NoAnswer(text, response=response)
    is_page = response.headers.get("Content-Type", "").startswith("text/html")
    sent = response.request.method in ("POST", "PUT")
    if is_page and response.is_success and (sent or response.request.url.path.startswith("/api/")):
        raise WebPage(
            f"a web page came in place of the answer of {_who(response.request)}: it is in trouble, or a network or "
            "proxy asks for a login. Open the Hub in a browser, and look at HF_ENDPOINT and HTTPS_PROXY if set",
            response=response,
        )


def _who(request: httpx2.Request) -> str:
    host = request.url.host
    return "the Hub" if host == httpx2.URL(constants.ENDPOINT).host else f"the storage of the Hub ({host})"


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
    """What is the matter with the Hub or the way to it, and what helps; None where an error is about something else."""
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


def last_trouble() -> str | None:
    """As `trouble`, of the last request of this process: `datasets` does not say what made it give up."""
    return _patience.last


def told(error: BaseException) -> str:
    """The reason that the Hub's answer gives, as far as it gives one."""
    found = (one.server_message for one in causes(error) if isinstance(one, HfHubHTTPError) and one.server_message)
    return one_line(next(found, ""))


def one_line(text: str) -> str:
    """A message of several lines as the end of a sentence, without secrets, of which a cut would leave a part."""
    text = without_secrets(" ".join(text.split()))
    return (text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ...").rstrip(".")
