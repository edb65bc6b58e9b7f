"""The server: its repositories, tokens and planted faults."""

from __future__ import annotations

import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path

from hub_server.answers import Handler
from hub_server.faults import Fault
from hub_server.repos import Commit, File, Repo, is_large
from hub_server.xet import XetStore

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class HubServer:
    """The Hub on a free port of this machine, in its own thread; use it in a `with` block.

    Attributes:
        url: what `HF_ENDPOINT` must be.
        token: may write in the namespaces `user` and `organisation`.
        read_token: may only read.
        team_token: a fine-grained one, which may write in `organisation` alone.
        requests: every request so far, as `METHOD /path`, in order.
        tells_oids: whether a client is told, before it uploads, which files have not changed.
        page_size: entries in one page of a file listing.
        full: why no large file is taken any more; None where there is room.
        part_size: large files above this many bytes are asked for in parts (LFS multipart); None for never.
    """

    user, organisation = "me", "team"
    token, read_token = "hf_TestTokenThatMayWrite0000", "hf_TestTokenThatMayRead00000"
    team_token = "hf_TestTokenOfTheTeam0000000"

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.page_size = 1000
        self.tells_oids = True
        self.full: str | None = None
        self.part_size: int | None = None
        self.lock = threading.RLock()
        self.stopping = threading.Event()
        self._listen(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.xet = XetStore(self.url, self.blobs)

    def _listen(self, address: tuple[str, int]) -> None:
        self.http = ThreadingHTTPServer(address, type("BoundHandler", (Handler,), {"hub": self}))
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stopping.set()  # wakes the requests that are stalled
        self.http.shutdown()
        self.http.server_close()

    def env(self, home: Path, *, token: str | None = "", xet: bool = True) -> dict[str, str]:
        """Returns the variables that a client process needs in its environment.

        Args:
            home: the client's own `HF_HOME`, so that no cache or login of this machine is used.
            token: the write token by default; None for none.
            xet: which of the two upload pipelines.
        """
        env = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "0" if xet else "1"}
        env |= {"HF_TOKEN": self.token if token == "" else token or "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        env |= {"HF_XET_XORB_COMPRESSION_POLICY": "none"}  # the standard library has no LZ4
        env |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
        return env | {"HF_EVALUATE_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}

    def add_repo(self, kind: str, id: str, files: dict[str, bytes | Path] | None = None, private: bool = False) -> Repo:
        """A repository (`model`, `dataset` or `space`) with one commit that holds `files`."""
        repo = self.repos[kind, id] = Repo(kind, id, private)
        contents = {".gitattributes": GITATTRIBUTES} | {
            path: source.read_bytes() if isinstance(source, Path) else source for path, source in (files or {}).items()
        }
        repo.commit("main", "initial commit", {path: self._file(path, data) for path, data in contents.items()})
        return repo

    def _file(self, path: str, content: bytes) -> File:
        file = File(content, large=is_large(path, len(content), content[:512]))
        if file.large:
            self.blobs[file.sha256] = content
        return file

    def files(self, id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        return {path: file.content for path, file in self.repos[kind, id].at(revision).files.items()}

    def commits(self, id: str, kind: str = "model") -> list[Commit]:
        """Oldest first; the first is the one that made the repository."""
        return self.repos[kind, id].history

    def fail(self, match: str, status: int = 503, times: int = 1, **headers: str) -> None:
        """Refuse; `headers` go with the answer (`Retry_After="3"`)."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(match, "status", times, status=status, headers=named))

    def drop(self, match: str, times: int = 1) -> None:
        """Close the connection instead of answering."""
        self.faults.append(Fault(match, "drop", times))

    def hide(self, match: str, times: int = 1) -> None:
        """Answer with a web page, as a network does that asks for a login."""
        self.faults.append(Fault(match, "page", times))

    def stall(self, match: str, seconds: float = 3600.0, times: int = 1) -> None:
        """Keep the connection open and say nothing."""
        self.faults.append(Fault(match, "stall", times, seconds=seconds))

    def drip(self, match: str, times: int = 1) -> None:
        """Answer one byte a second, which no limit on a silence ends."""
        self.faults.append(Fault(match, "drip", times))

    def cut(self, match: str, times: int = 1) -> None:
        """Send half of the answer, then close the connection."""
        self.faults.append(Fault(match, "cut", times))

    def outage(self, seconds: float) -> None:
        """Restart: for this long nobody listens on the port, and connections that are open are closed unanswered."""
        down = Fault("", "drop", 1 << 30)
        self.faults.insert(0, down)
        address = self.http.server_address
        self.http.shutdown()
        self.http.server_close()
        time.sleep(seconds)
        self.faults.remove(down)
        self._listen(address)

    def lose_reply(self, match: str, times: int = 1) -> None:
        """Do what is asked, then close the connection instead of answering."""
        self.faults.append(Fault(match, "lose", times))

    def next_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.match in request:
                    fault.times -= 1
                    return fault
        return None
