"""Every question to the Hub has an end, and what ends it is said; a short trouble is overcome."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

PATIENCE = 3.0  # seconds
ASKED = [
    *("blips info", "blips tree", "blips file"),
    *("asks-to-wait info", "asks-to-wait tree", "asks-to-wait file"),
    *("stalls tree", "drips info", "drips file"),
]
# One program for all, as the clients take seconds to import.
PROGRAM = """
import json, sys, time
from hfpipe.core.http import Patience, limit_waiting
from hfpipe.core.hub_errors import trouble

limit_waiting(Patience(float(sys.argv[1])))
from huggingface_hub import HfApi, hf_hub_download

questions = {
    "info": lambda id: HfApi().model_info(id).id,
    "tree": lambda id: [file.path for file in HfApi().list_repo_tree(id)],
    "file": lambda id: len(open(hf_hub_download(id, "big.safetensors"), "rb").read()),
}
for id, name in (asked.split() for asked in sys.argv[2:]):
    begun = time.monotonic()
    try:
        found = questions[name](f"me/{id}")
    except Exception as error:
        found = trouble(error) or repr(error)
    print(json.dumps([found, time.monotonic() - begun]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.long
def test_no_question_is_waited_for_longer_than_the_patience(hub: HubServer, tmp_path: Path) -> None:
    for name in ("blips", "asks-to-wait", "stalls", "drips"):
        hub.add_repo("model", f"me/{name}", {"big.safetensors": bytes(300_000)})
    for place in ("/api/models/me/blips", "GET /me/blips/resolve"):  # once each
        hub.fail(place, 503)
        hub.drop(place)
        hub.cut("GET /me/blips/resolve")
    hub.fail("me/asks-to-wait", 429, times=99, Retry_After="3600")
    hub.stall("me/stalls", times=99)
    hub.drip("me/drips", times=99)
    environment = os.environ | hub.env(tmp_path, xet=False) | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROGRAM, str(PATIENCE), *ASKED]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=180)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(ASKED), done.stderr
    found = dict(zip(ASKED, answers, strict=True))
    assert found["blips info"][0] == "me/blips"
    assert "big.safetensors" in found["blips tree"][0]
    assert found["blips file"][0] == 300_000
    for asked, (words, seconds) in found.items():
        if asked.startswith("asks-to-wait"):
            assert words == "the Hub asks to wait 60 minutes before another try (429).", asked
            assert seconds < PATIENCE, asked
        if asked.startswith(("stalls", "drips")):
            assert words.startswith("the Hub has not answered for 3 seconds. Try again later"), (asked, words)
            assert seconds < 3 * PATIENCE + 8, asked
