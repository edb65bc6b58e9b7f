"""A recipe as pydantic models: the keys that hfpipe itself understands, and the names that the Hub takes.

Only the keys that Hugging Face lacks are typed here. Blocks that are passed through (`training`, `lora`, `peft`, the
arguments of `load_dataset`, `architecture`, `generation`) stay plain mappings and are checked against the installed
libraries by `signatures.py`. Nothing in this file imports a heavy library.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from hfpipe.recipe.chat_templates import template_text
from hfpipe.recipe.metric_table import parts_of
from hfpipe.recipe.source_config import (
    BASE,
    BLOCK,
    LIST,
    WORD,
    Name,
    Share,
    Source,
    StrictBlock,
    Token,
    is_local_name,
    list_or_block,
    word_or_block,
)
from hfpipe.recipe.stage_config import Stage

# https://git-scm.com/docs/git-check-ref-format
_NO_REF = re.compile(r"[\x00-\x20~^:?*\[\\\x7f]|\.\.|//|/\.|@\{|^[-/.]|[/.]$|\.lock(/|$)|^@?$")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
LONGEST = 96  # characters of a repository's name


def _repo_id(text: str) -> str:
    """Checks as `huggingface_hub.utils.validate_repo_id`, which cannot be imported in half a second."""
    parts = text.split("/")
    if any(re.search(r"^[-.]|[-.]$|--|\.\.|\.git$", part) for part in parts) or len(parts[-1]) > LONGEST:
        raise ValueError(
            f"found the text '{text}'; a name on the Hub has at most {LONGEST} letters, does not begin or end with '-' "
            "or '.', does not end with '.git', and has no '--' or '..' in it."
        )
    return text


def _ref(text: str) -> str:
    if text.startswith("refs/"):
        raise ValueError(f"found the text '{text}'; `create_pr: true` adds to the open pull request of the same title.")
    if _COMMIT.fullmatch(text):
        raise ValueError(f"found '{text}', which reads as a commit; allowed is a name such as v1 or dev/long.")
    if _NO_REF.search(text):
        raise ValueError(f"found the text '{text}', which git does not take; allowed is a name such as v1 or dev/long.")
    return text


def _title(text: str) -> str:
    if text != text.strip() or len(text.splitlines()) != 1:  # the Hub takes the first line for the title
        raise ValueError("allowed is one line of text, without blanks around it.")
    return text


def _license(text: str) -> str:
    if not _LICENSE.fullmatch(text):
        near = re.sub(r"[\s_]+", "-", text.strip().lower())
        hint = f" Did you mean {near}?" if _LICENSE.fullmatch(near) else ""
        raise ValueError(
            f"found the text '{text}'; allowed is a licence by its name on the Hub, such as apache-2.0 or mit.{hint}"
        )
    return text


RepoId = Annotated[str, Field(pattern=r"^([\w.-]+/)?[\w.-]+$"), AfterValidator(_repo_id)]
Ref = Annotated[str, AfterValidator(_ref)]
Title = Annotated[str, AfterValidator(_title)]
License = Annotated[str, AfterValidator(_license)]


class TokenizerTraining(StrictBlock):
    """A byte-level BPE tokenizer, trained on the data of the first stage."""

    vocab_size: int = Field(gt=256, le=4_000_000, description="number of tokens, special tokens included")
    take: int = Field(20_000, gt=0, description="documents to train on")


class Tokenizer(StrictBlock):
    """The tokenizer. Other keys are those of transformers' own tokenizers, such as `eos_token`."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    id: str | None = Field(None, description="a tokenizer on the Hub or in a folder; the model's own when absent")
    revision: str = Field("main", description="branch, tag or commit of the tokenizer's repository")
    train: TokenizerTraining | None = Field(None, description="train a new one")
    chat_template: Annotated[str, AfterValidator(template_text)] | None = Field(
        None, description="a Jinja chat template: its text, the path of a file, or a name such as chatml or llama3"
    )
    add_tokens: list[Token] = Field(
        default_factory=list, description="words that become one token each; their embeddings are trained"
    )
    add_special_tokens: list[Token] = Field(
        default_factory=list, description="the same for marks such as <|im_start|>, which decoding leaves out"
    )

    @property
    def passed_through(self) -> dict[str, Any]:
        """The keys of transformers' tokenizers, as the recipe gives them."""
        return dict(self.model_extra or {})


