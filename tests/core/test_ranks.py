"""Ranks whose work takes unequally long: they find each other at short intervals, and an error of one reaches all."""

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from time import sleep
from typing import Any

import pytest

from hfpipe.core import ranks
from hfpipe.core.errors import DataError, Unreachable

RANKS = 3


@pytest.fixture
def on_each(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Callable[[], Any]]], tuple[list[Any], int]]:
    """Runs one piece of work on each of three ranks, which are threads here; what came of it, and the exchanges."""
    told: dict[int, Any] = {}
    exchanges: list[int] = []
    barrier = Barrier(RANKS, timeout=20)

    def gather(value: Any) -> list[Any]:
        exchanges.append(1)
        told[barrier.wait()] = value  # the place is another each time: ranks have no order here
        barrier.wait()
        found = list(told.values())
        barrier.wait()
        return found

    monkeypatch.setattr(ranks, "gather", gather)
    monkeypatch.setattr(ranks, "ranks", lambda: RANKS)
    monkeypatch.setattr(ranks, "EXCHANGE_SECONDS", 0.05)

    def run(works: list[Callable[[], Any]]) -> tuple[list[Any], int]:
        def result(work: Callable[[], Any]) -> Any:
            try:
                return sorted(ranks.each(work))
            except DataError as error:
                return str(error)

        with ThreadPoolExecutor(RANKS) as pool:
            return list(pool.map(result, works)), len(exchanges) // RANKS

    return run


def test_all_wait_for_the_slowest_and_learn_what_each_found(on_each: Any) -> None:
    def slow() -> int:
        sleep(0.3)
        return 2

    found, exchanges = on_each([lambda: 0, lambda: 1, slow])
    assert found == [[0, 1, 2]] * RANKS
    assert exchanges > 2, "nobody waits in one call until the slowest is done"


def test_an_error_of_one_ends_all(on_each: Any) -> None:
    def bad() -> int:
        raise DataError("row 7 is bad")

    assert on_each([lambda: sleep(5), bad, lambda: 1])[0] == ["row 7 is bad"] * RANKS


def test_what_ranks_tell_each_other_survives_the_way() -> None:
    error = pickle.loads(pickle.dumps(Unreachable("no answer", "503")))
    assert (str(error), error.why) == ("no answer", "503")
