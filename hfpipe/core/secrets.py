"""Keeps tokens and passwords out of everything that is printed, written or pushed. Imports nothing heavy."""

from __future__ import annotations

import os
import re
from pathlib import Path

# Tokens of Hugging Face, what calls itself one (hf_my_token_1, not hf_tokenizer), and keys of GitHub and AWS.
TOKEN = re.compile(
    r"hf_[A-Za-z0-9]{16,}|\bhf_(?=\w{10})\w*(?:[Tt]oken|TOKEN|[Ss]ecret|SECRET)(?![A-Za-z])\w*"
    r"|\bgh[pousr]_[A-Za-z0-9]{36}|\bAKIA[0-9A-Z]{16}\b"
)
PASSWORD_IN_URL = re.compile(r"(://[^/\s:@]+:)[^/\s:@]+(?=@)")
# In the query of a URL: signatures of storage, tokens, keys.
SECRET_IN_QUERY = re.compile(
    r"(://[^\s'\"<>]*?[?&](?:[\w-]*(?:token|signature|secret|password|credential|api[_-]?key|key-pair-id)|sig|key)=)"
    r"(?!\*\*\*)[^&\s'\"<>#]+",
    re.IGNORECASE,
)
SHORTEST = 8  # characters of a token of this machine: a shorter text would be found in harmless words


def own_tokens() -> list[str]:
    """The tokens that this machine is logged in to the Hub with."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    file = Path(os.environ.get("HF_TOKEN_PATH") or home / "token").expanduser()
    try:
        stored = file.read_text()
    except (OSError, UnicodeDecodeError):
        stored = ""
    found = (os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN"), stored)
    return [token.strip() for token in found if token and len(token.strip()) >= SHORTEST]


def has_secret(text: str) -> bool:
    """Whether a text holds a token of Hugging Face, one of this machine's, or a URL with a password or a signature."""
    return text != without_secrets(text)


def without_secrets(text: str) -> str:
    """The text with every such token and password made unreadable."""
    for token in own_tokens():
        text = text.replace(token, "hf_***")  # which is no alias in YAML, as *** would be
    text = PASSWORD_IN_URL.sub(r"\1***", TOKEN.sub("hf_***", text))
    while (masked := SECRET_IN_QUERY.sub(r"\1***", text)) != text:  # one of each URL at a time
        text = masked
    return text
