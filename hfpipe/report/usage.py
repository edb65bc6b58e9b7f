"""A trained model as others use it: where it lies, what it is loaded on, and the code that loads and asks it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfpipe.core.files import read_json
from hfpipe.core.run_layout import ADAPTER_CONFIG, DIAL, model_of, strength_of
from hfpipe.recipe import Recipe, Source, Stage
from hfpipe.recipe.config import hub_id, is_on_hub
from hfpipe.report.layout import Section

# By the task of the stage that made it: the Hub's name of the task, and the class that loads it.
TASKS = {
    "causal": ("text-generation", "AutoModelForCausalLM"),
    "masked": ("fill-mask", "AutoModelForMaskedLM"),
    "classification": ("text-classification", "AutoModelForSequenceClassification"),
    "seq2seq": ("translation", "AutoModelForSeq2SeqLM"),
}
# Fields of LoraConfig that add more than two matrices to a layer, and their values that do not.
TWO_MATRICES = {"use_dora": (None, False), "modules_to_save": (None, []), "bias": (None, "none")}


@dataclass(frozen=True)
class Usage:
    """A trained model or adapter.

    Args:
        place: Hub id, or the folder it lies in.
        what: `adapter`, `merged` or `model`.
        stage: The stage that made it.
        on_hub: Whether `place` is a Hub id.
        revision: The branch of the Hub; None for main.
        base: What an adapter is loaded on, and what any other was made from: a Hub id or a folder; None for a model
            that was trained from nothing.
        base_stage: The stage of the run that made the base of an adapter; None for one from elsewhere.
        base_revision: Commit of the base that was used.
        chat: Whether its tokenizer has a chat template.
        quantized: Whether its weights are stored quantized.
        license: Licence that the recipe states; None for the base's.
        strength: What the stage was dialled to so as to stay inside the budgets; None at full strength.
        base_facts: What the base's card says on the Hub: license, license_name, license_link, language.
        data_facts: The same of the data sets it was trained on, by Hub id.
        dial: Its stage's dial; None without one.
    """

    place: str
    what: str
    stage: str
    on_hub: bool = True
    revision: str | None = None
    base: str | None = None
    base_stage: str | None = None
    base_revision: str | None = None
    chat: bool = False
    quantized: bool = False
    license: str | None = None
    strength: float | None = None
    base_facts: Mapping[str, Any] = field(default_factory=dict)
    data_facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dial: Section | None = None

    @property
    def base_on_hub(self) -> bool:
        return self.base is not None and is_on_hub(self.base)


def usage_in_run(run: Path, recipe: Recipe, stage: str, folder: Path) -> Usage:
    """Code that uses the model in a folder of the run, from where the command was started."""
    config, adapter = (read_json(folder / name) for name in ("config.json", ADAPTER_CONFIG))
    known = read_json(run / "environment.json").get("base") or {}
    base, revision = recipe.model.id, known.get("revision")
    if adapter:
        base = adapter.get("base_model_name_or_path") or base
        revision = adapter.get("revision") or (revision if base == known.get("id") else None)
    return Usage(
        place=str(folder),
        what="adapter" if adapter else "merged" if folder.name == "merged" else "model",
        stage=stage,
        on_hub=False,
        base=base,
        base_stage=parent_stage(str(base), recipe) if adapter else None,
        base_revision=revision,
        chat=(folder / "chat_template.jinja").exists(),
        quantized="quantization_config" in config,
        strength=strength_of(run / "stages" / stage) if folder.name in (DIAL, "merged") else None,
        base_facts=card_facts(run, "model", recipe.model.id or ""),
        data_facts=data_facts(run, recipe, stage),
    )


def parent_stage(base: str, recipe: Recipe) -> str | None:
    """The stage of the run whose model an adapter's base is; None for a model from elsewhere."""
    parts = Path(base).parts[-3:]  # the run folder may have been moved
    known = len(parts) == 3 and parts[0] == "stages" and parts[1] in [stage.name for stage in recipe.stages]
    return parts[1] if known else None


def card_facts(run: Path, kind: str, id: str) -> dict[str, Any]:
    """Licence and languages of a model or data set as its card gave them when the run began, see hub/pins.py."""
    return next((facts for key, facts in read_json(run / "hub.json").items() if key.startswith(f"{kind} {id}@")), {})


def data_facts(run: Path, recipe: Recipe, stage: str) -> dict[str, Any]:
    """The same of each data set of the Hub that a stage or one before it was trained on."""
    sources = [source for one in lineage(recipe, stage) for source in one.data]
    return {id: card_facts(run, "dataset", id) for source in sources if (id := hub_id(source))}


def lineage(recipe: Recipe, stage: str) -> list[Stage]:
    """The stages that a model went through, first to last."""
    by_name = {one.name: one for one in recipe.stages}
    return [by_name[name] for name in recipe.lineage(stage)[1:]]


def lines_to_use(run: Path, recipe: Recipe, stage: str) -> list[str]:
    """Python that loads and asks what a stage left, merged where it is; for the terminal."""
    place = run / "stages" / stage
    folder = place / "merged" if (place / "merged").is_dir() else model_of(place)
    return code(usage_in_run(run, recipe, stage, folder), recipe).splitlines()


