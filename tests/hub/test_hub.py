"""Pushing: what arrives is what was trained, with a card that says what it is, and a second push doubles nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from hub_server import HubServer
from huggingface_hub import ModelCard
from huggingface_hub.utils import WeakFileLock
from pushing import COMMIT, PLANTED, RECIPE, Pusher, make_run, pushes

from hfpipe.core.errors import RecipeError
from hfpipe.hub import prepare_artifact
from hfpipe.recipe import Push, load_recipe


@pytest.fixture
def pusher(hub: HubServer, tmp_path: Path) -> Pusher:
    make_run(tmp_path / "run")
    return Pusher(hub, tmp_path)


# What is pushed


def test_the_artefact_is_whole_on_disk(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    recipe = load_recipe(run / "recipe.yaml")
    folder = prepare_artifact(run, Push(repo_id="me/toy"), recipe)
    assert folder == run / "push" / "adapter"
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "recipe.yaml",
        "scorecard.json",
        "tokenizer.json",
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/base", "c" * 40)
    merged = prepare_artifact(run, Push(repo_id="me/toy", what="merged"), recipe)
    assert {"config.json", "model.safetensors", "README.md"} <= {file.name for file in merged.iterdir()}


def test_no_folder_of_this_machine_is_told(tmp_path: Path) -> None:
    chat = RECIPE["stages"][1] | {
        "data": [{"path": "json", "data_files": ["/home/lovelace/law firm/chat*.jsonl", "b.jsonl"]}]
    }
    chat |= {"training": {"max_steps": 3, "deepspeed": "~lovelace/zero3.json"}}
    law = RECIPE["stages"][0] | {
        "data": [{"path": "/home/lovelace/law", "template": {"text": "/home/{name}/ is a home"}}]
    }
    run = make_run(tmp_path / "run", RECIPE | {"stages": [law, chat], "output_dir": "/home/lovelace/runs/toy"})
    folder = prepare_again(run)
    texts = {file.name: file.read_text() for file in folder.iterdir() if file.suffix != ".safetensors"}
    told = texts.pop("recipe.yaml")
    assert "lovelace" not in "".join(texts.values()) + told
    assert "beside these files, which are not here: `./law`, `./chat*.jsonl`, `b.jsonl`." in texts["README.md"]
    shared = load_recipe(folder / "recipe.yaml")  # which others can run, beside the files
    assert [source.path for stage in shared.stages for source in stage.data] == ["./law", "json"]
    assert shared.stages[0].data[0].template == {"text": "/home/{name}/ is a home"}
    assert (shared.name, shared.output_dir) == ("toy", None)


def test_the_card_says_what_it_is_and_what_it_cost(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    folder = prepare_artifact(run, Push(repo_id="me/toy"), load_recipe(run / "recipe.yaml"))
    card = ModelCard.load(folder / "README.md")
    data = card.data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("me/base", "adapter", "peft")
    assert (data.license, data.datasets, data.pipeline_tag) == ("apache-2.0", ["team/law"], "text-generation")
    assert data.language == ["de", "en"]
    assert "team/law is under cc-by-nc-4.0, which forbids commercial use; apache-2.0 does not" in card.text
    results = {(result.dataset_type, result.metric_type): result.metric_value for result in data.eval_results}
    assert results == {("team/general", "bits_per_byte"): 0.9, ("task", "exact_match"): 0.75}
    assert "| general bits_per_byte ↓ (n = 500) | 1.0000 | 0.8000 ▲ | 0.9000 ▼ |" in card.text
    assert "**forgotten**: general bits_per_byte 0.8000 → 0.9000: 12.5 % worse (9.0 to 16.0 %)" in card.text
    assert "**gained**: task exact_match 0.0 % → 75.0 %: 75.0 points better (69.1 to 80.9)" in card.text
    assert f'AutoModelForCausalLM.from_pretrained("me/base", revision="{"c" * 40}")' in card.text
    assert card.content == ModelCard.load(prepare_again(run) / "README.md").content


def test_the_card_shows_the_dial(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    about = {"gain_stderr": 0.01, "forgetting_stderr": 0.01, "over": [], "inside": True, "scores": []}
    points = [{"strength": at, "gain": at / 2, "forgetting": at / 10, **about} for at in (0.0, 0.5, 1.0)]
    dial = {"stage": "chat", "parent": "law", "method": "adapter", "best": 0.5, "verdict": "Half is best."}
    (run / "stages/chat/dial.json").write_text(json.dumps(dial | {"points": points}))
    folder = prepare_again(run)
    text = (folder / "README.md").read_text()
    assert "Half is best." in text
    assert "![Strengths of chat](dial-1.svg) ![Strengths of chat](dial-2.svg)" in text
    assert (folder / "dial-1.svg").read_text().startswith("<svg")
    assert text == (prepare_again(run) / "README.md").read_text()


def prepare_again(run: Path, what: str = "adapter") -> Path:
    return prepare_artifact(run, Push(repo_id="me/toy", what=what), load_recipe(run / "recipe.yaml"))


@pytest.mark.parametrize(
    ("what", "stage", "remedy"),
    [
        ("model", "chat", "what: adapter"),
        ("adapter", "law", "what: model"),
        ("merged", "law", "hfpipe merge"),
        ("adapter", "absent", "law, chat"),
    ],
)
def test_what_the_stage_did_not_make_is_refused(tmp_path: Path, what: str, stage: str, remedy: str) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(RecipeError, match=remedy):
        prepare_artifact(run, Push(repo_id="me/toy", what=what, stage=stage), load_recipe(run / "recipe.yaml"))
    assert not (run / "push").exists()


def test_an_adapter_on_a_local_base_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    config = run / "stages/chat/model/adapter_config.json"
    for local in ["runs/toy/stages/law/model", str(run / "stages/law/model"), "absent/folder/deep"]:
        config.write_text(json.dumps({"base_model_name_or_path": local}))
        with pytest.raises(RecipeError, match="what: merged"):
            prepare_again(run)


# The way to the Hub


@pytest.mark.slow
def test_a_push_is_one_private_commit_and_a_second_one_none(pusher: Pusher, hub: HubServer) -> None:
    first = pusher()
    assert first.returncode == 0, first.stdout + first.stderr
    assert f"URL {hub.url}/me/toy" in first.stdout
    assert hub.repos["model", "me/toy"].private
    second = pusher()
    assert "nothing was sent" in second.stdout
    assert pushes(hub) == 1
    (pusher.folder / "run/stages/chat/model/tokenizer.json").write_text("{}")
    sent = len(hub.requests)
    assert pusher().returncode == 0
    assert pushes(hub) == 2
    assert not [request for request in hub.requests[sent:] if "xorb" in request]  # the weights were there already


@pytest.mark.slow
def test_a_model_pushed_over_an_adapter_is_not_taken_for_it(pusher: Pusher, hub: HubServer) -> None:
    pusher.options = {"xet": False}
    assert pusher().returncode == 0
    done = pusher(what="merged", revision="whole", private=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"URL {hub.url}/me/toy/tree/whole" in done.stdout
    assert "adapter_config.json" in hub.files("me/toy")
    files = hub.files("me/toy", "whole")
    assert "model.safetensors" in files
    assert not [name for name in files if name.startswith("adapter")]
    assert "vllm serve me/toy --revision whole" in files["README.md"].decode()


@pytest.mark.slow
def test_nothing_is_left_out_and_nothing_of_another_run_replaced(pusher: Pusher, hub: HubServer) -> None:
    hub.add_repo("model", "me/toy", {".gitignore": b"*.safetensors"}, private=True)
    assert pusher(what="adapter").returncode == 0
    assert "adapter_model.safetensors" in hub.files("me/toy")
    hub.add_repo("model", "me/taken", {"model.safetensors": b"of another"}, private=True)
    refused = pusher(repo_id="me/taken")
    assert refused.returncode == 4
    assert "the name is taken: its main branch holds weights that this run did not make" in refused.stdout
    assert pushes(hub, "me/taken") == 0
    for _ in range(2):
        assert pusher(repo_id="me/taken", revision="mine").returncode == 0
    assert pushes(hub, "me/taken") == 1
    assert hub.files("me/taken")["model.safetensors"] == b"of another"
    for given in ({"what": "both", "merged_repo_id": "me/toy"}, {"repo_id": "me/a b"}):
        refused = pusher(**given)
        assert refused.returncode == 2
        assert len(refused.stdout.splitlines()) == 1
    assert pushes(hub) == 1


@pytest.mark.slow
def test_a_push_does_not_build_the_artefact_anew_under_another(pusher: Pusher, hub: HubServer) -> None:
    (pusher.folder / "run/push").mkdir()
    with WeakFileLock(pusher.folder / "run/push/lock"):
        refused = pusher()
    assert refused.returncode == 4
    assert "another push of this run is under way" in refused.stdout
    assert pushes(hub) == 0
    assert pusher().returncode == 0


@pytest.mark.slow
@pytest.mark.long
def test_a_tag_names_the_pushed_commit_and_is_never_moved(pusher: Pusher, hub: HubServer) -> None:
    hub.fail("POST /api/models/me/toy/tag", 409)  # which is no sign that it is there
    hub.lose_reply("POST /api/models/me/toy/tag")
    for _ in range(2):  # the second time everything is there already
        done = pusher(tag="v1")
        assert done.returncode == 0, done.stdout + done.stderr
        assert hub.repos["model", "me/toy"].refs["v1"].oid == hub.commits("me/toy")[-1].oid
    assert pushes(hub) == 1
    (pusher.folder / "run/stages/chat/model/tokenizer.json").write_text("{}")
    moved = pusher(tag="v1")
    assert moved.returncode == 4
    assert "names another commit" in moved.stdout
    assert hub.repos["model", "me/toy"].refs["v1"].oid == hub.commits("me/toy")[1].oid
    assert pusher(tag="v2").returncode == 0
    assert pushes(hub) == 2


def test_the_base_s_own_code_is_told_of_and_pushed_with_the_model(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "stages/chat/merged/modeling_odd.py").write_text("class OddForCausalLM: ...")
    assert "trust_remote_code" not in (prepare_again(run) / "README.md").read_text()
    assert not list(prepare_again(run, "merged").glob("*.py"))
    file = run / "environment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trust_remote_code": True}))
    model = {"model": {**RECIPE["model"], "trust_remote_code": True}}
    (run / "recipe.yaml").write_text(json.dumps(RECIPE | model))
    assert (prepare_again(run, "merged") / "modeling_odd.py").is_file()  # without which it does not load
    card = (prepare_again(run) / "README.md").read_text()
    assert "The code in the base's repository ran" in card
    assert f'from_pretrained("me/base", revision="{"c" * 40}", trust_remote_code=True)' in card
    assert "--trust-remote-code" in card


@pytest.mark.slow
@pytest.mark.long
def test_access_is_asked_before_anything_is_trained(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("model", "team/there")
    hub.add_repo("model", "me/locked")
    hub.add_repo("model", "me/taken", {"model.safetensors": b"of another"}, private=True)
    hub.add_repo("model", "me/again", {"model.safetensors": b"of this run", "recipe.yaml": b"name: toy"})
    hub.repos["model", "me/again"].refs["v1"] = hub.commits("me/again")[-1]
    hub.repos["model", "me/again"].tags.add("v1")
    hub.fail("GET /api/models/me/locked/auth-check/write", 403)
    hub.fail("GET /api/models/team/there", 503)  # which passes
    cases: list[tuple[dict[str, Any], str]] = [
        ({"repo_id": "toy"}, "may write to me/toy, which will be made, private"),
        ({"repo_id": "team/there"}, "may write to team/there, which exists and is public warning: everybody will see"),
        ({"repo_id": "others/toy"}, "may not write under others. Allowed: me, team."),
        ({"repo_id": "me/locked"}, "the token may not write to me/locked (403)"),
        ({"repo_id": "me/taken"}, "the name is taken: its main branch holds weights that this run did not make"),
        ({"repo_id": "me/taken", "revision": "new"}, "may write to me/taken"),
        ({"repo_id": "me/new", "license": "apache"}, "the Hub does not know the licence 'apache'"),
        ({"repo_id": "me/again"}, "may write to me/again"),
        ({"repo_id": "me/again", "tag": "v1"}, "has a tag 'v1' already"),
        ({"repo_id": "me/again", "private": True}, "is public, and the recipe says `private: true`"),
        ({"repo_id": "me/absent", "create_pr": True}, "a pull request needs a repository that exists"),
        ({"repo_id": "me/taken", "create_pr": True}, "may open a pull request on me/taken"),
        (
            {"repo_id": "me/new", "what": "both", "merged_repo_id": "others/new"},
            "push.merged_repo_id: nothing could be",
        ),
        # The parent of a chain is not a pull request, as the adapter must name its commit.
        (
            {"repo_id": "me/taken", "create_pr": True, "parent_repo_id": "others/b"},
            "push.parent_repo_id: nothing could",
        ),
    ]
    before = set(hub.repos)
    pusher = Pusher(hub, tmp_path)
    answers = pusher.check([words for words, _ in cases])
    assert [(case, answer) for case, answer in zip(cases, answers, strict=True) if case[1] not in answer] == []
    pusher.options = {"token": HubServer.team_token}
    ours, mine = pusher.check([{"repo_id": "team/new"}, {"repo_id": "me/new"}])
    assert "which will be made" in ours
    assert "is fine-grained and may not write to me/new-base. It may write to: team." in mine
    pusher.options = {"token": HubServer.read_token}
    assert "may only read" in pusher.check([{"repo_id": "me/toy"}])[0]
    assert set(hub.repos) == before


@pytest.mark.slow
def test_an_adapter_that_others_could_see_and_not_load_is_told_of(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("model", "me/base", private=True)
    alone = RECIPE | {"stages": RECIPE["stages"][1:]}
    pushes: list[dict[str, Any]] = [{"repo_id": "me/a", "private": False}, {"repo_id": "me/a"}]
    pushes += [{"repo_id": "me/a", "private": False, "what": "merged"}]
    told, *silent = Pusher(hub, tmp_path).check(pushes, alone)
    assert "load it only with access to me/base, which is private" in told
    assert [line for line in silent if "warning" in line] == []
    run = make_run(tmp_path / "run", alone)
    for access, line in (({"private": True}, "The base, me/base, was private"), ({"gated": "auto"}, "base is gated")):
        facts = json.loads((run / "hub.json").read_text())
        facts["model me/base@main"] = {"revision": "c" * 40} | access
        (run / "hub.json").write_text(json.dumps(facts))
        assert line in (prepare_again(run) / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_could_not_be_pushed_is_not_begun(hub: HubServer, tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    recipe = tiny.write(tmp_path, tiny.recipe(tmp_path, push={"repo_id": "others/toy", "what": "merged"}))
    process = tiny.start("run", str(recipe), **hub.env(tmp_path / "home"))
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 4, output
    assert "may not write under others" in output
    assert not list((tmp_path / "run/stages").glob("prose*"))


@pytest.mark.slow
@pytest.mark.parametrize("lists_discussions", [pytest.param(True, marks=pytest.mark.long), False])
def test_a_pull_request_is_opened_once(pusher: Pusher, hub: HubServer, lists_discussions: bool) -> None:
    if not lists_discussions:  # then ours is the one that has our files
        hub.fail("GET /api/models/me/toy/discussions", 404, times=99)
    hub.add_repo("model", "me/toy", {"config.json": b"{}"})
    hub.lose_reply(COMMIT)
    for _ in range(2):  # the second time it is there already
        done = pusher(create_pr=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"URL {hub.url}/me/toy/discussions/1" in done.stdout
    assert len(hub.repos["model", "me/toy"].pull_requests) == pushes(hub) == 1
    if not lists_discussions:
        return
    (pusher.folder / "run/stages/chat/model/tokenizer.json").write_text("{}")
    assert pusher(create_pr=True).returncode == 0
    assert len(hub.repos["model", "me/toy"].pull_requests) == 1
    assert hub.files("me/toy", "refs/pr/1")["tokenizer.json"] == b"{}"
    assert "tokenizer.json" not in hub.files("me/toy")


@pytest.mark.slow
def test_an_adapter_of_a_chain_is_pushed_with_its_parent(pusher: Pusher, hub: HubServer) -> None:
    config = pusher.folder / "run/stages/chat/model/adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "elsewhere/run/stages/law/model"}))
    hub.fail("/api/models/me/toy-base/commit", 403)
    failed = pusher(what="both", parent_repo_id="me/law", merged_repo_id="team/whole")
    assert failed.returncode == 0, failed.stdout
    assert {"me/law", "me/toy", "team/whole"} <= {id for _, id in hub.repos}
    pushed = json.loads(hub.files("me/toy")["adapter_config.json"])
    assert (pushed["base_model_name_or_path"], pushed["revision"]) == ("me/law", hub.commits("me/law")[-1].oid)
    assert "model.safetensors" in hub.files("team/whole")
    failed = pusher()  # without the names, the parent would go to me/toy-base
    assert failed.returncode == 4
    assert "The push to me/toy-base failed" in failed.stdout
    assert pushes(hub) == 1


@pytest.mark.slow
def test_no_token_in_anything_that_a_push_leaves(pusher: Pusher, hub: HubServer) -> None:
    scorecard = pusher.folder / "run/scorecard.json"
    scorecard.write_text(scorecard.read_text().replace('"task"', f'"{PLANTED}"'))
    hub.fail(COMMIT, 503)
    outputs = [pusher(), pusher()]
    hub.fail("/preupload/", 403)
    (pusher.folder / "run/stages/chat/model/tokenizer.json").write_text("{}")
    outputs.append(pusher())
    assert [output.returncode for output in outputs] == [0, 0, 4]
    written = [file.read_bytes() for file in (pusher.folder / "run/push").rglob("*") if file.is_file()]
    written += [(output.stdout + output.stderr).encode() for output in outputs]
    written += hub.files("me/toy").values()
    for token in (PLANTED, hub.token):
        assert not [text for text in written if token.encode() in text]


# The whole way


PULL = """
import sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

