"""What a benchmark of bias cannot tell, a sentence each, for the reports."""

from __future__ import annotations

_CROWS = (
    "CrowS-Pairs (Nangia et al. 2020): pairs of English sentences about groups in the United States, among which "
    "Blodgett et al. (2021, aclanthology.org/2021.acl-long.81) found many that are no valid contrast; a score near one "
    "half does not show that a model is free of bias."
)
_STEREOSET = (
    "StereoSet (Nadeem et al. 2021): English, written by crowd workers in the United States, about gender, profession, "
    "race and religion; Blodgett et al. (2021, aclanthology.org/2021.acl-long.81) found many of its pairs to be no "
    "valid contrast."
)
_BBQ = (
    "BBQ (Parrish et al. 2022): English questions by template about biases attested in the United States; answers are "
    "chosen by likelihood here, so a weak model's score says more about chance than about bias: read it beside the "
    "accuracy."
)
_SWAP = (
    "Counterfactual swaps test only the words that the recipe lists, in the sentences of its own data; a swap may make "
    "a sentence odd or change what is true, so look at the rows that flip (predictions/*.jsonl)."
)
LIMITS = {
    "accuracy_ambiguous": _BBQ,
    "accuracy_disambiguated": _BBQ,
    "bias_ambiguous": _BBQ,
    "bias_disambiguated": _BBQ,
    "flip_rate": _SWAP,
    "icat": _STEREOSET,
    "likelihood_difference": _CROWS,
    "lms": _STEREOSET,
    "ss": _STEREOSET,
    "stereotype_score": _CROWS,
}


def limits_of(metric: str) -> str | None:
    """The benchmark of a metric of bias and its limits, in a sentence; None for any other metric."""
    return LIMITS.get(metric)
