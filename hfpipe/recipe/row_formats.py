"""The formats of a row, in one table: the columns of each, who trains on it, who can score it, what is put to a model.

A source is brought to one of the formats that have `becomes` None; the others are what people's files hold, and are
converted to one of those (`hfpipe/data/sources/convert.py`). To add a format, add an entry here, and a converter there
if its columns are not trained on as they stand. Nothing heavy is imported: the rules of a recipe read this table too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

COMPLETION_TURNS = (
    "completion_turns"  # of `messages`: how many of the last turns are the completion, where data says it
)
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "thread", "turns", "chat")
# Who speaks and what is said, by the keys of a turn in people's files; of several the first counts.
SPEAKER_KEYS = ("from", "role", "author", "speaker", "sender")
SAID_KEYS = ("value", "content", "text", "body", "message")
BESIDE_MESSAGES = ("tools", "chat_template_kwargs")  # TRL's columns, which a chat template is given too


@dataclass(frozen=True)
class RowFormat:
    """One format of rows.

    Args:
        name: As `format:` of a source names it.
        columns: The columns that a row has.
        beside: The columns that it may have too.
        aliases: Other names under which a column is recognized.
        rank: Which format a source is taken for when it has the columns of several: the lowest; of equals a person is
            asked.
        unless: Columns that say it is something else.
        is_recognized: Whether columns alone make a source one of this format; otherwise `format:` has to name it.
        becomes: The format that it is converted to; None for one that is trained on or scored as it stands.
        trained_by: Kinds of stages that train on it.
        tasks: What the models are for that can score it, keys of `AUTO_CLASSES`.
        texts: The texts of a row, each as the columns whose values it joins; what is tokenized of a row, compared with
            other data, and learned by a new tokenizer.
        asked: The columns that are put to a model; the others say what is right.
        shown: The column that a person reads beside an answer.
        needs: What a metric may ask of a suite of these rows, see `hfpipe/evaluation/metrics`.
        fitting: Metrics to suggest for it.
        description: What it is, for messages: "its rows hold ...".
    """

    name: str
    columns: tuple[str, ...]
    beside: tuple[str, ...] = ()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unless: tuple[str, ...] = ()
    rank: int = 9
    is_recognized: bool = True
    becomes: str | None = None
    trained_by: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("causal",)
    texts: tuple[tuple[str, ...], ...] = ()
    asked: tuple[str, ...] = ()
    shown: str | None = None
    needs: tuple[str, ...] = ("likelihood", "choice", "generation", "masked", "swap")
    fitting: str = "bits_per_byte, accuracy or exact_match"
    description: str = "text"

    @property
    def all_columns(self) -> tuple[str, ...]:
        """The columns that a row has or may have."""
        return (*self.columns, *self.beside)


_CHOICE: dict[str, Any] = {
    "tasks": ("causal", "masked"),
    "needs": ("choice", "swap"),
    "fitting": "accuracy or accuracy_norm",
    "description": "choices",
}
_ALPACA: dict[str, Any] = {
    "columns": ("instruction", "output"),
    "beside": ("input", "system", "history"),
    "aliases": {"instruction": ("query",), "output": ("response",), "input": ("context",)},
}

_FORMATS = (
    RowFormat(
        "messages",
        ("messages",),
        beside=("system", *BESIDE_MESSAGES),
        aliases={"messages": CONVERSATIONS[1:]},
        rank=1,
        trained_by=("sft",),
        texts=(("messages",),),
        asked=("messages",),
        shown="messages",
    ),
    RowFormat(
        "prompt_completion",
        ("prompt", "completion"),
        aliases={"completion": ("response",)},
        rank=2,
        trained_by=("sft",),
        texts=(("prompt", "completion"),),
        asked=("prompt",),
        shown="prompt",
    ),
    RowFormat("text", ("text",), rank=3, trained_by=("pretrain", "sft"), texts=(("text",),), asked=("text",)),
    RowFormat(
        "classification",
        ("sentence", "label"),
        trained_by=("classification",),
        tasks=("classification",),
        texts=(("sentence",),),
        asked=("sentence",),
        shown="sentence",
        needs=("choice", "swap"),
        fitting="accuracy, f1 or f1_micro",
        description="class names",
    ),
    RowFormat(
        "translation",
        ("source", "target"),
        trained_by=("translation",),
        tasks=("seq2seq",),
        texts=(("source",), ("target",)),
        asked=("source",),
        shown="source",
    ),
    RowFormat(  # texts, or lists of turns; without a prompt it is what chosen and rejected have in common
        "preference",
        ("chosen", "rejected"),
        beside=("prompt", *BESIDE_MESSAGES),
        rank=0,
        trained_by=("preference",),
        texts=(("prompt", "chosen"), ("prompt", "rejected")),
        asked=("prompt",),
        shown="prompt",
        needs=("pair", "generation", "likelihood"),
        fitting="preference_accuracy, preference_margin or length_ratio",
        description="pairs of a chosen and a rejected answer",
    ),
    # Suites alone have these: see evaluation/multiple_choice.py and evaluation/bias_rows.py.
    RowFormat(
        "choices",
        ("prompt", "choices", "answer"),
        texts=(("prompt",),),
        asked=("prompt",),
        shown="prompt",
        **_CHOICE,
    ),
    RowFormat(
        "answer",
        ("prompt", "answer"),
        texts=(("prompt",),),
        asked=("prompt",),
        shown="prompt",
        **_CHOICE,
    ),
    RowFormat(
        "minimal_pair",
        ("good", "bad"),
        tasks=("causal", "masked"),
        texts=(("good",), ("bad",)),
        needs=("choice",),
        fitting="accuracy",
        description="a good and a bad sentence",
    ),
    RowFormat(
        "stereotype_pair",
        ("more", "less"),
        tasks=("causal", "masked"),
        texts=(("more",), ("less",)),
        needs=("stereotype_pair",),
        fitting="stereotype_score or likelihood_difference",
        description="pairs of stereotypes",
    ),
    RowFormat(
        "stereotypes",
        ("stereotype", "anti_stereotype", "unrelated"),
        beside=("term", "context"),
        tasks=("causal", "masked"),
        texts=(("stereotype",), ("anti_stereotype",), ("unrelated",)),
        needs=("stereotypes",),
        fitting="lms, ss or icat",
        description="StereoSet's sentences",
    ),
    RowFormat("stereoset", ("context", "sentences", "target")),
    RowFormat(
        "bbq",
        (
            *("context", "question", "ans0", "ans1", "ans2", "label"),
            *("answer_info", "additional_metadata", "context_condition", "question_polarity"),
        ),
        beside=("prompt",),
    ),
    # What people's files hold, and what becomes of it.
    RowFormat("alpaca", **_ALPACA, rank=2, becomes="prompt_completion"),
    RowFormat("alpaca_chat", **_ALPACA, is_recognized=False, becomes="messages"),
    RowFormat(
        "sharegpt",
        ("conversations",),
        beside=("system", *BESIDE_MESSAGES),
        aliases={"conversations": tuple(name for name in CONVERSATIONS if name != "conversations")},
        rank=1,
        becomes="messages",
    ),
    RowFormat(
        "question_answer",
        ("question", "answer"),
        aliases={"question": ("input",), "answer": ("output",)},
        unless=("choices",),
        rank=4,
        becomes="prompt_completion",
    ),
    RowFormat("text_label", ("text", "label"), becomes="classification"),
    RowFormat("hh_rlhf", ("chosen", "rejected"), rank=-1, becomes="preference"),
    RowFormat(
        "ranking",
        ("instruction", "chosen", "rejected"),
        beside=("input", "system", "history"),
        aliases={"instruction": ("question",), "input": ("context",)},
        rank=0,
        becomes="preference",
    ),
    RowFormat(
        "ranking_chat",
        ("conversations", "chosen", "rejected"),
        beside=("system", *BESIDE_MESSAGES),
        aliases={"conversations": ("messages", "conversation")},
        rank=0,
        becomes="preference",
    ),
)
ROW_FORMATS: dict[str, RowFormat] = {one.name: one for one in _FORMATS}
ENDS: dict[str, RowFormat] = {
    name: one for name, one in ROW_FORMATS.items() if one.becomes is None
}  # conversions' ends
TEXT_KINDS = tuple(name for name, one in ENDS.items() if "sft" in one.trained_by)  # what a language model is trained on
NUMBERS = (("number",), "mse, mae, pearsonr or spearmanr", "numbers")  # needs, fitting, description of labels that are

# The columns that a recipe may name: of sources that are trained on, and of suites alone.
TRAINED_COLUMNS = tuple(one.all_columns for one in ENDS.values() if one.trained_by)
LABELLED_COLUMNS = tuple(ROW_FORMATS[name].columns for name in ("classification", "text_label"))
SUITE_COLUMNS = tuple(one.all_columns for one in ENDS.values() if not one.trained_by and one.name != "answer")


def formats_of_stage(kind: str) -> tuple[str, ...]:
    """The formats of rows that a kind of stage is trained on."""
    return tuple(name for name, one in ENDS.items() if kind in one.trained_by)


def columns_of_stage(kind: str | None) -> tuple[tuple[str, ...], ...]:
    """The columns that a recipe may name of a source: of a stage that trains on pairs or on labels those alone."""
    pairs = ROW_FORMATS["preference"]
    if kind in pairs.trained_by:
        return (pairs.all_columns,)
    return LABELLED_COLUMNS if kind in ROW_FORMATS["classification"].trained_by else TRAINED_COLUMNS


def format_of(columns: Iterable[str]) -> RowFormat:
    """The format of rows as `load_rows` gives them, and of a suite's rows."""
    names = set(columns)
    return next(one for one in sorted(ENDS.values(), key=lambda one: -len(one.columns)) if names >= set(one.columns))


def texts_of(row: Mapping[str, Any]) -> list[str]:
    """The texts that a row says, each as a reader would find it elsewhere: prompt and completion are one."""
    parts = [[row[name] for name in columns] for columns in format_of(row).texts]
    joined = [("\n" if isinstance(values[0], list) else "").join(map(_said, values)) for values in parts]
    return [text for text in joined if text]


def text_of(row: Mapping[str, Any]) -> str:
    """The texts of a row joined."""
    return "".join(texts_of(row))


def question_of(row: Mapping[str, Any]) -> str:
    """The text that a person reads beside the answer to a row; empty of a row that is text alone."""
    shown = format_of(row).shown
    value = row[shown] if shown else None
    if isinstance(value, list):
        value = next((turn.get("content") for turn in reversed(value) if turn["role"] == "user"), None)
    return str(value) if value else ""


def _said(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(str(turn.get("content") or "") for turn in value)
    return value if isinstance(value, str) else ""
