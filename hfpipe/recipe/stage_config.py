"""Stages of a recipe as pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from hfpipe.recipe.source_config import (
    BLOCK,
    LIST,
    WORD,
    AutoCount,
    Name,
    Rate,
    Share,
    Source,
    StrictBlock,
    Swap,
    Token,
    list_or_word,
    word_or_block,
)

CHANGES_THE_BASE = ("pissa", "olora")  # values of init_lora_weights that move a part of the base into the adapter


class Quantization(StrictBlock):
    """The storage of an adapter's frozen base while it trains; bitsandbytes' own names go below `type`."""

    type: Literal["nf4", "int8", "none"] = Field(description="4 bits (nf4), 8 bits (int8), or as the base comes (none)")
    bnb_4bit_use_double_quant: bool = Field(True, description="of nf4: quantize the scales of the weights too")
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None,
        description="of nf4: the precision of matrix products; bfloat16 where the hardware computes in it when absent",
    )
    bnb_4bit_quant_storage: Literal["uint8", "float16", "bfloat16", "float32"] | None = Field(
        None, description="of nf4: the type that packed weights are kept in; FSDP divides any but uint8"
    )
    llm_int8_threshold: float = Field(
        6.0, description="of int8: activations above it are multiplied in 16 bits (outliers)"
    )
    llm_int8_skip_modules: list[str] | None = Field(None, description="of int8: names of modules left as they are")


class Qat(StrictBlock):
    """Trains for a quantization: weights and activations are rounded in each pass as it will round them.

    Source: Jacob et al. 2018, https://arxiv.org/abs/1712.05877; torchao does it.
    """

    weights: Literal["int4", "int8", "float8", "nvfp4", "mxfp4"] = Field(description="what weights are rounded to")
    activations: Literal["int8", "float8", "nvfp4", "mxfp4"] | None = Field(
        None, description="what the inputs of layers are rounded to, token by token; nothing when absent"
    )
    group_size: int = Field(32, gt=0, description="of integers: weights of a row that share a scale")
    target_modules: Annotated[
        Annotated[Literal["all-linear", "all"], Tag(WORD)] | Annotated[list[str], Tag(LIST)],
        Discriminator(list_or_word),
    ] = Field(
        "all-linear", description="names of the linear layers that round; all-linear: all but the head, all: with it"
    )
    after_steps: int = Field(0, ge=0, description="of integers: steps in full precision before the first that rounds")


class Replay(StrictBlock):
    """Mixes the data of an earlier stage into this one."""

    stage: Name = Field(description="an earlier stage")
    share: Share = Field(
        gt=0, lt=1, description="share of this stage: of the tokens (pretrain, streamed sft), or of the rows (sft)"
    )


class SelfReplay(StrictBlock):
    """Mixes texts into a stage that its parent wrote, given nothing but the token that begins a text.

    Source: Context-Free Synthetic Data Mitigates Forgetting (https://arxiv.org/abs/2505.13811).
    """

    from_: Literal["self"] = Field("self", alias="from", description="who made the texts: the stage's parent")
    share: Share = Field(0.125, gt=0, lt=1, description="share of the stage's trained tokens")
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="of the sampling; 1 is what the parent is")
    rows: AutoCount = Field(
        None, gt=0, description="texts that are made; auto: enough for the share without repeats, and at most 2,048"
    )


class KeepKl(StrictBlock):
    """Holds a stage near its parent by the Kullback-Leibler divergence from the parent's predictions."""

    weight: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="factor of the mean divergence that is added to the stage's mean loss",
    )
    on: Literal["replay"] = Field("replay", description="where it is measured: on the parent's own texts")
    parent: Literal["nf4"] | None = Field(
        None, description="nf4: the frozen copy of the parent that a full fine-tune holds is rounded to 4 bits"
    )


class KeepL2(StrictBlock):
    """Holds the weights of a stage near those of its parent.

    Source: Li et al. 2018, https://arxiv.org/abs/1802.01483 (L2-SP).
    """

    weight: float = Field(gt=0, allow_inf_nan=False, description="of half the squared distance, added to the loss")


class Keep(StrictBlock):
    """Ways in which a stage keeps what its parent can do."""

    replay: SelfReplay | None = Field(None, description="train also on texts that the parent wrote")
    kl: KeepKl | None = Field(None, description="learn the parent's predictions on these texts, not their tokens")
    l2: KeepL2 | None = Field(None, description="pull the weights towards the parent's")

    @classmethod
    def good(cls) -> Keep:
        """Returns what `keep: self` stands for."""
        return cls.model_validate({"replay": {}})


class Counterfactual(StrictBlock):
    """Teaches the same predictions for a row and for its form with words swapped.

    Source: Garg et al. 2019, https://arxiv.org/abs/1809.10610 (counterfactual logit pairing).
    """

    weight: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="factor of the mean divergence that is added to the stage's mean loss",
    )
    swap: Swap = Field("gender", description="what is swapped, as in `augment` of a source: gender, names, or lists")


