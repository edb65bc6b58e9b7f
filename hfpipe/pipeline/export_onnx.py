"""Takes a trained model to ONNX: `hfpipe export RUN --to onnx`, by transformers' own exporter.

The graph takes tokens with their mask and gives logits: the classes of a classifier, else those of each next token (a
text is not made with it: it keeps no cache). It is read again by ONNX Runtime and compared with the model.
"""

from __future__ import annotations

import inspect
import io
import logging
from contextlib import contextmanager, redirect_stdout
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hfpipe.core import display
from hfpipe.core.errors import MachineError, RecipeError
from hfpipe.core.files import GIB
from hfpipe.model.load import AUTO_CLASSES
from hfpipe.pipeline.context import quiet_libraries
from hfpipe.pipeline.export import PROBES
from hfpipe.pipeline.finished import finished_stage
from hfpipe.pipeline.trained import tokenizer_named, whole_model
from hfpipe.recipe import load_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MOST_APART = 1e-2  # of the largest logit; rounding in float32 costs less than a thousandth


def export_onnx(folder: Path, stage: str | None, output: str | None) -> Path:
    """Writes a stage's whole model as an ONNX graph with its weights, config and tokenizer beside it.

    Args:
        folder: The run folder.
        stage: Which stage; the last finished one when None.
        output: The folder that it is written to; `export/onnx` in the run folder when None.

    Returns:
        The graph.

    Raises:
        RecipeError: There is no such stage, it is an encoder-decoder, or an adapter that is not merged.
        MachineError: The packages of ONNX are not installed, or the exporter does not take the model, or the graph says
            something else than the model.
    """
    recipe = load_recipe(folder / "recipe.yaml")
    chosen = finished_stage(folder, recipe, stage)
    if chosen.task == "seq2seq":
        raise RecipeError(
            f"stage {chosen.name} of {folder} trains an encoder-decoder, which is no single graph. Load the model by "
            "transformers, or export its parts by transformers.exporters."
        )
    ref = whole_model(folder, recipe, chosen.name)
    if any(util.find_spec(name) is None for name in PACKAGES):
        raise MachineError(f"--to onnx needs {', '.join(PACKAGES)}: pip install 'hfpipe[onnx]', then run this again.")
    quiet_libraries()
    tokenizer = tokenizer_named(ref)
    trust = ref.options.trust_remote_code
    model = AUTO_CLASSES[chosen.task].from_pretrained(ref.path, dtype=torch.float32, trust_remote_code=trust).eval()
    model.config.use_cache = False
    target = Path(output) if output else folder / "export" / "onnx"
    with display.doing("exporting to ONNX"), _quiet():
        _write(model, _inputs(model, tokenizer, list(PROBES[:2])), target)
    tokenizer.save_pretrained(target)
    file = target / "model.onnx"
    size = sum(part.stat().st_size for part in target.glob("model.onnx*")) / GIB
    with display.doing("comparing it with the model"):
        compared = _compared(model, tokenizer, target)
    display.clear()
    print(f"{file} written, {size:.2f} GiB with its weights; {compared}. In Python:")
    print("  from transformers import AutoTokenizer\n  from transformers.exporters import ExportedModel")
    print(f'  tokenizer = AutoTokenizer.from_pretrained("{target}")')
    print(f'  model = ExportedModel.from_pretrained("{target}")  # on ONNX Runtime')
    print('  logits = model(**tokenizer("...", return_tensors="pt")).logits', flush=True)
    return file


def _inputs(model: Any, tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """The tokens of texts with their mask, as the model takes them."""
    taken = inspect.signature(model.forward).parameters
    found = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    return {name: value for name, value in found.items() if name in taken}


def _write(model: Any, inputs: dict[str, Any], target: Path) -> None:
    """Writes the graph of a model for any number of rows of any length.

    Raises:
        MachineError: The exporter does not take the model.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        config = OnnxConfig(dynamic=True, dynamic_shapes=dict.fromkeys(inputs, free))
        OnnxExporter().export(model, inputs, config).save_pretrained(target)
    except OSError:
        raise
    except Exception as error:  # of many kinds: torch's, onnxscript's, transformers'
        said = " ".join(str(error).split())[:600]
        raise MachineError(
            f"transformers' exporter to ONNX did not take the model ({type(model).__name__}): {said} Look for a newer "
            "transformers, or export to gguf."
        ) from error


def _compared(model: Any, tokenizer: Any, target: Path) -> str:
    """Reads the graph again and says how far its logits are from the model's.

    Raises:
        MachineError: So far that it is another model.
    """
    from transformers.exporters import ExportedModel

    graph: Any = ExportedModel.from_pretrained(target, device="cpu")
    apart = largest = 0.0
    for texts in (list(PROBES), *([text] for text in PROBES)):
        inputs = _inputs(model, tokenizer, texts)
        with torch.no_grad():
            wanted = model(**inputs).logits
        said = torch.as_tensor(graph(**inputs).logits)
        if wanted.dim() == 3:  # what stands at padding means nothing
            read = inputs["attention_mask"].bool()
            wanted, said = wanted[read], said[read]
        apart = max(apart, (wanted - said).abs().max().item())
        largest = max(largest, wanted.abs().max().item())
    if not apart <= MOST_APART * largest:
        raise MachineError(
            f"{target / 'model.onnx'} says something else than the model: logits of up to {largest:.3g} are "
            f"{apart:.3g} apart. Look for newer onnx, onnxscript and onnxruntime."
        )
    return f"read again by ONNX Runtime: logits of up to {largest:.3g} are {apart:.2g} apart at most"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the steps that torch's exporter prints, and its warnings about functions that nobody calls, to itself."""
    loud = logging.getLogger("torch.onnx")
    before = loud.level
    loud.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        loud.setLevel(before)
