"""Serves a trained model for any client of OpenAI's protocol: `hfpipe serve RUN`, by `transformers serve`."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path

from transformers.utils.import_utils import is_serve_available

from hfpipe.core.errors import MachineError, RecipeError
from hfpipe.core.upstream import list_served_model
from hfpipe.pipeline.trained import Trained, open_trained, whole_model
from hfpipe.report.usage import usage_in_run, vllm_command

HOST = "127.0.0.1"  # whoever wants to be reached from elsewhere starts the server by its own command


def serve(folder: Path, stage: str | None, port: int) -> None:
    """Serves the whole model of a stage on this machine until it is stopped.

    Args:
        folder: The run folder.
        stage: Which stage; the last finished one when None.
        port: The port on loopback.

    Raises:
        RecipeError: There is no such stage, it writes no text, has no chat template, or is an adapter that is not
            merged: `transformers serve` loads whole models.
        MachineError: The packages that serve are not installed, or the port is taken.
    """
    trained = open_trained(folder, stage, "serve")
    if not trained.tokenizer.chat_template:
        raise RecipeError(
            f"stage {trained.stage.name} of {folder} has no chat template, which the protocol needs. Give "
            "the recipe one (model.tokenizer.chat_template), or ask the model by `hfpipe generate`."
        )
    place = whole_model(folder, trained.recipe, trained.stage.name).path
    if not is_serve_available():
        raise MachineError("`hfpipe serve` needs packages that are not installed: pip install 'hfpipe[serving]'.")
    with socket.socket() as asked:
        asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            asked.bind((HOST, port))
        except OSError as error:
            raise MachineError(f"port {port} of {HOST} is taken: {error.strerror}. Take another: --port N.") from error
    for line in _lines(trained, place, port):
        print(line, flush=True)
    from transformers.cli.serve import Serve

    list_served_model(place)
    Serve(force_model=place, host=HOST, port=port, trust_remote_code=trained.recipe.model.trust_remote_code)


def _lines(trained: Trained, place: str, port: int) -> list[str]:
    """Lines with the address, a client, and the commands of other servers."""
    vllm = vllm_command(usage_in_run(trained.folder, trained.recipe, trained.stage.name, Path(place)), trained.recipe)
    return [
        f"serving {place} on http://{HOST}:{port}/v1 (Ctrl-C ends it). A client:",
        "  from openai import OpenAI",
        f'  client = OpenAI(base_url="http://{HOST}:{port}/v1", api_key="none")',
        '  turns = [{"role": "user", "content": "..."}]',
        f'  answer = client.chat.completions.create(model="{place}", messages=turns, temperature=0)',
        "  print(answer.choices[0].message.content)",
        f"the same to other machines: transformers serve {shlex.quote(place)} --host 0.0.0.0",
        *([f"for many users at once:    {vllm}"] if vllm else []),
        "",
    ]
