"""The fields of the libraries' own classes, read from their source with `ast`: nothing is imported.

Only the files that a recipe needs are parsed. Where a file cannot be found or read, the reader gives None and the check
that needs it is left out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

from hfpipe.recipe.annotations import ANYTHING, NULL, ValueKind, value_kinds
from hfpipe.recipe.source_reader import (
    UNKNOWN,
    ancestry,
    assigned,
    enum_members,
    find_class,
    is_whole,
    literal,
    methods_of,
    package,
    parsed,
    signature_of,
    source_of,
)
from hfpipe.recipe.stage_config import KINDS

# Annotations narrower than what the class takes: it turns these values into others itself.
_ALSO_TAKEN = {"fsdp": (ValueKind("bool"), ValueKind("list"))}


@dataclass(frozen=True)
class Field:
    """A field of a class, or a parameter of a function.

    Args:
        name: Its name.
        annotation: What it takes, as the source says it; None for anything.
        module: Where the annotation stands, to look up the classes it names.
        default: Its default, when that is a literal.
        choices: The only words allowed, when the source lists them beside the field.
        help: One line of its documentation, when the source has it beside the field.
    """

    name: str
    annotation: ast.expr | None = None
    module: str = ""
    default: Any = UNKNOWN
    choices: tuple[str, ...] = ()
    help: str = ""

    @cached_property
    def kinds(self) -> tuple[ValueKind, ...]:
        """Returns the kinds of value it takes; empty for anything. Worked out for a recipe's keys only: an enum may be
        files away.
        """
        kinds = value_kinds(self.annotation, partial(enum_members, self.module))
        if kinds == (ValueKind("str"),) and self.choices:
            kinds = (ValueKind("str", self.choices),)
        if self.default is None and kinds and NULL not in kinds:
            kinds = (*kinds, NULL)
        return (*kinds, *_ALSO_TAKEN.get(self.name, ())) if kinds else ANYTHING


Fields = dict[str, Field]
_CONSTRUCTION = ("__init__", "__post_init__")  # methods that take keyword arguments apart


@cache
def training_fields(kind: str) -> Fields | None:
    """Fields of the trainer's arguments, of the class that trains a kind of stage."""
    return _fields(*KINDS[kind].ARGUMENTS)


@cache
def compared_with(module: str, name: str) -> tuple[str, ...]:
    """Returns the words that a module compares a variable with; empty where its source cannot be read."""
    return tuple(dict.fromkeys(re.findall(rf'if {name} == "(\w+)"', source_of(module))))


@cache
def masking_fields() -> Fields | None:
    """Fields of transformers' collator for masked language modelling, without those that hfpipe decides."""
    fields = _fields("transformers.data.data_collator", "DataCollatorForLanguageModeling")
    decided = ("tokenizer", "mlm", "pad_to_multiple_of", "return_tensors", "seed", "tf_experimental_compile")
    return None if fields is None else {name: field for name, field in fields.items() if name not in decided}


@cache
def lora_fields() -> Fields | None:
    """Fields of peft.LoraConfig that its constructor takes."""
    return _fields("peft.tuners.lora.config", "LoraConfig")


@cache
def muon_fields() -> Fields | None:
    """Arguments of torch.optim.Muon, without the weights that it trains."""
    located = find_class("torch.optim", "Muon")
    init = next((one for one in methods_of(*located) if one.name == "__init__"), None) if located else None
    if located is None or init is None:
        return None
    return {one.arg: Field(one.arg, one.annotation, located[0]) for one in init.args.args[2:]}


@cache
def peft_types() -> dict[str, str]:
    """The config class of every type of adapter that the installed PEFT registers; empty when they cannot be read."""
    folder = package("peft")
    found = {}
    for file in sorted(folder.glob("tuners/*/__init__.py")) if folder else ():
        source = file.read_text(encoding="utf-8")
        calls = re.findall(r"register_peft_method\((.*?)\n?\)", source, re.DOTALL)
        if calls and (named := re.search(r"config_cls=(\w+)", calls[-1])):
            found[file.parent.name] = named[1]
    return found


@cache
def peft_fields(type: str) -> Fields | None:
    """Fields of the config class of a type of adapter, without the type itself, which the class sets."""
    fields = _fields(f"peft.tuners.{type}", peft_types()[type]) if type in peft_types() else None
    return None if fields is None else {name: field for name, field in fields.items() if name != "peft_type"}


@cache
def is_prompt_learning(type: str) -> bool:
    """Returns True if a type of adapter is tokens before the prompt and no change of the weights."""
    located = find_class(f"peft.tuners.{type}", peft_types().get(type, ""))
    return located is not None and any(node.name == "PromptLearningConfig" for _, node in ancestry(*located))


