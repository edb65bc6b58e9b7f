"""The metrics that a recipe may name: those of hfpipe with class and options, and those known to be on the Hub."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One of hfpipe's metrics.

    Args:
        class_path: File and class in `hfpipe/evaluation/metrics`.
        meaning: One line for the recipe reference (`make docs`).
        options: The keys that `metric_options` may give it.
    """

    class_path: str
    meaning: str
    options: tuple[str, ...] = ()


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

# Each of ours: to add one, write its class in `hfpipe/evaluation/metrics/` and its line here.
OUR_METRICS: dict[str, Metric] = {
    "accuracy": Metric("matches.Accuracy", "share of rows whose right answer the model finds the likeliest"),
    "accuracy_ambiguous": Metric("bias.Bbq", "BBQ: share of right answers where the context leaves the answer open"),
    "accuracy_bytes": Metric(
        "matches.AccuracyPerByte", "`accuracy` by log-likelihood per UTF-8 byte of the answer (lm-eval's `acc_bytes`)"
    ),
    "accuracy_disambiguated": Metric("bias.Bbq", "BBQ: share of right answers where the context gives the answer"),
    "accuracy_norm": Metric(
        "matches.AccuracyPerCharacter",
        "`accuracy` by log-likelihood per character of the answer (lm-eval's `acc_norm`)",
    ),
    "bias_ambiguous": Metric("bias.Bbq", "BBQ: bias score where the context leaves the answer open, from -1 to 1"),
    "bias_disambiguated": Metric("bias.Bbq", "BBQ: bias score where the context gives the answer, from -1 to 1"),
    "bits_per_byte": Metric(
        "likelihood.BitsPerByte", "bits that the model needs per UTF-8 byte of the text; comparable between tokenizers"
    ),
    "bleu": Metric("translation.SacreBleu", "sacrebleu's BLEU, from 0 to 100", _BLEU),
    "calibration_error": Metric(
        "classes.CalibrationError", "mean distance between confidence and accuracy, over 15 bins of confidence"
    ),
    "chrf": Metric(
        "translation.SacreBleu",
        "sacrebleu's chrF, from 0 to 100",
        ("char_order", "word_order", "beta", "lowercase", "whitespace", "eps_smoothing"),
    ),
    "exact_match": Metric(
        "matches.ExactMatch", "share of rows whose generated answer is the right one, white space at the ends aside"
    ),
    "f1": Metric("classes.FScore", "F1, the mean over the classes", _CLASSES),
    "f1_micro": Metric("classes.FScore", "F1 over all rows together"),
    "flip_rate": Metric("bias.FlipRate", "share of rows whose answer changes when `swap` exchanges words"),
    "greedy_match": Metric(
        "likelihood.GreedyMatch", "share of rows whose every target token is the model's likeliest (LAMBADA's accuracy)"
    ),
    "icat": Metric("bias.StereoSet", "StereoSet: language modelling score, less for every preference of stereotypes"),
    "length_ratio": Metric(
        "preference.LengthRatio", "characters of the generated answers over those of the right ones; above 1 says more"
    ),
    "likelihood_difference": Metric(
        "bias.LikelihoodDifference", "mean distance of the two log-likelihoods of a pair, in nats"
    ),
    "lms": Metric(
        "bias.StereoSet", "StereoSet: share of meaningful sentences that the model prefers to an unrelated one"
    ),
    "mae": Metric("numbers.MeanError", "mean absolute error"),
    "masked_accuracy": Metric("likelihood.MaskedAccuracy", "share of masked tokens that the model finds"),
    "masked_perplexity": Metric(
        "likelihood.MaskedPerplexity",
        "exponential of the mean loss per masked token; comparable for one tokenizer only",
    ),
    "matthews_correlation": Metric(
        "classes.MatthewsCorrelation", "correlation between predicted and right classes; 0 is chance"
    ),
    "mse": Metric("numbers.MeanError", "mean squared error"),
    "pearsonr": Metric("numbers.Correlation", "Pearson's correlation of predicted and right numbers"),
    "perplexity": Metric(
        "likelihood.Perplexity", "exponential of the mean loss per token; comparable for one tokenizer only"
    ),
    "preference_accuracy": Metric(
        "preference.PreferenceAccuracy", "share of pairs whose chosen answer is likelier than the rejected one"
    ),
    "preference_accuracy_per_token": Metric(
        "preference.PreferenceAccuracyPerToken", "`preference_accuracy` by log-likelihood per token of the answer"
    ),
    "preference_margin": Metric(
        "preference.PreferenceMargin", "log-likelihood of the chosen answer less that of the rejected one, in nats"
    ),
    "preference_margin_per_token": Metric(
        "preference.PreferenceMarginPerToken", "`preference_margin` by log-likelihood per token of the answer"
    ),
    "precision": Metric("classes.FScore", "precision, the mean over the classes", _CLASSES),
    "precision_micro": Metric("classes.FScore", "precision over all rows together"),
    "recall": Metric("classes.FScore", "recall, the mean over the classes", _CLASSES),
    "recall_micro": Metric("classes.FScore", "recall over all rows together"),
    "rouge1": Metric("rouge.Rouge", "ROUGE-1: F-measure of shared words", _ROUGE),
    "rouge2": Metric("rouge.Rouge", "ROUGE-2: F-measure of shared pairs of words", _ROUGE),
    "rougeL": Metric("rouge.Rouge", "ROUGE-L: F-measure of the longest common subsequence", _ROUGE),
    "rougeLsum": Metric("rouge.Rouge", "ROUGE-L over the lines of a summary", _ROUGE),
    "spearmanr": Metric("numbers.Correlation", "Spearman's rank correlation of predicted and right numbers"),
    "squad_em": Metric(
        "matches.SquadExactMatch", "SQuAD's exact match: case, punctuation, articles and white space aside"
    ),
    "squad_f1": Metric("matches.SquadF1", "SQuAD's F1 of the words of answer and reference"),
    "ss": Metric("bias.StereoSet", "StereoSet: share of stereotypes that the model prefers to anti-stereotypes"),
    "stereotype_score": Metric(
        "bias.StereotypeScore", "CrowS-Pairs: share of pairs whose more stereotypical sentence is the likelier"
    ),
    "ter": Metric(
        "translation.SacreBleu",
        "sacrebleu's translation edit rate, in percent",
        ("normalized", "no_punct", "asian_support", "case_sensitive"),
    ),
    "word_perplexity": Metric(
        "likelihood.WordPerplexity", "exponential of the mean loss per word; comparable between tokenizers"
    ),
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
        *("preference_accuracy", "preference_accuracy_per_token"),
        *("f1", "f1_micro", "precision", "precision_micro", "recall", "recall_micro"),
    }
)

# Differences of log-likelihoods, below and above zero: a change of one is told in nats, not as a share of it.
IN_NATS = frozenset({"preference_margin", "preference_margin_per_token"})

# The score of a flawless model, where there is one and it is more than nothing.
FULL_MARKS = {
    **dict.fromkeys((*SHARE_METRICS, *FAMILIES["rouge"], "masked_accuracy"), 1.0),
    **dict.fromkeys(("matthews_correlation", "pearsonr", "spearmanr"), 1.0),
    **dict.fromkeys(("bleu", "chrf"), 100.0),
}

# Metrics that can be too high and too low: no value is better for being larger, or smaller.
WITH_IDEAL = frozenset({"bias_ambiguous", "bias_disambiguated", "length_ratio", "ss", "stereotype_score"})

BIAS_METRICS = (WITH_IDEAL - {"length_ratio"}) | {
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
    is_path = "/" in name or "\\" in name or name.endswith(".py")
    return name in HUB_METRICS or (is_path and any(letter.isalnum() for letter in name.removesuffix(".py")))
