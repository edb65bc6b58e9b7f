"""The words of a recipe: what hfpipe itself understands, as pydantic models.

Only the words that Hugging Face lacks are typed here. Blocks that are passed through (`training`, `lora`, `peft`, the
arguments of `load_dataset`, `architecture`, `generation`) stay plain mappings and are checked against the installed
libraries by `signatures.py`. Nothing in this file imports a heavy library.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema, model_validator

from hfpipe.recipe.metric_names import parts_of

BASE = "base"  # the model before any training, where the name of a stage may stand

Token = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="letters, digits, '.', '_' and '-'")]


# A value that may be a word, a list or a block is told apart by its shape, so that a fault is reported once and not
# once for each of the shapes. The tags appear in pydantic's paths; `structure.py` takes them out again.
WORD, LIST, BLOCK = "<word>", "<list>", "<block>"


def _word_or_block(value: Any) -> str:
    return BLOCK if isinstance(value, (dict, BaseModel)) else WORD


def _list_or_block(value: Any) -> str:
    return BLOCK if isinstance(value, dict) else LIST


def _list_or_word(value: Any) -> str:
    return LIST if isinstance(value, list) else WORD


def _as_share(value: Any) -> Any:
    """Reads "3%" and "3 %" as 0.03; a number is a share already."""
    if isinstance(value, str):
        percent = re.fullmatch(r"\s*([-+]?\d+(?:\.\d*)?)\s*%\s*", value)
        if percent is None:
            raise ValueError(f"found the text '{value}'; allowed is a share, such as 3% or 0.03.")
        value = float(percent[1]) / 100
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 1:
        hint = f" Did you mean {value:g}%?" if value <= 100 else ""
        raise ValueError(
            f"found {value:g}, which is {value:.0%}; allowed is a share up to 100%, such as 3% or 0.03.{hint}"
        )
    return value


Share = Annotated[
    float,
    BeforeValidator(_as_share),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "maximum": 1},
                {"type": "string", "pattern": r"^\s*\+?\d+(\.\d*)?\s*%\s*$"},
            ]
        }
    ),
]


class Words(BaseModel):
    """A closed block: an unknown key is a fault, and so is a value of another type ("8" is not 8)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# A text, or a list of them: the choices of a row, each a column or a template of its own.
_Text = Annotated[Annotated[str, Tag(WORD)] | Annotated[list[str], Tag(LIST)], Discriminator(_list_or_word)]


class Fold(Words):
    """One of several equal parts of a table, whose rows are dealt out at random, and always alike."""

    of: int = Field(ge=2, description="number of folds")
    keep: int | None = Field(None, ge=1, description="the one fold whose rows are kept")
    leave: int | None = Field(None, ge=1, description="the one fold whose rows are left out")


class Deduplicate(Words):
    """How alike documents must be to be one."""

    near: Share = Field(0.8, ge=0.5, lt=1, description="least Jaccard similarity of their word 5-grams")