class Model(StrictBlock):
    """The base model: one of the Hub (or a folder), or an architecture with fresh weights."""

    id: str | None = Field(None, description="a model on the Hub or in a folder")
    revision: str = Field(
        "main", description="branch, tag or commit of the model's repository; a run records the commit"
    )
    architecture: dict[str, Any] | None = Field(
        None,
        description="start from nothing: fields of a transformers config with `model_type`, or those of a model's by "
        "`from`, its name on the Hub or its folder",
    )
    config: dict[str, Any] | None = Field(
        None, description="fields of the model's transformers config that are changed, e.g. {rope_scaling: {...}}"
    )
    tokenizer: Tokenizer | None = Field(None, description="the tokenizer; the model's own when absent")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="precision of the weights")
    attn_implementation: str | None = Field(
        None,
        description="the attention kernel by transformers' name: eager, sdpa, flash_attention_2...; the best "
        "installed one when absent",
    )
    trust_remote_code: bool = Field(False, description="run the code that comes with the model's repository")


LM_EVAL = "lm_eval"  # the path of the source that stands for the data of lm-eval's tasks


class Suite(StrictBlock):
    """A held-out data set with its metrics, scored on the base and after every stage."""

    data: Source = Field(
        Source.model_validate({"path": LM_EVAL}), description="the held-out data; lm-eval's tasks bring their own"
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
    too_few_rows: Literal["fail", "pass"] = Field(
        "fail",
        description="for a budget, if the suite has too few rows to show any loss beyond the noise: a measured loss "
        "above the budget counts (fail), or not (pass)",
    )
    choices: list[str] | None = Field(None, description="the answers `accuracy` ranks; those of the suite when absent")
    delimiter: str | None = Field(
        None,
        description="text between a prompt and each of its `choices`, a space when absent; before both sentences of a "
        'minimal pair, where lm-eval has a space (`delimiter: " "`) and hfpipe nothing when absent',
    )
    blank: str | None = Field(
        None, min_length=1, description="a mark in the prompt that each choice replaces; the text after it is scored"
    )
    target: Literal["last_word"] | None = Field(None, description="`last_word`: only a text's last word is scored")
    swap: (
        Annotated[
            Annotated[dict[str, dict[str, list[str]]], Tag(BLOCK)] | Annotated[list[list[str]], Tag(LIST)],
            Discriminator(list_or_block),
        ]
        | None
    ) = Field(
        None,
        description="for flip_rate: lists of words that take each other's place, e.g. [[he, she]], or words by group "
        "for marks in the text, e.g. {name: {women: [Anna], men: [Ali]}}",
    )
    max_length: int | None = Field(
        None, gt=1, description="tokens that the model reads at once when a row is scored; its own context when absent"
    )
    batch_size: int = Field(16, gt=0, description="rows scored at once on each rank")
    every: int | None = Field(None, gt=0, description="score the suite also after every so many steps of a stage")
    generation: dict[str, Any] = Field(default_factory=dict, description="fields of transformers.GenerationConfig")
    reasoning: Literal["keep", "strip"] = Field(
        "keep", description="`strip` removes reasoning blocks (<think>...</think>) from generated and right answers"
    )

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
        if not all(isinstance(part, str) for part in parts):
            return data  # which pydantic refuses
        return {
            **data,
            "metrics": list(dict.fromkeys(parts)),
            **({} if options is None else {"metric_options": options}),
        }


class Push(StrictBlock):
    """The artifact that goes to the Hub when the run is done."""

    repo_id: RepoId = Field(description="the repository to push to, OWNER/NAME; your own account without an owner")
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
    revision: Ref | None = Field(None, description="a branch; made when it does not exist")
    tag: Ref | None = Field(None, description="a name for the pushed commit, such as v1; never moved from another")
    create_pr: bool = Field(False, description="open a pull request, or add to the open one of the same title")
    commit_message: Title | None = Field(None, description="title of the commit or of the pull request, one line")
    checkpoints: Literal["end", "every_save"] = Field(
        "end", description="the trainer's hub_strategy: `every_save` also pushes every checkpoint, to a branch"
    )
    license: License | None = Field(
        None, description="licence of what is pushed, as the Hub writes it; the base's if absent"
    )
    deadline_seconds: float | None = Field(
        None, gt=0, le=604_800, description="time for each repository; 5 minutes and one more per 30 MB when absent"
    )


class Merge(StrictBlock):
    """The bounds on how much a merge may change the model, and the precision of what it writes."""

    max_loss: float = Field(
        0.1, ge=0, description="nats per token that the merged model may lose against the adapter on held-out texts"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="precision of the merged weights; that of the base's files when absent"
    )


class Energy(StrictBlock):
    """The way to measure the energy of training, where codecarbon is installed."""

    country_iso_code: str | None = Field(
        None, description="the country that the electricity comes from, in three letters such as DEU; CO2 needs it"
    )


class Shift(StrictBlock):
    """The way to measure the shift between training data and suites."""

    rows: int = Field(500, gt=0, description="rows of each stage and suite that are looked at")


class CrossValidation(StrictBlock):
    """The run repeated, each time with another part of a stage's data held out and scored."""

    stage: Name = Field(description="the stage whose only source is cut into folds")
    metrics: list[str] = Field(min_length=1, description="what is scored on the held-out fold, as a suite's metrics")
    folds: int = Field(5, ge=2, description="number of folds, and of runs")


class Cures(StrictBlock):
    """The comparison of a stage's cures for forgetting, at the end of a run; `hfpipe cure` makes the same."""

    stage: Name | None = Field(None, description="which stage; the last one that trains on next tokens when absent")
    steps: int | None = Field(None, gt=0, description="steps of the stage, each time; the stage's own when absent")
    dial: bool = Field(True, description="score each of them at a quarter, half and three quarters of its strength too")


class Recipe(StrictBlock):
    """One run: a base model, stages in order, suites, and what leaves the run."""

    name: Name = Field(description="the name of the run: letters, digits, '.', '_' and '-'")
    seed: int = Field(42, ge=0, lt=2**32, description="the seed of all random choices")
    output_dir: str | None = Field(None, description="the run folder; `runs/<name>` when absent")
    model: Model = Field(description="the base model")
    stages: list[Stage] = Field(min_length=1, description="the trainings, in order; `hfpipe evaluate` needs none")
    evaluate: dict[Name, Suite] = Field(
        default_factory=dict,
        description="suites by name: held-out data and metrics, scored on the base and after every stage",
    )
    merge: Annotated[
        Annotated[bool, Tag(WORD)] | Annotated[Merge, Tag(BLOCK)],
        Discriminator(word_or_block),
    ] = Field(False, description="merge the last adapter into its base, verified against the adapter")
    push: Push | None = Field(None, description="what goes to the Hub at the end; nothing when absent")
    energy: Annotated[
        Annotated[bool, Tag(WORD)] | Annotated[Energy, Tag(BLOCK)],
        Discriminator(word_or_block),
    ] = Field(True, description="measure the energy of training by codecarbon, where it is installed")
    shift: Annotated[
        Annotated[bool, Tag(WORD)] | Annotated[Shift, Tag(BLOCK)],
        Discriminator(word_or_block),
    ] = Field(True, description="measure how far the training data lies from the suites, before training")
    overlap: Literal["refuse", "report"] = Field(
        "refuse", description="what happens when rows of a suite are found in the training data"
    )
    fit: Literal["refuse", "auto"] = Field(
        "refuse",
        description="if a stage needs more memory than there is: end (refuse), or make it smaller (auto)",
    )
    cures: Annotated[
        Annotated[bool, Tag(WORD)] | Annotated[Cures, Tag(BLOCK)],
        Discriminator(word_or_block),
    ] = Field(False, description="at the end, train a stage with several cures for forgetting, and compare them")
    lost_rank_seconds: float = Field(
        60.0,
        ge=5,
        description="seconds within which all ranks end once one of them, or its machine, is lost",
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] | None = Field(
        None, min_length=2, description="the whole run is repeated with each of these; mean and spread are reported"
    )
    cross_validation: CrossValidation | None = Field(
        None, description="the whole run is repeated on every fold of a stage's data; mean and spread are reported"
    )

    @property
    def compared(self) -> Cures | None:
        """The comparison of cures as a block; None without one."""
        return Cures.model_validate({}) if self.cures is True else self.cures or None

    @property
    def run_folder(self) -> Path:
        """The folder of the run."""
        return Path(self.output_dir or f"runs/{self.name}")

    def parent_of(self, stage: str) -> str:
        """The stage that a stage starts from, or `base`."""
        number = [one.name for one in self.stages].index(stage)
        return self.stages[number].parent or (self.stages[number - 1].name if number else BASE)

    def lineage(self, stage: str) -> list[str]:
        """Returns the ancestors of a stage, the base first and itself last; not the stages beside it, from the same
        parent.
        """
        return [BASE] if stage == BASE else [*self.lineage(self.parent_of(stage)), stage]


class Suites(StrictBlock):
    """A file that trains nothing: suites for `hfpipe evaluate MODEL FILE`, which any model is scored on."""

    seed: int = Field(42, ge=0, lt=2**32, description="of everything that is drawn at random")
    model: Model = Field(
        default_factory=lambda: Model.model_validate({}),
        description="how a model is loaded: dtype, attn_implementation, trust_remote_code",
    )
    evaluate: dict[Name, Suite] = Field(min_length=1)


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


# `load_dataset` takes these for its own builders, and `builtin` is ours: none of them is a data set on the Hub.
BUILDERS = {
    "builtin",
    "lm_eval",
    "json",
    "csv",
    "parquet",
    "arrow",
    "text",
    "xml",
    "sql",
    "pandas",
    "webdataset",
    "generator",
}


def is_on_hub(name: str) -> bool:
    """Returns True if a name is a Hub id, and not a folder of this machine."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def hub_id(source: Source) -> str | None:
    """The Hub id of a source; None for a file, a folder or a builder."""
    path = source.path
    return path if path not in BUILDERS and not is_local_name(path) and is_on_hub(path) else None
