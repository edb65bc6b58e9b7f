"""Writes the references in this folder from the code: every key of a recipe, every command with its options, and on the
page on scaling the table of what cannot be combined.

`make docs` runs it. `tests/test_documented.py` fails when a committed page is not what the code makes, so run it after
every change of a recipe's words, of a metric or of a command. Meanings are the descriptions of the fields in
`hfpipe/recipe/`, the meanings in `metric_table.py`, and the help texts in `hfpipe/cli/parser.py`: mend them there.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfpipe.cli.parser import build_parser
from hfpipe.evaluation.metrics import load_metric
from hfpipe.recipe import Recipe, StageBase
from hfpipe.recipe.metric_table import FAMILIES, HUB_METRICS, OUR_METRICS
from hfpipe.recipe.passthrough import SAVING, length_fields
from hfpipe.recipe.row_formats import ROW_FORMATS
from hfpipe.recipe.stage_config import KINDS
from hfpipe.stages.sharding import REFUSALS

FOLDER = Path(__file__).parent
TABLE_BEGINS = "<!-- Made by `make docs` from hfpipe/stages/sharding.py. -->"
TABLE_ENDS = "<!-- Up to here. -->"
MADE = "<!-- Made by `make docs` from the code: change the code, not this page. -->\n"

# The blocks whose keys are a library's own, and where that library documents them.
TRANSFORMERS, PEFT = "https://huggingface.co/docs/transformers/main_classes", "https://huggingface.co/docs/peft"
CLASS_PAGES = {
    "TrainingArguments": f"{TRANSFORMERS}/trainer#transformers.TrainingArguments",
    "Seq2SeqTrainingArguments": f"{TRANSFORMERS}/trainer#transformers.Seq2SeqTrainingArguments",
    "DPOConfig": "https://huggingface.co/docs/trl/dpo_trainer#trl.DPOConfig",
    "SFTConfig": "https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig",
}
PASSED_THROUGH = {
    "`lora` of a stage": f"[`peft.LoraConfig`]({PEFT}/package_reference/lora#peft.LoraConfig)",
    "`peft` of a stage": "the config class of its `type`, such as `IA3Config` "
    f"([PEFT]({PEFT}/package_reference/peft_types))",
    "`masking` of a pretrain stage": f"[`DataCollatorForLanguageModeling`]({TRANSFORMERS}/data_collator"
    "#transformers.DataCollatorForLanguageModeling)",
    "a source": "[`datasets.load_dataset`](https://huggingface.co/docs/datasets/package_reference/loading_methods"
    "#datasets.load_dataset) and the builder that it names",
    "`generation` of a suite": f"[`transformers.GenerationConfig`]({TRANSFORMERS}/text_generation"
    "#transformers.GenerationConfig)",
    "`architecture` and `config` of the model": f"the [config class]({TRANSFORMERS}/configuration) of its `model_type`",
    "`tokenizer` of the model": f"[transformers' tokenizers]({TRANSFORMERS}/tokenizer), such as `eos_token`",
}
SPELLED = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false"}
PLURAL = {"string": "texts", "integer": "whole numbers", "number": "numbers"}
LIMITS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def recipe_reference() -> str:
    """Returns the page with every key of a recipe."""
    schema = Recipe.model_json_schema()
    blocks = schema["$defs"]
    kinds = [words.__name__ for words in KINDS.values()]
    common = {name: blocks[kinds[0]]["properties"][name] for name in StageBase.model_fields if name != "kind"}
    parts = [
        "# Every key of a recipe\n",
        MADE,
        "A key without a default has to be given. `hfpipe check --fast RECIPE` finds a misspelt key in half a second,\n"
        "and `hfpipe schema > recipe.schema.json` gives an editor the same list. The guides ([index](README.md)) say\n"
        "when to use which.\n",
        _section("A recipe", schema, _text(schema["description"]), schema["properties"]),
    ]
    for name in _in_order(schema, blocks):
        if name == kinds[0]:
            parts.append("## A stage\n\nThe keys that every kind of stage has.\n")
            parts.append(_table(blocks[name], {"kind": {"description": _kind_help(), **_kinds_schema()}, **common}))
        if name in kinds:
            kind = next(kind for kind, words in KINDS.items() if words.__name__ == name)
            own = {key: value for key, value in blocks[name]["properties"].items() if key not in {"kind", *common}}
            told = f"{_text(blocks[name]['description'])} `training:` takes the fields of `{KINDS[kind].ARGUMENTS[1]}`."
            parts.append(_section(f"`kind: {kind}`", blocks[name], told, own))
        else:
            parts.append(
                _section(_title(name), blocks[name], _text(blocks[name]["description"]), blocks[name]["properties"])
            )
    parts += [_passed_through(), _formats(), _metrics()]
    return "\n".join(parts)


def _in_order(schema: dict[str, Any], blocks: dict[str, Any]) -> list[str]:
    """The blocks in the order in which a reader of the page meets them."""
    found: list[str] = []
    waiting = re.findall(r'"#/\$defs/(\w+)"', json.dumps(schema["properties"]))
    kinds = [words.__name__ for words in KINDS.values()]
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found.append(name)
            waiting += re.findall(r'"#/\$defs/(\w+)"', json.dumps(blocks[name]["properties"]))
    first = found.index(next(name for name in found if name in kinds))
    rest = [name for name in found if name not in kinds]
    return [*rest[:first], *kinds, *rest[first:]]


def _kind_help() -> str:
    return "what the stage trains; each kind has keys of its own, below"


def _kinds_schema() -> dict[str, Any]:
    return {"enum": list(KINDS)}


def _section(title: str, block: dict[str, Any], told: str, keys: dict[str, Any]) -> str:
    table = _table(block, keys) if keys else "It has no keys of its own.\n"
    return f"## {title}\n\n{told}\n\n{table}"


def _table(block: dict[str, Any], keys: dict[str, Any]) -> str:
    required = {*block.get("required", ())}
    lines = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in keys.items():
        if "description" not in field and "$ref" not in json.dumps(field):
            raise SystemExit(f"{name} of {block['title']} has no description: write one in hfpipe/recipe")
        lines.append(
            f"| `{name}` | {_cell(_value(field))} | {_cell(_default(field, name in required))} | "
            f"{_cell(_text(field.get('description', 'see there')))} |"
        )
    return "\n".join(lines) + "\n"


def _value(field: dict[str, Any]) -> str:
    """The values that a field takes, in words."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{_title(name)}](#{_anchor(_title(name))})"
    if "enum" in field or "const" in field:
        return ", ".join(f"`{one}`" for one in field.get("enum", [field.get("const")]))
    if "discriminator" in field:
        return "a [stage](#a-stage)"
    for joined in ("anyOf", "oneOf"):
        if joined in field:
            ways = [one for one in field[joined] if one.get("type") != "null"]
            if any("%" in one.get("pattern", "") for one in ways):
                return "a share, such as `3%` or `0.03`"
            return ", or ".join(dict.fromkeys(_value(one) for one in ways))
    kind = field.get("type")
    if kind == "array":
        items = field["items"]
        return f"a list of {PLURAL[items['type']]}" if items.get("type") in PLURAL else f"a list, each {_value(items)}"
    if kind == "object":
        inner = field.get("additionalProperties") or next(iter(field.get("patternProperties", {}).values()), True)
        return "a mapping" if inner is True else f"a mapping of names, each to {_value(inner)}"
    limits = [f"{sign} {field[word]:,}" for word, sign in LIMITS.items() if word in field]
    return " ".join([SPELLED[str(kind)], *limits])