class EarlyStopping(StrictBlock):
    """Keeps the checkpoint that scores best on a suite, and stops when the score no longer improves."""

    suite: Name = Field(description="a suite of the recipe")
    metric: str | None = Field(None, description="one of the suite's metrics; its first when absent")
    patience: int | None = Field(
        3, gt=0, description="evaluations without a better score after which the stage ends; null: train to the end"
    )


class Samples(StrictBlock):
    """Prompts whose answers are kept while a stage trains, so that they can be read beside each other."""

    prompts: list[Token] = Field(min_length=1, max_length=20, description="what the model is asked, as it is trained")
    every: int | None = Field(
        None, gt=0, description="steps from one sample to the next; a tenth of the stage when absent"
    )
    max_new_tokens: int = Field(64, gt=0, description="tokens of an answer at most")


SamplesWord = Annotated[
    Samples | None,
    Field(description="prompts that are answered before the first step, every so many steps, and at the end"),
]

KeepWord = Annotated[
    Annotated[
        Annotated[Literal["self"], Tag(WORD)] | Annotated[Keep, Tag(BLOCK)],
        Discriminator(word_or_block),
    ]
    | None,
    Field(description="how the stage keeps what its parent can do; `self`: by training on texts of the parent too"),
]


QatWord = Annotated[Qat | None, Field(description="train for a quantization, which rounds weights in each pass")]
CounterfactualWord = Annotated[
    Counterfactual | None,
    Field(description="learn the same predictions for a row and for its form with words such as he and she swapped"),
]


class StageBase(StrictBlock):
    """The keys that stages of every kind have.

    Each kind names the class of its trainer's arguments, as module and class: the fields of its `training:`; those of
    them that do nothing for it, with the reason; and whether a row of it is a pair of texts that begin alike.
    """

    ARGUMENTS: ClassVar[tuple[str, str]]
    LENGTHS: ClassVar[dict[str, str]] = {}  # keys of `training` beside `max_length`, with their meaning
    WITHOUT_EFFECT: ClassVar[dict[str, str]] = {}
    PAIRS: ClassVar[bool] = False

    name: Name = Field(description="the name of the stage: letters, digits, '.', '_' and '-'")
    kind: str = Field(description="what the stage trains")
    data: list[Source] = Field(min_length=1, description="the sources that it is trained on")
    parent: str | None = Field(None, description="the stage to start from, or `base`; the stage before when absent")
    parent_adapter: Literal["merge", "continue"] = Field(
        "merge",
        description="what happens to the parent's adapter: merge it into the weights and train on top of "
        "them, or continue to train it",
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
        Discriminator(word_or_block),
    ] = Field("none", description="how the frozen base of an adapter is stored while it trains")
    train_only: list[str] | None = Field(
        None, min_length=1, description="patterns (regular expressions) of the names of the weights that are trained"
    )
    freeze: list[str] | None = Field(
        None, min_length=1, description="patterns of the names of weights that stay as they are"
    )
    learning_rates: dict[str, Rate] | None = Field(
        None,
        min_length=1,
        description="learning rates by patterns of weights' names, e.g. {embed_tokens: 1e-5}",
    )

    muon: dict[str, Any] | None = Field(
        None,
        description="arguments of torch.optim.Muon, which trains the matrices of the layers; `optim` trains the rest",
    )

    @property
    def adapter(self) -> dict[str, Any] | None:
        """The adapter that is trained: PEFT's `type` and the fields of its config; None for all weights."""
        return {"type": "lora", **self.lora} if self.lora is not None else self.peft

    @property
    def changes_base(self) -> bool:
        """Returns True if a new adapter of the stage changes the base's weights when it is made."""
        return str((self.adapter or {}).get("init_lora_weights", "")).startswith(CHANGES_THE_BASE)

    @property
    def decided(self) -> dict[str, Any]:
        """Returns fields of the trainer's arguments that follow from other keys of the stage."""
        return {}

    @property
    def kept(self) -> Keep:
        """Returns the block that keeps what the parent can do; an empty one where the stage does nothing for it."""
        keep = getattr(self, "keep", None)
        return Keep.good() if keep == "self" else keep or Keep.model_validate({})

    @property
    def fake_quantized(self) -> Qat | None:
        """Returns the quantization that the stage trains for."""
        return getattr(self, "qat", None)

    @property
    def task(self) -> str:
        """The task of the model that the stage leaves: `causal`, `masked` or `classification`."""
        return "causal"

    @property
    def method(self) -> str:
        """Names in a word what is trained: full, LoRA, or PEFT's name of another adapter."""
        if self.adapter is None:
            return "full"
        return "LoRA" if self.adapter["type"] == "lora" else str(self.adapter["type"])

    @property
    def quantized(self) -> Quantization | None:
        """The quantization as a block; None for full precision."""
        block = (
            Quantization.model_validate({"type": self.quantization})
            if isinstance(self.quantization, str)
            else self.quantization
        )
        return None if block.type == "none" else block


