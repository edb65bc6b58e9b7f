"""The data sets and chat templates of an axolotl config; see `axolotl.py`."""

from __future__ import annotations

from typing import Any

from hfpipe.convert import preferences, words
from hfpipe.convert.draft import OFF, Draft, Lost, Table, Unneeded, with_another

PREPARED = Unneeded("hfpipe keeps prepared rows itself")
# axolotl's names of chat templates, and the names by which TRL has the same template.
TEMPLATES = {
    "llama3": "llama3",
    "qwen_25": "qwen2_5",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma3": "gemma3",
    "phi_3": "phi3",
    "phi_35": "phi3_5",
    "cohere": "cohere",
    "deepseek_v3": "deepseekv3",
}


def follow_template(draft: Draft, value: Any) -> None:
    if value in OFF or value == "tokenizer_default" or not is_chat(draft):
        return
    if value == "jinja":
        return  # `chat_template_jinja` says it
    name = str(value).removeprefix("tokenizer_default_fallback_")
    if name == "chatml":
        draft.put("model.tokenizer.chat_template", words.CHATML)
    elif name in TEMPLATES:
        draft.put("model.tokenizer.chat_template", TEMPLATES[name])
    else:
        words.own_template(draft, "chat_template", name)


def note_end_of_turn(draft: Draft, value: Any) -> None:
    """`eot_tokens`, which training follows without being told."""
    if value:
        why = f"the end of a turn is what the chat template writes after it ({', '.join(map(str, value))})"
        draft.note("changed", "eot_tokens", why)


def deduplicate(draft: Draft, value: Any) -> None:
    """`dataset_exact_deduplication`."""
    for source in draft.stage["data"] if value else ():
        source["deduplicate"] = "exact"


def is_chat(draft: Draft) -> bool:
    return any(
        str((one or {}).get("type", "")).startswith("chat_template") for one in draft.config.get("datasets") or []
    )


def add_documents(draft: Draft, value: Any) -> None:
    for one in value if isinstance(value, list) else [value]:
        one = {"path": one} if isinstance(one, str) else one
        column = one.get("text_column") or one.get("field") or "text"
        streaming = True if draft.config.get("pretraining_dataset") else None
        source = words.source_of(
            one["path"],
            name=one.get("name"),
            data_files=one.get("data_files"),
            split=one.get("split") or "train",
            skip=one.get("skip"),
            streaming=streaming,
        )
        draft.stage["data"].append(source if column == "text" else {**source, "columns": {"text": column}})
        known = ("path", "name", "data_files", "split", "skip", "text_column", "field", "type", "trust_remote_code")
        for key in sorted(set(one) - set(known)):
            draft.note("lost", f"pretraining_dataset.{key}", "a source has no such word")


_SOURCE: Table = {
    "path": with_another,
    "type": with_another,
    "name": with_another,
    "split": with_another,
    "data_files": with_another,
    "revision": with_another,
    "ds_type": with_another,
    "field": with_another,
    "field_*": with_another,
    "message_property_mappings": with_another,
    "message_field_role": with_another,
    "message_field_content": with_another,
    "trust_remote_code": Unneeded("data sets with code are not loaded any more"),
    "roles": with_another,
    "roles_to_train": with_another,
    "train_on_eos": with_another,
    "chat_template": follow_template,
    "chat_template_jinja": "model.tokenizer.chat_template",
    "preprocess_shards": PREPARED,
    "drop_system_message": Lost("the system message of a row is kept"),
    "message_field_training": Lost("a message is trained on by its role; a message's own `train: false` is honoured"),
    "message_field_training_detail": Lost("a message is trained on whole"),
    "shards": with_another,
    "shards_idx": with_another,
    "template_thinking_key": with_another,
    "split_thinking": Lost("a message is rendered as it stands"),
    "conversation": Unneeded("the chat template says it"),
}
_KNOWN_ROLES = {"user": {"human", "user"}, "assistant": {"gpt", "assistant"}, "system": {"system"}, "tool": {"tool"}}


def add_sources(draft: Draft) -> None:
    for number, one in enumerate(draft.config.get("datasets") or []):
        if draft.stage["kind"] == "preference":
            draft.stage["data"].append(_pairs(draft, f"datasets[{number}]", one))
            continue
        kind, _, style = str(one.get("type") or "chat_template").partition(":")
        before = f"datasets[{number}]"
        if isinstance(one.get("type"), dict):
            one = {**one, **one["type"]}
            kind = "user_defined"
        source = words.source_of(
            one["path"], **{key: one.get(key) for key in ("name", "data_files", "split", "revision")}
        )
        if one.get("shards"):
            source["fold"] = {"of": int(one["shards"]), "keep": 1 + int(one.get("shards_idx") or 0)}
        draft.stage["data"] += _rows(draft, before, one, source, kind.removesuffix(".load_qa"), style)
        rules = {f"{before}.{key}": rule for key, rule in _SOURCE.items()}
        if kind == "user_defined":
            rules |= {f"{before}.{key}": with_another for key in _OWN_PROMPT}
        draft.apply(rules, {f"{before}.{key}": value for key, value in one.items()})


