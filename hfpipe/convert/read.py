"""Reads the config of another tool, and tells whose it is by its keys."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from hfpipe.convert.draft import OutOfScope
from hfpipe.core.errors import RecipeError
from hfpipe.recipe.document import Loader

# Words of a command line, and the tool that is started by it.
_COMMANDS = {
    "swift": "ms-swift",
    "megatron": "ms-swift",
    "llamafactory-cli": "llama-factory",
    "trl": "trl",
    "sft.py": "trl",
}


def read_config(path: Path) -> tuple[dict[str, Any], str, str | None]:
    """The config of a file of YAML or JSON, or of a shell script that starts a tool with arguments.

    Returns:
        The config, the file's text, and the tool that a script names.

    Raises:
        RecipeError: The file cannot be read, or holds no config.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"{path} cannot be read: {why}. Name a config: YAML, JSON, or a shell script.") from error
    if path.suffix in (".sh", ".bash", ".slurm") or text.startswith("#!"):
        return _read_script(path, text)
    try:
        data = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=Loader)
    except (ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} is no YAML or JSON that can be read: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or not data:
        raise RecipeError(f"{path} holds no config: a mapping of keys and values is needed.")
    return {str(key): value for key, value in data.items()}, text, None


def _read_script(path: Path, text: str) -> tuple[dict[str, Any], str, str | None]:
    """Arguments of the command that trains: `--key value` becomes a key."""
    commands = re.sub(r"\\\s*\n", " ", re.sub(r"(?m)^\s*#.*$", "", text))
    for line in commands.splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        named = next((index for index, word in enumerate(words) if word.rsplit("/", 1)[-1] in _COMMANDS), None)
        if named is None:
            continue
        arguments = _arguments(words[named + 1 :])
        file = next((word for word in words[named + 1 :] if word.endswith((".yaml", ".yml", ".json"))), None)
        place = next((one for one in (path.parent / file, Path(file)) if one.is_file()), None) if file else None
        if place is not None and len(arguments) <= 2:
            return (*read_config(place)[:2], _COMMANDS[words[named].rsplit("/", 1)[-1]])
        if arguments:
            return arguments, text, _COMMANDS[words[named].rsplit("/", 1)[-1]]
    raise RecipeError(f"{path} starts none of the tools that are converted: {', '.join(dict.fromkeys(_COMMANDS))}.")


def _arguments(words: list[str]) -> dict[str, Any]:
    """`sft --a 1 --b x y` as a mapping, with the word of the command as `command`."""
    found: dict[str, list[str]] = {}
    command = words[0] if words and not words[0].startswith("-") else None
    key = ""
    for word in words[1 if command else 0 :]:
        if word in ("|", "&&", ";", ">", "2>&1", "&"):
            break
        if word.startswith("--"):
            key, _, value = word[2:].partition("=")
            found[key] = [value] if value else []
        elif key:
            found[key].append(word)
    values = {key: [yaml.load(one, Loader=Loader) for one in ones] for key, ones in found.items()}
    plain = {key: True if not ones else ones[0] if len(ones) == 1 else ones for key, ones in values.items()}
    return {**({"command": command} if command else {}), **plain}


def recognize(config: dict[str, Any], path: Path) -> str:
    """The tool whose config it is.

    Raises:
        RecipeError: No tool's keys are there.
    """
    keys = set(config)
    model = config.get("model")
    if "stages" in keys and isinstance(model, dict):
        raise RecipeError(f"{path} is an hfpipe recipe already. Try: hfpipe check {path}")
    if "base_model" in keys:
        return "axolotl"
    if any(isinstance(value, dict) and "_component_" in value for value in config.values()):
        return "torchtune"
    if isinstance(model, dict) and "model_name" in model:
        return "oumi"
    if "model_name_or_path" in keys and keys & {"stage", "finetuning_type", "template", "cutoff_len"}:
        return "llama-factory"
    if isinstance(model, str) and keys & {"train_dataset", "peft_config", "dist_config"}:
        return "llama-factory"
    if "model_name_or_path" in keys:
        return "trl"
    if isinstance(model, str) and keys & {"dataset", "tuner_type", "train_type", "lora_rank", "cached_dataset"}:
        return "ms-swift"
    if keys & {"resources", "run", "setup", "compute_environment", "distributed_type", "zero_optimization"}:
        raise OutOfScope(f"{path} says how a job is launched, not what is trained. Convert the config of the training.")
    raise RecipeError(
        f"{path} has the keys {', '.join(sorted(keys)[:8])}, by which no tool is recognized. Say whose config it is: "
        "--from axolotl, llama-factory, trl, torchtune, oumi or ms-swift."
    )