@cache
def generation_fields() -> Fields | None:
    """Names that transformers.GenerationConfig takes out of its keyword arguments; defaults tell which are numbers."""
    located = find_class("transformers.generation.configuration_utils", "GenerationConfig")
    if located is None:
        return None
    module, node = located
    defaults: dict[str, Any] = {}
    for method in methods_of(module, node):
        if method.name == "_get_default_generation_params":
            returned = literal(getattr(method.body[-1], "value", None))
            defaults = returned if isinstance(returned, dict) else {}
    defaults |= {"max_new_tokens": 0, "min_new_tokens": 0}  # they have none there
    numbers = {int: ast.Constant("int | None"), float: ast.Constant("float | None")}
    names = {*_taken_from_kwargs(module, node), *_own_fields(node, module)}
    return {
        name: Field(name, numbers.get(type(defaults.get(name)))) for name in sorted(names) if not name.startswith("_")
    } or None


# Of a tokenizer's own keys, those that say what it is made of, or that a recipe says otherwise.
_NOT_OF_A_RECIPE = {
    "backend",
    "chat_template",
    "files_loaded",
    "max_len",
    "model_specific_special_tokens",
    "name_or_path",
    "processor_class",
    "response_schema",
    "verbose",
}


@cache
def tokenizer_fields() -> Fields | None:
    """Words that transformers' tokenizers take when they are made, such as `eos_token` and `padding_side`."""
    located = find_class("transformers.tokenization_utils_base", "PreTrainedTokenizerBase")
    special = literal(assigned(located[1].body, "SPECIAL_TOKENS_ATTRIBUTES")) if located else None
    if located is None or not isinstance(special, list):
        return None
    sides = ast.parse("Literal['left', 'right']", mode="eval").body
    kinds = {
        "model_max_length": ast.Constant("int"),
        "padding_side": sides,
        "truncation_side": sides,
        "clean_up_tokenization_spaces": ast.Constant("bool"),
        "split_special_tokens": ast.Constant("bool"),
        "extra_special_tokens": ast.Constant("list[str]"),
        "model_input_names": ast.Constant("list[str]"),
    }
    names = [name for name in _taken_from_kwargs(*located) if name not in _NOT_OF_A_RECIPE]
    fields = {name: Field(name, kinds.get(name)) for name in (*kinds, *names)}
    return {name: Field(name, ast.Constant("str")) for name in special} | fields


@cache
def config_fields(model_type: str) -> Fields | None:
    """Fields of the transformers config of a model type, the names it maps to them, and what it takes besides."""
    located = _config_class(model_type)
    if located is None or not is_whole(*located):
        return None
    fields = _inherited_fields(*located)
    for owner, ancestor in ancestry(*located):
        for name in (*_taken_from_kwargs(owner, ancestor), *_parameters_of_init(owner, ancestor)):
            fields.setdefault(name, Field(name))
        mapped = literal(assigned(ancestor.body, "attribute_map"))
        for name, target in mapped.items() if isinstance(mapped, dict) else ():
            fields.setdefault(name, replace(fields[target], name=name) if target in fields else Field(name))
    fields["model_type"] = Field("model_type", ast.Constant("str"))
    return {name: field for name, field in fields.items() if not name.startswith("_")}


@cache
def model_types() -> tuple[str, ...]:
    """Every `model_type` of transformers; empty when its table cannot be read."""
    names: dict[str, None] = {}
    for module in ("transformers.models.auto.auto_mappings", "transformers.models.auto.configuration_auto"):
        for node in ast.walk(parsed(module)):
            if isinstance(node, ast.Tuple) and isinstance(pair := literal(node), tuple) and len(pair) == 2:
                if isinstance(pair[1], str) and pair[1].endswith("Config"):
                    names[str(pair[0])] = None
            elif isinstance(node, ast.Dict) and isinstance(table := literal(node), dict):
                names |= {str(key): None for key, value in table.items() if str(value).endswith("Config")}
    return tuple(names)


@cache
def encoder_types() -> tuple[str, ...]:
    """Every `model_type` whose models fill masked tokens, as `model.load.task_of_type` has it, without imports."""
    return tuple(name for name in _table("MASKED_LM") if name not in seq2seq_types())


@cache
def seq2seq_types() -> tuple[str, ...]:
    """Every `model_type` whose models read a source and say a target."""
    return tuple(_table("SEQ_TO_SEQ_CAUSAL_LM"))


def _table(task: str) -> list[str]:
    """The model types of transformers' table for a task, an `OrderedDict([...])`."""
    value = assigned(parsed("transformers.models.auto.modeling_auto").body, f"MODEL_FOR_{task}_MAPPING_NAMES")
    pairs = literal(value.args[0]) if isinstance(value, ast.Call) and value.args else []
    return [str(pair[0]) for pair in pairs] if isinstance(pairs, list) else []


