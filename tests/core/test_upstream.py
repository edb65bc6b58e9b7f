"""The libraries still lack what `core/upstream.py` makes up for, and still have what it uses.

A test that fails here after an upgrade asks for a look: the function can go, or has to follow the library.
"""

import ast
import copy
import gzip
import inspect
import json
import re
import tomllib
import tracemalloc
from collections.abc import Iterator
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from datasets import DownloadConfig, IterableDataset, load_dataset
from datasets.utils.file_utils import xopen
from hub_server import HubServer
from huggingface_hub import CacheNotFound, CommitOperationAdd, HfApi
from packaging.requirements import Requirement
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from sacrebleu.metrics import BLEU, CHRF, TER
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertTokenizerFast,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerState,
    TrainingArguments,
    modeling_utils,
)
from transformers.distributed import DistributedConfig, fsdp, mixin
from transformers.integrations import deepspeed as integration

from hfpipe.core import upstream
from hfpipe.data.sources.load import load_rows
from hfpipe.recipe import Source

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
PYPROJECT = Path(__file__).parent.parent.parent / "pyproject.toml"


def llama(**words: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=96, **SMALL, **words))


def with_layers_replaced(folder: Path) -> Any:
    """A Llama from files in 4 bits, with plain layers in the place of its quantized ones."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    llama().save_pretrained(folder / "plain")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=config, device_map="cpu")
    model.save_pretrained(folder / "bits")
    model = AutoModelForCausalLM.from_pretrained(folder / "bits", device_map="cpu")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            model.set_submodule(name, torch.nn.Linear(layer.in_features, layer.out_features, bias=False))
    return model


def test_the_versions_it_was_tried_on_are_allowed() -> None:
    """And what is installed is no later major version than was tried."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    allowed = {one.name: one.specifier for one in (Requirement(text) for group in groups for text in group)}
    for name, (lowest, highest) in upstream.TRIED.items():
        assert lowest in allowed[name], name
        assert highest in allowed[name], name
        assert f"{Version(highest).major + 1}.0.0" not in allowed[name], f"{name} has no upper bound"
        assert Version(metadata.version(name)).major <= Version(highest).major