ids = AutoTokenizer.from_pretrained("me/toy")("what was learned", return_tensors="pt").input_ids
base = AutoModelForCausalLM.from_pretrained("me/base")
merged = AutoModelForCausalLM.from_pretrained("me/toy", revision="whole")
direct = AutoPeftModelForCausalLM.from_pretrained("me/toy")
with torch.no_grad():
    logits = {"base": base(ids).logits, "merged": merged(ids).logits, "direct": direct(ids).logits}
    logits["adapter"] = PeftModel.from_pretrained(base, "me/toy")(ids).logits
torch.save(logits, "logits.pt")
assert not [name for name in sys.modules if name.startswith("hfpipe")]
"""


@pytest.mark.slow
@pytest.mark.long
def test_plain_transformers_and_peft_get_the_same_logits(pusher: Pusher, hub: HubServer) -> None:
    import torch

    tokenizer, base, adapted = tiny_models(pusher.folder)
    hub.add_repo("model", "me/base", {file.name: file for file in base.iterdir()})
    stage = pusher.folder / "run/stages/chat"
    commit = hub.commits("me/base")[-1].oid
    environment = {"base": {"id": "me/base", "revision": commit}}
    (pusher.folder / "run/environment.json").write_text(json.dumps(environment))
    for folder in (stage / "model", stage / "merged"):
        for file in folder.iterdir():
            file.unlink()
        tokenizer.save_pretrained(folder)
    adapted.save_pretrained(stage / "model")
    config = stage / "model/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "me/base"}))
    ids = tokenizer("what was learned", return_tensors="pt").input_ids
    with torch.no_grad():
        trained = adapted(ids).logits
        adapted.merge_and_unload().save_pretrained(stage / "merged")
    for xet, arguments in ((True, {}), (False, {"what": "merged", "revision": "whole"})):
        pusher.options = {"xet": xet}
        done = pusher(**arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    env = os.environ | hub.env(pusher.folder / "elsewhere") | {"OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "-c", PULL], env=env, cwd=pusher.folder, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    logits = torch.load(pusher.folder / "logits.pt")
    assert not torch.allclose(logits["base"], trained, atol=1e-3)
    torch.testing.assert_close(logits["adapter"], trained, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits["direct"], trained, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits["merged"], trained, atol=1e-5, rtol=0)


def tiny_models(folder: Path) -> tuple[Any, Path, Any]:
    """A tokenizer, the folder of a base model, and that base with an adapter that changes it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "what": 1, "was": 2, "learned": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).eval()
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return tokenizer, folder / "base", get_peft_model(base, lora).eval()
