"""Takes a trained model out of Hugging Face's formats: `hfpipe export RUN --to gguf`, for llama.cpp and Ollama.

llama.cpp's own converter does the work where it is installed; where it is not, the commands are written out. The file
is read again by transformers and compared with the model. Beside it lies a Modelfile for Ollama with the chat template
it was trained with and its stop tokens. Ollama has templates of its own kind, so the trained one is taken apart into
what stands around each turn, and what is put together of the parts is compared with it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_gguf_available

from hfpipe.core import display
from hfpipe.core.errors import MachineError
from hfpipe.core.files import GIB, write_text
from hfpipe.data.prompts import Asking
from hfpipe.evaluation.generation import stop_tokens
from hfpipe.model.adapter import divergence, probe
from hfpipe.pipeline.quants import WRITTEN_AT_ONCE, require_quant
from hfpipe.pipeline.trained import Trained, open_trained, whole_model
from hfpipe.recipe.faults import listed

# Texts whose next tokens the file and the model have to find alike.
PROBES = (
    "The quick brown fox jumps over the lazy dog, and then it rests in the shade of a tree until evening.",
    "To bake bread you need flour, water, salt and yeast. First mix the flour with the water, then wait.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # 5",
    "北京是中国的首都。",
)
MOST_NATS = 1.0  # a token; 4 bits cost a few hundredths, and weights in the wrong order several
CONVERTER, QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"


def export_gguf(folder: Path, stage: str | None, quant: str, output: str | None) -> Path:
    """Writes a stage's whole model as one GGUF file, with a Modelfile for Ollama beside it.

    Args:
        folder: The run folder.
        stage: Which stage; the last finished one when None.
        quant: How the weights are stored, one of `QUANTS`.
        output: The folder that it is written to; `export` in the run folder when None.

    Returns:
        The GGUF file.

    Raises:
        RecipeError: There is no such stage or form, the stage writes no text, or it is an adapter that is not merged.
        MachineError: llama.cpp is not installed: the message has the commands; or it does not take the model, or the
            file says something else than the model.
    """
    require_quant(quant)
    trained = open_trained(folder, stage, "export")
    place = Path(whole_model(folder, trained.recipe, trained.stage.name).path)
    target = Path(output) if output else folder / "export"
    file = target / f"{trained.recipe.name}-{trained.stage.name}-{quant}.gguf"
    write_text(target / "Modelfile", modelfile(trained, place, file.name))
    display.say(f"{target / 'Modelfile'} written, for Ollama", "result")
    commands = _commands(place, file, quant)
    program = _program()
    if program is None:
        told = "\n".join(f"  {shlex.join(command)}" for command in commands)
        raise MachineError(
            f"llama.cpp is not installed here, and its converter makes the file. Install it (a checkout of "
            f"https://github.com/ggml-org/llama.cpp with `pip install gguf`, named by LLAMA_CPP=FOLDER; {QUANTIZER} on "
            f"the PATH for forms other than {listed(WRITTEN_AT_ONCE)}) and run this again, or run\n{told}"
        )
    if len(commands) > 1 and shutil.which(QUANTIZER) is None:
        raise MachineError(
            f"{quant} is made by llama.cpp's {QUANTIZER}, which is not on the PATH. Take --quant q8_0, or add it."
        )
    for command in commands:
        with display.doing(command[0]):
            _run([*program, *command[1:]] if command[0] == CONVERTER else command)
    if len(commands) > 1:
        Path(commands[0][3]).unlink()
    with display.doing(f"comparing {file.name} with the model"):
        compared = _compared(trained, place, file)
    display.clear()
    print(f"{file} written, {file.stat().st_size / GIB:.2f} GiB; {compared}. Try it:", flush=True)
    print(f"  ollama create {trained.recipe.name} -f {target / 'Modelfile'} && ollama run {trained.recipe.name}")
    print(f"  llama-cli -m {file} --jinja")
    return file


def _commands(place: Path, file: Path, quant: str) -> list[list[str]]:
    """The commands of llama.cpp that make the file."""
    if quant in WRITTEN_AT_ONCE:
        return [[CONVERTER, str(place), "--outfile", str(file), "--outtype", quant]]
    whole = file.with_name(f"{file.stem}-whole.gguf")
    convert = [CONVERTER, str(place), "--outfile", str(whole), "--outtype", "bf16"]
    return [convert, [QUANTIZER, str(whole), str(file), quant.upper()]]


def _program() -> list[str] | None:
    """The command that starts llama.cpp's converter; None where it is not here."""
    if named := os.environ.get("LLAMA_CPP"):
        script = Path(named) / CONVERTER
        if not script.is_file():
            raise MachineError(
                f"LLAMA_CPP is {named}, and there is no {CONVERTER} in it. Name a checkout of llama.cpp."
            )
        return [sys.executable, str(script)]
    found = shutil.which(CONVERTER)
    if found is None:
        return None
    return [found] if os.access(found, os.X_OK) else [sys.executable, found]


