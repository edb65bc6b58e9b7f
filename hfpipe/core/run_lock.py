"""One hfpipe at a time in a run folder: a lock that says who holds it, and that the dead do not hold.

The lock is the kernel's (`flock`), which ends with its process however that ends, on network file systems that share
such locks too. Some do not share them between machines: so the holder touches the file every `HEARTBEAT` seconds, and a
lock of another machine counts as left behind only when it was not touched for `SILENCE`, by the clock of the file
system. Imports nothing heavy: a second run is refused at once.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from hfpipe.core.errors import MachineError
from hfpipe.core.secrets import without_secrets

LOCK = "run.lock"
HEARTBEAT, SILENCE = 15.0, 300.0
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps every other hfpipe out of a run folder until the block ends. Ranks other than the main one do nothing.

    Args:
        folder: The run folder; made where it is not there, and removed again where it is left empty.

    Raises:
        MachineError: Another process works there, or nothing can be written there.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path = folder / LOCK
    require_output(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = _locked(path)
    over = threading.Event()
    threading.Thread(target=_beat, args=(file, over), name="run lock", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        with suppress(OSError):
            path.unlink()
        os.close(file)
        with suppress(OSError):
            folder.rmdir()


def require_output(folder: Path) -> None:
    """Refuses a run folder that cannot be written to.

    Raises:
        MachineError: It, or a folder above it, is a file; its name is too long; or this account may not write there.
    """
    named = f"output_dir: {str(folder)[:100]}"
    try:
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    except (OSError, ValueError) as error:  # a name that is too long, or has a zero byte
        raise MachineError(f"{named} cannot be the name of a folder ({_reason(error)}). Take another name.") from error
    if not there.is_dir():
        raise MachineError(f"{named}: {there} is a file, and the run needs a folder. Take another name.")
    probe = there / f".hfpipe-{os.getpid()}"
    try:  # a read-only file system lets the superuser through `os.access`
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MachineError(
            f"{named}: nothing can be written into {there} ({_reason(error)}). Take another folder, or ask for the "
            "right to write."
        ) from error


def _reason(error: OSError | ValueError) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def _locked(path: Path) -> int:
    """The open lock file, locked, with this process in it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        shared = True  # among the processes of this machine
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                _refuse(path, _holder(file), None, file)
            shared = False
        try:
            if os.fstat(file).st_ino != path.stat().st_ino:  # its holder has removed it meanwhile
                os.close(file)
                continue
        except FileNotFoundError:
            os.close(file)
            continue
        _require_left(path, file, shared)
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(_myself()).encode(), 0)
        os.fsync(file)
        os.register_at_fork(after_in_child=partial(_close, file))
        return file


def _require_left(path: Path, file: int, shared: bool) -> None:
    """Refuses a lock whose holder may be alive though this process could lock the file."""
    holder = _holder(file)
    if not holder:
        return
    if holder.get("boot") == _boot():
        if shared or not _is_alive(holder):
            return
        _refuse(path, holder, None, file)
    silent = _now(path.parent) - os.fstat(file).st_mtime
    if silent < SILENCE:
        _refuse(path, holder, silent, file)


def _refuse(path: Path, holder: dict[str, Any], silent: float | None, file: int) -> None:
    os.close(file)
    who = f"process {holder.get('pid')} on {holder.get('host')} ({holder.get('command')}, since {holder.get('since')})"
    if silent is None:
        remedy = f"stop it (kill {holder.get('pid')}, which saves a checkpoint)" if holder else "stop it"
    else:
        remedy = (
            f"or, if that machine is gone, run again in {max(1, round(SILENCE - silent))} s (it gave a sign of life "
            f"{max(0, round(silent))} s ago), or delete {path}"
        )
    raise MachineError(
        f"another hfpipe works in {path.parent}: {who if holder else 'a process that is just starting'}. Two would "
        f"destroy each other's work. Wait for its end, {remedy}; or give this run a folder of its own (`output_dir`)."
    )


def _holder(file: int) -> dict[str, Any]:
    """Reads the holder from the lock file; returns nothing where it is empty or cannot be read."""
    try:
        found = json.loads(os.pread(file, 1 << 16, 0))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "boot": _boot(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": without_secrets(" ".join(["hfpipe", *sys.argv[1:]]))[:300],
    }


def _boot() -> str:
    """Identifies the running kernel: processes of one share its locks, in containers too."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _start_of(pid: int) -> str | None:
    """The start of a process as the kernel writes it; None without such a process. Others use its number later."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def _is_alive(holder: dict[str, Any]) -> bool:
    started = _start_of(int(holder.get("pid") or 0))
    return started is not None and started == holder.get("started")


def _now(folder: Path) -> float:
    """The time by the clock of the file system, which may be another machine's."""
    probe = folder / f".{LOCK}.{os.getpid()}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _beat(file: int, over: threading.Event) -> None:
    while not over.wait(HEARTBEAT):
        with suppress(OSError):
            os.utime(file)


def _close(file: int) -> None:
    """Lets go of the lock in a forked process, which must not keep it after its parent."""
    with suppress(OSError):
        os.close(file)
