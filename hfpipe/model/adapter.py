"""Adapters: making, and verifying by loading again."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import TrainableTokensWrapper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from hfpipe.core.errors import RecipeError
from hfpipe.core.upstream import adapters_of_whole_layers, copied_whole
from hfpipe.model.classifier import is_classifier
from hfpipe.model.fake_quantized import fake_quantize
from hfpipe.model.load import AUTO_CLASSES, task_of_type
from hfpipe.model.load_errors import clear_errors
from hfpipe.model.parameters import train_part
from hfpipe.model.positions import within_positions
from hfpipe.model.seq2seq import decoder_input
from hfpipe.model.spread import device_of, make_trained_whole
from hfpipe.model.tokenizer import train_rows
from hfpipe.recipe import Recipe
from hfpipe.recipe.stage_config import CHANGES_THE_BASE

# Largest difference of log-probabilities that two ways of computing the same model may show, by precision.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
_LINEAR = (torch.nn.Linear, Conv1D)
PROBE_SIZE = 2**25  # log-probabilities
BATCH_SIZE = 2**24  # of them in a pass
ProbeText = str | tuple[str, str]  # or a source and its target


def add_adapter(model: Any, block: dict[str, Any], seed: int) -> PeftModel:
    """Puts the adapter that a recipe's `lora:` or `peft:` asks for on a model.

    Args:
        model: The base; its weights are frozen.
        block: PEFT's `type` and fields of the config class of that type.
        seed: Seed of the adapter's first weights.

    Raises:
        RecipeError: PEFT refuses the values, or they do not fit this model.
    """
    block = copy.deepcopy(block)  # PEFT lengthens `modules_to_save` in place
    fields = {"task_type": None if task_of_type(model.config.model_type) == "masked" else "CAUSAL_LM", **block}
    kind = fields.pop("type")
    if kind == "lora":
        fields.setdefault("target_modules", "all-linear")
    set_seed(seed)
    modules = [name for name, _ in model.named_modules()]
    try:
        for name in fields.get("modules_to_save") or ():  # PEFT passes over one that is not there
            if not any(found.endswith(name) for found in modules):
                raise ValueError(f"`modules_to_save` names {name!r}, and no module is called so")
        targets = fields.get("target_modules")
        for name in targets if isinstance(targets, list) else ():  # and this over one among others
            if not any(found == name or found.endswith(f".{name}") for found in modules):
                raise ValueError(f"`target_modules` names {name!r}, and no module is called so")
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind.upper()](**fields)
        with adapters_of_whole_layers(), copied_whole(model):
            adapted = get_peft_model(model, config, autocast_adapter_dtype=_trains_in_float32(model))
        _require_read(adapted)
        PeftConfig.from_peft_type(**config.to_dict())  # PEFT fills fields in, and may refuse them when it loads them
        make_trained_whole(adapted)
        return _with_head_bias(adapted)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, re.error) as error:
        linear = sorted({name.rpartition(".")[2] for name, one in model.named_modules() if type(one) in _LINEAR})
        unknown = re.search(r"(Target modules|`target_modules`).*(not found|no module)", str(error))
        has = f" Its linear layers are named {', '.join(linear)}; `all-linear` is all but the head." if unknown else ""
        raise RecipeError(f"{kind}: peft refuses it on this model: {str(error).strip().rstrip('.')}.{has}") from error


def _require_read(model: PeftModel) -> None:
    """Refuses embeddings that are trained where nothing reads them.

    PEFT replaces a module under one name. Encoders and decoders read the embeddings that they share under theirs, and
    of Marian's, which are one module, PEFT does not know it.

    Raises:
        ValueError: They are.
    """
    modules = list(model.get_base_model().named_modules(remove_duplicate=False))
    wrappers = {name: module for name, module in modules if isinstance(module, AuxiliaryTrainingWrapper)}
    embeddings = {
        name: module.original_module.weight
        for name, module in wrappers.items()
        if isinstance(module.original_module, torch.nn.Embedding)
    }
    inside = tuple(f"{name}." for name in wrappers)
    readers = [
        (name, module)
        for name, module in modules
        if isinstance(module, torch.nn.Embedding) and not name.startswith(inside)
    ]
    for trained, weight in embeddings.items():
        left = [name for name, module in readers if module.weight is weight and not name.endswith("shared")]
        if left:
            whole = "Train all weights"
            if not isinstance(wrappers[trained], TrainableTokensWrapper):
                whole = f"Write `modules_to_save: [{left[-1].rpartition('.')[2]}]`, or train all weights"
            raise ValueError(
                f"it would train the embeddings {trained!r}, which the model reads as {' and '.join(left)} too, where "
                f"they would stay as they are. {whole}"
            )


def require_adapters(recipe: Recipe, config: Any, added: tuple[int, ...]) -> dict[str, Any]:
    """Refuses an adapter, or a pattern of weights, that does not fit the base, before anything is scored or trained.

    Tried on a model of the base's shapes, without weights; what only the weights can tell is told by the stage.

    Args:
        recipe: The recipe.
        config: transformers' config of the base.
        added: Ids of the tokens that the adapters have to train, see `added_ids`.

    Returns:
        The shapes that were tried, by the name of the stage.

    Raises:
        RecipeError: PEFT refuses the values of a stage, or they name modules or weights that the model does not have,
            or the adapter cannot train the added tokens.
    """
    tried = {}
    for stage in recipe.stages:
        rounding = stage.fake_quantized
        chosen = stage.adapter or stage.train_only or stage.freeze or stage.learning_rates or rounding
        if not chosen or stage.parent_adapter == "continue":
            continue
        block = {key: value for key, value in (stage.adapter or {}).items() if key != "init_lora_weights"}
        if task := {"classification": "SEQ_CLS", "translation": "SEQ_2_SEQ_LM"}.get(stage.kind):
            block["task_type"] = task
        try:
            with torch.device("meta"):
                trust = recipe.model.trust_remote_code
                model = AUTO_CLASSES[stage.task].from_config(copy.deepcopy(config), trust_remote_code=trust)
                fake_quantize(model, rounding)
                if stage.adapter is not None:
                    model = add_adapter(model, train_rows(model, block, added), recipe.seed)
            train_part(model, stage)
            tried[stage.name] = model
        except RecipeError as error:
            if not isinstance(error.__cause__, NotImplementedError):  # which is what tensors without values raise
                raise RecipeError(f"stages.{stage.name}: {error}") from error
        except Exception:  # shapes alone do not tell
            continue
    return tried


def continue_adapter(model: Any, folder: str) -> PeftModel:
    """Puts a saved adapter on the base it belongs to, to train it further."""
    cast = _trains_in_float32(model)
    with clear_errors("adapter", folder), adapters_of_whole_layers(), copied_whole(model):
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=True, autocast_adapter_dtype=cast)
        make_trained_whole(adapted, Path(folder))
    return _with_head_bias(adapted)


def _trains_in_float32(model: Any) -> bool:
    """Returns True if an adapter is kept in float32 on a base of half precision."""
    # With ZeRO-3 all parameters that are gathered together have one type: https://github.com/huggingface/trl/issues/6089
    return not is_deepspeed_zero3_enabled() or getattr(model, "hf_quantizer", None) is not None


def _with_head_bias(model: PeftModel) -> PeftModel:
    """Lets SFTTrainer, which reads the `bias` of the head, find none where PEFT trains rows of the head."""
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.register_parameter("bias", None)
    return model


def original_state(model: Any) -> dict[str, torch.Tensor]:
    """The first weights of an adapter whose making changed the base, and nothing for any other.

    PiSSA and OLoRA (https://arxiv.org/abs/2404.02948, https://arxiv.org/abs/2406.01775) move a part of the base's
    weights into the adapter, so that what is trained fits a base that nobody else has. See `adapter_state`.
    """
    config = model.peft_config["default"]
    if not str(getattr(config, "init_lora_weights", "")).startswith(CHANGES_THE_BASE):
        return {}
    state = get_peft_model_state_dict(model)
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items() if _is_lora_matrix(name)}


def adapter_state(
    model: Any, original: dict[str, torch.Tensor], *, grown: bool, state: dict[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter as they are saved: for the base as it came.

    Args:
        model: The trained model.
        original: See `original_state`; what was taken from the base is taken from the adapter again, at twice its rank:
            A'B' = [A, A0][B, -B0]. PEFT's own conversion does the same but leaves out every other tensor.
        grown: Whether the embeddings of the base have grown, see `_saves_embeddings`.
        state: That of the model, if not `state_dict()`.
    """
    tensors = get_peft_model_state_dict(model, state, save_embedding_layers=_saves_embeddings(model, grown))
    return _given_back({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, original)


def _given_back(state: dict[str, torch.Tensor], original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for name, first in original.items():
        is_a = "lora_A" in name
        state[name] = torch.cat([state[name], (first if is_a else -first).to(state[name])], dim=0 if is_a else 1)
    return state


def save_adapter(
    model: Any, folder: Path, original: dict[str, torch.Tensor], *, grown: bool, state: dict[str, Any] | None = None
) -> None:
    """Writes an adapter that loads on the base as it came; see `adapter_state`."""
    if not original:
        model.save_pretrained(folder, save_embedding_layers=_saves_embeddings(model, grown), state_dict=state)
        return
    _write_given_back(model, folder, adapter_state(model, original, grown=grown, state=state))


def give_back(model: Any, folder: Path, original: dict[str, torch.Tensor]) -> None:
    """Turns an adapter that was saved as it was trained into one for the base as it came; see `adapter_state`."""
    if original:
        _write_given_back(model, folder, _given_back(load_file(folder / "adapter_model.safetensors"), original))


def _write_given_back(model: Any, folder: Path, state: dict[str, torch.Tensor]) -> None:
    config = model.peft_config["default"]
    factor = 2**0.5 if config.use_rslora else 2  # of alpha: the scaling stays as it was
    saved = copy.deepcopy(config)
    saved.r, saved.lora_alpha = 2 * config.r, factor * config.lora_alpha
    saved.init_lora_weights, saved.inference_mode = True, True
    saved.save_pretrained(str(folder))
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _saves_embeddings(model: Any, grown: bool) -> bool:
    """Returns True if an adapter's file needs the embeddings and the head of its base: it is on them, and they grew.

    PEFT's own choice is to save them of any base, whose weights an adapter on its head then carries along.
    """
    config = model.peft_config["default"]
    named = (getattr(config, key, None) for key in ("trainable_token_indices", "modules_to_save"))
    return grown and not any(named)


def _is_lora_matrix(name: str) -> bool:
    return "lora_A" in name or "lora_B" in name


def verify_tensors(folder: Path, trained: dict[str, torch.Tensor] | None) -> None:
    """Checks the file of a saved adapter: it holds the trained tensors and no others, to the bit.

    Args:
        folder: The adapter's folder.
        trained: What it should hold (see `adapter_state`); None where the weights are spread over ranks.

    Raises:
        RuntimeError: A tensor is missing, unexpected, not the trained one or not finite, or every `lora_B` is zero.
    """
    b_seen = b_moved = False
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        names = set(tensors.keys())
        if trained is not None and names != trained.keys():
            missing, more = sorted(trained.keys() - names), sorted(names - trained.keys())
            raise RuntimeError(f"{folder}: the adapter lacks tensors {missing} and has others {more}")
        for name in names:
            tensor = tensors.get_tensor(name)
            if not torch.isfinite(tensor).all():
                raise RuntimeError(f"{folder}: tensor {name} is not finite")
            if trained is not None and not torch.equal(tensor, trained[name]):
                raise RuntimeError(f"{folder}: tensor {name} is not what was trained")
            if "lora_B" in name:
                b_seen = True
                b_moved = b_moved or bool(tensor.abs().max() > 0)
    if b_seen and not b_moved:
        if trained is not None:
            raise RecipeError(
                f"stage {folder.parent.name}: the adapter learned nothing, every lora_B is still 0: the learning rate "
                "was 0 at each step (early stopping may have kept the first, of the warm-up, as the best), or no "
                "gradient reached it. Look at learning_rate, warmup_steps, max_steps and eval_steps."
            )
        raise RuntimeError(f"{folder}: every lora_B is zero: nothing was learned or the wrong weights were saved")


@torch.no_grad()
def probe(model: Any, tokenizer: Any, texts: Sequence[ProbeText], max_length: int = 64) -> torch.Tensor:
    """Log-probabilities of the model over its vocabulary after the tokens of a few short texts, (N, V) in float32.

    An encoder-decoder model reads the source of a pair and says the target; of a lone text, both are the same. Where
    the vocabulary is large, only some of each text's tokens are looked at, so that a probe takes at most 128 MB.
    """
    limit = within_positions(model, max_length)
    config, classifies = model.config, is_classifier(model)
    speaks = config.is_encoder_decoder and not classifies
    pairs = [(text, text) if isinstance(text, str) else text for text in texts]
    ids = [tokenizer(text, truncation=True, max_length=limit)["input_ids"] for text, _ in pairs]
    said = [tokenizer(text_target=text, truncation=True, max_length=limit)["input_ids"] for _, text in pairs if speaks]
    read = {index: (row, said[index] if speaks else row) for index, row in enumerate(ids) if row}
    cached = {} if classifies or task_of_type(config.model_type) == "masked" else {"use_cache": False}
    rows: dict[int, torch.Tensor] = {}
    for batch in _alike(read, config.get_text_config().vocab_size):
        place = device_of(model)
        source, target = (torch.tensor([read[index][side] for index in batch], device=place) for side in (0, 1))
        heard = {"decoder_input_ids": decoder_input(model, target)} if speaks else {}
        for index, logits in zip(batch, model(input_ids=source, **heard, **cached).logits, strict=True):
            if classifies:  # (C,), compared as they are: of one class the log-probability is always 0
                rows[index] = logits[None].float().cpu()
                continue
            most = max(1, PROBE_SIZE // (len(texts) * logits.shape[1]))
            rows[index] = logits[:: -(-len(logits) // most)].float().log_softmax(-1).cpu()
    return torch.cat([rows[index] for index in sorted(rows)])


def _alike(read: dict[int, tuple[list[int], list[int]]], vocabulary: int) -> Iterator[list[int]]:
    """Batches of texts with as many tokens as one another, which need no padding, with logits of at most 64 MB."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, (source, target) in read.items():
        by_size.setdefault((len(source), len(target)), []).append(index)
    for (_, size), indices in by_size.items():
        most = max(1, BATCH_SIZE // (size * vocabulary))
        yield from (indices[start : start + most] for start in range(0, len(indices), most))


def difference(before: torch.Tensor, after: torch.Tensor) -> float:
    """Largest difference between two probes, in nats, over the tokens that either finds possible at all (p > 1e-4).

    Over all, where there are none: a model that has just begun finds each of 50,000 tokens as likely as the others.
    """
    possible = torch.maximum(before, after) > -9.2
    differences = (before - after).abs()
    return float((differences[possible] if possible.any() else differences).max())


def require_equal(before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype, what: str) -> float:
    """Raises a RuntimeError when two probes of what should be one model differ beyond the precision of `dtype`."""
    found = difference(before, after)
    if not found <= TOLERANCE.get(dtype, 0.25):
        raise RuntimeError(f"{what} differs from what was trained: log-probabilities by {found:.3g} nats")
    return found


def divergence(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of two probes, in nats per token; of a lone number the mean difference."""
    if before.shape[1] == 1:
        return float((before - after).abs().mean())
    rows = []
    for pair in zip(before, after, strict=True):  # row by row: in double precision all at once would take much memory
        p, q = (row.double().log_softmax(-1) for row in pair)
        rows.append(float((p.exp() * (p - q)).sum()))
    return sum(rows) / len(rows)