def test_each_function_is_tested_here_and_names_its_issue() -> None:
    tests = Path(__file__).read_text()
    for node in ast.parse(Path(upstream.__file__).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            told = (ast.get_docstring(node) or "").lower()
            assert re.search("https://|no issue found|see `", told), f"{node.name} names no issue"
            assert f"upstream.{node.name}(" in tests, f"{node.name} has no test"


def test_a_method_that_a_library_renamed_is_not_replaced_in_silence(tmp_path: Path) -> None:
    trainer = Trainer(llama(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    upstream.override(trainer, get_train_dataloader=lambda: "ours")
    assert trainer.get_train_dataloader() == "ours"
    with pytest.raises(AttributeError, match="get_train_loader"):
        upstream.override(trainer, get_train_loader=lambda: "ours")
    with pytest.raises(AttributeError, match="is no method"):
        upstream.override(trainer, args=lambda: "ours")
    assert callable(trainer.accelerator.clip_grad_norm_)
    assert callable(trainer.training_step)
    assert callable(trainer.evaluate)


def test_datasets_opens_a_stream_again_as_often_as_a_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """No argument of a caller says it: `max_retries` is of downloads."""
    monkeypatch.setattr("datasets.config.STREAMING_OPEN_MAX_RETRIES", 3)
    monkeypatch.setattr("datasets.config.STREAMING_OPEN_RETRY_INTERVAL", 0)
    tries: list[str] = []

    def refuse(path: str, *given: Any, **named: Any) -> None:
        tries.append(path)
        raise TimeoutError("refused")

    monkeypatch.setattr("fsspec.get_fs_token_paths", refuse)
    with pytest.raises(OSError):  # noqa: PT011
        xopen("http://127.0.0.1:9/rows.txt", download_config=DownloadConfig(max_retries=0))
    assert len(tries) == 3
    upstream.end_streams_at_the_first_fault()
    tries.clear()
    with pytest.raises(OSError):  # noqa: PT011
        xopen("http://127.0.0.1:9/rows.txt")
    assert len(tries) == 1


def test_datasets_has_no_public_list_of_its_builders() -> None:
    assert {"json", "csv", "text", "parquet", "arrow"} <= set(upstream.builder_names())
    assert not [name for name in dir(datasets) if re.search("list_|builders$", name)]


def test_datasets_counts_the_loads_of_local_files_and_hfpipe_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    asked: list[str] = []

    def no_network(host: str, *_: Any, **__: Any) -> Any:
        asked.append(host)
        raise OSError("no name server")

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    rows = load_rows(Source.model_validate({"path": str(tmp_path / "rows.jsonl")}))
    assert (list(rows["text"]), asked) == (["a"], [])
    with upstream.count_no_load():
        load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")
    assert not asked
    load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")
    assert asked, "datasets counts no longer: `count_no_load` can go"


def test_datasets_shares_no_file_among_shards_and_has_no_public_way_in(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"row {number} " * 20}) for number in range(2_000)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    stream = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", streaming=True)
    assert stream.num_shards == stream.reshard().num_shards == 1
    assert not [name for name in dir(IterableDataset) if "ex_iterable" in name and not name.startswith("_")]
    examples = upstream.examples_of(stream)
    builder = upstream.file_builder_of(examples)
    assert builder.config.data_files
    assert callable(upstream.tables_of(builder))
    again = upstream.with_examples(stream, examples)
    assert list(again) == list(stream)
    assert upstream.file_builder_of(upstream.examples_of(stream.take(3))) is None
    assert upstream.file_builder_of(upstream.examples_of(IterableDataset.from_generator(lambda: iter(())))) is None


def test_datasets_takes_rows_of_every_shard(tmp_path: Path) -> None:
    """https://github.com/huggingface/datasets/pull/6965; `data/sources/sharded_files.py` takes the first rows."""
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("".join(f"{number}.{row}\n" for row in range(10)))
    stream = load_dataset("text", data_files=str(tmp_path / "*.txt"), split="train", streaming=True).take(4)
    assert [row["text"] for row in stream] == ["0.0", "0.1", "0.2", "0.3"]
    lanes = [row["text"] for lane in range(2) for row in stream.shard(num_shards=2, index=lane)]
    assert lanes == ["0.0", "0.1", "1.0", "1.1"]


def test_datasets_reads_a_compressed_file_again_from_its_beginning(tmp_path: Path) -> None:
    """A resume parses every row before its place; `data/sources/line_files.py` knows where a piece begins."""
    (tmp_path / "rows.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": f"{n}"}) + "\n" for n in range(50)).encode())
    )
    stream = load_dataset("json", data_files=str(tmp_path / "rows.jsonl.gz"), split="train", streaming=True)
    begun = iter(stream)
    for _ in range(20):
        next(begun)
    assert "begin" not in json.dumps(stream.state_dict())
    assert "shard_example_idx" in json.dumps(stream.state_dict())


@pytest.fixture
def collator(tmp_path: Path) -> DataCollatorForLanguageModeling:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return DataCollatorForLanguageModeling(BertTokenizerFast(str(tmp_path / "vocab.txt")), whole_word_mask=True)


def test_transformers_masks_whole_words_in_quadratic_memory(collator: DataCollatorForLanguageModeling) -> None:
    chance = np.random.default_rng(2)
    words = np.cumsum(chance.random((1, 2_000)) < 0.6, axis=1)
    words[:, [0, 300, -1]] = -1  # special tokens
    chosen = torch.from_numpy(chance.random(words.shape) < 0.15)
    chosen[:, [0, 300, -1]] = True

    def masked() -> tuple[Any, int]:
        tracemalloc.start()
        found = collator._whole_word_mask(words, chosen)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, peak

    theirs, square = masked()
    upstream.mask_whole_words_in_linear_time(collator)
    ours, line = masked()
    assert (ours == theirs).all()
    assert 0.1 < ours.mean() < 0.5
    assert square > words.size**2
    assert line < 100 * words.size


