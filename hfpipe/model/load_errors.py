"""Errors of the libraries while they load a model, a tokenizer or an adapter, as one paragraph with what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError

from hfpipe.core.errors import MachineError, RecipeError, UserError
from hfpipe.core.hub_errors import not_readable, status_of
from hfpipe.core.machine import machine_error
from hfpipe.core.run_layout import ADAPTER_CONFIG


@contextmanager
def clear_errors(what: str, path: str) -> Iterator[None]:
    """Turns the libraries' loading errors into one paragraph with the remedy."""
    try:
        yield
    except ImportError as error:
        if "bitsandbytes" in str(error):
            raise MachineError("quantization needs bitsandbytes: pip install 'hfpipe[quantization]'.") from error
        raise MachineError(
            f"{what} {path!r} needs a package that is not installed: {_first_lines(error)} Install it, then run again."
        ) from error
    except HFValidationError as error:
        raise not_readable(error, f"{what} {path!r}", RecipeError) or error from error
    except OSError as error:  # of the Hub, of a missing file, or of transformers around one of these
        if machine_error(error) is not None:
            raise
        raise _not_loaded(error, what, path) from error
    except Exception as error:  # whatever a library raises over a file that it cannot use
        if known := None if Path(path).is_dir() else not_readable(error, f"{what} {path!r}", RecipeError):
            raise known from error  # amid a download
        if isinstance(error, UserError) or machine_error(error) is not None:
            raise
        raise RecipeError(_unusable(what, path, error)) from error


def _unusable(what: str, path: str, error: Exception) -> str:
    """Says that the files of a model, tokenizer or adapter are none that the libraries can use."""
    adapter = "It is an adapter and not a whole model: name its base, or merge it. "
    hint = adapter if what == "model" and (Path(path) / ADAPTER_CONFIG).is_file() else ""
    said = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return (
        f"{what} {path!r} cannot be loaded. {hint}transformers says: {said}{_first_lines(error)} If the name is right, "
        "its files are damaged, or made for another version of the libraries: download or save them again."
    )


def _first_lines(error: Exception) -> str:
    """Returns the beginning of what an error says, as one line with a full stop."""
    text = " ".join(str(error).split())[:300]
    return text if text.endswith((".", "!", "?")) else f"{text or 'nothing'}."


def _not_loaded(error: OSError, what: str, path: str) -> UserError:
    """Says why the files of a model or tokenizer cannot be had."""
    thing, local = f"{what} {path!r}", "is not a valid model identifier" in str(error)
    there = Path(path).is_dir() and not local
    if known := None if there else not_readable(HFValidationError(str(error)) if local else error, thing, RecipeError):
        return known
    if "model.safetensors" in str(error):
        return RecipeError(pickles_only(path))
    if there:
        return RecipeError(_unusable(what, path, error))
    status = status_of(error)
    answered = f"the Hub answered {status}. " if status else ""
    first_line = str(error).strip().split("\n")[0].rstrip(" :.") + "."
    return MachineError(
        f"{thing} cannot be loaded: {answered}{first_line} Check the name, the network and the disk; "
        "a model that is in the cache loads without a network."
    )


def pickles_only(path: str) -> str:
    """Returns the message for a model without weights as safetensors."""
    return (
        f"model {path!r} has no weights as safetensors, and hfpipe reads nothing else: a pickle can run any code. Look "
        "on its page for a converted branch (a pull request of SFconvertbot) and name it: `revision: refs/pr/NUMBER`. "
        "Or convert it where you trust it, by transformers' from_pretrained and save_pretrained, and name that folder."
    )


def require_token_ids(model: Any, path: str) -> None:
    """Refuses a generation config whose special tokens are not given by their ids.

    Raises:
        RecipeError: One is not.
    """
    for word in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(getattr(model, "generation_config", None), word, None)
        if any(type(one) is not int for one in (ids if isinstance(ids, list) else [ids] if ids is not None else [])):
            raise RecipeError(
                f"model {path!r}: its generation config (generation_config.json, or config.json) has {word} {ids!r}, "
                "which is no id of a token. Write the number there."
            )
