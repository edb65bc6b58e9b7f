"""Parts of a recipe that several tools' configs come to: sources, who is trained on, quantization, held-out rows."""

from __future__ import annotations

from math import isclose
from pathlib import Path
from typing import Any, Literal

from hfpipe.convert.draft import Draft
from hfpipe.recipe.row_formats import SAID_KEYS, SPEAKER_KEYS

Trained = Literal["assistant", "last", "completion", "all"]
Block = dict[str, Any]
HELD_OUT = "held-out"
EIGHT_BIT_FLOATS = "matrices are multiplied in bfloat16, which is more exact than 8-bit floats, and slower"
_BUILDERS = {"json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet", "text": "text", "arrow": "arrow"}
_BUILDERS |= {"txt": "text", "tsv": "csv"}
_ALPACA = "Below is an instruction that describes a task{context}. "
_ALPACA += "Write a response that appropriately completes the request."
ALPACA_SYSTEM = _ALPACA.format(context="")
ALPACA_SYSTEM_WITH_INPUT = _ALPACA.format(context=", paired with an input that provides further context")
ALPACA_PROMPT = f"{ALPACA_SYSTEM}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n"
ALPACA_PROMPT_WITH_INPUT = (
    f"{ALPACA_SYSTEM_WITH_INPUT}\n\n### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n### Response:\n"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def source_of(path: str, **more: Any) -> Block:
    """A source of a Hub data set, a folder, or a file, which its ending says how to read."""
    given = {key: value for key, value in more.items() if value is not None}
    ending = Path(path.removesuffix(".gz").removesuffix(".zst")).suffix.removeprefix(".")
    if path in _BUILDERS or ending not in _BUILDERS or "://" in path:
        return {"path": path, **given}
    return {"path": _BUILDERS[ending], "data_files": path, **given}


def chat_rows(draft: Draft, source: Block, column: str, role: str = "role", content: str = "content") -> list[Block]:
    """Sources of conversations: a list of turns in one column."""
    if (role, content) != ("role", "content") and role in SPEAKER_KEYS and content in SAID_KEYS:
        named = {} if column == "conversations" else {"columns": {"conversations": column}}
        return [{**source, "format": "sharegpt", **named}]
    if (role, content) != ("role", "content"):
        why = f"turns with the keys `{role}` and `{content}` are not read; `role` and `content` are"
        draft.note("lost", str(source["path"]), why)
    return [{**source, **({} if column == "messages" else {"columns": {"messages": column}})}]


def with_and_without_input(source: Block, plain: Block, with_input: Block) -> list[Block]:
    """Sources of instruction, input and output: rows without an input are built otherwise than rows with one.

    Args:
        source: The source.
        plain: The template of rows without an input.
        with_input: The template of rows with one.
    """
    return [
        {**source, "where": "input == '' or input is None", "template": plain},
        {**source, "where": "input != '' and input is not None", "template": with_input},
    ]


def turns(user: str, assistant: str, system: str | None = None) -> Block:
    """A template of a conversation with one question and its answer."""
    said = [("system", system), ("user", user), ("assistant", assistant)]
    return {"messages": [{"role": role, "content": text} for role, text in said if text is not None]}


def train_on(draft: Draft, who: Trained) -> None:
    """Says whose tokens are trained on."""
    if draft.stage["kind"] == "sft":
        draft.put("stage.train_on", who)


def special_token(draft: Draft, key: str, name: str, value: Any) -> None:
    """An end-of-sequence or padding token of the tokenizer."""
    if value and name == "pad_token":
        draft.note("unneeded", key, "padding is masked, whichever token it is")
    elif value:
        draft.put(f"model.tokenizer.{name}", value)


def model_config(draft: Draft, values: Any) -> None:
    """Fields of the model's config that differ from those of its files."""
    if values:
        draft.put("model.config", {**(draft.take("model.config") or {}), **values})


def quantize(draft: Draft, bits: int, **more: Any) -> None:
    """Stores the frozen base in 4 or 8 bits; bitsandbytes' options differ from hfpipe's defaults only where given."""
    if bits == 8:
        draft.put("stage.quantization", "int8")
        return
    more = {key: value for key, value in more.items() if value is not None}
    if more.get("bnb_4bit_use_double_quant") is True:
        more.pop("bnb_4bit_use_double_quant")
    draft.put("stage.quantization", {"type": "nf4", **more} if more else "nf4")


def target_modules(value: Any) -> Any:
    """Modules of an adapter: names in a list, a pattern, or all linear layers."""
    names = [one.strip() for one in value.split(",")] if isinstance(value, str) and "," in value else value
    names = names[0] if isinstance(names, list) and len(names) == 1 and "all" in str(names[0]) else names
    return "all-linear" if names in ("all", "all-linear", "all_linear") else names


def hold_out(draft: Draft, key: str, size: Any) -> None:
    """Holds a part of every source out of the training, and scores it.

    Args:
        draft: The draft, with its sources.
        key: The key that asks for it.
        size: A share below 1, or a number of rows.
    """
    size = float(size or 0)
    if not size:
        return
    for number, source in enumerate(draft.stage["data"]):
        name = f"{HELD_OUT}-{number + 1}" if len(draft.stage["data"]) > 1 else HELD_OUT
        held = {name: value for name, value in source.items() if name not in ("weight", "deduplicate")}
        if size >= 1 or source.get("streaming"):
            rows = int(size) if size >= 1 else 1000
            source["skip"] = rows
            held["take"] = rows
            draft.note(
                "changed", key, f"the first {rows} rows of each source are held out, not {size:g} drawn at random"
            )
        elif "fold" in source:
            draft.note("lost", key, "a source of which a part is taken cannot be cut into folds once more")
            continue
        else:
            folds = max(2, round(1 / size))
            if not isclose(1 / folds, size, rel_tol=0.02):
                draft.note(
                    "changed", key, f"one row in {folds} is held out ({1 / folds:.1%} of the rows, not {size:.1%})"
                )
            source["fold"], held["fold"] = {"of": folds, "leave": 1}, {"of": folds, "keep": 1}
        steps = draft.config.get("eval_steps")
        every = {"every": steps} if isinstance(steps, int) and steps > 1 else {}
        draft.suites[name] = {"data": held, "metrics": ["bits_per_byte"], **every}


def part_of(draft: Draft, key: str, source: Block, share: float) -> None:
    """Takes a share of a source's rows."""
    if share >= 1:
        return
    folds = round(1 / share)
    if isclose(1 / folds, share, rel_tol=0.01):
        source["fold"] = {"of": folds, "keep": 1}
    else:
        source["split"] = f"{source.get('split', 'train')}[:{max(1, round(share * 100))}%]"
        draft.note(
            "changed", key, f"the first {max(1, round(share * 100))} % of the rows are taken, not drawn at random"
        )


def warmup(draft: Draft, key: str, value: Any) -> None:
    """Steps of warm-up, or their share below 1: transformers takes both by one name."""
    if value is not None:
        draft.train(key, "training.warmup_steps", value)


def warmup_of_constant(draft: Draft) -> None:
    """Leaves a warm-up out that the constant schedule of transformers takes no notice of."""
    if draft.take("stage.training.lr_scheduler_type") == "constant" and draft.take("stage.training.warmup_steps"):
        draft.stage["training"].pop("warmup_steps")
        draft.note("unneeded", "warmup", "transformers' constant schedule has none (constant_with_warmup has)")


def warmup_within_steps(draft: Draft) -> None:
    """Ends a warm-up with the last step, where it is longer than the training; each step has the rate that it had."""
    steps, warm = (draft.take(f"stage.training.{name}") for name in ("max_steps", "warmup_steps"))
    rate = draft.take("stage.training.learning_rate")
    if isinstance(steps, int) and isinstance(warm, int) and isinstance(rate, int | float) and warm > steps > 0:
        draft.put("stage.training.warmup_steps", steps)
        draft.put("stage.training.learning_rate", float(f"{rate * steps / warm:.6g}"))
        why = f"the training ends amid a warm-up of {warm} steps: `learning_rate` is what it reaches by then"
        draft.note("changed", "warmup", why)


def fresh(draft: Draft) -> None:
    """Starts from fresh weights, by the config of the model that the draft names."""
    model = draft.recipe["model"]
    named = model.pop("id")
    if model.pop("revision", None):
        draft.note("lost", "revision", "a config is taken as the main branch has it")
    model["architecture"] = {"from": named, **(model.pop("config", None) or {})}
    model.setdefault("tokenizer", {}).setdefault("id", named)


def muon(draft: Draft, options: Block) -> None:
    """Trains matrices by Muon, scaled so that it takes AdamW's learning rate (Moonlight's way).

    Source: Liu et al. 2025, https://arxiv.org/abs/2502.16982.
    """
    draft.put("stage.muon", {"adjust_lr_fn": "match_rms_adamw", **options})


def checkpointing(draft: Draft, value: Any) -> None:
    """Activations are computed again in the backward pass (to save memory), or kept."""
    draft.put("stage.training.activation_checkpointing", bool(value))


def own_template(draft: Draft, key: str, name: str) -> None:
    """The config names a template of its tool: the model's own takes its place."""
    why = f"the model's own chat template is taken, not the tool's '{name}'; a base without one needs "
    draft.note("changed", key, why + "`model.tokenizer.chat_template`")


def lora_plus(draft: Draft, key: str, ratio: float) -> None:
    """LoRA+: the second matrix of an adapter learns at a multiple of the first one's rate.

    Source: Hayou et al. 2024, https://arxiv.org/abs/2402.12354.
    """
    rate = draft.config.get("learning_rate")
    if rate:
        draft.put("stage.learning_rates", {"lora_B": float(rate) * float(ratio)})
    else:
        draft.note("lost", key, "it is a multiple of `learning_rate`, which the config does not say")


def too_long(draft: Draft, what: Literal["cut", "drop"]) -> None:
    """Converts the word for rows that are longer than `max_length`."""
    if draft.stage["kind"] == "sft":
        draft.put("stage.too_long", what)


def is_file(path: str) -> bool:
    """Returns True if a path is one of a file or folder on this machine, by its form."""
    return path.startswith(("/", "./", "../", "~")) or "data_files" in source_of(path)


def streams_need_steps(draft: Draft) -> None:
    """A streamed source has no known length: without a number of steps it is read as a table."""
    if draft.take("stage.training.max_steps") is None:
        streamed = [source for source in draft.stage["data"] if source.pop("streaming", None)]
        if streamed:
            why = "sources are downloaded whole: a streamed one has no known length and needs `training.max_steps`"
            draft.note("changed", "streaming", why)
            for source in [suite["data"] for suite in draft.suites.values()]:
                source.pop("streaming", None)


def merge(draft: Draft, value: Any) -> None:
    """Merges the adapter at the end, where there is one."""
    if value and "lora" in draft.stage:
        draft.put("merge", True)


def max_steps(draft: Draft, value: Any) -> None:
    """Steps of the stage; -1 and 0 leave the number to the epochs."""
    if value and value > 0:
        draft.train("max_steps", "training.max_steps", value)


def compiled(draft: Draft, value: Any) -> None:
    """Compiles the model."""
    if value is True:
        draft.put("stage.training.torch_compile", True)
