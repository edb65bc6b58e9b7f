"""The machine's errors are told as such: every entry of the table, and the folders that cannot be written to."""

from __future__ import annotations

import errno
import os
import ssl
from pathlib import Path

import pytest
import torch

from hfpipe.cli import main
from hfpipe.core.machine import BY_NUMBER, machine_error

NUMBERS = [number for numbers in BY_NUMBER for number in numbers]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: errno.errorcode[number])
def test_an_error_of_the_system_names_the_file_and_what_to_do(number: int) -> None:
    told = machine_error(OSError(number, os.strerror(number), "/mnt/run/log.jsonl"))
    assert told is not None
    assert told.exit_code == 4
    assert "/mnt/run/log.jsonl" in str(told)
    assert str(told).count(". ") >= 1 or "(" in str(told)


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), "GPU"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), "GPU"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"), "memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), "memory"),
        (MemoryError(), "memory"),
        (RuntimeError("std::bad_alloc"), "memory"),
        (RuntimeError("can't start new thread"), "thread"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "disk is full"),
        (ValueError("I/O error: No space left on device (os error 28)"), "disk is full"),
        (OSError("[Errno 24] Too many open files"), "ulimit -n"),
        (RuntimeError("unable to write to file </torch_1>: shared memory is full"), "/dev/shm"),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), "nvidia-smi"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "checkpoint"),
    ],
)
def test_an_error_of_a_library_about_the_machine_is_told(error: Exception, word: str) -> None:
    told = machine_error(error)
    assert told is not None
    assert word in str(told)


def test_the_cause_tells_where_the_error_itself_does_not() -> None:
    error = RuntimeError("the worker failed")
    error.__cause__ = OSError(errno.EMFILE, "Too many open files", "/data/x")
    assert "ulimit -n" in str(machine_error(error))


def test_certificates_that_a_variable_names_and_are_not_there_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/missing/ca.pem")
    with pytest.raises(FileNotFoundError) as caught:
        ssl.create_default_context(cafile="/missing/ca.pem")
    told = str(machine_error(caught.value))
    assert "/missing/ca.pem, which the variable SSL_CERT_FILE names, is missing" in told


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("HF_HUB_DOWNLOAD_TIMEOUT", "abc", ValueError("invalid literal for int() with base 10: 'abc'")),
        ("ACCELERATE_USE_CPU", "maybe", ValueError("invalid truth value maybe")),
        ("LOGLEVEL", "weird", ValueError("Unknown level: 'weird'")),
    ],
)
def test_a_variable_that_a_library_refuses_is_named(
    name: str, value: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine_error(error) is None
    monkeypatch.setenv(name, value)
    assert f"{name}='{value}'" in str(machine_error(error))


def test_a_number_in_an_error_is_not_taken_for_that_of_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "60")
    assert machine_error(IndexError("index 60 is out of range")) is None


def test_a_fault_of_ours_is_none_of_the_machine() -> None:
    assert machine_error(KeyError("stages")) is None
    assert machine_error(RuntimeError("shapes do not match")) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a-file", "a-file/run", "n" * 300])
def test_an_output_folder_that_cannot_be_is_refused_by_check_and_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a-file").write_text("")
    Path("r.yaml").write_text(
        f"name: r\noutput_dir: {name}\nmodel: {{id: nowhere/here}}\n"
        + "stages: [{name: s, kind: sft, data: [{path: json, data_files: x.jsonl}]}]\n"
    )
    told = []
    for command in ("check", "run"):
        assert main([command, "r.yaml"]) == 4
        told.append(capsys.readouterr().err)
    assert told[0] == told[1]
    assert "output_dir" in told[0]
