"""One table of the errors that a machine at its limits raises; the command line asks it for any error not caught
before.

Each entry says how an error is recognized, and the paragraph that is shown instead of a traceback.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

from hfpipe.core.errors import MachineError

# Variables that libraries read, and values that an error may say for a reason of its own, as it may a number.
VARIABLES = ("ACCELERATE_", "DATASETS_", "FSDP_", "HF_", "LOGLEVEL", "PYTORCH_", "TORCH", "TRANSFORMERS_")
USUAL = ("", "true", "false", "yes", "no", "on", "off", "auto", "none", "cpu", "cuda", "fp16", "bf16")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")  # variables that Python's ssl reads
# By the number that the operating system gives an error; {file} is where it happened.
BY_NUMBER: dict[tuple[int, ...], str] = {
    (errno.ENOSPC, errno.EDQUOT): "the disk is full ({file}). Free some space and run again.",
    (errno.EROFS,): "{file} lies on a file system that is read-only. Take another output_dir or HF_HOME.",
    (errno.EACCES, errno.EPERM): "no permission to write or read {file}. Take another output_dir or HF_HOME, or ask "
    "for the right to.",
    (errno.ENAMETOOLONG,): "the name {file} is too long for this file system. Take a shorter output_dir or name.",
    (errno.ENOTDIR,): "a part of {file} is a file, and a folder is needed there. Remove it, or take another name.",
    (errno.EISDIR,): "{file} is a folder, and a file is needed there. Remove it, or take another name.",
    (errno.EEXIST, errno.ENOTEMPTY): "{file} is there already, and not as it is needed. Remove it and run again.",
    (errno.ENOENT,): "{file} is missing. Was it removed while hfpipe ran? Run again; what is whole is not made anew.",
    (errno.EMFILE, errno.ENFILE): "too many files are open ({file}). Raise the limit (ulimit -n 65536), or set "
    "training.dataloader_num_workers: 0.",
    (errno.ENOMEM,): "the memory of this machine is full ({file}). Close other programs, or take smaller batches.",
    (errno.EAGAIN,): "this machine starts no further process or thread ({file}). Raise the limit (ulimit -u), or set "
    "OMP_NUM_THREADS=1.",
    (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO): "the disk fails ({file}). Look at it, then run again.",
    (errno.EFBIG,): "{file} grows larger than this file system or limit (ulimit -f) allows. Take another output_dir.",
    (errno.ELOOP,): "{file} is a link that leads to itself. Remove it.",
}

_MEMORY = (
    "the memory of this machine is full. Halve training.per_device_train_batch_size (global_batch_size keeps the "
    "result the same), shorten training.max_length, train an adapter (lora:), or take a smaller model."
)
_GPU = (
    "out of memory on the GPU. Halve training.per_device_train_batch_size (global_batch_size keeps the result "
    "the same), shorten training.max_length, set training.gradient_checkpointing: true, or train an adapter on "
    "a 4-bit base (lora: and quantization: nf4)."
)
_DISK = "the disk is full (while weights were written). Free some space and run again."
# By the name of the error's class, "*" for any, and a pattern of its text; the first that fits is taken.
BY_TEXT: tuple[tuple[str, str, str], ...] = (
    ("OutOfMemoryError", "", _GPU),
    ("*", r"CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|MPS backend out of memory", _GPU),
    ("MemoryError|_ArrayMemoryError|ArrowMemoryError", "", _MEMORY),
    ("*", r"DefaultCPUAllocator|not enough memory: you tried|std::bad_alloc|[Cc]annot allocate memory", _MEMORY),
    (
        "RuntimeError",
        r"can't start new thread|Resource temporarily unavailable",
        "this machine starts no further thread. Raise the limit (ulimit -u), or set OMP_NUM_THREADS=1 and "
        "TOKENIZERS_PARALLELISM=false.",
    ),
    ("*", r"No space left on device|[Dd]isk quota exceeded|PytorchStreamWriter failed|file write failed", _DISK),
    ("*", r"Too many open files", BY_NUMBER[errno.EMFILE, errno.ENFILE].format(file="while data was read")),
    ("*", r"Read-only file system", BY_NUMBER[(errno.EROFS,)].format(file="what is written")),
    (
        "RuntimeError|OSError",
        r"unable to (open|allocate|mmap|write to) .*shared memory|/dev/shm",
        "the shared memory of this machine (/dev/shm) is full. Enlarge it (docker run --shm-size=8g), or set "
        "training.dataloader_num_workers: 0.",
    ),
    (
        "RuntimeError",
        r"CUDA driver|no CUDA-capable device|CUDA error: (?:no kernel image|invalid device|unknown error)|NVML",
        "the GPU does not work with this torch: look at `nvidia-smi`, and at the CUDA version that torch was made for.",
    ),
    (
        "RuntimeError",
        r"CUDA error: (?:uncorrectable ECC|an illegal memory access|device-side assert|the launch timed out)",
        "the GPU stopped with an error. Run again: the run continues from its last checkpoint. If it comes again, look "
        "at `nvidia-smi` and set CUDA_LAUNCH_BLOCKING=1.",
    ),
)  # fmt: skip


def machine_error(error: BaseException) -> MachineError | None:
    """Returns what a machine lacks, in words; None where an error is about something else."""
    for one in _causes(error):
        if isinstance(one, MachineError):
            return one
        if isinstance(one, OSError) and one.errno is not None:
            for numbers, told in BY_NUMBER.items():
                if one.errno in numbers:
                    return MachineError(told.format(file=_file_of(one)))
        name, text = type(one).__name__, str(one)
        for names, pattern, told in BY_TEXT:
            if (names == "*" or name in names.split("|")) and re.search(pattern, text):
                return MachineError(told)
        if named := _variable_of(text):
            return MachineError(
                f"a library does not take the variable {named}={os.environ[named]!r} of the environment "
                f"({name}: {text}). Correct it, or remove it (`unset {named}`)."
            )
    return None


def _variable_of(text: str) -> str | None:
    """Returns the variable of a library whose value an error quotes; None where there is none."""
    for name, value in os.environ.items():
        if not name.startswith(VARIABLES) or "TOKEN" in name:
            continue
        if value.lower() in USUAL or value.isdecimal() or os.path.exists(value):
            continue
        if re.search(rf"(?<![\w./-]){re.escape(value)}(?![\w./-])", text):
            return name
    return None


def _file_of(error: OSError) -> str:
    """Returns the file of an error; Python's ssl does not name the certificates that it was told to read."""
    if error.filename:
        return str(error.filename)
    if error.errno == errno.ENOENT:
        for name in CERTIFICATES:
            if (path := os.environ.get(name)) and not os.path.exists(path):
                return f"{path}, which the variable {name} names,"
    return "a file that the system does not name"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and what it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__
