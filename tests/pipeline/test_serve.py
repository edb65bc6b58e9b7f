"""`hfpipe serve`: a client of the openai package gets the answer of plain transformers; refusals before any loading."""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import talking
import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfpipe.cli import main

pytestmark = pytest.mark.slow

TURNS = [{"role": "user", "content": "3: the cow?"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    assert main(["run", str(tiny.write(folder, talking.recipe(folder)))]) == 0
    return folder / "run"


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


@pytest.fixture
def served(run: Path) -> Iterator[tuple[int, str, subprocess.Popen]]:
    """The port of a server of the run, the name of its model, and its process."""
    assert main(["merge", str(run)]) == 0
    port = free_port()
    process = tiny.start("serve", str(run), "--port", str(port))
    try:
        for _ in range(600):
            assert process.poll() is None, process.communicate()[0]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        yield port, str(run / "stages" / "chat" / "merged"), process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()


def test_an_adapter_is_merged_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(run)]) == 2
    assert f"Merge it first: hfpipe merge {run}" in capsys.readouterr().err


def test_a_client_of_the_protocol_gets_the_answer_of_the_model_and_of_chat(
    served: tuple[int, str, subprocess.Popen],
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    openai = pytest.importorskip("openai", reason="the extra serving is not installed")
    port, name, process = served
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == [name]
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
    inputs = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    plain = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answer = client.chat.completions.create(model=name, messages=TURNS, temperature=0, max_tokens=8)
    assert answer.choices[0].message.content.strip() == plain.strip()
    pieces = client.chat.completions.create(model=name, messages=TURNS, temperature=0, max_tokens=8, stream=True)
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    broken = "\N{REPLACEMENT CHARACTER} \n"  # half a character at the end, which a stream holds back
    assert said.strip(broken) == plain.strip(broken)
    monkeypatch.setattr("sys.stdin", io.StringIO(TURNS[0]["content"]))
    capsys.readouterr()
    assert main(["chat", str(run), "--set", "max_new_tokens=8"]) == 0
    assert capsys.readouterr().out.strip(broken) == plain.strip(broken)
    stops = json.loads((Path(name) / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.eos_token_id in (stops if isinstance(stops, list) else [stops]), "it would run on when served"
    begun = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert not [one for one in begun if one.is_running()]
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)


def test_a_port_that_is_taken_is_told(
    run: Path, served: tuple[int, str, subprocess.Popen], capsys: pytest.CaptureFixture[str]
) -> None:
    port, *_ = served
    assert main(["serve", str(run), "--port", str(port)]) == 4
    assert "is taken" in capsys.readouterr().err
