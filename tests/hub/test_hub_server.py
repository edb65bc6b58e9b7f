"""The test Hub itself, asked by the unmodified clients: what it answers is what they expect of the real one."""

from __future__ import annotations

import http.client
import io
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError


def run_client(hub: HubServer, home: Path, program: str, **options: Any) -> dict[str, Any]:
    """Runs a program in a process of its own and returns the JSON that it prints last."""
    env = os.environ | hub.env(home, **options) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=home, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


PUSH_AND_PULL = """
import json, pathlib
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

up = pathlib.Path("up")
(up / "sub").mkdir(parents=True)
(up / "README.md").write_text("---\\nlicense: mit\\n---\\nhello")
(up / "sub/a.safetensors").write_bytes(bytes(range(256)) * 1000)
(up / "b.safetensors").write_bytes(b"abc" * 70000)
api = HfApi()
api.create_repo("me/x", private=True)
api.create_repo("me/x", private=True, exist_ok=True)
api.upload_folder(repo_id="me/x", folder_path=up)
again = api.upload_folder(repo_id="me/x", folder_path=up)
down = pathlib.Path(snapshot_download("me/x"))
one = pathlib.Path(hf_hub_download("me/x", "sub/a.safetensors", revision=again.oid))
same = all((down / p.relative_to(up)).read_bytes() == p.read_bytes() for p in up.rglob("*") if p.is_file())
print(json.dumps({"same": same and one.read_bytes() == (up / "sub/a.safetensors").read_bytes(), "head": again.oid}))
"""


@pytest.mark.parametrize(("xet", "part_size"), [(True, None), (False, None), (False, 50_000)])
def test_what_is_pushed_comes_back(hub: HubServer, tmp_path: Path, xet: bool, part_size: int | None) -> None:
    hub.part_size = part_size
    hub.page_size = 2
    answer = run_client(hub, tmp_path, PUSH_AND_PULL, xet=xet)
    assert answer["same"]
    assert answer["head"] == hub.commits("me/x")[-1].oid
    assert len(hub.commits("me/x")) == 2  # the second push found nothing to do
    assert hub.files("me/x")["b.safetensors"] == b"abc" * 70000
    assert any("/v1/xorbs" in request for request in hub.requests) == xet
    assert any("/lfs/" in request for request in hub.requests) != xet


DATA_AND_METRICS = """
import json
import evaluate
from datasets import load_dataset

stream = load_dataset("HuggingFaceFW/fineweb", name="sample-10BT", split="train", streaming=True)
table = load_dataset("HuggingFaceFW/fineweb", name="default", split="train")
score = evaluate.load("accuracy").compute(predictions=[1, 0], references=[1, 1])
print(json.dumps({"shards": stream.num_shards, "ids": [row["id"] for row in stream], "table": table["id"][:]} | score))
"""
CARD = b"""---
configs:
- config_name: default
  data_files: [{split: train, path: "data/*/*"}]
- config_name: sample-10BT
  data_files: [{split: train, path: "sample/10BT/*"}]
---
"""
ACCURACY = b"""
import datasets
import evaluate
class Accuracy(evaluate.Metric):
    def _info(self):
        whole = datasets.Value("int32")
        features = datasets.Features({"predictions": whole, "references": whole})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)
    def _compute(self, predictions, references):
        return {"accuracy": sum(p == r for p, r in zip(predictions, references)) / len(references)}
"""


def shard(*ids: int) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": [f"document {i}" for i in ids], "id": list(ids)}), buffer)
    return buffer.getvalue()


@pytest.mark.slow
def test_datasets_streams_shards_by_name_and_evaluate_finds_its_space(hub: HubServer, tmp_path: Path) -> None:
    files = {"README.md": CARD, "sample/10BT/0.parquet": shard(0, 1, 2), "sample/10BT/1.parquet": shard(3, 4)}
    hub.add_repo("dataset", "HuggingFaceFW/fineweb", files | {"data/CC-MAIN-2024-10/0.parquet": shard(7, 8)})
    hub.add_repo("space", "evaluate-metric/accuracy", {"accuracy.py": ACCURACY})
    answer = run_client(hub, tmp_path, DATA_AND_METRICS, token=None)
    assert answer == {"shards": 2, "ids": [0, 1, 2, 3, 4], "table": [7, 8], "accuracy": 0.5}


def test_who_may_do_what(hub: HubServer) -> None:
    hub.add_repo("model", "me/secret", {"a.txt": b"a"}, private=True)
    owner, reader, nobody = (HfApi(hub.url, token=token) for token in (hub.token, hub.read_token, False))
    stranger = HfApi(hub.url, token="hf_unknown")
    assert owner.whoami()["auth"]["accessToken"]["role"] == "write"
    assert [f.path for f in reader.list_repo_tree("me/secret")] == [".gitattributes", "a.txt"]
    with pytest.raises(RepositoryNotFoundError) as refused:
        nobody.model_info("me/secret")
    assert refused.value.response.status_code == 401
    with pytest.raises(RepositoryNotFoundError) as refused:
        owner.model_info("me/absent")
    assert refused.value.response.status_code == 404
    for act, status in [
        (stranger.whoami, 401),
        (lambda: reader.create_repo("me/new"), 403),
        (lambda: owner.create_repo("others/new"), 403),
        (lambda: owner.create_repo("me/secret"), 409),
        (lambda: reader.upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id="me/secret"), 403),
    ]:
        with pytest.raises(HfHubHTTPError) as refused:
            act()
        assert refused.value.response.status_code == status
    assert list(hub.files("me/secret")) == [".gitattributes", "a.txt"]


def test_branches_tags_and_a_stale_parent(hub: HubServer) -> None:
    api = HfApi(hub.url, token=hub.token)
    hub.add_repo("model", "me/x", {"a.txt": b"a"})
    first = hub.commits("me/x")[-1].oid
    api.create_branch("me/x", branch="try/1")
    api.upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id="me/x", revision="try/1", parent_commit=first)
    api.create_tag("me/x", tag="v1", revision="try/1")
    assert "b.txt" in hub.files("me/x", "try/1")
    assert "b.txt" not in hub.files("me/x")
    assert api.model_info("me/x", revision="v1").sha == api.model_info("me/x", revision="try/1").sha != first
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(
            path_or_fileobj=b"c", path_in_repo="c.txt", repo_id="me/x", revision="try/1", parent_commit=first
        )
    with pytest.raises(RevisionNotFoundError):
        api.model_info("me/x", revision="absent")


def test_faults_on_demand(hub: HubServer) -> None:
    hub.add_repo("model", "me/x")

    def get(path: str = "/api/models/me/x") -> int:
        try:
            with urllib.request.urlopen(hub.url + path, timeout=5) as reply:
                return reply.status
        except urllib.error.HTTPError as error:
            return error.code

    hub.fail("GET /api/models", status=503, times=2)
    assert [get(), get("/api/whoami-v2"), get(), get()] == [503, 401, 503, 200]
    hub.drop("models/me/x")
    with pytest.raises(http.client.RemoteDisconnected):
        get()
    hub.stall("models/me/x", seconds=0.3)
    started = time.monotonic()
    with pytest.raises(http.client.RemoteDisconnected):
        get()
    assert 0.3 <= time.monotonic() - started < 3
    hub.lose_reply("POST /api/repos/create")
    request = urllib.request.Request(
        hub.url + "/api/repos/create", b'{"name": "y"}', {"Authorization": f"Bearer {hub.token}"}
    )
    with pytest.raises(http.client.RemoteDisconnected):
        urllib.request.urlopen(request, timeout=5)
    assert ("model", "me/y") in hub.repos
