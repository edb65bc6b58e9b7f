"""The names of metrics that a recipe may say: ours with their options, and those known to be on the Hub."""

from __future__ import annotations

_BLEU = (
    "lowercase",
    "force",
    "tokenize",
    "smooth_method",
    "smooth_value",
    "max_ngram_order",
    "effective_order",
    "trg_lang",
)
_CLASSES = ("average", "pos_label")
_ROUGE = ("tokenize", "use_stemmer")

# Each of ours, and the options that `metric_options` may give it.
OUR_METRICS: dict[str, tuple[str, ...]] = {
    "accuracy": (),
    "accuracy_ambiguous": (),
    "accuracy_bytes": (),
    "accuracy_disambiguated": (),
    "accuracy_norm": (),
    "bias_ambiguous": (),
    "bias_disambiguated": (),
    "bits_per_byte": (),
    "bleu": _BLEU,
    "calibration_error": (),
    "chrf": ("char_order", "word_order", "beta", "lowercase", "whitespace", "eps_smoothing"),
    "exact_match": (),
    "f1": _CLASSES,
    "f1_micro": (),
    "flip_rate": (),
    "greedy_match": (),
    "icat": (),
    "likelihood_difference": (),
    "lms": (),
    "mae": (),
    "masked_accuracy": (),
    "masked_perplexity": (),
    "matthews_correlation": (),
    "mse": (),
    "pearsonr": (),
    "perplexity": (),
    "precision": _CLASSES,
    "precision_micro": (),
    "recall": _CLASSES,
    "recall_micro": (),
    "rouge1": _ROUGE,
    "rouge2": _ROUGE,
    "rougeL": _ROUGE,
    "rougeLsum": _ROUGE,
    "spearmanr": (),
    "squad_em": (),
    "squad_f1": (),
    "ss": (),
    "stereotype_score": (),
    "ter": ("normalized", "no_punct", "asian_support", "case_sensitive"),
    "word_perplexity": (),
}

# A name that stands for several of ours; its options go to each of them.
FAMILIES = {
    "rouge": ("rouge1", "rouge2", "rougeL", "rougeLsum"),
    "squad": ("squad_em", "squad_f1"),
}

# Shares: from nothing to 1.
SHARE_METRICS = frozenset(
    {
        *("accuracy", "accuracy_norm", "accuracy_bytes", "greedy_match", "exact_match", "squad_em", "squad_f1"),
        *("f1", "f1_micro", "precision", "precision_micro", "recall", "recall_micro"),
    }
)

# The score of a flawless model, where there is one and it is more than nothing.
FULL_MARKS = {
    **dict.fromkeys((*SHARE_METRICS, *FAMILIES["rouge"], "masked_accuracy"), 1.0),
    **dict.fromkeys(("matthews_correlation", "pearsonr", "spearmanr"), 1.0),
    **dict.fromkeys(("bleu", "chrf"), 100.0),
}

# Metrics that can be too high and too low: no value is better for being larger, or smaller.
WITH_IDEAL = frozenset({"bias_ambiguous", "bias_disambiguated", "ss", "stereotype_score"})

BIAS_METRICS = WITH_IDEAL | {
    *("accuracy_ambiguous", "accuracy_disambiguated", "flip_rate", "icat", "likelihood_difference", "lms"),
}

MASKED_METRICS = frozenset({"masked_accuracy", "masked_perplexity"})  # of an encoder's masked tokens

# Metrics of the Hub's `evaluate-metric` that take a generated text and a right one. Any other is named with its owner
# ("owner/metric") or as a script: what is neither is taken for a misspelt word.
HUB_METRICS = (
    *("bertscore", "bleurt", "cer", "character", "charcut_mt", "comet", "frugalscore", "google_bleu"),
    *("mauve", "meteor", "nist_mt", "sacrebleu", "sari", "wer"),
)


def parts_of(name: str) -> tuple[str, ...]:
    """The metrics that a name stands for, most often itself."""
    return FAMILIES.get(name, (name,))


def is_elsewhere(name: str) -> bool:
    """Returns True if a name that is not ours goes to `evaluate.load`."""
    return name in HUB_METRICS or "/" in name or "\\" in name or name.endswith(".py")
