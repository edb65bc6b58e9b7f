"""The first rows of a source as a stage would train on them: their tokens, and the flaws that a person should see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hfpipe.data.chat import left_out
from hfpipe.data.dataloader import SIDES
from hfpipe.data.tokenize import IGNORED
from hfpipe.recipe import Source, Stage
from hfpipe.stages.compatibility import encode_rows

FEW = 0.02  # of the rows: fewer with a flaw are told, and nothing has to be done
LONG_ROWS = {"cut": "lose their end", "split": "go on in another row", "drop": "are left out"}
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Flaw:
    """Something about rows that train, though not as a person expects.

    Args:
        share: Of the rows.
        what: What they do: "the rows ...".
        remedy: What to do.
    """

    share: float
    what: str
    remedy: str


def facts_of(sample: Rows, stage: Stage, tokenizer: Any, max_length: int, source: Source) -> dict[str, float]:
    """Returns of the first rows of a source the tokens a row, the share that is trained, and of rows without one."""
    if not sample:
        return {"tokens": 0.0, "trained": 0.0, "untrained": 0.0}
    encoded = encode_rows(sample, stage, tokenizer, None if stage.kind == "pretrain" else max_length, 0, source)
    tokens = sum(len(row[side]) for row in encoded for side in SIDES if side in row)
    trained = sum(label != IGNORED for row in encoded for label in row["labels"])
    for row in (row for row in encoded if "rejected_ids" in row):  # both sides begin alike
        trained += len(row["rejected_ids"]) - row["labels"].count(IGNORED)
    rows = max(len(encoded), 1)
    share = {"trained": trained / max(tokens, 1), "untrained": max(0.0, 1 - len(encoded) / len(sample))}
    return {"tokens": tokens / rows, **share}


def flaws_of(sample: Rows, stage: Stage, tokenizer: Any, max_length: int, source: Source) -> list[Flaw]:
    """Lists the flaws of a source's first rows, those that no row has too, with a share of 0."""
    if not sample:
        return []
    untrained = facts_of(sample, stage, tokenizer, max_length, source)["untrained"]
    advice = "look at them with `hfpipe preview`; a larger max_length may reach an answer"
    found = [Flaw(untrained, "have no token to train on", advice)]
    if stage.kind == "sft":
        found += _marks(sample, stage, tokenizer, max_length, source)
    if stage.task == "causal" and stage.kind != "pretrain":
        found += _left_out(sample, tokenizer)
    return found


def _left_out(sample: Rows, tokenizer: Any) -> list[Flaw]:
    """Lists the parts of conversations that the chat template does not render."""
    parts = [part for row in sample for part in left_out(tokenizer, row)]
    advice = (
        "take a chat template that renders it (`model.tokenizer.chat_template`: a file, or a name such as qwen2_5), or "
        "a model whose own one does"
    )
    return [
        Flaw(parts.count(part) / len(sample), f"have `{part}` that the chat template leaves out", advice)
        for part in dict.fromkeys(parts)
    ]


def _marks(sample: Rows, stage: Stage, tokenizer: Any, max_length: int, source: Source) -> list[Flaw]:
    """Lists the flaws of the beginnings and ends of rows."""
    encoded = encode_rows(sample, stage, tokenizer, None, 0, source)
    ids = [row["input_ids"] for row in encoded]
    trained = [[token for token in row["labels"][-3:] if token != IGNORED] for row in encoded]  # a line feed may follow
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    long = LONG_ROWS[getattr(stage, "too_long", "cut")]
    found = [
        (
            sum(row[:2] == [bos, bos] for row in ids),
            f"begin with two BOS tokens ({tokenizer.bos_token}): the data or the chat template has one, and the "
            "tokenizer adds another",
            f"take {tokenizer.bos_token} out of the data or of the chat template",
        ),
        (
            sum(eos not in row for row in trained),
            f"do not end with the EOS token ({tokenizer.eos_token}) as something to learn, so the model does not learn "
            "to stop there",
            "a chat template ends its turns otherwise, or has EOS outside of its generation marks: set "
            "model.tokenizer.eos_token to what ends a turn",
        ),
        (
            sum(len(row) > max_length for row in ids),
            f"are longer than max_length ({max_length}) and {long}",
            "raise training.max_length, or choose `too_long: cut | split | drop`",
        ),
    ]
    return [Flaw(count / max(len(ids), 1), what, remedy) for count, what, remedy in found]
