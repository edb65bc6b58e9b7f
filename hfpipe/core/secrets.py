"""Keeps tokens and passwords out of everything that is printed, written or pushed. Imports nothing heavy."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

# Each by the beginning that its service gives it.
_KEYS = (
    r"hf_[A-Za-z0-9]{16,}",
    r"\bhf_(?=\w{10})\w*(?:[Tt]oken|TOKEN|[Ss]ecret|SECRET)(?![A-Za-z])\w*",  # hf_my_token_1, and not hf_tokenizer
    r"\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_\w{22,}|\bglpat-[\w-]{20,}",
    r"\bA[KS]IA[0-9A-Z]{16}\b|\bAccountKey=[A-Za-z0-9+/]{20,}=*",
    r"\bAIza[\w-]{35}|\bya29\.[\w-]{20,}",  # Google
    r"\bsk-(?=[\w-]*\d)[A-Za-z0-9_-]{20,}|\b[sr]k_(?:live|test)_\w{16,}",  # OpenAI, Anthropic; Stripe
    r"\bgsk_\w{20,}|\br8_\w{30,}|\bxai-\w{20,}|\bnvapi-[\w-]{20,}",  # other servers of models
    r"\bwandb_v\d_\w{20,}|\bxox[abprs]-[A-Za-z0-9-]{10,}",  # W&B, Slack
    r"\bnpm_[A-Za-z0-9]{36}|\bpypi-[\w-]{30,}|\bdckr_pat_[\w-]{20,}|\bdapi[0-9a-f]{32}",
    r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]*|\bBearer\s+(?=\S*\d)[\w.~+/=-]{16,}",
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----)?",
)
TOKEN = re.compile("|".join(_KEYS), re.DOTALL)
PASSWORD_IN_URL = re.compile(r"(://[^/\s:@]+:)[^/\s:@]+(?=@)")
NAME_IN_URL = re.compile(r"(://)(?!hf_\*)[^/\s:@]{8,}(?=@)")  # https://TOKEN@host, as git takes it
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


def has_secret(text: str, own: Sequence[str] | None = None) -> bool:
    """Returns True if a text holds a token or key, one of this machine's, or a URL with a password or a signature.

    Args:
        text: The text.
        own: The tokens of this machine, where they are known already; see `own_tokens`.
    """
    return text != without_secrets(text, own)


def without_secrets(text: str, own: Sequence[str] | None = None) -> str:
    """Returns the text with every such token and password made unreadable; see `has_secret`."""
    for token in own_tokens() if own is None else own:
        text = text.replace(token, "hf_***")  # which is no alias in YAML, as *** would be
    text = NAME_IN_URL.sub(r"\1***", PASSWORD_IN_URL.sub(r"\1***", TOKEN.sub("hf_***", text)))
    while (masked := SECRET_IN_QUERY.sub(r"\1***", text)) != text:  # one of each URL at a time
        text = masked
    return text
