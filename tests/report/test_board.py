"""The board by HTTP: runs, curves, scores; names that would be HTML; nothing outside of the folder, nothing written."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny

from hfpipe.cli import main
from hfpipe.report.board import Board
from hfpipe.report.plots import undominated
from hfpipe.scores.scorecard import Score, write_scorecard

HOSTILE = "<img src=x onerror=alert(1)>&quot"


def add_run(root: Path, name: str, value: float | None) -> Path:
    """A run folder without models; scored after its first stage where a value is given."""
    folder = root / name
    (folder / "stages" / "prose").mkdir(parents=True)
    tiny.write(folder, tiny.recipe(folder, merge=False), "recipe.yaml")
    log(folder, [7.0, 6.0, 5.0])
    if value is not None:
        scores = [
            Score(stage, "general", "bits_per_byte", at, 0.01, 300, False, low=at - 0.02, high=at + 0.02)
            for stage, at in (("base", 4.0), ("prose", value))
        ]
        write_scorecard(scores, folder / "scorecard.json")
    return folder


def log(folder: Path, losses: list[float]) -> None:
    always = {"max_steps": 200, "seconds_per_step": 0.1}
    rows = [{"step": 10 * n, "loss": loss, **always} for n, loss in enumerate(losses, 1)]
    (folder / "stages" / "prose" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Asked:
    """Asks a board for pages."""

    def __init__(self, board: Board) -> None:
        self.port = board.server_port

    def __call__(self, path: str, method: str = "GET", host: str | None = None) -> tuple[int, str, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request(method, path, headers={"Host": host or f"127.0.0.1:{self.port}"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), dict(answer.getheaders())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    root.mkdir()
    (tmp_path / "secret.txt").write_text("not for the board")
    return root


@pytest.fixture
def ask(root: Path) -> Iterator[Asked]:
    with Board(root, 0) as board:
        thread = threading.Thread(target=board.serve_forever, daemon=True)
        thread.start()
        yield Asked(board)
        board.shutdown()
        thread.join()


def elements(page: str) -> list[tuple[str, dict[str, str | None]]]:
    found: list[tuple[str, dict[str, str | None]]] = []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))  # type: ignore[method-assign]
    reader.feed(page)
    return found


def test_runs_their_scores_and_their_pages(root: Path, ask: Asked) -> None:
    add_run(root, "one", 2.5)
    add_run(root, "two", 2.25)
    status, page, headers = ask("/")
    assert status == 200
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    for text in ("2.5000", "2.2500", "bits_per_byte\N{NO-BREAK SPACE}↓", "training", "waiting", "30 of 200"):
        assert text in page
    links = [words["href"] for tag, words in elements(page) if tag == "a"]
    assert sorted(map(str, links)) == ["/run/one", "/run/two"]
    status, page, _ = ask("/run/one")
    assert status == 200
    assert "<svg" in page
    assert "Gained" in page
    assert "2.5000" in page


def test_runs_are_compared_by_their_losses_and_on_the_front(root: Path, ask: Asked) -> None:
    for name, general, task in (("small", 4.1, 3.0), ("large", 4.4, 2.0), ("worse", 4.5, 2.5)):
        folder = add_run(root, name, None)
        scores = [
            Score(stage, suite, "bits_per_byte", at, 0.01, 300, False, low=at - 0.02, high=at + 0.02)
            for stage, values in (("base", (4.0, 4.0)), ("prose", (general, task)))
            for suite, at in zip(("general", "task"), values, strict=True)
        ]
        write_scorecard(scores, folder / "scorecard.json")
    log(root / "large", [7.0, 6.0, 4.0])
    add_run(root, "other", 2.5)
    (root / "other" / "stages" / "prose" / "log.jsonl").unlink()
    _, page, _ = ask("/")
    told = {str(words["aria-label"]) for tag, words in elements(page) if tag == "svg"}
    [losses] = [text for text in told if text.startswith("Training losses of stage prose")]
    assert "large 4.0000 at step 30" in losses
    assert "other" not in losses
    [front] = [text for text in told if text.startswith("Gain against forgetting")]
    assert "large: gain 50.0%, forgetting 10.0%" in front
    assert "small: gain 25.0%, forgetting 2.5%" in front
    assert "other" not in front
    assert undominated([(0.1, 0.5), (0.025, 0.25), (0.125, 0.375)]) == [(0.025, 0.25), (0.1, 0.5)]


def test_a_run_that_goes_on_is_seen(root: Path, ask: Asked) -> None:
    folder = add_run(root, "live", None)
    assert "5.0000" in ask("/")[1]
    assert "5.0000 last" in ask("/run/live")[1]
    log(folder, [7.0, 6.0, 5.0, 4.5])
    assert "4.5000" in ask("/")[1]
    assert "4.5000 last" in ask("/run/live")[1]


def test_hostile_names_and_broken_runs_are_text(root: Path, ask: Asked) -> None:
    add_run(root, HOSTILE, 2.5)
    broken = add_run(root, "broken", 2.5)
    (broken / "recipe.yaml").write_text(f"name: {HOSTILE!r}\nstages: 3")
    half = add_run(root, "half", 2.5)
    (half / "scorecard.json").write_text('[{"stage": "<script>alert(1)</script>"')
    _, page, _ = ask("/")
    assert {tag for tag, _ in elements(page)}.isdisjoint({"img", "script", "iframe", "object"})
    assert page.count("cannot be read") == 2
    links = [str(words["href"]) for tag, words in elements(page) if tag == "a"]
    assert len(links) == 3
    for link in links:
        status, page, _ = ask(link)
        assert status == 200
        assert {tag for tag, _ in elements(page)}.isdisjoint({"img", "script", "iframe", "object"})


def test_only_runs_are_answered_and_only_to_this_machine(root: Path, ask: Asked) -> None:
    add_run(root, "one", 2.5)
    for path in ("/run/..", "/run/..%2Fsecret.txt", "/../secret.txt", "/run/one/recipe.yaml", "/secret.txt", "/run/"):
        status, page, _ = ask(path)
        assert (status, "not for the board" in page) == (404, False), path
    assert ask("/", host="evil.example")[0] == 403
    assert ask("/", host="localhost:1")[0] == 200
    assert ask("/", "POST")[0] == 501
    assert ask("/", "HEAD")[1] == ""


def test_nothing_is_written(root: Path, ask: Asked) -> None:
    add_run(root, "one", 2.5)
    before = {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}
    ask("/")
    ask("/run/one")
    assert {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))} == before


def test_one_run_can_be_shown_and_a_folder_that_is_none_is_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Board(add_run(root, "one", 2.5), 0) as board:
        assert list(board.runs()) == ["one"]
        assert ">one</a>" in str(board.page("/"))
        assert "1 run. The page" in str(board.page("/"))
        assert "Gained" in str(board.page("/run/one"))
        assert main(["board", str(root), "--port", str(board.server_port)]) == 4
        assert "--port" in capsys.readouterr().err
    assert main(["board", str(root / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
