"""The forms in which llama.cpp stores weights, by the names that its converter and its quantizer take."""

from __future__ import annotations

from hfpipe.core.errors import RecipeError
from hfpipe.recipe.faults import did_you_mean, listed

WRITTEN_AT_ONCE = ("f32", "f16", "bf16", "q8_0")  # by the converter itself
QUANTS = (
    *WRITTEN_AT_ONCE,
    *("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m"),
    *("q5_0", "q5_1", "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs"),
)


def require_quant(quant: str) -> None:
    """Refuses a form that llama.cpp does not have.

    Raises:
        RecipeError: It has none of that name.
    """
    if quant not in QUANTS:
        raise RecipeError(
            f"--quant {quant}: there is no such form; there are {listed(QUANTS)}.{did_you_mean(quant, QUANTS)}"
        )