def test_transformers_has_no_public_name_for_what_it_knows_of_a_model() -> None:
    model = llama(tie_word_embeddings=True)
    assert upstream.attention_of(model) in ("sdpa", "eager")
    assert set(upstream.layer_classes(model)) == {"LlamaDecoderLayer"}
    assert upstream.takes_flash_attention(model)
    assert isinstance(list(upstream.left_out_of_checkpoints(model)), list)
    assert not hasattr(model.config, "attn_implementation")
    for name in (
        "no_split_modules",
        "supports_flash_attn",
        "keys_to_ignore_on_save",
        "auto_class",
        "weight_conversions",
    ):
        assert not hasattr(PreTrainedModel, name)
        assert not hasattr(PreTrainedConfig, name)
    for name in ("_no_split_modules", "_supports_flash_attn", "_keys_to_ignore_on_save", "_auto_class"):
        assert hasattr(PreTrainedModel, name)


def test_transformers_draws_the_weights_of_a_module_by_a_private_method_alone() -> None:
    model = llama()
    layer, other = model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(torch.zeros_like(layer.weight))
    before = other.weight.clone()
    assert [*inspect.signature(PreTrainedModel.initialize_weights).parameters] == ["self"]  # which takes no module
    upstream.draw_weights(model, layer)
    assert layer.weight.detach().std() == pytest.approx(model.config.initializer_range, rel=0.2)
    assert torch.equal(other.weight, before)


def test_datasets_has_no_argument_for_the_bar_of_a_download(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bar(tqdm):
        bytes_told = 0

        def update(self, n: float | None = 1) -> bool | None:
            Bar.bytes_told += int(n or 0)
            return super().update(n)

    assert "tqdm_class" not in {field.name for field in fields(DownloadConfig)}
    monkeypatch.setattr(HfApi, "hf_hub_download", HfApi.hf_hub_download)  # as it was, after the test
    upstream.show_downloads(Bar)
    hub.add_repo("dataset", "me/data", {"rows.jsonl": b'{"text": "a"}\n'})
    HfApi(endpoint=hub.url).hf_hub_download("me/data", "rows.jsonl", repo_type="dataset", cache_dir=tmp_path)
    assert Bar.bytes_told == 14


def test_transformers_maps_the_files_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama().save_pretrained(tmp_path)
    backends: list[str] = []
    library: Any = modeling_utils
    opened = library.safe_open

    def noted(*names: Any, **options: Any) -> Any:
        backends.append(options["backend"])
        return opened(*names, **options)

    monkeypatch.setattr(modeling_utils, "safe_open", noted)
    with upstream.files_read_by_rows():
        AutoModelForCausalLM.from_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert backends[0] == "pread"
    assert backends[-1] == "mmap"


def test_transformers_marks_a_model_that_it_loaded_in_parts() -> None:
    """The marks are set where a model is spread, and no public function takes them off."""
    assert "model._is_distributed_loading_by_transformers = True" in inspect.getsource(mixin)
    assert "model._tp_size = " in inspect.getsource(mixin)
    assert "model._is_fsdp_managed_module = True" in inspect.getsource(fsdp)
    model = llama()
    model._is_distributed_loading_by_transformers = model._is_fsdp_managed_module = True
    model._tp_size = 1
    assert model.is_distributed_loading_by_transformers
    assert fsdp.is_fsdp_managed_module(model)
    upstream.leave_training_to_accelerate(model)
    assert not model.is_distributed_loading_by_transformers
    assert not fsdp.is_fsdp_managed_module(model)
    assert model.tp_size is None


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A group of two ranks whose first is this process; the other one says nothing."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


def read_in_parts(folder: Path, model_type: str, layers: str) -> Any:
    """The first part of an encoder-decoder model; its embeddings have an odd number of rows."""
    sides: dict[str, Any] = {"num_layers": 1, "num_heads": 2, "d_kv": 4, "d_ff": 8}
    if model_type == "marian":
        one = {"layers": 1, "attention_heads": 2, "ffn_dim": 8}
        sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in one.items()}
    config = AutoConfig.for_model(
        model_type, vocab_size=33, d_model=8, pad_token_id=0, decoder_start_token_id=0, **sides
    )
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    parts = DistributedConfig(fsdp_size=2, fsdp_plan={layers: "free_full_weight"})
    return AutoModelForSeq2SeqLM.from_pretrained(folder, distributed_config=parts)


