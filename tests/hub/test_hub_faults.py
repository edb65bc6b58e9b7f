"""A push cannot lose work: every trouble with the Hub ends in one commit, or in one paragraph and one command."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from pushing import COMMIT, PLANTED, Plant, at_once, pushes

LFS, XET = {"xet": False}, {"xet": True}
LIMIT = {"RateLimit": '"api";r=0;t=900', "RateLimit_Policy": '"fixed window";"api";q=500;w=900'}
STORE = {"lfs": "PUT /lfs/", "xet": "POST /v1/xorbs"}  # where the weights go in each of the two pipelines


@pytest.mark.slow
@pytest.mark.long
def test_a_passing_trouble_is_overcome_by_one_commit(tmp_path: Path) -> None:
    cases: dict[str, tuple[Plant, dict[str, Any], dict[str, Any]]] = {
        "429": (lambda hub: hub.fail(COMMIT, 429, Retry_After="2"), LFS, {}),
        "412": (lambda hub: hub.fail(COMMIT, 412), LFS, {}),
        "500-on-create": (lambda hub: hub.fail("POST /api/repos/create", 500), LFS, {}),
        "create-lost": (lambda hub: hub.lose_reply("POST /api/repos/create"), XET, {}),
    }
    for pipeline, options in (("lfs", LFS), ("xet", XET)):
        store = STORE[pipeline]
        cases |= {
            f"503-{pipeline}": (lambda hub: hub.fail(COMMIT, 503), options, {}),
            f"dropped-{pipeline}": (lambda hub: hub.drop(COMMIT), options, {}),
            f"reply-lost-{pipeline}": (lambda hub: hub.lose_reply(COMMIT), options, {}),
            f"store-502-{pipeline}": (lambda hub, store=store: hub.fail(store, 502), options, {}),
            f"store-dropped-{pipeline}": (lambda hub, store=store: hub.drop(store), options, {}),
        }
    for name, pusher, done in at_once(tmp_path, cases):
        assert done.returncode == 0, (name, done)
        assert "has it now" in done.stdout, name
        assert pushes(pusher.hub) == 1, name
        assert "X-Amz-Signature=signed" not in done.stderr, name  # which the client shows, and opens the storage


@pytest.mark.slow
@pytest.mark.long
def test_a_lasting_trouble_ends_in_one_paragraph_and_the_one_command_that_finishes_it(tmp_path: Path) -> None:
    cases: dict[str, tuple[Plant, dict[str, Any], str]] = {
        "dropped": (lambda hub: hub.drop(COMMIT, times=4), XET, "connection to the Hub broke"),
        "409": (lambda hub: hub.fail(COMMIT, 409, times=4), XET, "changed by somebody else"),
        "503": (lambda hub: hub.fail(COMMIT, 503, times=4), LFS, "answered 503"),
        "429": (
            lambda hub: hub.fail(COMMIT, 429, Retry_After="3600"),
            XET,
            "the Hub asks to wait 60 minutes before another try (429).",
        ),
        "429-by-limit": (
            lambda hub: hub.fail("/whoami", 429, **LIMIT),
            LFS,
            "the Hub asks to wait 15 minutes before another try (429).",
        ),
        "429-by-storage": (lambda hub: hub.fail("PUT /lfs/", 429, Retry_After="3600"), LFS, "asks to wait 60 minutes"),
        "429-by-xet": (lambda hub: hub.fail("xet-write", 429, Retry_After="3600"), XET, "asks to wait 60 minutes"),
        "403-by-storage": (
            lambda hub: hub.fail("PUT /lfs/", 403, times=4),
            LFS,
            "(403), which is not about your token",
        ),
        "503-by-storage": (lambda hub: hub.fail("PUT /lfs/", 503, times=99), LFS, "answered 503"),
        "503-by-xet": (lambda hub: hub.fail("/v1/xorbs", 503, times=99), XET, "answered 503"),
        "409-by-storage": (lambda hub: hub.fail("PUT /lfs/", 409, times=4), LFS, "the storage of the Hub (127.0.0.1)"),
        "create-409": (lambda hub: hub.fail("/repos/create", 409, times=4), LFS, "is not the Hub (KeyError: 'url')"),
        "403-by-xet": (lambda hub: hub.fail("/v1/xorbs", 403, times=4), XET, "(403), which is not about your token"),
        "page-by-storage": (lambda hub: hub.hide("PUT /lfs/", times=4), LFS, "a web page came in place of the answer"),
        "login-page": (lambda hub: hub.hide(COMMIT, times=4), LFS, "a web page came in place of the answer of the Hub"),
        "no-room": (
            lambda hub: setattr(hub, "full", "No storage is left" + f" {hub.token}" * 20),
            LFS,
            "No storage is left",
        ),
        "unreachable": (lambda hub: hub.http.server_close(), LFS, "the Hub cannot be reached"),
        "no-token": (lambda hub: None, {"token": None}, "hf auth login"),
        "read-only": (lambda hub: None, {"token": HubServer.read_token}, "may only read"),
        "unknown-token": (lambda hub: None, {"token": PLANTED}, "does not accept the token (401)"),
        "401": (lambda hub: hub.fail(COMMIT, 401), LFS, "does not accept the token (401)"),
        "403": (lambda hub: hub.fail("/preupload/", 403), LFS, "(403). The Hub says: planted 403. Use a token"),
        "403-from-xet": (lambda hub: hub.fail("xet-write-token", 403), XET, "may not write to me/toy (403)"),
        "404": (lambda hub: hub.fail(COMMIT, 404), XET, "does not find me/toy"),
    }
    with_arguments = {name: (plant, options, {}) for name, (plant, options, _) in cases.items()}
    for name, pusher, failed in at_once(tmp_path, with_arguments):
        assert failed.returncode == 4, (name, failed)
        message = failed.stdout.partition("ERROR ")[2]
        assert cases[name][2] in message, name
        assert "whole in run/push/adapter" in message, name
        assert HubServer.token[:8] not in message.replace("hf_***", ""), name  # nor a part of it
        assert message.strip().endswith("hfpipe push run"), name
        assert (pusher.folder / "run/push/adapter/adapter_model.safetensors").is_file(), name
        assert "Traceback" not in failed.stderr, name
        for store in STORE.values():
            assert sum(line.startswith(store) for line in pusher.hub.requests) <= 8, name  # half a minute
        if name in (
            "401",
            "409",
            "no-room",
        ):  # the command that the message gives finishes it, and sends no weights again
            pusher.hub.faults.clear()
            pusher.hub.full = None
            sent = len(pusher.hub.requests)
            assert pusher().returncode == 0, name
            assert pushes(pusher.hub) == 1, name
            again = [line for line in pusher.hub.requests[sent:] if any(place in line for place in STORE.values())]
            assert bool(again) == (name == "no-room"), name


@pytest.mark.slow
def test_a_stalled_hub_meets_the_deadline(tmp_path: Path) -> None:
    arguments = {"deadline_seconds": 4.0, "what": "adapter"}
    cases = {
        "commit": (lambda hub: hub.stall(COMMIT, times=99), {}, arguments),
        "lfs": (lambda hub: hub.stall("PUT /lfs/", times=99), LFS, arguments),
        "xet": (lambda hub: hub.stall("/v1/xorbs", times=99), XET, arguments),
    }
    started = time.monotonic()
    for name, pusher, failed in at_once(tmp_path, cases):
        assert failed.returncode == 4, (name, failed)
        assert "not done after 4 seconds" in failed.stdout, name
        assert failed.stdout.strip().endswith("hfpipe push run --what adapter"), name
        assert pushes(pusher.hub) == 0, name
    assert time.monotonic() - started < 20