def _default(field: dict[str, Any], required: bool) -> str:
    if required:
        return ""
    value = field.get("default")
    return (
        "none"
        if value is None or value == [] or isinstance(value, dict)
        else f"`{json.dumps(value) if not isinstance(value, str) else value}`"
    )


def _title(name: str) -> str:
    """`TokenizerTraining` as `Tokenizer training`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).capitalize()


def _anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def _text(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _passed_through() -> str:
    lines = ["| where | keys |", "| --- | --- |"]
    for kind, words in KINDS.items():
        name = words.ARGUMENTS[1]
        more = "; ".join(f"`{key}`: {field.help}" for key, field in (length_fields(kind) | SAVING).items())
        lines.append(f"| `training` of `kind: {kind}` | [`{name}`]({CLASS_PAGES[name]}); {more} |")
    lines += [f"| {where} | {what} |" for where, what in PASSED_THROUGH.items()]
    return (
        "## Keys of the libraries\n\nThese blocks take the keys of a library, by their own names. They are checked "
        "against the installed version.\n\n" + "\n".join(lines) + "\n"
    )


def _formats() -> str:
    lines = ["| `format` | columns | may have too | read as | trained on by |", "| --- | --- | --- | --- | --- |"]
    for name, one in ROW_FORMATS.items():
        columns, beside = (", ".join(f"`{column}`" for column in names) for names in (one.columns, one.beside))
        end = ROW_FORMATS.get(one.becomes or name, one)
        trained = ", ".join(end.trained_by) or "no stage"
        becomes = "itself" if end.name == name else f"`{end.name}`"
        lines.append(f"| `{name}` | {columns} | {beside} | {becomes} | {trained} |")
    return "## Formats of rows\n\nWith examples in [data.md](data.md#formats).\n\n" + "\n".join(lines) + "\n"


def _metrics() -> str:
    lines = ["| metric | asks the model for | better | options | meaning |", "| --- | --- | --- | --- | --- |"]
    for name, entry in OUR_METRICS.items():
        metric = load_metric(name)
        better = (
            f"nearer to {metric.ideal:g}"
            if metric.ideal is not None
            else "higher"
            if metric.higher_is_better
            else "lower"
        )
        options = ", ".join(f"`{option}`" for option in entry.options)
        lines.append(f"| `{name}` | {metric.needs} | {better} | {options} | {_cell(entry.meaning)} |")
    families = "; ".join(
        f"`{name}` stands for {', '.join(f'`{one}`' for one in ones)}" for name, ones in FAMILIES.items()
    )
    hub = ", ".join(f"`{name}`" for name in HUB_METRICS)
    return (
        "## Metrics\n\nWhich rows each is for stands in [evaluation.md](evaluation.md#rows). "
        f"{families}. These of the Hub are fetched by `evaluate.load`, as is any `owner/metric`: {hub}.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def command_reference() -> str:
    """Returns the page with every command and its options."""
    parser = build_parser()
    parts = [
        "# Every command\n",
        MADE,
        f"{parser.description} {_text(parser.epilog or '').capitalize()}; see [faults.md](faults.md).\n",
        "`hfpipe COMMAND --help` says the same. `python -m hfpipe` is `hfpipe`.\n",
    ]
    for name, help, command in _commands(parser):
        positional = [action for action in _actions(command) if not action.option_strings]
        options = [action for action in _actions(command) if action.option_strings]
        words = " ".join([name, *(str(action.metavar) for action in positional), *(["[OPTIONS]"] if options else [])])
        parts.append(f"## hfpipe {name}\n\n    hfpipe {words}\n\n{help[0].upper()}{help[1:]}.\n")
        if positional or options:
            rows = [
                f"| `{_cell(_spelling(action))}` | {_cell(_option_help(name, action))} |"
                for action in positional + options
            ]
            parts.append("\n".join(["| argument | meaning |", "| --- | --- |", *rows]) + "\n")
    return "\n".join(parts)


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    # argparse gives its actions under no public name; its own help texts are made of the same list.
    group = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    helps = {action.dest: action.help or "" for action in group._choices_actions}
    for name, command in group.choices.items():
        yield name, helps[name], command


def _actions(command: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in command._actions if not isinstance(action, argparse._HelpAction)]


def _spelling(action: argparse.Action) -> str:
    if not action.option_strings:
        return str(action.metavar)
    value = "" if action.nargs == 0 else action.metavar or "|".join(action.choices or ()) or action.dest.upper()
    return f"{', '.join(action.option_strings)} {value}".strip()


def _option_help(command: str, action: argparse.Action) -> str:
    if not action.help:
        raise SystemExit(f"hfpipe {command}: {_spelling(action)} has no help: write one in hfpipe/cli/parser.py")
    return action.help


def scaling() -> str:
    """Returns the page on scaling as it is, with the table of what cannot be combined made anew."""
    before, rest = (FOLDER / "scaling.md").read_text().split(TABLE_BEGINS)
    _, after = rest.split(TABLE_ENDS)
    rows = [f"| {refusal.name} | {refusal.reason} |" for refusal in REFUSALS]
    table = "\n".join(["| what | why, and what to do |", "| --- | --- |", *rows])
    return f"{before}{TABLE_BEGINS}\n{table}\n{TABLE_ENDS}{after}"


PAGES = {"recipe-reference.md": recipe_reference, "commands.md": command_reference, "scaling.md": scaling}


def main() -> None:
    """Writes the pages."""
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make())
        print(FOLDER / name)


if __name__ == "__main__":
    main()