def _pairs(draft: Draft, before: str, one: dict[str, Any]) -> dict[str, Any]:
    """A source of one of axolotl's types of pairs."""
    source = words.source_of(one["path"], **{key: one.get(key) for key in ("name", "data_files", "split", "revision")})
    given = one.get("type")
    kind = str(given or "chat_template.default").partition(".")[2] if not isinstance(given, dict) else "user_defined"
    if kind == "default":
        asked = one.get("field_messages") or "messages"
        sides = {"chosen": one.get("field_chosen"), "rejected": one.get("field_rejected")}
        return preferences.renamed(source, "ranking_chat", conversations=asked, **sides)
    if kind == "argilla":
        return preferences.renamed(source, "ranking", chosen="chosen_response", rejected="rejected_response")
    if kind in ("icr", "prompt_pairs"):
        asked = "{input}" if kind == "icr" else "{prompt}"
        return {**source, "template": preferences.in_turns(asked, "{chosen}", "{rejected}")}
    if kind not in ("intel", "ultra", "argilla_chat"):
        draft.note("lost", f"{before}.type", f"axolotl's type '{given}' is not converted; write `template:`")
    return source


# Of axolotl's styles of alpaca: the system message, and the turn of a user without an input and with one.
_STYLES = {
    "chat": ("SYSTEM: {system}\n", "USER: {instruction}\nASSISTANT:", "USER: {instruction}\n{input}\nASSISTANT:"),
    "phi": (
        "<|system|>\n{system}<|end|>\n",
        "<|user|>\n{instruction}<|end|>\n<|assistant|>\n",
        "<|user|>\n{instruction}<|end|>{input}<|assistant|>",
    ),
}
_OWN_PROMPT = ("system_prompt", "system_format", "format", "no_input_format", "field_instruction")


def _rows(
    draft: Draft, before: str, one: dict[str, Any], source: dict[str, Any], kind: str, style: str
) -> list[dict[str, Any]]:
    """Sources of one of axolotl's types of data set."""
    if kind in ("chat_template", "chat_template.default", "sharegpt"):
        return _conversations(draft, before, one, source, kind)
    if kind == "alpaca" and style == "":
        return [{**source, "format": "alpaca"}]
    if kind == "alpaca" and style in _STYLES:
        system, plain, with_input = _STYLES[style]
        said = (words.ALPACA_SYSTEM, words.ALPACA_SYSTEM_WITH_INPUT)
        prompts = (system.format(system=one) + form for one, form in zip(said, (plain, with_input), strict=True))
        return words.with_and_without_input(source, *({"prompt": one, "completion": "{output}"} for one in prompts))
    if kind == "jeopardy":
        asked = words.ALPACA_PROMPT_WITH_INPUT.format(instruction="{question}", input="{category}")
        return [{**source, "template": {"prompt": asked, "completion": "what is {answer}"}}]
    if kind == "completion":
        column = one.get("field") or "text"
        return [source if column == "text" else {**source, "columns": {"text": column}}]
    if kind == "input_output":
        draft.note("lost", f"{before}.type", "segments with a mark of their own are not a format of rows")
        return [source]
    if kind == "user_defined":
        return _own_prompt(draft, before, one, source)
    draft.note("lost", f"{before}.type", f"axolotl's type '{one.get('type')}' is not converted; write `template:`")
    return [source]


def _conversations(
    draft: Draft, before: str, one: dict[str, Any], source: dict[str, Any], kind: str
) -> list[dict[str, Any]]:
    mapping = one.get("message_property_mappings") or {}
    asked = "from" if kind == "sharegpt" else "role"
    role = one.get("message_field_role") or mapping.get("role") or asked
    content = one.get("message_field_content") or mapping.get("content") or ("value" if asked == "from" else "content")
    column = one.get("field_messages") or ("conversations" if kind == "sharegpt" else "messages")
    for target, sources in (one.get("roles") or {}).items():
        if not set(sources) <= _KNOWN_ROLES.get(target, {target}):
            draft.note("lost", f"{before}.roles", f"roles named {', '.join(sources)} are not read as {target}")
    if (trained := one.get("roles_to_train")) not in (None, ["assistant"], ["assistant", "gpt"], ["gpt"]):
        draft.note("lost", f"{before}.roles_to_train", f"the assistant's turns are trained on, not those of {trained}")
    if one.get("train_on_eos") not in (None, "turn", "all"):
        draft.note("lost", f"{before}.train_on_eos", "the end of every turn that is trained on is trained on")
    thinking = one.get("field_thinking")
    if thinking not in (None, "reasoning_content", "thinking"):
        draft.note("lost", f"{before}.field_thinking", f"the chat template reads its own field, not '{thinking}'")
    return words.chat_rows(draft, source, column, role, content)


def _own_prompt(draft: Draft, before: str, one: dict[str, Any], source: dict[str, Any]) -> list[dict[str, Any]]:
    """A prompt format of the config: `{instruction}`, `{input}` and `{output}` stand for the columns it names."""
    columns = {name: one.get(f"field_{name}") or name for name in ("instruction", "input", "output", "system")}
    system = one.get("system_prompt") or ""
    if "{system}" in (one.get("system_format") or ""):
        system = one["system_format"].replace("{system}", system) if system else ""

    def built(form: str) -> str:
        for name, column in columns.items():
            form = form.replace(f"{{{name}}}", f"{{{column}}}")
        return system + form

    completion = f"{{{columns['output']}}}"
    form = built(one.get("format") or "{instruction} {input} ")
    plain = built(one.get("no_input_format") or one.get("format") or "{instruction} ")
    if f"{{{columns['input']}}}" not in form or form == plain:
        return [{**source, "template": {"prompt": form, "completion": completion}}]
    rows = words.with_and_without_input(
        source, {"prompt": plain, "completion": completion}, {"prompt": form, "completion": completion}
    )
    for row in rows:
        row["where"] = row["where"].replace("input", columns["input"])
    return rows