def code(usage: Usage, recipe: Recipe) -> str:
    """Python that loads a model and asks it, by its kind and task."""
    trust = ", trust_remote_code=True" if recipe.model.trust_remote_code else ""
    branch = f', revision="{usage.revision}"' if usage.revision else ""
    last = lineage(recipe, usage.stage)[-1]
    _, auto = TASKS[last.task]
    languages = ""
    if last.data[0].src_lang and last.data[0].tgt_lang:
        languages = f', src_lang="{last.data[0].src_lang}", tgt_lang="{last.data[0].tgt_lang}"'
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({_quoted(usage.place)}{branch}{trust}{languages})"
    lines = [f"from transformers import {auto}, AutoTokenizer"]
    if usage.what == "adapter":
        commit = f', revision="{usage.base_revision}"' if usage.base_revision else ""
        named = ""
        if last.task == "classification":  # the classes are in the adapter's config.json
            lines[0] = lines[0].replace("import ", "import AutoConfig, ")
            lines.append(f"config = AutoConfig.from_pretrained({_quoted(usage.place)}{branch}{trust})")
            named = ", config=config"
        lines.insert(1, "from peft import PeftModel")
        lines.append(tokenizer)
        lines.append(f"base = {auto}.from_pretrained({_quoted(usage.base)}{commit}{named}{trust})")
        if _grows(recipe):
            lines.append("base.resize_token_embeddings(max(len(tokenizer), base.config.vocab_size))")
        lines.append(f"model = PeftModel.from_pretrained(base, {_quoted(usage.place)}{branch})")
    else:
        lines += [tokenizer, f"model = {auto}.from_pretrained({_quoted(usage.place)}{branch}{trust})"]
    return "\n".join([*lines, *_asking(last, usage.chat)])


def _quoted(text: str | None) -> str:
    return json.dumps(text, ensure_ascii=False)


def _grows(recipe: Recipe) -> bool:
    """Returns True if the recipe adds tokens to the vocabulary of the base."""
    tokenizer = recipe.model.tokenizer
    return tokenizer is not None and bool(tokenizer.add_tokens or tokenizer.add_special_tokens)


def _asking(stage: Stage, chat: bool) -> list[str]:
    """The lines that ask a model, and print its answer."""
    source = stage.data[0]
    if stage.task == "classification":
        return [
            'logits = model(**tokenizer("...", return_tensors="pt")).logits[0]',
            "print(dict(zip(model.config.id2label.values(), logits.tolist())))",
        ]
    if stage.task == "masked":
        return [
            'inputs = tokenizer(f"... {tokenizer.mask_token} ...", return_tensors="pt")',
            "place = inputs.input_ids[0].tolist().index(tokenizer.mask_token_id)",
            "print(tokenizer.decode([model(**inputs).logits[0, place].argmax().item()]))",
        ]
    if stage.task == "seq2seq":
        begin = ', forced_bos_token_id=tokenizer(text_target="").input_ids[0]' if source.tgt_lang else ""
        return [
            f'inputs = tokenizer({_example(source, "source")}, return_tensors="pt")',
            f"output = model.generate(**inputs{begin}, max_new_tokens=200)",
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        ]
    named = {**(source.template or {}), **(source.columns if isinstance(source.columns, dict) else {})}
    if chat and stage.kind != "pretrain" and not isinstance(named.get("prompt"), str):
        inputs = [
            'turns = [{"role": "user", "content": "..."}]',
            "inputs = tokenizer.apply_chat_template("
            'turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
        ]
    else:
        inputs = [f'inputs = tokenizer({_example(source, "prompt")}, return_tensors="pt")']
    return [
        *inputs,
        "output = model.generate(**inputs, max_new_tokens=200)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
    ]


def _example(source: Source, role: str) -> str:
    """A text as the model was asked in training: the recipe's template, with its columns to be filled in."""
    text = (source.template or {}).get(role)
    return _quoted(text) if isinstance(text, str) else '"..."'


def needs_access(usage: Usage, recipe: Recipe) -> tuple[str, str] | None:
    """The reason why the base of an adapter is not for everybody, `private` or `gated`, and its Hub id."""
    if usage.what != "adapter" or usage.base is None or usage.base != recipe.model.id:
        return None
    kinds = [kind for kind in ("private", "gated") if usage.base_facts.get(kind)]
    return (kinds[0], usage.base) if kinds else None


def vllm_command(usage: Usage, recipe: Recipe) -> str | None:
    """The command that serves a model by vLLM; empty for an adapter that vLLM does not take, None where not asked."""
    last = lineage(recipe, usage.stage)[-1]
    if last.task != "causal":
        return None
    trust = " --trust-remote-code" if recipe.model.trust_remote_code else ""
    if usage.what != "adapter":
        return (
            f"vllm serve {shlex.quote(usage.place)}{f' --revision {usage.revision}' if usage.revision else ''}{trust}"
        )
    fields = last.adapter or {}
    plain = all(fields.get(key) in values for key, values in TWO_MATRICES.items())
    if last.method != "LoRA" or _grows(recipe) or not plain:
        return ""
    if usage.revision:  # vLLM takes adapters of main
        return None
    converted = str(fields.get("init_lora_weights", "")).startswith(("pissa", "olora"))
    rank = fields.get("r", 8) * (2 if converted else 1)
    at = f" --revision {usage.base_revision}" if usage.base_revision else ""
    at += f"{trust} --max-lora-rank {max(8, 2 ** (rank - 1).bit_length())}"  # it knows powers of two
    name = usage.place.rstrip("/").split("/")[-1] if usage.on_hub else usage.stage
    base, adapter = shlex.quote(str(usage.base)), shlex.quote(f"{name}={usage.place}")
    return f"vllm serve {base}{at} --enable-lora --lora-modules {adapter}"