def _run(command: Sequence[str]) -> None:
    """Runs a program of llama.cpp.

    Raises:
        MachineError: It fails; the message has the end of what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise MachineError(f"llama.cpp did not take the model: {said[-600:]} The command was {shlex.join(command)}")


def _compared(trained: Trained, place: Path, file: Path) -> str:
    """Reads the file again and says how far its log-probabilities are from the model's.

    Raises:
        MachineError: So far that it is another model.
    """
    if not is_gguf_available():
        return "not compared with the model, which takes `pip install gguf`"
    probes = []
    for folder, words in ((place, {}), (file.parent, {"gguf_file": file.name})):
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **words).eval()
        except ValueError as error:
            if "not supported" not in str(error):
                raise MachineError(f"{file} cannot be read again: {error}") from error
            return "not compared with the model: transformers does not read GGUF of this architecture"
        probes.append(probe(model, trained.tokenizer, PROBES))
    nats = divergence(*probes)
    if not nats < MOST_NATS:
        raise MachineError(
            f"{file} says something else than {place}: {nats:.3g} nats a token, where {MOST_NATS:g} is much. "
            "Look for a newer llama.cpp, or take another --quant."
        )
    return f"read again, and {nats:.2g} nats a token from the model"


@dataclass(frozen=True)
class Turns:
    """A chat template taken apart.

    Args:
        around: By role, the text before and behind the content of a turn.
        without_system: The text that stands first where no system turn is given.
        opening: The text behind the last turn, which opens the answer.
    """

    around: dict[str, tuple[str, str]]
    without_system: str
    opening: str

    def text(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation as Ollama will write it."""
        first = "" if messages[0]["role"] == "system" else self.without_system
        turns = [turn["content"].join(self.around[turn["role"]]) for turn in messages]
        return first + "".join(turns) + self.opening

    def go(self) -> str:
        """The template in Go's language, which Ollama has."""
        said = []
        for number, (role, (before, behind)) in enumerate(self.around.items()):
            test = "if" if number == 0 else "else if"
            said.append(f'{{{{ {test} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{behind}')
        first = f"{{{{ if not .System }}}}{self.without_system}{{{{ end }}}}" if self.without_system else ""
        return f"{first}{{{{ range .Messages }}}}{''.join(said)}{{{{ end }}}}{{{{ end }}}}{self.opening}"


def turns_of(tokenizer: Any) -> Turns | None:
    """A tokenizer's chat template taken apart; None where what is put together of the parts is another text."""
    for roles in (("system", "user", "assistant", "user"), ("user", "assistant", "user")):  # not all have a system
        try:
            found = _taken_apart(tokenizer, roles)
            if _is_the_same(tokenizer, found):
                return found
        except (TemplateError, TypeError, ValueError, KeyError, IndexError):
            continue
    return None


def _written(tokenizer: Any, turns: Sequence[dict[str, str]]) -> str:
    """A conversation with the opening of an answer, without the BOS token where llama.cpp puts it in front itself.

    Its converter looks at whether the tokenizer does so. SmolLM2's does not, though its turns begin with its BOS token.
    """
    text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
    bos = tokenizer.bos_token_id
    is_added = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return text.removeprefix(tokenizer.bos_token) if is_added else text