class Source(Words):
    """One `load_dataset` call, and what its columns mean.

    Keys that are not declared here go to `datasets.load_dataset` as they stand.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    path: str = Field(description="a Hub data set, a builder (json, parquet, text, csv...), a folder, or `builtin`")
    weight: float | None = Field(
        None, gt=0, description="share of the tokens (pretrain) or of the rows (sft) drawn from this source"
    )
    take: int | None = Field(None, gt=0, description="keep this many rows")
    skip: int = Field(0, ge=0, description="leave out this many rows at the beginning")
    where: str | None = Field(None, description='a condition on columns, such as "language_score > 0.9"')
    fold: Fold | None = Field(None, description="one of several equal parts of a table, or all but that one")
    columns: (
        Annotated[
            Annotated[dict[str, _Text], Tag(BLOCK)] | Annotated[list[str], Tag(LIST)], Discriminator(_list_or_block)
        ]
        | None
    ) = Field(None, description="role: column, for columns with other names, e.g. {text: content}")
    template: dict[str, _Text] | None = Field(
        None, description='builds roles from columns, e.g. {prompt: "Q: {question}\\nA:", completion: " {answer}"}'
    )
    src_lang: str | None = Field(None, description="language code of `source`, of tokenizers that have them (NLLB)")
    tgt_lang: str | None = Field(None, description="language code of `target`, of tokenizers that have them")
    deduplicate: (
        Annotated[
            Annotated[Literal["exact", "near"], Tag(WORD)] | Annotated[Deduplicate, Tag(BLOCK)],
            Discriminator(_word_or_block),
        ]
        | None
    ) = Field(None, description="rows that say the same (exact), or nearly the same (near), are trained on once")
    decontaminate: bool = Field(False, description="leave out rows that overlap a suite by 13-word sequences")

    @property
    def near(self) -> float | None:
        """The similarity from which documents are near duplicates; None where none are looked for."""
        block = Deduplicate.model_validate({}) if self.deduplicate == "near" else self.deduplicate
        return block.near if isinstance(block, Deduplicate) else None

    @property
    def cleaned(self) -> bool:
        """Whether rows are removed before training."""
        return self.deduplicate is not None or self.decontaminate

    @property
    def passed_through(self) -> dict[str, Any]:
        """The arguments of `load_dataset` as the recipe gives them."""
        extra = dict(self.model_extra or {})
        if isinstance(self.columns, list):  # Parquet's own `columns`: which ones to read
            extra["columns"] = self.columns
        return extra


class TokenizerTraining(Words):
    """A byte-level BPE tokenizer, trained on the data of the first stage."""

    vocab_size: int = Field(gt=256, description="number of tokens, special tokens included")
    take: int = Field(20_000, gt=0, description="documents to train on")


class Tokenizer(Words):
    id: str | None = Field(None, description="a tokenizer on the Hub or in a folder")
    revision: str = "main"
    train: TokenizerTraining | None = Field(None, description="train one from nothing")
    chat_template: str | None = Field(None, description="a Jinja chat template, when the tokenizer has none")
    add_tokens: list[Token] = Field(
        default_factory=list, description="words that become one token each; their embeddings are trained"
    )
    add_special_tokens: list[Token] = Field(
        default_factory=list, description="the same for marks such as <|im_start|>, which decoding leaves out"
    )


class Model(Words):
    """The base model: one of the Hub (or a folder), or an architecture with fresh weights."""

    id: str | None = Field(None, description="a model on the Hub or in a folder")
    revision: str = "main"
    architecture: dict[str, Any] | None = Field(
        None, description="fields of a transformers config, with `model_type`: start from nothing"
    )
    tokenizer: Tokenizer | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="precision of the weights")
    attn_implementation: str | None = None
    trust_remote_code: bool = False


class Quantization(Words):
    """How the frozen base of an adapter is stored while it trains; bitsandbytes' own names go below `type`."""

    type: Literal["nf4", "int8", "none"]
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    bnb_4bit_quant_storage: Literal["uint8", "float16", "bfloat16", "float32"] | None = None
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None


class Replay(Words):
    """Mixes the data of an earlier stage into this one."""

    stage: Name
    share: Share = Field(gt=0, lt=1, description="share of the tokens (pretrain) or of the rows (sft) of this stage")


class EarlyStopping(Words):
    """Keeps the checkpoint that scores best on a suite, and stops when the score no longer improves."""

    suite: Name = Field(description="a suite of the recipe")
    metric: str | None = Field(None, description="one of the suite's metrics; its first when absent")
    patience: int | None = Field(
        3, gt=0, description="evaluations without a better score that end the stage; null: it is trained to its end"
    )


class StageBase(Words):
    """What stages of every kind have."""

    name: Name
    kind: str
    data: list[Source] = Field(min_length=1)
    parent: str | None = Field(None, description="the stage to start from, or `base`; the stage before when absent")
    parent_adapter: Literal["merge", "continue"] = Field(
        "merge",
        description="what becomes of the parent's adapter: it is merged and the stage trains on top of it, or it is "
        "trained further, on the base it has",
    )
    global_batch_size: int | None = Field(
        None, gt=0, description="rows per optimizer step over all ranks; divided over the ranks, the rest accumulated"
    )
    max_dirty_share: Share = Field(
        0.01, ge=0, description="share of a source's rows that may be empty or of a wrong type before the run stops"
    )
    early_stopping: EarlyStopping | None = Field(
        None, description="keep the best checkpoint by a suite, scored every training.eval_steps"
    )
    training: dict[str, Any] = Field(default_factory=dict, description="fields of the trainer's own arguments class")
    lora: dict[str, Any] | None = Field(None, description="fields of peft.LoraConfig")
    peft: dict[str, Any] | None = Field(
        None, description="an adapter of any kind that PEFT has: its `type`, such as ia3, and the fields of its config"
    )
    quantization: Annotated[
        Annotated[Literal["nf4", "int8", "none"], Tag(WORD)] | Annotated[Quantization, Tag(BLOCK)],
        Discriminator(_word_or_block),
    ] = Field("none", description="how the frozen base of an adapter is stored while it trains")

    @property
    def adapter(self) -> dict[str, Any] | None:
        """The adapter that is trained: PEFT's `type` and the fields of its config; None for all weights."""
        return {"type": "lora", **self.lora} if self.lora is not None else self.peft

    @property
    def task(self) -> str:
        """What the model that the stage leaves is for: `causal`, `masked` or `classification`."""
        return "causal"

    @property
    def method(self) -> str:
        """What is trained, in a word: full, LoRA, or PEFT's name of another adapter."""
        if self.adapter is None:
            return "full"
        return "LoRA" if self.adapter["type"] == "lora" else str(self.adapter["type"])

    @property
    def quantized(self) -> Quantization | None:
        """The quantization as a block; None for full precision."""
        block = Quantization(type=self.quantization) if isinstance(self.quantization, str) else self.quantization
        return None if block.type == "none" else block