class Pretrain(StageBase):
    """Continued (or first) pretraining on packed documents."""

    ARGUMENTS = ("transformers.training_args", "TrainingArguments")

    kind: Literal["pretrain"]
    objective: Literal["causal", "masked"] = Field(
        "causal", description="what is learned: the next token (decoders), or masked tokens (encoders)"
    )
    masking: dict[str, Any] | None = Field(
        None, description="with `objective: masked`: fields of transformers.DataCollatorForLanguageModeling"
    )
    lanes: int | None = Field(None, gt=0, description="parallel lanes of the stream; fixed for the life of the run")
    exhausted: Literal["repeat", "stop"] = Field(
        "repeat", description="at the end of a source: read it again (repeat), or go on with the others (stop)"
    )
    replay: Replay | None = Field(None, description="mix data of an earlier stage in, against forgetting")
    keep: KeepWord = None
    counterfactual: CounterfactualWord = None
    qat: QatWord = None
    samples: SamplesWord = None

    @property
    def task(self) -> str:
        return self.objective


class Sft(StageBase):
    """Supervised fine-tuning on prompt + completion, messages, or text."""

    ARGUMENTS = ("trl.trainer.sft_config", "SFTConfig")

    kind: Literal["sft"]
    train_on: Literal["assistant", "last", "completion", "all"] | None = Field(
        None,
        description="what is learned: every assistant's turn, the last of them, the completion, or all; when absent "
        "the completion where a row has one, the assistant's turns of a conversation, and all of a text",
    )
    too_long: Literal["cut", "split", "drop"] = Field(
        "cut",
        description="what happens to a row beyond training.max_length: it loses its end, is split, or is left out",
    )
    lanes: int | None = Field(
        None, gt=0, description="parallel lanes of a streamed source; fixed for the life of the run"
    )
    replay: Replay | None = Field(None, description="mix data of an earlier stage in, against forgetting")
    keep: KeepWord = None
    counterfactual: CounterfactualWord = None
    qat: QatWord = None
    samples: SamplesWord = None


class Classification(StageBase):
    """A classifier, or a regression, on sentence + label."""

    ARGUMENTS = ("transformers.training_args", "TrainingArguments")

    kind: Literal["classification"]
    labels: list[str] | None = Field(None, description="the classes in order; those of the data when absent")
    class_weights: Literal["balanced"] | None = Field(
        None, description="`balanced`: rare classes weigh as much as others"
    )
    counterfactual: CounterfactualWord = None

    @property
    def task(self) -> str:
        return "classification"


class Translation(StageBase):
    """An encoder-decoder model on source + target: translation, summarization and the like."""

    ARGUMENTS = ("transformers.training_args_seq2seq", "Seq2SeqTrainingArguments")

    kind: Literal["translation"]

    @property
    def task(self) -> str:
        return "seq2seq"


class Preference(StageBase):
    """Preference training (DPO and its kin) on pairs of a chosen and a rejected answer."""

    ARGUMENTS = ("trl.trainer.dpo_config", "DPOConfig")
    LENGTHS: ClassVar = {
        "max_prompt_length": "tokens of a prompt at most: it loses its beginning, before the end of an answer is cut"
    }
    WITHOUT_EFFECT: ClassVar[dict[str, str]] = {
        "label_smoothing_factor": "DPOTrainer computes no cross-entropy; `label_smoothing` is for its losses robust "
        "and exo_pair",
        **dict.fromkeys(
            ("ref_model_mixup_alpha", "ref_model_sync_steps"), "the reference is the stage's parent, and stays it"
        ),
    }
    PAIRS = True

    kind: Literal["preference"]
    loss: Annotated[
        Annotated[str, Tag(WORD)] | Annotated[list[str], Tag(LIST)],
        Discriminator(list_or_word),
    ] = Field(
        "sigmoid",
        description="a loss of TRL's DPOTrainer, or several: sigmoid (DPO), ipo, hinge, robust, sft and so on",
    )
    keep: KeepWord = None
    samples: SamplesWord = None

    @property
    def decided(self) -> dict[str, Any]:
        """Returns the losses, most often one; hfpipe itself computes log-probabilities before the training."""
        losses = [self.loss] if isinstance(self.loss, str) else self.loss
        return {"loss_type": losses, "precompute_ref_log_probs": False}


KINDS: dict[str, type[StageBase]] = {
    "pretrain": Pretrain,
    "sft": Sft,
    "classification": Classification,
    "translation": Translation,
    "preference": Preference,
}
KEEPING = tuple(name for name, one in KINDS.items() if "keep" in one.model_fields)  # kinds that have `keep:`
Stage = Annotated[Pretrain | Sft | Classification | Translation | Preference, Field(discriminator="kind")]