@cache
def load_dataset_fields(path: str | None = None) -> Fields | None:
    """Parameters of datasets.load_dataset, with the options of a packaged builder.

    Args:
        path: The builder (json, csv, ...). Any other path may turn out to be any of them, and so takes the options of
            all; None takes those of none.
    """
    function = signature_of("datasets.load", "load_dataset")
    if function is None:
        return None
    fields = {
        argument.arg: Field(argument.arg, argument.annotation, "datasets.load")
        for argument in (*function.args.args, *function.args.kwonlyargs)
    }
    if path is None:
        return fields
    for builder in [path] if path in builders() else builders():
        fields = _builder_fields(builder) | fields
    return fields


@cache
def builders() -> tuple[str, ...]:
    """Names of the builders that come with datasets: json, csv, parquet, text..."""
    folder = package("datasets")
    files = folder.glob("packaged_modules/*/*.py") if folder else ()
    return tuple(sorted(file.stem for file in files if file.stem == file.parent.name))


def _builder_fields(builder: str) -> Fields:
    module = f"datasets.packaged_modules.{builder}.{builder}"
    configs = [node for node in parsed(module).body if isinstance(node, ast.ClassDef)]
    return {
        name: field
        for node in configs
        if node.name.endswith("Config")
        for name, field in _inherited_fields(module, node).items()
    }


def _fields(module: str, name: str) -> Fields | None:
    located = find_class(module, name)
    return (_inherited_fields(*located) or None) if located and is_whole(*located) else None


def _inherited_fields(module: str, node: ast.ClassDef) -> Fields:
    fields: Fields = {}
    for owner, ancestor in ancestry(module, node):
        fields |= _own_fields(ancestor, owner)
    return fields


def _own_fields(node: ast.ClassDef, module: str) -> Fields:
    """The annotated fields that a dataclass declares itself."""
    decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
    if "dataclass" not in decorators and "strict" not in decorators and not node.name.endswith("Config"):
        return {}
    fields = {}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            field = _field(statement.target.id, statement, module)
            if field is not None:
                fields[field.name] = field
    return fields


def _field(name: str, statement: ast.AnnAssign, module: str) -> Field | None:
    if "ClassVar" in ast.unparse(statement.annotation):
        return None
    value = statement.value
    options = {keyword.arg: keyword.value for keyword in value.keywords} if isinstance(value, ast.Call) else {}
    if options and literal(options.get("init")) is False:
        return None
    metadata = options.get("metadata")
    notes = dict(zip(metadata.keys, metadata.values, strict=True)) if isinstance(metadata, ast.Dict) else {}
    named = {key.value: literal(note) for key, note in notes.items() if isinstance(key, ast.Constant)}
    return Field(
        name,
        statement.annotation,
        module,
        default=literal(options.get("default") if options else value),
        choices=tuple(named["choices"]) if isinstance(named.get("choices"), list) else (),
        help=named["help"] if isinstance(named.get("help"), str) else "",
    )


def _taken_from_kwargs(module: str, node: ast.ClassDef) -> Iterator[str]:
    """Names that a class looks up with `kwargs.pop("name")` or `kwargs.get("name")` when it is made."""
    methods = [
        method
        for method in methods_of(module, node)
        if method.name in _CONSTRUCTION or method.name.startswith("convert_")
    ]
    for call in (part for method in methods for part in ast.walk(method)):
        match call:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="kwargs"), attr="pop" | "get"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def _parameters_of_init(module: str, node: ast.ClassDef) -> list[str]:
    """Returns the parameters of a class's own `__init__`, for a class that is no dataclass."""
    arguments = [method.args for method in methods_of(module, node) if method.name == "__init__"]
    return [argument.arg for every in arguments for argument in (*every.args[1:], *every.kwonlyargs)]


def _config_class(model_type: str) -> tuple[str, ast.ClassDef] | None:
    """The config class with this `model_type`, in the folder of that name or of the longest beginning of it."""
    transformers = package("transformers")
    folder = model_type.replace("-", "_")
    while transformers and folder and not (transformers / "models" / folder).is_dir():
        folder = folder.rpartition("_")[0]
    if not transformers or not folder:
        return None
    for file in sorted((transformers / "models" / folder).glob("configuration_*.py")):
        module = f"transformers.models.{folder}.{file.stem}"
        for node in parsed(module).body:
            if isinstance(node, ast.ClassDef) and literal(assigned(node.body, "model_type")) == model_type:
                return module, node
    return None