class Pretrain(StageBase):
    """Continued (or first) pretraining on packed documents."""

    kind: Literal["pretrain"]
    objective: Literal["causal", "masked"] = Field(
        "causal", description="what is learned: the next token (decoders), or masked tokens (encoders)"
    )
    masking: dict[str, Any] | None = Field(
        None, description="with `objective: masked`: fields of transformers.DataCollatorForLanguageModeling"
    )
    lanes: int | None = Field(None, gt=0, description="parallel lanes of the stream; fixed for the life of the run")
    exhausted: Literal["repeat", "stop"] = Field(
        "repeat", description="a source that is read to its end begins anew, or the others go on without it"
    )
    replay: Replay | None = None

    @property
    def task(self) -> str:
        return self.objective


class Sft(StageBase):
    """Supervised fine-tuning on prompt + completion, messages, or text."""

    kind: Literal["sft"]
    replay: Replay | None = None


class Classification(StageBase):
    """A classifier, or a regression, on sentence + label."""

    kind: Literal["classification"]
    labels: list[str] | None = Field(None, description="the classes in order; those of the data when absent")
    class_weights: Literal["balanced"] | None = Field(None, description="`balanced`: rare classes count as much")

    @property
    def task(self) -> str:
        return "classification"


class Translation(StageBase):
    """An encoder-decoder model on source + target: translation, summarization and the like."""

    kind: Literal["translation"]

    @property
    def task(self) -> str:
        return "seq2seq"


KINDS: dict[str, type[StageBase]] = {
    "pretrain": Pretrain,
    "sft": Sft,
    "classification": Classification,
    "translation": Translation,
}
Stage = Annotated[Pretrain | Sft | Classification | Translation, Field(discriminator="kind")]


HARNESS = "lm_eval"  # the path of the source that stands for the data of lm-eval's tasks


class Suite(Words):
    """A held-out data set with its metrics, scored on the base and after every stage."""

    data: Source = Field(
        Source.model_validate({"path": HARNESS}), description="the held-out data; lm-eval's tasks bring their own"
    )
    metrics: list[str] = Field([], description="what is measured; lm-eval's tasks bring their own")
    lm_eval: str | None = Field(
        None, description="a task of the Language Model Evaluation Harness, e.g. arc_easy, instead of data and metrics"
    )
    limit: int | None = Field(None, gt=0, description="rows of each of lm-eval's tasks; all when absent")
    num_fewshot: int | None = Field(None, ge=0, description="examples in the prompts of lm-eval's task")
    include_path: str | None = Field(None, description="a folder with task files for lm-eval")
    metric_options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="options by metric, e.g. {bleu: {tokenize: zh}}"
    )
    budget: Share | None = Field(None, ge=0, description="how much of the score may be lost, e.g. 3%")
    budget_action: Literal["fail", "dial"] = Field(
        "fail",
        description="what happens when more is lost: the run ends, or the stage is dialled down to the best strength "
        "that is inside the budgets",
    )
    choices: list[str] | None = Field(None, description="the answers `accuracy` ranks; those of the suite when absent")
    delimiter: str = Field(" ", description="what stands between a prompt and each of its `choices`")
    blank: str | None = Field(
        None, min_length=1, description="a mark in the prompt where the choices are set: what follows it is scored"
    )
    target: Literal["last_word"] | None = Field(None, description="`last_word`: only a text's last word is scored")
    swap: (
        Annotated[
            Annotated[dict[str, dict[str, list[str]]], Tag(BLOCK)] | Annotated[list[list[str]], Tag(LIST)],
            Discriminator(_list_or_block),
        ]
        | None
    ) = Field(
        None,
        description="for flip_rate: lists of words that take each other's place, e.g. [[he, she]], or words by group "
        "for marks in the text, e.g. {name: {women: [Anna], men: [Ali]}}",
    )
    max_length: int | None = Field(
        None, gt=1, description="tokens of context when a row is scored; 1024 of a text, the model's own for choices"
    )
    batch_size: int = Field(16, gt=0, description="rows scored at once on each rank")
    generation: dict[str, Any] = Field(default_factory=dict, description="fields of transformers.GenerationConfig")

    @model_validator(mode="before")
    @classmethod
    def _parts_of_families(cls, data: Any) -> Any:
        """`squad` and `rouge` are written out as the metrics that they stand for."""
        if not isinstance(data, dict) or not isinstance(data.get("metrics"), list):
            return data
        parts = [part for name in data["metrics"] for part in (parts_of(name) if isinstance(name, str) else (name,))]
        options = data.get("metric_options")
        if isinstance(options, dict):
            options = {part: value for name, value in options.items() for part in parts_of(str(name))}
        return {
            **data,
            "metrics": list(dict.fromkeys(parts)),
            **({} if options is None else {"metric_options": options}),
        }