def _taken_apart(tokenizer: Any, roles: Sequence[str]) -> Turns:
    """Cuts the text of a conversation at its contents, and each piece between two into the end of one turn and the
    beginning of the next.

    Where exactly that is does not matter as long as every conversation comes out the same: what stands before all turns
    of the user is their beginning, and what stands behind all of them their end.
    """
    turns = [{"role": role, "content": f"(({role} said {number}))"} for number, role in enumerate(roles)]
    pieces, rest = [], _written(tokenizer, turns)
    for turn in turns:
        before, rest = rest.split(turn["content"])
        pieces.append(before)
    first, behind_answer = pieces[0], pieces[-1]
    without_system, alone = _written(tokenizer, turns[-1:]).split(turns[-1]["content"])
    if alone != rest:
        raise ValueError("the opening of an answer depends on what was said before")
    befores = [without_system, behind_answer, *(pieces[1:2] if roles[0] == "system" else ())]
    before_user = _beginning([text[::-1] for text in befores])[::-1]
    behind_user = _beginning([rest, pieces[-2]])
    around = {
        "user": (before_user, behind_user),
        "assistant": (pieces[-2].removeprefix(behind_user), behind_answer.removesuffix(before_user)),
    }
    if roles[0] == "system":
        around = {"system": (first, pieces[1].removesuffix(before_user)), **around}
    return Turns(around, without_system.removesuffix(before_user), rest.removeprefix(behind_user))


def _beginning(texts: Sequence[str]) -> str:
    """The longest text that all begin with."""
    shortest = min(texts, key=len)
    same = (all(text[place] == letter for text in texts) for place, letter in enumerate(shortest))
    return shortest[: next((place for place, alike in enumerate(same) if not alike), len(shortest))]


def _is_the_same(tokenizer: Any, turns: Turns) -> bool:
    """Returns True if conversations of several lengths are written as the tokenizer's own template writes them."""
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is two and two?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "And three and three?"},
        {"role": "assistant", "content": "Six."},
        {"role": "user", "content": "Thank you"},
    ]
    parts = [talk[1:2], talk[1:4], talk[1:], *([talk[:2], talk[:4], talk] if "system" in turns.around else [])]
    return all(turns.text(part) == _written(tokenizer, part) for part in parts)


def modelfile(trained: Trained, place: Path, model: str) -> str:
    """The Modelfile of Ollama: the file of weights, the template that the model was trained with, its stop tokens."""
    tokenizer, asking = trained.tokenizer, trained.asking
    lines = [f"# stage {trained.stage.name} of {trained.recipe.name}, by hfpipe", f"FROM ./{model}"]
    if asking.is_chat:
        turns = turns_of(tokenizer)
        lines += (
            [f'TEMPLATE """{turns.go()}"""']
            if turns is not None
            else [
                "# The chat template of this model does more than Ollama's can say: Ollama takes the one in the file,",
                "# as far as it knows it. Compare its answers with those of `hfpipe chat`.",
            ]
        )
    elif len(asking.fields) > 1:
        lines += [
            f"# The model was trained on prompts built of {listed(asking.fields)}: ask it whole prompts.",
            _plain(),
        ]
    else:
        lines.append(_plain(asking))
    ids = stop_tokens(_Config(place), tokenizer, {})
    lines += [
        f'PARAMETER stop "{text}"' for text in dict.fromkeys(map(tokenizer.decode, [[one] for one in ids])) if text
    ]
    return "\n".join([*lines, "PARAMETER temperature 0", ""])


def _plain(asking: Asking | None = None) -> str:
    prompt = asking.of_text("{{ .Prompt }}")["prompt"] if asking is not None else "{{ .Prompt }}"
    return f'TEMPLATE """{prompt}"""'


class _Config:
    """The generation config of a model that is not loaded."""

    def __init__(self, place: Path) -> None:
        from transformers import GenerationConfig

        has_one = (place / "generation_config.json").is_file()
        self.generation_config = GenerationConfig.from_pretrained(str(place)) if has_one else GenerationConfig()