def test_transformers_works_no_table_of_positions_out_for_a_part(two_ranks: None, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        read_in_parts(tmp_path, "marian", "model.encoder.layers.*")
    with upstream.computed_weights_divided():
        found = read_in_parts(tmp_path, "marian", "model.encoder.layers.*")
    part = found.model.encoder.embed_positions.weight.to_local()
    whole = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).model.encoder.embed_positions.weight
    assert torch.equal(part, whole[: len(part)])


def test_transformers_divides_what_is_tied_several_times(two_ranks: None, tmp_path: Path) -> None:
    """Embeddings of a T5: shared, the encoder's, the decoder's and the head are one weight."""
    assert isinstance(read_in_parts(tmp_path, "t5", "encoder.block.*").encoder.embed_tokens, FSDPModule)
    with upstream.shared_weights_divided_together():
        model = read_in_parts(tmp_path, "t5", "encoder.block.*")
    assert [name for name, module in model.named_modules() if isinstance(module, FSDPModule)] == ["", "encoder.block.0"]
    (group,) = model._get_fsdp_state()._fsdp_param_groups

    def gathered() -> int:
        return sum(getattr(one._module_info.module, "weight", None) is model.shared.weight for one in group.fsdp_params)

    assert gathered() == 4
    upstream.gather_shared_weights_once(model)
    assert gathered() == 1
    ids = torch.ones((1, 2), dtype=torch.long)
    assert model(input_ids=ids, decoder_input_ids=ids).logits.shape == (1, 2, 33)
    model.reshard()
    assert all(isinstance(one.weight, DTensor) for one in (model.shared, model.decoder.embed_tokens, model.lm_head))


def test_peft_makes_an_adapter_for_the_part_of_a_layer_under_hybrid_sharding() -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp_replicate", "fsdp"))

        def outputs() -> int:
            layer = torch.nn.Linear(8, 8, bias=False)
            part = DTensor.from_local(torch.zeros(4, 8), mesh, [Replicate(), Shard(0)])
            layer.weight = torch.nn.Parameter(part, requires_grad=False)
            adapted: Any = get_peft_model(torch.nn.Sequential(layer), LoraConfig(target_modules=["0"], r=2))
            return adapted.base_model.model[0].lora_B["default"].out_features

        assert outputs() == 4
        with upstream.adapters_of_whole_layers():
            assert outputs() == 8
    finally:
        torch.distributed.destroy_process_group()


def test_peft_takes_no_part_of_a_weight_apart() -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))

        def made() -> Any:
            layer = torch.nn.Linear(8, 8, bias=False)
            layer.weight = torch.nn.Parameter(DTensor.from_local(torch.ones(4, 8), mesh, [Shard(0)]))
            config = LoraConfig(target_modules=["0"], r=2, init_lora_weights="pissa", use_dora=True)
            adapted: Any = get_peft_model(torch.nn.Sequential(layer), config)
            return adapted.base_model.model[0]

        with pytest.raises(RuntimeError):
            made()
        with upstream.adapters_of_whole_layers():
            layer = made()
        assert layer.base_layer.weight.to_local().shape == (4, 8)
        assert not any(isinstance(one, DTensor) for name, one in layer.named_parameters() if "lora_" in name)
    finally:
        torch.distributed.destroy_process_group()


