"""Signs of life of the ranks, beside their collective calls, so that a lost rank or host ends the others soon.

A collective call whose peer is lost waits for minutes (gloo: 16, until the kernel gives the connection up; NCCL: until
`ddp_timeout`). So every rank writes a sign of life into the store by which the ranks found each other, in a thread.
Rank 0 looks at all signs and names who is silent; the others look at rank 0. A second thread ends the process where the
store itself cannot be reached. Ranks that wait for a long piece of work of one of them wait here too, and not in a
collective call. Imports nothing heavy: the store is given.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from hfpipe.core import display, ending
from hfpipe.core.errors import LostRank, UserError
from hfpipe.core.secrets import without_secrets

LOST_AFTER = 60.0  # seconds in which every rank ends once one is lost
FAILED, LOST, LEFT = "hfpipe/failed", "hfpipe/lost", "left"


class _State:
    """This rank among its peers; written by the main thread and by the two that watch."""

    def __init__(self) -> None:
        self.store: Any = None
        self.rank, self.count, self.lost_after = 0, 1, LOST_AFTER
        self.meetings = 0  # that this rank has come to
        self.reached = 0.0  # when the store last answered
        self.kept = False  # the run can be continued from a checkpoint
        self.over = threading.Event()

    @property
    def beat(self) -> float:
        """Seconds between two signs of life."""
        return min(self.lost_after / 20, 3.0)

    @property
    def silence(self) -> float:
        """Seconds after which a rank that gives no sign counts as lost: what is left is for telling the others."""
        return self.lost_after * 0.7


_state = _State()


def join(store: Any, rank: int, count: int, lost_after: float) -> None:
    """Begins to give signs of life, and to look for those of the others. Later calls do nothing.

    Args:
        store: What the ranks found each other by (`torch.distributed.Store`).
        rank: The number of this process.
        count: How many ranks there are.
        lost_after: Seconds within which every rank ends once one is lost.
    """
    if _state.store is not None or count == 1:
        return
    _state.store, _state.rank, _state.count, _state.lost_after = store, rank, count, lost_after
    _state.reached = time.monotonic()
    store.set(f"hfpipe/process/{rank}", f"{_boot()} {os.getpid()}")
    store.set(_sign(rank), "0")
    threading.Thread(target=_beat, args=(store.clone(),), name="sign of life", daemon=True).start()
    threading.Thread(target=_watch_store, name="watch of the store", daemon=True).start()


def has_joined() -> bool:
    """Says whether this process is one of several ranks that have found each other."""
    return _state.store is not None


def keep() -> None:
    """Notes that a checkpoint is there: from now on a lost rank ends the run with exit code 75."""
    _state.kept = True


def meet() -> None:
    """Waits until every rank is here, however long one of them works, as long as all are alive.

    Raises:
        LostRank: A rank has failed, or is gone.
    """
    if _state.store is None:
        return
    store, key = _state.store, f"hfpipe/meeting/{_state.meetings}"
    if store.add(f"{key}/here", 1) == _state.count:
        store.set(f"{key}/all", "1")
        for word in ("here", "all"):  # everybody has left the one before the last
            store.delete_key(f"hfpipe/meeting/{_state.meetings - 2}/{word}")
    _state.meetings += 1
    pause, longest, looked = 0.0005, 0.05 * max(1.0, _state.count / 64), time.monotonic()
    while not store.check([f"{key}/all"]):
        time.sleep(pause)
        pause = min(pause * 1.5, longest)
        if time.monotonic() - looked > 1.0:
            looked = time.monotonic()
            if found := _known_loss(store):
                raise found


def fail(error: Exception, text: str, code: int) -> bool:
    """Tells the other ranks of an error that ends this one, and returns whether it has to be said here.

    What every rank finds is said by rank 0 alone, and the loss of a rank once on each machine.
    """
    if _state.store is None:
        return os.environ.get("RANK", "0") == "0"
    _state.over.set()
    if getattr(error, "of_all_ranks", False):
        return _state.rank == 0
    with suppress(Exception):
        told = json.dumps({"rank": _state.rank, "text": text, "code": code})
        _state.store.compare_set(FAILED, "", told)
        _state.store.set(f"{FAILED}/{_state.rank}", text)
        if _state.rank and not isinstance(error, LostRank):
            return not _is_said_by_main(text)
        if _state.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _let_others_hear()
    return _state.rank == 0 or not isinstance(error, LostRank) or _is_first_here()


def _let_others_hear() -> None:
    """Stays a moment where the store lives in the process of rank 0 and ends with it."""
    until = time.monotonic() + 2
    others = [f"{FAILED}/{number}" for number in range(1, _state.count)]
    while time.monotonic() < until and not _state.store.check(others):
        time.sleep(0.05)
    time.sleep(0.3)


def _is_first_here() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _is_said_by_main(text: str) -> bool:
    """Gives rank 0 a moment to come upon the same error, as every rank reads the recipe and the data alike."""
    for _ in range(20):
        if _state.store.check([f"{FAILED}/0"]):
            return text in _state.store.get(f"{FAILED}/0").decode()
        time.sleep(0.1)
    return False


def leave(*, last: bool = True) -> None:
    """Ends the signs of life without alarm.

    Args:
        last: Rank 0 waits for the others, as the store may live in its process.
    """
    if _state.store is None or _state.over.is_set():
        return
    _state.over.set()
    with suppress(Exception):
        _state.store.set(_sign(_state.rank), LEFT)
        until = time.monotonic() + _state.lost_after
        others = [number for number in range(1, _state.count)] if last and _state.rank == 0 else []
        while time.monotonic() < until and any(_state.store.get(_sign(number)) != LEFT.encode() for number in others):
            time.sleep(0.05)


def lost(why: str) -> LostRank:
    """Returns the error of a collective call that has failed, with the rank that is gone where that can be found."""
    until = time.monotonic() + 4 * _state.beat
    with suppress(Exception):
        before = _signs(_state.store)
        while time.monotonic() < until:
            if found := _known_loss(_state.store):
                return found
            time.sleep(0.1)
        now = _signs(_state.store)
        if silent := [number for number, sign in now.items() if sign == before[number] and number != _state.rank]:
            return _gone(silent, why)
    return _gone([], why)


def is_lost() -> LostRank | None:
    """Returns the error of a rank that is known to be gone; None where none is."""
    with suppress(Exception):
        return _known_loss(_state.store) if _state.store is not None else None
    return None


def _sign(rank: int) -> str:
    return f"hfpipe/alive/{rank}"


def _signs(store: Any) -> dict[int, bytes]:
    """The signs of life of the ranks that have given one."""
    there = [number for number in range(_state.count) if store.check([_sign(number)])]
    return dict(zip(there, store.multi_get([_sign(number) for number in there]), strict=True))


def _known_loss(store: Any) -> LostRank | None:
    """Returns the error where a rank has failed, is silent, or where its process on this machine has ended."""
    if store.check([FAILED]):
        found = json.loads(store.get(FAILED))
        if found["rank"] != _state.rank:
            return _failed(found)
    if store.check([LOST]):
        return _gone(json.loads(store.get(LOST)), "it gives no sign of life")
    for number in _on_this_machine():
        key = f"hfpipe/process/{number}"
        if number == _state.rank or not store.check([key]):
            continue
        boot, pid = store.get(key).decode().split()
        if boot == _boot() and not _is_alive(int(pid)) and store.get(_sign(number)) != LEFT.encode():
            return _gone([number], "its process has ended")
    return None


def _on_this_machine() -> range:
    """The ranks that the launcher says are on this machine; all where it does not say."""
    try:
        first = _state.rank - int(os.environ["LOCAL_RANK"])
        return range(first, first + int(os.environ["LOCAL_WORLD_SIZE"]))
    except (KeyError, ValueError):
        return range(_state.count)


def _boot() -> str:
    """Identifies a machine, and on it the processes that see each other."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return not Path("/proc/self/stat").exists()


