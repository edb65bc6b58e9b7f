"""The traffic of this process with the Hub: every request has an end, and its errors are said in words.

The clients of the Hub wait for ever for an answer that does not come, and sleep for as long as a server asks them to.
`limit_waiting` exchanges the HTTP client that they share for one that does neither.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextvars import copy_context
from typing import Any

import httpx2
from huggingface_hub import constants, get_session, set_client_factory
from huggingface_hub.errors import HfHubHTTPError

from hfpipe.core.hub_errors import NoAnswer, WebPage, asks_to_wait, is_short, spoken, trouble
from hfpipe.core.secrets import without_secrets

SILENCE = max(30.0, float(constants.HF_HUB_DOWNLOAD_TIMEOUT))  # seconds that one answer may take
SILENCE_OF_A_WRITE = 2 * SILENCE  # a commit is work
SHORTEST = 5.0  # seconds that it may take once the Hub has been silent for all that its patience allows
SLOWEST = 1000.0  # bytes per second; an answer that drips is none
READS = ("GET", "HEAD")
WAITS = (1.0, 3.0)  # seconds before a question that met a short trouble is asked again
BIG = 100_000  # bytes; how long the sending of more takes is for the network to say
PATIENCE = 2 * SILENCE  # seconds that all tries together may take, and that the Hub may ask to wait
# hf_xet has a client of its own, which tries for many minutes; these are its settings, where the user has none.
XET_TRIES = {"HF_XET_CLIENT_RETRY_MAX_DURATION": "10s"}
XET_READS = {"HF_XET_CLIENT_READ_TIMEOUT": "20s", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2"}


class Patience:
    """The time that this process waits for the Hub.

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
        """Notes that no answer came, and returns whether the patience is at its end."""
        self._failed = time.monotonic()
        self._mute.add(str(request.url))
        return self._since is not None and self._failed - self._since >= self.seconds - 1.0

    def note(self, request: httpx2.Request, trouble: str | None) -> None:
        """Keeps in words why a request failed; None for a request that did not.

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
        """Sends as httpx does, within the limits of the patience; a request that meets a short trouble is sent again.

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
                if wait is None or not is_short(error):
                    raise
            else:
                _patience.note(request, trouble(HfHubHTTPError("", response=response)) if response.is_error else None)
                if wait is None or not is_short(response):
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
    """Returns the result of a call; a call that takes longer is left behind in a thread of its own.

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


def last_trouble() -> str | None:
    """Returns `trouble` of the last request of this process: `datasets` does not say what made it give up."""
    return _patience.last