def test_fsdp_refuses_to_copy_what_it_has_divided() -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model: Any = torch.nn.Sequential(torch.nn.Linear(8, 8))
        fully_shard(model[0], mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",)))
        with pytest.raises(AssertionError, match="does not support deepcopy"):
            copy.deepcopy(model[0])
        with upstream.copied_whole(model):
            plain = copy.deepcopy(model[0])
        assert type(plain) is torch.nn.Linear
        assert type(plain.weight.data) is torch.Tensor
        assert plain.weight.shape == (8, 8)
        assert plain(torch.ones(1, 8)).shape == (1, 8)
        with pytest.raises(AssertionError, match="does not support deepcopy"):
            copy.deepcopy(model[0])
    finally:
        torch.distributed.destroy_process_group()


def test_the_layer_below_an_adapter_is_called_with_its_hooks() -> None:
    model: Any = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    layer, seen = model.base_model.model[0], []
    layer.get_base_layer().register_forward_hook(lambda *_: seen.append("behind"))
    layer.get_base_layer().register_forward_pre_hook(lambda *_: seen.append("before"))
    expected = layer.forward(torch.ones(1, 8))
    assert seen == ["before", "behind"]
    with upstream.without_hooks(layer):
        assert torch.equal(layer(torch.ones(1, 8)), expected)
    assert seen == ["before", "behind"]
    layer(torch.ones(1, 8))
    assert seen == ["before", "behind"] * 2


def test_fsdp_does_not_give_back_what_it_has_divided() -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
        seen: list[bool] = []
        model[0].register_forward_hook(lambda *_: seen.append(True))
        for module in (model[0], model):
            fully_shard(module, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",)))
        model(torch.ones(1, 8))
        model[0].register_parameter("weight", torch.nn.Parameter(torch.ones(8, 8)))
        upstream.take_fsdp_away(model)
        assert [type(module) for module in model.modules()] == [torch.nn.Sequential, torch.nn.Linear]
        seen.clear()
        assert model(torch.ones(1, 8)).tolist() == [[8.0] * 8]
        assert model.state_dict()["0.weight"].shape == (8, 8)
        assert seen == [True]  # what others have hung there stays
        for module in (model[0], model):
            fully_shard(module, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",)))
    finally:
        torch.distributed.destroy_process_group()


def test_modules_that_fsdp_gathers_at_once_are_told() -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
        fully_shard(model[0], mesh=mesh)
        fully_shard([model[1], model[3]], mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert upstream.gathered_together(model) == [[""], ["0"], ["1", "3"]]
    finally:
        torch.distributed.destroy_process_group()


def test_a_layer_shows_the_part_of_a_rank_outside_of_a_pass() -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        layer = torch.nn.Linear(8, 8, bias=False)
        with upstream.whole_weight(layer):
            assert layer.weight.shape == (8, 8)
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",)))
        part: Any = layer.weight
        assert part.to_local().shape == (4, 8)
        with upstream.whole_weight(layer):
            assert type(layer.weight.data) is torch.Tensor
            assert layer.weight.shape == (8, 8)
        assert layer.weight is part
    finally:
        torch.distributed.destroy_process_group()


def test_a_plain_4_bit_weight_does_not_know_how_it_is_rounded_and_its_layer_does() -> None:
    layer = Linear4bit(64, 64, bias=False, quant_type="nf4", quant_storage=torch.float32)
    layer.weight = Params4bit(torch.randn(64, 64), quant_type="nf4", quant_storage=torch.float32, module=layer).to(
        "cpu"
    )
    rounded = dequantize_module_weight(layer)
    layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
    assert dequantize_module_weight(layer).shape != (64, 64)
    upstream.state_its_rounding(layer)
    assert torch.equal(dequantize_module_weight(layer), rounded)


class OfZero3:
    """The part that transformers keeps of a trainer under ZeRO-3."""

    def is_zero3(self) -> bool:
        return True


def test_transformers_does_not_tell_what_divides_the_models_that_are_built() -> None:
    state = OfZero3()
    integration.set_hf_deepspeed_config(state)
    try:
        assert integration.is_deepspeed_zero3_enabled()
        with upstream.undivided():
            assert not integration.is_deepspeed_zero3_enabled()
        assert integration.is_deepspeed_zero3_enabled()
        assert not [name for name in vars(integration) if re.match("get.*deepspeed_config", name)]
    finally:
        integration.unset_hf_deepspeed_config()


def test_deepspeed_divides_one_weight_before_it_asks_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    pytest.importorskip("deepspeed")
    made: list[torch.nn.Parameter] = []

    def weights() -> Iterator[torch.nn.Parameter]:
        for _ in range(3):
            assert all(upstream.shape_of(one) == (8, 4) and one.shape == (0,) for one in made)
            made.append(torch.nn.Parameter(torch.ones(8, 4)))
            yield made[-1]

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        plan = {"stage": 3, "memory_efficient_linear": False}  # without a change of torch's own function
        upstream.divide_one_by_one(weights(), {"train_batch_size": 1, "zero_optimization": plan})
        assert len(made) == 3
        assert upstream.gathered_by_deepspeed(made[0]).tolist() == torch.ones(8, 4).tolist()
        assert made[0].shape == (0,)
    finally:
        torch.distributed.destroy_process_group()


class OfItsOwn(LlamaForCausalLM):
    """A model whose code comes with it: this file."""


def test_transformers_saves_the_code_of_a_model_beside_its_weights_alone(tmp_path: Path) -> None:
    model = OfItsOwn(llama().config)
    upstream.save_code_of(model, tmp_path)
    assert not list(tmp_path.iterdir())
    model._auto_class = "AutoModelForCausalLM"
    upstream.save_code_of(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [Path(__file__).name]
    assert model.config.auto_map == {"AutoModelForCausalLM": f"{Path(__file__).stem}.OfItsOwn"}
    assert not [name for name in dir(PreTrainedModel) if re.match("save.*code", name)]


def test_transformers_cannot_save_a_model_whose_quantized_layers_were_replaced(tmp_path: Path) -> None:
    model = with_layers_replaced(tmp_path)
    with pytest.raises(NotImplementedError):
        model.save_pretrained(tmp_path / "whole")
    upstream.forget_quantizer_conversions(model)
    assert model.is_loaded_in_4bit
    upstream.declare_dequantized(model)
    model.save_pretrained(tmp_path / "whole")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert all((a == b.to(a.dtype)).all() for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_transformers_leaves_flags_that_peft_asks_for(tmp_path: Path) -> None:
    model = with_layers_replaced(tmp_path)
    model.hf_quantizer.remove_quantization_config(model)
    assert getattr(model, "is_loaded_in_4bit", False)


def test_trainer_keeps_no_sums_of_losses_in_a_checkpoint(tmp_path: Path) -> None:
    rows = [{"input_ids": [row, 2, 3], "labels": [row, 2, 3]} for row in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=3, save_steps=3, logging_steps=2, report_to="none"
    )
    trainer = Trainer(llama(), arguments, train_dataset=rows)  # type: ignore[arg-type]
    mean = trainer.train().training_loss
    sums = upstream.loss_sums(trainer)
    assert sums["since"] == 2
    assert sums["before"] == pytest.approx(3 * mean)
    assert not [field.name for field in fields(TrainerState) if "loss" in field.name]
    upstream.set_loss_sums(trainer, {"sum": 1.0, "since": 5, "before": 7.0})
    assert upstream.loss_sums(trainer) == {"sum": sums["sum"] + 1.0, "since": 5, "before": 7.0}


def test_trainer_reads_a_checkpoint_by_private_methods_alone(tmp_path: Path) -> None:
    rows = [{"input_ids": [row, 2, 3], "labels": [row, 2, 3]} for row in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=2, save_steps=1, logging_steps=9, report_to="none"
    )
    Trainer(llama(), arguments, train_dataset=rows).train()  # type: ignore[arg-type]
    read: list[str] = []
    trainer = Trainer(llama(), arguments, train_dataset=rows)  # type: ignore[arg-type]
    upstream.read_checkpoint_by(trainer, lambda: read.append("weights"), lambda: read.append("rest"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert read == ["weights", "rest"]
    assert trainer.state.global_step == 2
    assert not [name for name in dir(Trainer) if re.match("(load|read).*(checkpoint|optimizer)", name)]


def test_torch_gives_the_store_of_a_process_group_by_a_private_name_alone() -> None:
    import torch.distributed

    assert not [name for name in dir(torch.distributed) if "default_store" in name and not name.startswith("_")]
    with pytest.raises(ValueError, match="process group"):
        upstream.default_store()


def test_transformers_shares_one_module_of_embeddings_once_they_grow() -> None:
    config = AutoConfig.for_model("t5", vocab_size=96, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    model = AutoModelForSeq2SeqLM.from_config(config)
    model.resize_token_embeddings(100)
    embeddings = model.get_input_embeddings()
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is embeddings]
    assert len(names) > 1
    upstream.part_shared_embeddings(model)
    apart = [model.get_submodule(name) for name in names]
    assert len({id(module) for module in apart}) == len(names)
    assert len({id(module.weight) for module in apart}) == 1


def test_the_hub_tells_of_an_ignored_file_in_a_private_field_alone() -> None:
    operation = CommitOperationAdd("a.bin", b"content")
    assert upstream.left_out_of_commit([operation]) == []
    operation._should_ignore = True
    assert upstream.left_out_of_commit([operation]) == ["a.bin"]
    assert [field.name for field in fields(operation) if "ignore" in field.name] == ["_should_ignore"]
    assert not [name for name in inspect.signature(HfApi.create_commit).parameters if "ignore" in name]


def test_transformers_lists_the_models_of_the_cache_and_not_the_one_it_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = pytest.importorskip("transformers.cli.serving.model_manager")
    own = manager.ModelManager.__dict__["get_gen_models"]
    monkeypatch.setattr(manager.ModelManager, "get_gen_models", own)  # which is put back
    with pytest.raises(CacheNotFound):
        manager.ModelManager.get_gen_models(str(tmp_path / "nowhere"))
    upstream.list_served_model(str(tmp_path))
    assert [model["id"] for model in manager.ModelManager.get_gen_models()] == [str(tmp_path)]
    assert "force_model" not in inspect.getsource(own.__func__), "it lists what it serves by itself"


@pytest.mark.parametrize("metric", [BLEU, CHRF, TER])
def test_sacrebleu_gives_the_statistics_of_a_row_in_private_alone(metric: type) -> None:
    scorer = metric()
    said, right = ["the cat sat on the mat", "a dog"], ["the cat sat on a mat", "a dog barked"]
    rows = np.asarray(upstream.row_statistics(scorer, said, right), dtype=float)
    assert len(rows) == 2
    whole = scorer.corpus_score(said, [right]).score
    assert upstream.score_of_statistics(scorer, rows.sum(axis=0).tolist()) == pytest.approx(whole)
    assert not [name for name in dir(scorer) if "stat" in name and not name.startswith("_")]


def test_codecarbon_knows_the_countries() -> None:
    pytest.importorskip("codecarbon")
    known = upstream.countries()
    assert known["DEU"] == "Germany"
    assert len(known) > 100