def _gone(numbers: list[int], why: str) -> LostRank:
    one = f"rank {numbers[0]} is" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))} are"
    who = one if numbers else "another rank is"
    return LostRank(
        f"{who} gone ({why.rstrip('.')}). What was finished stays: run again to continue.", 75 if _state.kept else 4
    )


def _failed(found: dict[str, Any]) -> LostRank:
    return LostRank(f"rank {found['rank']} has failed: {found['text']}", found["code"])


def _beat(store: Any) -> None:
    """Gives signs of life, and ends this process where a rank is lost or has failed."""
    number, seen = 0, dict.fromkeys(range(_state.count), (b"", time.monotonic()))
    while not _state.over.wait(_state.beat):
        number += 1
        try:
            store.set(_sign(_state.rank), str(number))
            found = _judged(store, seen) or _known_loss(store)
        except Exception as error:  # its server has ended
            found = _gone([0] if _state.rank else [], str(error).split("\n")[0][:200])
        if found:
            _end(found)
            return
        _state.reached = time.monotonic()


def _judged(store: Any, seen: dict[int, tuple[bytes, float]]) -> LostRank | None:
    """Looks whose sign of life has not changed for too long: rank 0 at all ranks, the others at rank 0.

    Args:
        store: Where the signs are.
        seen: The last sign of each rank, and when it was new; changed here.
    """
    now = time.monotonic()
    if now - _state.reached > 4 * _state.beat:  # this process itself was held: nobody can be judged by its clock
        seen.update({other: (last, now) for other, (last, _) in seen.items()})
    signs = _signs(store) if _state.rank == 0 else {0: store.get(_sign(0))}
    for other, (last, _) in seen.items():
        if signs.get(other, b"") != last:
            seen[other] = (signs[other], now)
    watched = [number for number in (seen if _state.rank == 0 else (0,)) if number != _state.rank]
    silent = [other for other in watched if seen[other][0] != LEFT.encode() and now - seen[other][1] > _state.silence]
    if not silent:
        return None
    if _state.rank == 0:
        store.set(LOST, json.dumps(silent))
    return _gone(silent, f"no sign of life for {_state.silence:.0f} s")


def _watch_store() -> None:
    """Ends this process where the thread that gives the signs waits for a store that does not answer."""
    last = time.monotonic()
    while not _state.over.wait(_state.beat):
        now = time.monotonic()
        if now - last > 4 * _state.beat:
            _state.reached = now
        last = now
        if now - _state.reached > _state.silence + 2 * _state.beat:
            _end(_gone([0], "the machine of rank 0 cannot be reached"))
            return


def _end(error: LostRank) -> None:
    """Ends this process, whose main thread may wait for ever in a collective call, unless it is ending by itself."""
    if _state.over.wait(2 * _state.beat):
        return
    _state.over.set()
    display.leave()
    if _is_first_here():
        print(f"hfpipe: {without_secrets(str(error))}", file=sys.stderr, flush=True)
    ending.record(error.exit_code)
    os._exit(error.exit_code)


def of_all(error: UserError) -> UserError:
    """Marks an error that every rank has."""
    error.of_all_ranks = True  # type: ignore[attr-defined]
    return error
