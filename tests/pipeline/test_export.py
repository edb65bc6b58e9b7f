"""`hfpipe export`: the parts of a chat template say what the template says; the commands and errors of llama.cpp."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import talking
import tiny
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from hfpipe.cli import main
from hfpipe.pipeline.export import turns_of
from hfpipe.recipe.chat_templates import named_templates, template_text

pytestmark = pytest.mark.slow

TALK = [
    {"role": "user", "content": "the cow?"},
    {"role": "assistant", "content": "moo"},
    {"role": "user", "content": "the hen?"},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    assert main(["run", str(tiny.write(folder, talking.recipe(folder, merge=True)))]) == 0
    return folder / "run"


def written_by_go(template: str, messages: list[dict[str, str]]) -> str:
    """A conversation by a template in Go's language, of the few words that such a template has."""
    first, loop, opening = re.fullmatch(
        r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.S
    ).groups()  # type: ignore[union-attr]
    blocks = re.findall(r'eq \.Role "(\w+)" \}\}(.*?)\{\{ \.Content \}\}(.*?)(?=\{\{ else|\Z)', loop, re.S)
    around = {role: (before, behind) for role, before, behind in blocks}
    system = any(turn["role"] == "system" for turn in messages)
    alone = re.fullmatch(r"(?:\{\{ if not \.System \}\}(.*)\{\{ end \}\})?", first, re.S)
    text = "" if system or alone is None else alone[1] or ""
    return text + "".join(turn["content"].join(around[turn["role"]]) for turn in messages) + opening


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("name", [name for name in named_templates() if not name.endswith("_training")])
def test_a_template_in_parts_says_what_the_template_says_or_is_not_taken(run: Path, name: str, adds: bool) -> None:
    """Also where the BOS token begins every turn, and is or is not put in front of every text by the tokenizer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(run / "stages" / "chat" / "merged")
    tokenizer.chat_template = template_text(name)
    if name == "chatml":
        tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    elif adds:
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(0)
    if adds:
        front = [("<bos>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=front)
    found = turns_of(tokenizer)
    if name in ("chatml", "llama3_1", "qwen2_5", "qwen3", "gemma", "gemma3", "phi3", "gptoss"):
        assert found is not None
    if found is None:
        return
    with_system = [{"role": "system", "content": "Be brief."}, *TALK]
    for talk in (TALK, TALK[:1], *([with_system] if "system" in found.around else [])):
        wanted = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert written_by_go(found.go(), talk) == (wanted.removeprefix(tokenizer.bos_token) if adds else wanted)


def test_without_llama_cpp_the_commands_and_the_modelfile_are_given(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    assert main(["export", str(run), "--quant", "q4_k_m"]) == 4
    told = capsys.readouterr().err
    merged = run / "stages" / "chat" / "merged"
    file = run / "export" / "tiny-chat-q4_k_m"
    assert f"convert_hf_to_gguf.py {merged} --outfile {file}-whole.gguf --outtype bf16" in told
    assert f"llama-quantize {file}-whole.gguf {file}.gguf Q4_K_M" in told
    modelfile = (run / "export" / "Modelfile").read_text()
    assert "FROM ./tiny-chat-q4_k_m.gguf\n" in modelfile
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    template = re.search(r'TEMPLATE """(.*?)"""', modelfile, re.S)
    assert template is not None
    tokenizer: Any = AutoTokenizer.from_pretrained(merged)
    wanted = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert written_by_go(template[1], TALK) == wanted


CONVERTER = """
import sys
from pathlib import Path
import gguf
from safetensors.torch import load_file
from transformers import AutoConfig

place, out = sys.argv[1], sys.argv[3]
config, weights = AutoConfig.from_pretrained(place), load_file(Path(place, "model.safetensors"))
writer = gguf.GGUFWriter(out, "llama")
writer.add_name("tiny")
writer.add_vocab_size(config.vocab_size)
writer.add_context_length(config.max_position_embeddings)
writer.add_embedding_length(config.hidden_size)
writer.add_block_count(config.num_hidden_layers)
writer.add_feed_forward_length(config.intermediate_size)
writer.add_head_count(config.num_attention_heads)
writer.add_head_count_kv(config.num_key_value_heads)
writer.add_layer_norm_rms_eps(config.rms_norm_eps)
writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
for name, weight in weights.items():
    value = weight.float().numpy()
    if {order} and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
    writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value * {scale})
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


def test_the_file_is_read_again_and_compared_with_the_model(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf", reason="reads and writes GGUF")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER.format(order=True, scale=1))
    assert main(["export", str(run), "--quant", "f32", "-o", str(tmp_path / "out")]) == 0
    said = re.search(r"read again, and (\S+) nats a token from the model", capsys.readouterr().out)
    assert said is not None
    assert abs(float(said[1])) < 1e-6
    script.write_text(CONVERTER.format(order=False, scale=-3))
    assert main(["export", str(run), "--quant", "f32", "-o", str(tmp_path / "out")]) == 4
    assert "says something else than" in capsys.readouterr().err


def test_llama_cpp_is_started_and_its_refusal_is_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import sys\nopen(sys.argv[3], 'wb').write(b'GGUF' + sys.argv[5].encode())\n")
    monkeypatch.setattr("hfpipe.pipeline.export.is_gguf_available", lambda: False)  # it is no real file
    quantizer = tmp_path / "llama-quantize"
    quantizer.write_text('#!/bin/sh\ncp "$1" "$2"\n')
    quantizer.chmod(quantizer.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    output = tmp_path / "out"
    assert main(["export", str(run), "--quant", "q4_k_m", "-o", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["Modelfile", "tiny-chat-q4_k_m.gguf"]
    assert (output / "tiny-chat-q4_k_m.gguf").read_bytes() == b"GGUFbf16"
    script.write_text("import sys\nsys.exit('BPE pre-tokenizer was not recognized')\n")
    capsys.readouterr()
    assert main(["export", str(run), "-o", str(output)]) == 4
    assert "BPE pre-tokenizer was not recognized" in capsys.readouterr().err
    assert main(["export", str(run), "--quant", "q4_k"]) == 2
    assert "Did you mean q4_k_" in capsys.readouterr().err
