"""A recipe that is too large, too deep, or holds a secret is refused at once, in few words, and shows no secret."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hfpipe.cli import main

HEAD = "name: x\nmodel: {id: gpt2}\nstages: [{name: s, kind: sft, data: [{path: json, data_files: x.jsonl}]}]\n"
LAUGHS = (
    "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
    + HEAD
)


def told(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(content, encoding="utf-8")
    begin = os.times().user
    assert main(["check", "--fast", str(path)]) == 2
    assert os.times().user - begin < 2.0  # of the processor, on a slow one
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert len(said) < 30_000
    return said


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (LAUGHS, "aliases"),
        (f"{HEAD}evaluate: {'[' * 3000}{']' * 3000}\n", "deep"),
        (f"{HEAD}evaluate: {'{a: ' * 3000}1{'}' * 3000}\n", "deep"),
        (HEAD + "".join(f"{' ' * n}a:\n" for n in range(200)), "deep"),
        (f"{HEAD}x: {'y' * 5_000_000}\n", "kB"),
        (HEAD + "".join(f"key{n}: {n}\n" for n in range(5000)), "more"),
        (f"{HEAD}{'k' * 1000}: 1\n", "unknown key"),
        (f"{HEAD}seed: {'9' * 5000}\n", "!!int"),
        (f"{HEAD}seed: 0x{'f' * 5000}\n", "bits"),
        (f'{HEAD}output_dir: "a\\0b"\n', "zero byte"),
        (f'{HEAD}output_dir: "\\ud800"\n', "half a character"),
    ],
    ids=["laughs", "lists", "mappings", "indents", "megabytes", "keys", "key", "digits", "hex", "zero", "surrogate"],
)
def test_a_monster_is_refused_at_once(
    content: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert word in told(content, tmp_path, capsys)


@pytest.mark.parametrize(
    ("line", "secret"),
    [
        ("training: {run_name: sk-proj-abcdefgh12345678abcdefgh}", "abcdefgh12345678"),
        ("training: {run_name: sk-ant-api03-Qw3rty_Qw3rty_Qw3rty}", "Qw3rty"),
        ("training: {run_name: wandb_v1_0123456789abcdefghij}", "0123456789"),
        ("training: {wandb_api_key: 0123456789abcdef0123456789abcdef01234567}", "0123456789"),
        ("parent: https://Qw3rtyTokenQw3rty@example.org/x", "Qw3rty"),
        ("parent: https://me:Qw3rty@example.org/x", "Qw3rty"),
        ("data: [{path: json, data_files: x, storage_options: {headers: {Cookie: sid=Qw3rty}}}]", "Qw3rty"),
        ("data: [{path: json, data_files: x, storage_options: {cookies: {sid: Qw3rty}}}]", "Qw3rty"),
        ("data: [{path: json, data_files: x, storage_options: {connection_string: Qw3rty}}]", "Qw3rty"),
    ],
)
def test_a_secret_is_noticed_and_not_shown(
    line: str, secret: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = "" if line.startswith("data") else "\n    data: [{path: json, data_files: x.jsonl}]"
    said = told(
        f"name: x\nmodel: {{id: gpt2}}\nstages:\n  - name: s\n    kind: sft{data}\n    {line}\n", tmp_path, capsys
    )
    assert "holds a token" in said
    assert secret not in said


@pytest.mark.parametrize("text", ["hf://datasets/me/x@main/a.json", "sk-learn-classifier-of-sentences", "git@host:x/y"])
def test_harmless_words_are_no_secrets(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(HEAD.replace("x.jsonl", f"'{text}'"))
    assert main(["check", "--fast", str(path)]) == 0
