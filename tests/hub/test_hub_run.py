"""A chain from the Hub to the Hub: what it takes is pinned, what it pushes loads elsewhere, and no token is left."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
from datasets import Dataset, disable_progress_bars
from hub_server import HubServer
from huggingface_hub import ModelCard

from hfpipe.model.create import create_model, train_tokenizer
from hfpipe.recipe import load_recipe

CARD = "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"


def fineweb(folder: Path) -> dict[str, bytes]:
    """Three shards with the nine columns of FineWeb."""
    disable_progress_bars()
    rows = [json.loads(line) for line in (folder / "prose.jsonl").read_text().splitlines()]
    files = {"README.md": CARD.encode()}
    for number in range(3):
        shard = [
            {
                "text": row["text"],
                "id": f"<urn:uuid:{row['id']}>",
                "dump": "CC-MAIN-2024-10",
                "url": "http://example.com",
                "date": "2024-02-21T00:00:00Z",
                "file_path": "s3://none",
                "language": "en",
                "language_score": 0.9,
                "token_count": len(row["text"].split()),
            }
            for row in rows[number::3]
        ]
        Dataset.from_list(shard).to_parquet(folder / "shard.parquet", batch_size=20)
        files[f"sample/10BT/00{number}_00000.parquet"] = (folder / "shard.parquet").read_bytes()
    return files


def base_model(folder: Path) -> dict[str, bytes]:
    texts = [json.loads(line)["text"] for line in (folder / "prose.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer(texts, 320, 128)
    create_model(tiny.recipe(folder)["model"]["architecture"], tokenizer, 0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return {path.name: path.read_bytes() for path in (folder / "base").iterdir()}


class Finished(NamedTuple):
    hub: HubServer
    folder: Path
    recipe: Path
    environment: dict[str, str]
    output: str
    command_lines: set[bytes]  # of every process while it ran

    @property
    def run(self) -> Path:
        return self.folder / "run"


def command_lines(process: subprocess.Popen, found: set[bytes]) -> None:
    """Collects the command lines of all processes until one ends."""
    while process.poll() is None:
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                found.add(file.read_bytes())
        time.sleep(0.05)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """A chain, its base and its streamed FineWeb from the Hub, and checkpoints, adapter and merged model back to it."""
    folder = tmp_path_factory.mktemp("chain")
    with HubServer() as hub:
        tiny.write_data(folder)
        hub.add_repo("model", "someone/base", base_model(folder) | {"README.md": b"---\nlicense: apache-2.0\n---\n"})
        hub.add_repo("dataset", "HuggingFaceFW/fineweb", fineweb(folder))
        push = {"repo_id": "me/chat", "what": "both", "checkpoints": "every_save"}
        content = tiny.recipe(folder, model={"id": "someone/base"}, merge=False, push=push)
        content["stages"][0]["data"] = [{"path": "HuggingFaceFW/fineweb", "name": "sample-10BT", "streaming": True}]
        recipe = tiny.write(folder, content)
        environment = {**hub.env(folder / "home", token=hub.token), "HF_HUB_OFFLINE": "0"}
        process = tiny.start("run", str(recipe), **environment)
        seen: set[bytes] = set()
        watcher = threading.Thread(target=command_lines, args=(process, seen))
        watcher.start()
        output = process.communicate(timeout=300)[0]
        watcher.join()
        assert process.returncode == 0, output
        yield Finished(hub, folder, recipe, environment, output, seen)


@pytest.mark.slow
@pytest.mark.long
def test_base_and_data_are_pinned_to_their_commits(finished: Finished) -> None:
    recipe = load_recipe(finished.run / "recipe.yaml")
    assert recipe.model.revision == finished.hub.commits("someone/base")[-1].oid
    commit = finished.hub.commits("HuggingFaceFW/fineweb", "dataset")[0].oid
    assert recipe.stages[0].data[0].passed_through["revision"] == commit
    stream = json.loads((finished.run / "stages" / "prose" / "done.json").read_text())["data"]
    assert stream["tokens"] == 6 * 4 * 64


@pytest.mark.slow
@pytest.mark.long
def test_the_card_has_the_scores_the_data_and_the_licences(finished: Finished) -> None:
    for repo, relation in (("me/chat", "adapter"), ("me/chat-merged", "finetune"), ("me/chat-base", "finetune")):
        card = ModelCard(finished.hub.files(repo)["README.md"].decode())
        base = "me/chat-base" if repo == "me/chat" else "someone/base"
        assert (card.data.base_model, card.data.base_model_relation) == (base, relation)
        assert (card.data.datasets, card.data.license) == (["HuggingFaceFW/fineweb"], "apache-2.0")
        stage = "prose" if repo == "me/chat-base" else "sounds"
        shown = {result.metric_value for result in card.data.eval_results}
        assert round(tiny.scores(finished.run)[stage, "general", "bits_per_byte"], 6) in shown
        assert "The licence of the data set HuggingFaceFW/fineweb is not known" in card.text
        assert finished.hub.repos["model", repo].private


PULL = """
import sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

