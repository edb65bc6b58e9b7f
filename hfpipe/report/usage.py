"""What is pushed, as its card sees it, and how others load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hfpipe.recipe import Recipe, Source, Stage

# By the task of the stage that made it: the Hub's name of the task, and the class that loads it.
TASKS = {
    "causal": ("text-generation", "AutoModelForCausalLM"),
    "masked": ("fill-mask", "AutoModelForMaskedLM"),
    "classification": ("text-classification", "AutoModelForSequenceClassification"),
    "seq2seq": ("translation", "AutoModelForSeq2SeqLM"),
}
# Fields of LoraConfig with which vLLM refuses an adapter, and the values that it takes: its lora/peft_helper.py.
TAKEN_BY_VLLM = {"use_dora": (None, False), "modules_to_save": (None, []), "bias": (None, "none")}
LORA_RANK_OF_VLLM = 16  # the largest that vLLM takes without being told


@dataclass(frozen=True)
class Artefact:
    """What is pushed.

    Args:
        repo_id: Where it goes on the Hub.
        what: `adapter`, `merged` or `model`.
        stage: The stage that made it.
        revision: The branch it goes to; None for main.
        base: Hub id of the base model; None when the run started from nothing.
        base_revision: Commit of the base that was used.
        quantized: Whether its weights are stored in fewer bits.
        license: Licence that the recipe states; None for the base's.
        base_facts: What the base's card says on the Hub: license, license_name, license_link, language.
        data_facts: The same of the data sets it was trained on, by Hub id.
        dial: The section on its stage's dial; empty where there is none.
        strength: What the stage was dialled to so as to stay inside the budgets; None at full strength.
    """

    repo_id: str
    what: str
    stage: str
    revision: str | None = None
    base: str | None = None
    base_revision: str | None = None
    quantized: bool = False
    license: str | None = None
    strength: float | None = None
    base_facts: Mapping[str, Any] = field(default_factory=dict)
    data_facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dial: str = ""


def lineage(recipe: Recipe, stage: str) -> list[Stage]:
    """The stages that an artefact went through, first to last."""
    by_name = {one.name: one for one in recipe.stages}
    return [by_name[name] for name in recipe.lineage(stage)[1:]]


def _access(artefact: Artefact, recipe: Recipe) -> str:
    """What others need first where the base of an adapter is not for everybody."""
    if artefact.what != "adapter" or artefact.base != recipe.model.id:
        return ""
    if artefact.base_facts.get("private"):
        return f"The base, {artefact.base}, was private when this was trained: it needs an account that may see it.\n\n"
    if artefact.base_facts.get("gated"):
        page = f"https://huggingface.co/{artefact.base}"
        return f"The base is gated: ask for access on [its page]({page}), then log in (`hf auth login`).\n\n"
    return ""


def how_to_load(artefact: Artefact, recipe: Recipe) -> str:
    """The lines of code that load an artefact, by its kind and task, and what is needed first."""
    return _access(artefact, recipe) + _code(artefact, recipe)


def _code(artefact: Artefact, recipe: Recipe) -> str:
    trust = ", trust_remote_code=True" if recipe.model.trust_remote_code else ""
    branch = f', revision="{artefact.revision}"' if artefact.revision else ""
    last = lineage(recipe, artefact.stage)[-1]
    _, auto = TASKS[last.task]
    generates = last.task == "causal"  # what vLLM serves
    head = f"from transformers import {auto}, AutoTokenizer"
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{artefact.repo_id}"{branch}{trust})'
    use = ""
    if last.task == "seq2seq":
        tokenizer, use = _how_to_translate(last.data[0], tokenizer)
    if artefact.what != "adapter":
        load = f'model = {auto}.from_pretrained("{artefact.repo_id}"{branch}{trust})'
        at = f" --revision {artefact.revision}" if artefact.revision else ""
        at += " --trust-remote-code" if trust else ""
        served = f"\n\nvLLM: `vllm serve {artefact.repo_id}{at}`" if generates else ""
        return f"```python\n{head}\n\n{load}\n{tokenizer}{use}\n```{served}"
    commit = f', revision="{artefact.base_revision}"' if artefact.base_revision else ""
    named = ", config=config" if last.task == "classification" else ""
    if named:  # the classes are in the adapter's config.json
        head = head.replace("import ", "import AutoConfig, ")
    load = f'config = AutoConfig.from_pretrained("{artefact.repo_id}"{branch}{trust})\n' if named else ""
    words = recipe.model.tokenizer
    grows = words is not None and bool(words.add_tokens or words.add_special_tokens)
    load += f'base = {auto}.from_pretrained("{artefact.base}"{commit}{named}{trust})\n{tokenizer}\n'
    load += "base.resize_token_embeddings(max(len(tokenizer), base.config.vocab_size))\n" if grows else ""
    load += f'model = PeftModel.from_pretrained(base, "{artefact.repo_id}"{branch})'
    code = f"```python\n{head}\nfrom peft import PeftModel\n\n{load}{use}\n```"
    fields = last.adapter or {}
    if not generates:
        return code
    taken = all(fields.get(key) in values for key, values in TAKEN_BY_VLLM.items())
    if last.method != "LoRA" or grows or not taken:
        return f"{code}\n\nvLLM serves no adapter of this kind; it serves the model that the adapter is merged into."
    if artefact.revision:  # vLLM takes adapters of main
        return code
    converted = str(fields.get("init_lora_weights", "")).startswith(("pissa", "olora"))
    rank = fields.get("r", 8) * (2 if converted else 1)
    at = f" --revision {artefact.base_revision}" if artefact.base_revision else ""
    at += " --trust-remote-code" if trust else ""
    at += f" --max-lora-rank {rank}" if rank > LORA_RANK_OF_VLLM else ""
    name = artefact.repo_id.split("/")[-1]
    vllm = f"vllm serve {artefact.base}{at} --enable-lora --lora-modules {name}={artefact.repo_id}"
    return f"{code}\n\nvLLM: `{vllm}`"


def _how_to_translate(source: Source, tokenizer: str) -> tuple[str, str]:
    """The line that loads the tokenizer, and what says a target."""
    begin = ""
    if source.src_lang and source.tgt_lang:
        tokenizer = f'{tokenizer[:-1]}, src_lang="{source.src_lang}", tgt_lang="{source.tgt_lang}")'
        begin = ', forced_bos_token_id=tokenizer(text_target="").input_ids[0]'
    text = (source.template or {}).get("source") or "..."
    return tokenizer, (
        f'\n\ninputs = tokenizer({text!r}, return_tensors="pt")\n'
        f"output = model.generate(**inputs{begin}, max_new_tokens=200)\n"
        "print(tokenizer.decode(output[0], skip_special_tokens=True))"
    )
