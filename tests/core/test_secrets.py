"""A token typed into a recipe by mistake is refused, and shown nowhere: not in the error, not in what a run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from hfpipe.cli import main

TOKEN = "hf_PlantedTokenThatNobodyMaySee01"
OWN = "a-token-of-another-shape"


def in_source(**words: Any) -> Any:
    return lambda recipe: recipe["stages"][0]["data"][0].update(words)


@pytest.mark.parametrize(
    ("place", "plant"),
    [
        ("data.0.data_files", in_source(data_files=f"https://example.com/a.jsonl?token={TOKEN}")),
        ("data.0.data_files", in_source(data_files=f"https://me:{OWN}@example.com/a.jsonl")),
        ("data.0.data_files", in_source(data_files="https://example.com/a.jsonl?v=1&X-Amz-Signature=5ec3e7")),
        ("data.0.token", in_source(token=TOKEN)),
        ("storage_options.secret", in_source(storage_options={"key": "AKIA", "secret": "of another kind"})),
        ("headers.Authorization", in_source(storage_options={"headers": {"Authorization": "Bearer x"}})),
        ("training.hub_token", lambda recipe: recipe["stages"][0]["training"].update(hub_token=TOKEN)),
        ("seed", lambda recipe: recipe.update(seed=TOKEN)),
        ("name", lambda recipe: recipe.update(name=OWN)),
        ("storage_options", in_source(storage_options={TOKEN: "x"})),
    ],
)
def test_a_recipe_with_a_secret_is_refused_without_showing_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str, plant: Any
) -> None:
    monkeypatch.setenv("HF_TOKEN", OWN)
    recipe = tiny.recipe(tmp_path)
    plant(recipe)
    path = tiny.write(tmp_path, recipe)
    assert main(["run", str(path)]) == 2
    output = "".join(capsys.readouterr())
    assert place in output
    for secret in (TOKEN, OWN, "5ec3e7", "of another kind", "Bearer x"):
        assert secret not in output
    assert not (tmp_path / "run").exists()


BODY = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8s9T0"
KEYS = [
    f"ghp_{BODY[:36]}",
    f"glpat-{BODY[:20]}",
    f"AIza{BODY[:35]}",
    f"sk-ant-{BODY}",
    f"sk_live_{BODY[:24]}",
    f"gsk_{BODY}",
    f"npm_{BODY[:36]}",
    f"eyJ{BODY}.eyJ{BODY}.{BODY}",
    f"Bearer {BODY}",
    f"DefaultEndpointsProtocol=https;AccountKey={BODY}==",
    f"-----BEGIN RSA PRIVATE KEY-----\n{BODY}\n-----END RSA PRIVATE KEY-----",
]


@pytest.mark.parametrize("key", KEYS)
def test_keys_of_other_services_are_seen_anywhere(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny.recipe(tmp_path)
    recipe["model"]["tokenizer"]["chat_template"] = f"{{{{ messages }}}} {key}"
    assert main(["check", "--fast", str(tiny.write(tmp_path, recipe))]) == 2
    said = capsys.readouterr().err
    assert "chat_template" in said
    assert BODY[:20] not in said


def test_words_that_look_a_little_like_keys_may_stand(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    words = "the bearer of good news, Bearer certificates, hf_tokenizer, sk-learn, npm_package, eyJ, AIza"
    recipe["model"]["tokenizer"]["chat_template"] = f"{{{{ messages }}}} {words}"
    assert main(["check", "--fast", str(tiny.write(tmp_path, recipe))]) == 0


def test_a_secret_in_an_override_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.write(tmp_path, tiny.recipe(tmp_path))
    assert main(["check", "--fast", str(path), "--set", f"model.revision={TOKEN}", "--set", f"sed={TOKEN}"]) == 2
    assert TOKEN not in "".join(capsys.readouterr())


def test_ways_to_log_in_that_are_no_secret_are_allowed(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    recipe["stages"][0]["data"][0]["storage_options"] = {"anon": True, "token": "google_default"}
    assert main(["check", "--fast", str(tiny.write(tmp_path, recipe))]) == 0
