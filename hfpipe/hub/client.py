"""The client of the Hub for a push, logged in as somebody who may write."""

from __future__ import annotations

from typing import Any

from huggingface_hub import HfApi, constants, get_token

from hfpipe.core.errors import MachineError
from hfpipe.core.http import Patience, limit_waiting


def logged_in(patience: Patience | None = None) -> HfApi:
    """The client with this machine's token.

    Args:
        patience: How long to wait for the Hub, where not as long as everywhere.

    Raises:
        MachineError: It has none, or may not talk to the Hub.
    """
    if constants.is_offline_mode():
        raise MachineError("HF_HUB_OFFLINE is set, which forbids all traffic with the Hub. Unset it.")
    token = get_token()
    if not token:
        raise MachineError("this machine is not logged in to the Hub. Run `hf auth login`, or set HF_TOKEN.")
    limit_waiting(patience)
    return HfApi(token=token)


def who_may_write(api: HfApi) -> dict[str, Any]:
    """Asks the Hub for the token's owner.

    Raises:
        MachineError: The token may only read.
    """
    me = api.whoami(cache=True)  # the Hub answers it a few times an hour only
    if access_token(me).get("role") == "read":
        raise MachineError(
            "the token of this machine may only read. Make one that may write at https://huggingface.co/settings/tokens"
            " and log in with it: `hf auth login`."
        )
    return me


def access_token(me: dict[str, Any]) -> dict[str, Any]:
    """Role and scopes of the token, as far as the Hub tells them."""
    return (me.get("auth") or {}).get("accessToken") or {}


def full_name(repo_id: str, me: dict[str, Any]) -> str:
    return repo_id if "/" in repo_id else f"{me['name']}/{repo_id}"
