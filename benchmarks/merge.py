"""The memory of a merge beside the size of the model: what the process holds of its own, and what it maps.

    python benchmarks/merge.py [--layers 24] [--dtype bfloat16] [--quantized nf4]

Makes a random Llama and a random adapter of all its linear layers in a temporary folder, merges them as `hfpipe merge`
does, and looks into /proc (Linux) while it goes. Memory of Python and the libraries is left out. With `--quantized` the
adapter is one of the base in 4 or 8 bits; with `--files` the base's files are in few bits already.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from hfpipe.model.create import train_tokenizer
from hfpipe.model.load import ModelRef, quantization_config
from hfpipe.model.merge import merge_adapter
from hfpipe.recipe import Model, Quantization

SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "max_position_embeddings": 512}
TEXTS = ["The cat sat by the river and said mew.", "The dog sat by a tree and said bark."]


def make_adapter(folder: Path, layers: int, dtype: torch.dtype, few: Quantization | None = None) -> tuple[Path, Any]:
    """Writes a random base, in few bits if so told, and a random adapter of it.

    Returns:
        The adapter's folder, and a tokenizer.
    """
    tokenizer = train_tokenizer(TEXTS, 300, 512)
    config = AutoConfig.for_model("llama", vocab_size=32_000, num_hidden_layers=layers, **SIZES)
    base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    base.save_pretrained(folder / "base")
    lora = LoraConfig(r=8, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(folder / "adapter")
    if few is not None:
        config = quantization_config(few, "causal")
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype, quantization_config=config)
        shutil.rmtree(folder / "base")
        base.save_pretrained(folder / "base")
    saved = folder / "adapter" / "adapter_config.json"
    named = json.loads(saved.read_text()) | {"base_model_name_or_path": str(folder / "base")}
    saved.write_text(json.dumps(named))
    return folder / "adapter", tokenizer


def resident(kind: str) -> int:
    """Bytes of this process that lie in memory: `RssAnon` its own, `VmRSS` with mapped files."""
    found = re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=24, help="of 17 M weights each")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--quantized", choices=["nf4", "int8"], help="an adapter of the base in 4 or 8 bits")
    parser.add_argument("--files", action="store_true", help="of a base whose files are in 4 or 8 bits")
    options = parser.parse_args()
    quantization = Quantization.model_validate({"type": options.quantized}) if options.quantized else None
    few, quantization = (quantization, None) if options.files else (None, quantization)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter, tokenizer = make_adapter(folder, options.layers, getattr(torch, options.dtype), few)
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what the making has freed would be used again, uncounted
        kinds = ("RssAnon", "VmRSS")
        before = {kind: resident(kind) for kind in kinds}
        peak, done = dict(before), threading.Event()

        def watch() -> None:
            while not done.wait(0.002):
                peak.update({kind: max(peak[kind], resident(kind)) for kind in kinds})

        thread = threading.Thread(target=watch)
        thread.start()
        begin = time.perf_counter()
        ref = ModelRef(str(adapter), Model(id="base"), quantization=quantization)
        found = merge_adapter(ref, tokenizer, folder / "merged", TEXTS, 100.0)
        seconds = time.perf_counter() - begin
        done.set()
        thread.join()
        size = sum(file.stat().st_size for file in (folder / "merged").glob("*.safetensors"))
    own, mapped = ((peak[kind] - before[kind]) / size for kind in kinds)
    print(f"merged {size / 1e6:,.0f} MB in {found.dtype} into the base {found.base}, in {seconds:.0f} s")
    print(f"at the peak, of the merged model's size: {own:.2f} own memory, {mapped:.2f} with the mapped files")


if __name__ == "__main__":
    main()