run = sys.argv[1]
ids = AutoTokenizer.from_pretrained("me/chat")("The cat sat by the hill and said", return_tensors="pt").input_ids
parent = AutoModelForCausalLM.from_pretrained("me/chat-base")
models = {
    "adapter": AutoPeftModelForCausalLM.from_pretrained("me/chat"),
    "merged": AutoModelForCausalLM.from_pretrained("me/chat-merged"),
    "checkpoint": AutoModelForCausalLM.from_pretrained("me/chat", revision="checkpoints-prose"),
    "on disk": AutoModelForCausalLM.from_pretrained(f"{run}/stages/prose/model"),
}
with torch.no_grad():
    logits = {name: model.eval()(ids).logits for name, model in models.items()}
    logits["parent"] = parent.eval()(ids).logits
    logits["by hand"] = PeftModel.from_pretrained(parent, "me/chat").eval()(ids).logits
    trained = PeftModel.from_pretrained(models["on disk"], f"{run}/stages/sounds/model").eval()(ids).logits
torch.testing.assert_close(logits["parent"], logits["on disk"], atol=0, rtol=0)
for name in ("adapter", "by hand", "merged"):
    torch.testing.assert_close(logits[name], trained, atol=1e-5, rtol=0)
    assert not torch.allclose(logits[name], logits["parent"], atol=1e-3), name