RepoId = Annotated[str, Field(pattern=r"^([\w.-]+/)?[\w.-]+$")]


class Push(Words):
    """What goes to the Hub when the run is done."""

    repo_id: RepoId
    what: Literal["adapter", "model", "merged", "both"] = Field(
        "adapter", description="`both`: the adapter to `repo_id`, the merged model to `merged_repo_id`"
    )
    stage: str | None = Field(None, description="the last stage, or the last with an adapter, when absent")
    merged_repo_id: RepoId | None = Field(None, description="of `what: both`; `<repo_id>-merged` when absent")
    parent_repo_id: RepoId | None = Field(
        None, description="for the earlier stage that a chain's adapter is loaded on; `<repo_id>-base` when absent"
    )
    private: bool | None = Field(
        None, description="private when absent; `true` also refuses to push to a repository that is public"
    )
    revision: str | None = Field(None, description="a branch; made when it does not exist")
    tag: str | None = Field(None, description="a name for the pushed commit, such as v1; never moved from another")
    create_pr: bool = Field(False, description="open a pull request, or add to the open one of the same title")
    commit_message: str | None = None
    checkpoints: Literal["end", "every_save"] = Field(
        "end", description="the trainer's hub_strategy: `every_save` also pushes every checkpoint, to a branch"
    )
    license: str | None = Field(
        None, description="licence of what is pushed, as the Hub writes it; the base's if absent"
    )
    deadline_seconds: float | None = Field(
        None, gt=0, description="time for each repository; 5 minutes and one more per 30 MB when absent"
    )


class Merge(Words):
    """How much a merge may change the model, where the adapter was trained on a quantized base."""

    max_loss: float = Field(
        0.1, ge=0, description="nats per token that the merged model may lose against the adapter on held-out texts"
    )


class Energy(Words):
    """How the energy of training is measured, where codecarbon is installed."""

    country_iso_code: str | None = Field(
        None, description="the country that the electricity comes from, in three letters such as DEU; CO2 needs it"
    )


class Shift(Words):
    """How the shift between training data and suites is measured."""

    rows: int = Field(500, gt=0, description="rows of each stage and suite that are looked at")


class CrossValidation(Words):
    """The run repeated, each time with another part of a stage's data held out and scored."""

    stage: Name = Field(description="the stage whose only source is cut into folds")
    metrics: list[str] = Field(min_length=1, description="what is scored on the held-out fold, as a suite's metrics")
    folds: int = Field(5, ge=2, description="number of folds, and of runs")


class Recipe(Words):
    """One run: a base model, stages in order, suites, and what leaves the run."""

    name: Name
    seed: int = 42
    output_dir: str | None = Field(None, description="`runs/<name>` when absent")
    model: Model
    stages: list[Stage] = Field(min_length=1)
    evaluate: dict[Name, Suite] = Field(default_factory=dict)
    merge: Annotated[
        Annotated[bool, Tag(WORD)] | Annotated[Merge, Tag(BLOCK)],
        Discriminator(_word_or_block),
    ] = Field(False, description="merge the last adapter into its base, verified against the adapter")
    push: Push | None = None
    energy: Annotated[
        Annotated[bool, Tag(WORD)] | Annotated[Energy, Tag(BLOCK)],
        Discriminator(_word_or_block),
    ] = Field(True, description="measure the energy of training by codecarbon, where it is installed")
    shift: Annotated[
        Annotated[bool, Tag(WORD)] | Annotated[Shift, Tag(BLOCK)],
        Discriminator(_word_or_block),
    ] = Field(True, description="measure how far the training data lies from the suites, before training")
    overlap: Literal["refuse", "report"] = Field(
        "refuse", description="what happens when rows of a suite are found in the training data"
    )
    seeds: list[int] | None = Field(
        None, min_length=2, description="the whole run is repeated with each of these; mean and spread are reported"
    )
    cross_validation: CrossValidation | None = Field(
        None, description="the whole run is repeated on every fold of a stage's data; mean and spread are reported"
    )

    def parent_of(self, stage: str) -> str:
        """The stage that a stage starts from, or `base`."""
        number = [one.name for one in self.stages].index(stage)
        return self.stages[number].parent or (self.stages[number - 1].name if number else BASE)

    def lineage(self, stage: str) -> list[str]:
        """What a stage came from, the base first and itself last; not the stages beside it, from the same parent."""
        return [BASE] if stage == BASE else [*self.lineage(self.parent_of(stage)), stage]