assert logits["checkpoint"].shape == trained.shape
assert not [name for name in sys.modules if name.startswith("hfpipe")]
"""


@pytest.mark.slow
@pytest.mark.long
def test_plain_transformers_and_peft_get_the_logits_of_the_chain(finished: Finished, tmp_path: Path) -> None:
    environment = {**os.environ, **finished.hub.env(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", PULL, str(finished.run)], env=environment, cwd=tmp_path, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    config = json.loads(finished.hub.files("me/chat")["adapter_config.json"])
    assert config["base_model_name_or_path"] == "me/chat-base"
    assert config["revision"] == finished.hub.commits("me/chat-base")[-1].oid


@pytest.mark.slow
@pytest.mark.long
def test_an_adapter_of_the_hub_is_scored_like_that_of_the_run(finished: Finished, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    process = tiny.start("evaluate", "me/chat", str(finished.recipe), "--output", str(output), **finished.environment)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    found = {(row["suite"], row["metric"]): row["value"] for row in json.loads(output.read_text())}
    for (stage, *key), value in tiny.scores(finished.run).items():
        if stage == "sounds":
            assert found[tuple(key)] == pytest.approx(value, abs=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_checkpoints_are_on_a_branch_without_pickles_and_local_paths(finished: Finished) -> None:
    for stage, weights in (("prose", "model.safetensors"), ("sounds", "adapter_model.safetensors")):
        files = finished.hub.files("me/chat", f"checkpoints-{stage}")
        assert weights in files
        assert {Path(name).suffix for name in files} <= {"", ".safetensors", ".json", ".md", ".jinja"}
        assert not [name for name, content in files.items() if str(finished.folder).encode() in content]


@pytest.mark.slow
@pytest.mark.long
def test_no_token_in_anything_that_a_run_leaves(finished: Finished) -> None:
    token = finished.hub.token.encode()
    pushed = [finished.hub.files(id) for kind, id in finished.hub.repos if kind == "model"]
    left = {str(file): file.read_bytes() for file in finished.run.rglob("*") if file.is_file()}
    assert [name for name, content in left.items() if token in content] == []
    assert [name for files in pushed for name, content in files.items() if token in content] == []
    assert token.decode() not in finished.output
    assert any(b"hfpipe.hub.upload" in line for line in finished.command_lines)
    assert [line for line in finished.command_lines if token in line] == []


def command(finished: Finished, *arguments: str) -> tuple[int, str]:
    process = tiny.start(*arguments, **finished.environment)
    output = process.communicate(timeout=300)[0]
    return process.returncode, output


@pytest.mark.slow
@pytest.mark.long
def test_the_recipe_of_the_run_folder_repeats_the_run(finished: Finished) -> None:
    again = finished.folder / "again"
    changes = [f"output_dir={again}", "stages.sounds=null", "evaluate=null", "push=null"]
    arguments = [part for change in changes for part in ("--set", change)]
    code, output = command(finished, "run", str(finished.run / "recipe.yaml"), *arguments)
    assert code == 0, output
    first, second = (folder / "stages/prose/model/model.safetensors" for folder in (finished.run, again))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
@pytest.mark.long
def test_trained_but_not_pushed_and_data_that_moved_on(finished: Finished) -> None:
    hub = finished.hub
    moved = hub.repos["dataset", "HuggingFaceFW/fineweb"]
    moved.commit("main", "moved on", {"README.md": moved.at("main").files["README.md"]})
    hub.fail("/api/models/me/other/preupload", 403)
    elsewhere = ["--set", "push.repo_id=me/other", "--set", "push.what=merged"]
    code, output = command(finished, "run", str(finished.recipe), *elsewhere)
    assert code == 4, output
    assert "prose: done before, skipped" in output
    assert "sounds: done before, skipped" in output
    assert f"The run is trained and whole in {finished.run}, but not pushed. The push to me/other failed" in output
    assert output.strip().endswith(f"hfpipe push {finished.run}")
    code, output = command(finished, "push", str(finished.run))
    assert code == 0, output
    assert len(hub.commits("me/other")) == 2


def questions(folder: Path, ranks: int) -> Counter[str]:
    """The Hub's requests for a short run that streams, apart from those for the data itself."""
    folder.mkdir()
    with HubServer() as hub:
        tiny.write_data(folder)
        hub.add_repo("model", "someone/base", base_model(folder))
        hub.add_repo("dataset", "HuggingFaceFW/fineweb", fineweb(folder))
        source = {"path": "HuggingFaceFW/fineweb", "name": "sample-10BT"}
        content = tiny.recipe(folder, model={"id": "someone/base"}, merge=False, shift=False, energy=False)
        content["stages"] = content["stages"][:1]
        content["stages"][0]["data"] = [{**source, "skip": 20, "streaming": True}]
        content["evaluate"] = {"web": {"data": {**source, "split": "train", "take": 8}, "metrics": ["bits_per_byte"]}}
        content["stages"][0]["training"]["max_steps"] = 1
        launch = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)) if ranks > 1 else ()
        environment = {**hub.env(folder / "home"), "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
        process = tiny.start("run", str(tiny.write(folder, content)), launch=launch, **environment)
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0, output
        return Counter(one.partition("?")[0] for one in hub.requests if not one.endswith(".parquet"))


@pytest.mark.slow
@pytest.mark.long
def test_more_ranks_ask_the_hub_no_more_than_one(tmp_path: Path) -> None:
    one, two = questions(tmp_path / "one", 1), questions(tmp_path / "two", 2)
    more = two - one
    assert all(name.endswith("generation_config.json") for name in more), more
    assert one.total() > 20
